"""What must hold of our manifests beyond their schema: rules that each yield what they find wrong.

A rule takes all manifests that are applied together. test_k8s.py runs every rule over every
rendering, and shows for every rule a manifest on which it fails.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

from attr_batch import __version__, cli, errors
from attr_batch.log import TICK_SECONDS
from attr_batch.spec import JobSpec, load

Manifest = Mapping[str, Any]
Rule = Callable[[Sequence[Manifest]], Iterator[str]]

# What the cluster does after each of our errors; `Count` is what no rule of the policy says.
ACTIONS = {
    errors.AttrBatchError: "Count",
    errors.SpecError: "FailJob",
    errors.DataError: "FailJob",
    errors.NumericsError: "FailIndex",
    errors.LedgerConflict: "FailJob",
    errors.StoreError: "Count",
    errors.Interrupted: "Count",
}
GIVEN = {"attribution-images"}  # claims that whoever runs the job makes
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1}


# -- where things are -----------------------------------------------------------------------------


def jobs(manifests: Sequence[Manifest]) -> Iterator[Mapping[str, Any]]:
    """Yield every JobSpec."""
    for manifest in manifests:
        if manifest["kind"] == "Job":
            yield manifest["spec"]
        if manifest["kind"] == "CronJob":
            yield manifest["spec"]["jobTemplate"]["spec"]


def templates(manifests: Sequence[Manifest]) -> Iterator[Mapping[str, Any]]:
    """Yield every pod template."""
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield manifest
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            yield manifest["spec"]["template"]
    yield from (spec["template"] for spec in jobs(manifests))


def pods(manifests: Sequence[Manifest]) -> Iterator[Mapping[str, Any]]:
    """Yield every PodSpec."""
    yield from (template["spec"] for template in templates(manifests))


def containers(manifests: Sequence[Manifest]) -> Iterator[Mapping[str, Any]]:
    """Yield every container."""
    for pod in pods(manifests):
        yield from (*pod.get("initContainers", ()), *pod["containers"])


def environment(container: Mapping[str, Any]) -> dict[str, str | None]:
    """Return a container's variables; None where the value comes from elsewhere."""
    return {entry["name"]: entry.get("value") for entry in container.get("env", ())}


def size(quantity: str) -> int:
    """Return the bytes of a quantity such as 12Gi."""
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)?", quantity).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit or ""]


def job_spec(manifests: Sequence[Manifest], job: Mapping[str, Any]) -> JobSpec:
    """Return the job spec that a job's command reads, with the `--set`s of its arguments.

    AttrBatchError if the command line or the spec is not valid.
    """
    (container,) = job["template"]["spec"]["containers"]
    words = [word.replace("$(CPUS)", "1") for word in container["args"]]
    given = cli._parser().parse_args(words)
    (text,) = (m["data"]["job.yaml"] for m in manifests if m["kind"] == "ConfigMap")
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        (Path(folder) / "job.yaml").write_text(text, encoding="utf-8")
        return load(Path(folder) / "job.yaml", given.overrides)


# -- the job --------------------------------------------------------------------------------------


def shards_are_indexes(manifests: Sequence[Manifest]) -> Iterator[str]:
    for job in jobs(manifests):
        if job.get("completionMode") != "Indexed":
            yield "completionMode is not Indexed"
        shards = environment(job["template"]["spec"]["containers"][0]).get("ATTR_BATCH_SHARDS")
        if shards != str(job.get("completions")):
            yield f"{job.get('completions')} completions, but ATTR_BATCH_SHARDS is {shards}"
        if not 1 <= job.get("parallelism", 1) <= job.get("completions", 0):
            yield "more pods at once than indexes"


def failures_are_counted_per_index(manifests: Sequence[Manifest]) -> Iterator[str]:
    for job in jobs(manifests):
        if job["template"]["spec"].get("restartPolicy") != "Never":
            yield "restartPolicy must be Never with podFailurePolicy and backoffLimitPerIndex"
        if job.get("backoffLimitPerIndex", 0) < 1:
            yield "an index has no second try"
        if not 0 <= job.get("maxFailedIndexes", -1) < job.get("completions", 0):
            yield "maxFailedIndexes stops nothing"
        if "backoffLimit" in job:
            yield "backoffLimit adds up the failures of all indexes"
        if job.get("podReplacementPolicy") != "Failed":
            yield "a pod is replaced before it has ended"


def exit_codes_are_ours(manifests: Sequence[Manifest]) -> Iterator[str]:
    known = [errors.AttrBatchError, *errors.AttrBatchError.__subclasses__()]
    wanted = {error.exit_code: ACTIONS.get(error, "no decision") for error in known}
    for job in jobs(manifests):
        rules = job.get("podFailurePolicy", {}).get("rules", [{}])
        disrupted = [{"type": "DisruptionTarget", "status": "True"}]
        if rules[0] != {"action": "Ignore", "onPodConditions": disrupted}:
            yield "the first rule does not ignore pods that the cluster ended"
        names = [container["name"] for container in job["template"]["spec"]["containers"]]
        found = dict.fromkeys(wanted, "Count")
        for rule in rules[1:]:
            codes = rule.get("onExitCodes", {})
            values = codes.get("values", [])
            if codes.get("operator") != "In" or codes.get("containerName") not in names:
                yield f"a rule that fits no exit code of {names}"
            if values != sorted(set(values)) or 0 in values:
                yield f"{values}: exit codes must be in order, distinct and not 0"
            found.update((code, rule["action"]) for code in values)
        if found != wanted:
            yield f"the policy does {found}, errors.py wants {wanted}"


def jobs_end(manifests: Sequence[Manifest]) -> Iterator[str]:
    for job in jobs(manifests):
        with suppress(errors.AttrBatchError):  # commands_are_valid says it
            base_wait = job_spec(manifests, job).resources.base_wait
            if job.get("activeDeadlineSeconds", 0) <= base_wait:
                yield "activeDeadlineSeconds is missing or shorter than a shard waits for the base"
        if job.get("ttlSecondsAfterFinished", 0) < 86400:
            yield "a finished job and its logs are kept for less than a day, or for ever"
        if job["template"]["spec"].get("terminationGracePeriodSeconds", 30) < 6 * TICK_SECONDS:
            yield "too little time for a checkpoint"


def commands_are_valid(manifests: Sequence[Manifest]) -> Iterator[str]:
    for job in jobs(manifests):
        try:
            spec = job_spec(manifests, job)
        except errors.AttrBatchError as error:
            yield str(error)
            continue
        mounts = {
            m["mountPath"]: m for m in job["template"]["spec"]["containers"][0]["volumeMounts"]
        }
        for path in (spec.store, getattr(spec.data, "path", None)):
            if (
                path
                and "://" not in path
                and not any(path.startswith(f"{m}/") or path == m for m in mounts)
            ):
                yield f"{path} is not on a mounted volume"
        resources = job["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = {name: n for name, n in resources.items() if name.startswith("nvidia.com/")}
        if (spec.resources.device == "cuda") != (list(gpus.values()) == ["1"]):
            yield f"device {spec.resources.device} with {gpus}"
        if spec.resources.device == "cpu" and spec.resources.workers is None:
            yield "without `workers` a pod starts as many as its node has cores"


def cron_jobs_run_once_and_on_time(manifests: Sequence[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        if manifest["kind"] != "CronJob":
            continue
        spec = manifest["spec"]
        if not re.fullmatch(r"\S+( \S+){4}", spec["schedule"]) or "timeZone" not in spec:
            yield "schedule and timeZone do not say when"
        if spec.get("concurrencyPolicy") != "Forbid":
            yield "two runs at once"
        if spec.get("startingDeadlineSeconds", 0) < 3600:
            yield "a run is left out when the controller is away for an hour"
        if not {"successfulJobsHistoryLimit", "failedJobsHistoryLimit"} <= set(spec):
            yield "no history limits"
        if len(manifest["metadata"]["name"]) > 52:
            yield "a CronJob's name has at most 52 characters"
        args = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]
        if args[2:4] != ["--period", "auto"]:
            yield "the run leaves no periods/<label>.json"


def queues_start_the_job(manifests: Sequence[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        if manifest["kind"] == "CronJob":
            manifest = manifest["spec"]["jobTemplate"]
        elif manifest["kind"] != "Job":
            continue
        queued = "kueue.x-k8s.io/queue-name" in manifest["metadata"].get("labels", {})
        if queued != manifest["spec"].get("suspend", False):
            yield "suspended without a queue, or queued and not suspended"
        least = (
            manifest["metadata"].get("annotations", {}).get("kueue.x-k8s.io/job-min-parallelism")
        )
        if least is not None and not 1 <= int(least) < manifest["spec"]["parallelism"]:
            yield f"Kueue refuses job-min-parallelism {least} for this parallelism"


# -- pods -----------------------------------------------------------------------------------------


def resources_are_bounded(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        scratch = memory = 0
        for volume in pod["volumes"]:
            if "emptyDir" in volume:
                bytes_ = size(volume["emptyDir"].get("sizeLimit", "0"))
                if not bytes_:
                    yield f"emptyDir {volume['name']} has no sizeLimit"
                if volume["emptyDir"].get("medium") == "Memory":
                    memory += bytes_
                else:
                    scratch += bytes_
        for container in pod["containers"]:
            found = container.get("resources", {})
            limits, requests = found.get("limits", {}), found.get("requests", {})
            if not {"cpu", "memory", "ephemeral-storage"} <= set(limits) & set(requests):
                yield f"{container['name']}: cpu, memory or ephemeral-storage is not bounded"
                continue
            for name in set(limits) - {"cpu"}:
                if requests.get(name) != limits[name]:
                    yield f"{container['name']}: {name} is requested below its limit"
            if scratch > size(limits["ephemeral-storage"]) or 2 * memory > size(limits["memory"]):
                yield f"{container['name']}: its emptyDirs hold more than its limits"


def pods_are_restricted(manifests: Sequence[Manifest]) -> Iterator[str]:
    """What the Pod Security Standard `restricted` asks for, and a read-only root."""
    for pod in pods(manifests):
        context = pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield "may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield "no seccomp profile"
        if context.get("fsGroup") != context.get("runAsGroup"):
            yield "cannot write its volumes"
        if pod.get("automountServiceAccountToken") is not False:
            yield "gets a token for the API server"
        if pod.get("enableServiceLinks") is not False:
            yield "gets variables named after services, such as MLFLOW_PORT"
        if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            yield "shares a namespace of the host"
        if any("hostPath" in volume for volume in pod["volumes"]):
            yield "mounts a folder of the host"
    for container in containers(manifests):
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{container['name']} may gain privileges"
        if not context.get("readOnlyRootFilesystem"):
            yield f"{container['name']} has a writable root"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']} keeps capabilities"


def images_are_exact(manifests: Sequence[Manifest]) -> Iterator[str]:
    for container in containers(manifests):
        image = container["image"]
        name, _, tag = image.rpartition("/")[2].partition(":")
        if "@sha256:" in image:
            continue
        if not re.search(r"\d+\.\d+", tag):
            yield f"{image}: no exact tag"
        if name == "attr-batch" and tag != __version__:
            yield f"{image} is not of this version, {__version__}"


def volumes_are_there(manifests: Sequence[Manifest]) -> Iterator[str]:
    made = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    for manifest in manifests:
        claims = manifest["spec"].get("volumeClaimTemplates", ()) if "spec" in manifest else ()
        extra = {claim["metadata"]["name"] for claim in claims}
        for pod in pods([manifest]):
            names = {volume["name"] for volume in pod["volumes"]} | extra
            mounts = [mount for c in pod["containers"] for mount in c["volumeMounts"]]
            if names != {mount["name"] for mount in mounts}:
                yield f"volumes {sorted(names)}, mounted {sorted({m['name'] for m in mounts})}"
            if len({mount["mountPath"] for mount in mounts}) < len(mounts):
                yield "two volumes are mounted on one path"
            writable = {m["mountPath"] for m in mounts if not m.get("readOnly")}
            if "/tmp" not in writable:
                yield "nothing writable at /tmp under a read-only root"
            for volume in pod["volumes"]:
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                if claim and claim not in GIVEN and ("PersistentVolumeClaim", claim) not in made:
                    yield f"no claim {claim}"
                config = volume.get("configMap", {}).get("name")
                if config and ("ConfigMap", config) not in made:
                    yield f"no ConfigMap {config}"
            if manifest["kind"] in ("Job", "CronJob") and not any(
                volume.get("emptyDir", {}).get("medium") == "Memory"
                and {"name": volume["name"], "mountPath": "/dev/shm"} in mounts
                for volume in pod["volumes"]
            ):
                yield "no /dev/shm in memory"


def one_node_volumes_keep_pods_together(manifests: Sequence[Manifest]) -> Iterator[str]:
    alone = {
        m["metadata"]["name"]
        for m in manifests
        if m["kind"] == "PersistentVolumeClaim" and m["spec"]["accessModes"] == ["ReadWriteOnce"]
    }
    for template in (job["template"] for job in jobs(manifests)):
        pod = template["spec"]
        claims = {v.get("persistentVolumeClaim", {}).get("claimName") for v in pod["volumes"]}
        terms = (
            pod.get("affinity", {})
            .get("podAffinity", {})
            .get("requiredDuringSchedulingIgnoredDuringExecution", ())
        )
        together = any(
            term["topologyKey"] == "kubernetes.io/hostname"
            and term["labelSelector"]["matchLabels"].items()
            <= template["metadata"]["labels"].items()
            for term in terms
        )
        if bool(claims & alone) != together:
            yield "pods of a one-node volume on several nodes, or of others on one"


def secrets_are_given(manifests: Sequence[Manifest]) -> Iterator[str]:
    if any(manifest["kind"] == "Secret" for manifest in manifests):
        yield "a Secret in the manifests is none"
    for container in containers(manifests):
        for name, value in environment(container).items():
            if value and re.search(r"PASSWORD|SECRET|KEY|TOKEN", name):
                yield f"{name} stands in the manifest"
        names = [entry["name"] for entry in container.get("env", ())]
        if len(set(names)) < len(names):
            yield "a variable is set twice"
        for i, entry in enumerate(container.get("env", ())):
            for used in re.findall(r"\$\((\w+)\)", entry.get("value", "")):
                if used not in names[:i]:
                    yield f"$({used}) is not known where it is used"
        for word in container.get("args", ()):
            for used in re.findall(r"\$\((\w+)\)", word):
                if used not in names or re.search(r"PASSWORD|SECRET|TOKEN", used):
                    yield f"$({used}) in an argument"


def selectors_select(manifests: Sequence[Manifest]) -> Iterator[str]:
    labels = [template["metadata"]["labels"] for template in templates(manifests)]
    labels += [{"app.kubernetes.io/name": name} for name in ("attr-batch", "mlflow")]
    covered = []
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Service":
            selectors = [spec["selector"]]
        elif manifest["kind"] == "NetworkPolicy":
            if set(spec["policyTypes"]) != {"Ingress", "Egress"}:
                yield f"{manifest['metadata']['name']} leaves a direction open"
            peers = [
                peer
                for rule in (*spec.get("ingress", ()), *spec.get("egress", ()))
                for peer in (*rule.get("from", ()), *rule.get("to", ()))
            ]
            covered.append(spec["podSelector"]["matchLabels"])
            selectors = [
                covered[-1],
                *(p["podSelector"]["matchLabels"] for p in peers if "podSelector" in p),
            ]
        elif manifest["kind"] in ("Deployment", "StatefulSet"):
            selectors = [spec["selector"]["matchLabels"]]
            if not selectors[0].items() <= spec["template"]["metadata"]["labels"].items():
                yield f"{manifest['metadata']['name']} does not select its own pods"
        else:
            continue
        for selector in selectors:
            if not any(selector.items() <= found.items() for found in labels):
                yield f"{manifest['metadata']['name']} selects no pod: {selector}"
    for template in templates(manifests):
        found = template["metadata"]["labels"]
        if not any(selector.items() <= found.items() for selector in covered):
            yield f"no network policy for {found}"


RULES: tuple[Rule, ...] = (
    shards_are_indexes,
    failures_are_counted_per_index,
    exit_codes_are_ours,
    jobs_end,
    commands_are_valid,
    cron_jobs_run_once_and_on_time,
    queues_start_the_job,
    resources_are_bounded,
    pods_are_restricted,
    images_are_exact,
    volumes_are_there,
    one_node_volumes_keep_pods_together,
    secrets_are_given,
    selectors_select,
)


def broken(manifests: Sequence[Manifest]) -> dict[str, list[str]]:
    """Return what each rule finds wrong; rules that find nothing are left out."""
    found = {rule.__name__: list(rule(manifests)) for rule in RULES}
    return {name: problems for name, problems in found.items() if problems}
