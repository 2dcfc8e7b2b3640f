"""`make gpu`: on a machine with a CUDA device build, test and benchmark, within nine minutes.

    make gpu                                 # GPU_PYTHON=python3 OUT=benchmarks/results
    make gpu OUT=folder WHEELS=folder        # packages the machine lacks, as wheels
    python benchmarks/gpu.py --rehearse --out folder     # the same on a CPU, tiny, in a minute

The machine's own Python is used, with its own CUDA build of torch: nothing is installed or fetched.
Every step is a process of its own with a time limit, so that a kernel that hangs or takes its
process along costs that step alone; OUT/gpu.json is written after every step and OUT/gpu.log is
what the steps said. The exit code is 1 if a step failed; a target that is missed is a finding, no
failure. What is measured, and how: `gpu_parts.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 525  # for everything
GRACE = 15  # seconds a part has to end by itself once its time is up
OPS = ("solver_step", "norm_act", "pruned_conv2d")
NEEDS = {  # packages, by what they are for
    "everything": ("torch", "numpy", "tqdm"),
    "build": ("setuptools", "ninja"),
    "tests": ("pytest", "hypothesis", "scipy"),
    "models": ("pydantic", "diffusers", "torch_pruning", "safetensors", "yaml", "PIL"),
}
HELPFUL = ("pybind11", "triton", "xdist")


@dataclass
class Step:
    """A command and its time: at least `least` seconds, at most `most`."""

    name: str
    command: Callable[[Run, int], list[str]]  # of the run and the seconds it has
    least: int
    most: int
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    after: Callable[[Run], str | None] = lambda _: None  # what is wrong although it ended well


@dataclass
class Run:
    """What a run of all steps has found so far."""

    out: Path
    name: str
    rehearsal: bool
    environment: dict[str, str]
    until: float
    facts: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """The ops that are not known to be right on this machine."""
        right = {r["name"] for r in self.rows if r["name"].startswith("check ") and r["ok"]}
        return [op for op in OPS if f"check {op}" not in right]

    def write(self) -> None:
        """Write all that is known: whole or not at all."""
        found = {**self.facts, "steps": self.steps}
        found |= {"targets": targets(self.rows), "rows": self.rows}
        draft = self.out / f"{self.name}.json.new"
        draft.write_text(json.dumps(found, indent=1) + "\n")
        draft.replace(self.out / f"{self.name}.json")


def say(text: str) -> None:
    print(text, flush=True)


# -- running ---------------------------------------------------------------------------------------


def work(run: Run, steps: list[Step]) -> int:
    """Do the steps, whatever becomes of each; return how many failed."""
    for i, step in enumerate(steps):
        later = sum(s.least for s in steps[i + 1 :])
        seconds = min(step.most, int(run.until - time.monotonic() - later))
        missing = missing_packages(step.needs, run.environment)
        if missing:
            why = f"needs {', '.join(missing)}: give wheels with WHEELS=folder"
            record = {"step": step.name, "ok": False, "seconds": 0, "why": why}
        elif seconds < step.least:
            why = f"no time was left ({max(0, seconds)} of {step.least} s)"
            record = {"step": step.name, "ok": False, "seconds": 0, "why": why}
        else:
            record = one(run, step, seconds)
        run.steps.append(record)
        run.write()
        failed = "" if record["ok"] else f" FAILED: {record['why']}"
        say(f"== {step.name}: {record['seconds']} s{failed}")
        for line in record.get("tail", []):
            say(f"   {line}")
    return sum(not record["ok"] for record in run.steps)


def one(run: Run, step: Step, seconds: int) -> dict[str, Any]:
    """Run one step for at most so many seconds; take its rows along, also if it failed."""
    say(f"== {step.name} (at most {seconds} s)")
    rows = run.out / f"{run.name}.rows"
    rows.unlink(missing_ok=True)
    started = time.monotonic()
    with (run.out / f"{run.name}.log").open("a") as log:
        log.write(f"\n== {step.name}\n")
        log.flush()
        at = log.tell()
        code = supervised(
            step.command(run, seconds), {**run.environment, **step.environment}, seconds, log
        )
    why = None
    if code is None:
        why = f"stopped after {seconds} s"
    elif code != 0:
        why = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
    why = why or step.after(run)
    run.rows += read_rows(rows)
    rows.unlink(missing_ok=True)
    record = {"step": step.name, "ok": why is None, "seconds": round(time.monotonic() - started)}
    if why is not None:
        said = (run.out / f"{run.name}.log").read_bytes()[at:].decode(errors="replace")
        lines = [line[:300] for line in said.splitlines() if line.strip()]
        record |= {"why": why, "tail": lines[-25:]}
    return record


def supervised(
    command: list[str], environment: dict[str, str], seconds: float, log: Any
) -> int | None:
    """Return a command's exit code; None if it had to be stopped, its children included."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows a part has written, but for one that it was killed in the middle of."""
    found = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


# -- the steps -------------------------------------------------------------------------------------


def part(name: str, *more: str) -> Callable[[Run, int], list[str]]:
    """Return the command of a part of gpu_parts.py."""

    def command(run: Run, seconds: int) -> list[str]:
        rows = str(run.out / f"{run.name}.rows")
        words = [sys.executable, "benchmarks/gpu_parts.py", name, *more, "--rows", rows]
        words += ["--seconds", str(max(1, seconds - GRACE))]
        if name != "check":
            words += [word for op in run.broken for word in ("--without", op)]
        if name == "job":
            words += ["--models", str(2 if run.rehearsal else best_cohort(run.rows))]
        return words + (["--rehearse"] if run.rehearsal else [])

    return command


def best_cohort(rows: list[dict[str, Any]]) -> int:
    """Return the K with the shortest coalition of the CIFAR shape; 4 where it is not known."""
    cohorts = {"graph": 1, "cohort 2": 2, "cohort 4": 4, "cohort 8": 8}
    seconds = {
        cohorts[row["variant"]]: row["seconds"]
        for row in rows
        if row["name"] == "cifar/coalition" and row["variant"] in cohorts
    }
    return min(seconds, key=lambda k: seconds[k], default=4)


def reference_if_broken(name: str) -> Callable[[Run, int], list[str]]:
    """Return a part's command, with PyTorch's own kernels where ours cannot be trusted.

    A convolution that is wrong can be left out alone; the others stand and fall with the library.
    """

    def command(run: Run, seconds: int) -> list[str]:
        words = part(name)(run, seconds)
        if {"solver_step", "norm_act"} & set(run.broken):
            say(f"   {name}: reference ops, because these did not pass: {', '.join(run.broken)}")
            return ["env", "ATTR_BATCH_OPS=reference", *words]
        return words

    return command


def pytest(*words: str) -> Callable[[Run, int], list[str]]:
    """Return a command that runs tests without the fixtures that need the whole program."""

    def command(run: Run, seconds: int) -> list[str]:  # noqa: ARG001
        base = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
        base += ["-W", "default", "--maxfail", "40", "--tb", "short"]
        base += ["--continue-on-collection-errors"]  # a package may be missing for some of them
        several = has("xdist", run.environment) and not run.rehearsal
        return [*base, *(["-n", "4", "--dist", "loadfile"] if several else []), *words]

    return command


JOB = "tests/gpu/test_gpu_job.py"  # by the command line, in processes of its own
CPU_TESTS = ("test_ops", "test_conv", "test_norm_act", "test_fused", "test_training")


def all_steps(rehearsal: bool) -> list[Step]:
    """Return the steps; of a rehearsal nothing is built, and a few tests stand for all."""
    build = Step(
        "build",
        lambda run, _: [sys.executable, "setup.py", "build_ext", "--inplace"],  # noqa: ARG005
        least=60,
        most=200,
        needs=NEEDS["build"],
        environment={"ATTR_BATCH_BUILD": "0"} if rehearsal else {},
        after=what_was_built,
    )
    few = ("-k", "captured or split") if rehearsal else ()
    threads = {"OMP_NUM_THREADS": "4"}  # for the float64 references of 4 processes
    on_cpu = {"ATTR_BATCH_TEST_DEVICE": "cpu"} if rehearsal else threads
    steps = [
        build,
        *(Step(f"check {op}", part("check", "--op", op), 10, 30) for op in OPS),
        Step("tests", pytest("tests/gpu", f"--ignore={JOB}", *few), 40, 110, ("pytest",), on_cpu),
        Step("ops", part("ops"), 50, 105),
        Step("pipeline", reference_if_broken("pipeline"), 60, 150, NEEDS["models"]),
        Step("job", reference_if_broken("job"), 40, 80, NEEDS["models"]),
    ]
    if not rehearsal:
        needs = ("pytest", *NEEDS["models"])
        steps.insert(-3, Step("a run", pytest(JOB), 30, 70, needs))
        files = [f"tests/{name}.py" for name in CPU_TESTS if (ROOT / f"tests/{name}.py").exists()]
        needs = (*NEEDS["tests"], *NEEDS["models"])
        steps.append(Step("tests on the CPU", pytest(*files), 20, 120, needs, threads))
    return steps


def what_was_built(run: Run) -> str | None:
    """Note what the program says of its native ops; return which library is missing, if one is."""
    program = "import json; from attr_batch import ops; print(json.dumps(ops.build_info()))"
    said = first_line([sys.executable, "-c", program], run.environment)
    run.facts["build"] = json.loads(said) if said else None
    say(f"   build_info: {said}")
    for name in () if run.rehearsal else ("_native_cpu.so", "_native_cuda.so"):
        if not (ROOT / "attr_batch" / name).exists():
            return f"{name} was not built: is nvcc on PATH or in CUDA_HOME/bin, a compiler there?"
    return None


# -- the targets -----------------------------------------------------------------------------------


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each target: what was wanted and found (None: not measured), and whether it holds."""

    def value(key: str, name: str, variant: str | None = None) -> float | None:
        for row in rows:
            if row["name"].startswith(name) and variant in (None, row.get("variant")):
                return row.get(key)
        return None

    def ratio(above: float | None, below: float | None) -> float | None:
        return round(above / below, 3) if above and below else None

    def at_least(what: str, wanted: float, found: float | None) -> dict[str, Any]:
        holds = None if found is None else found >= wanted
        return {"target": what, "wanted": f">= {wanted:g}", "found": found, "holds": holds}

    def at_most(what: str, wanted: float, found: float | None) -> dict[str, Any]:
        holds = None if found is None else found <= wanted
        return {"target": what, "wanted": f"<= {wanted:g}", "found": found, "holds": holds}

    cohorts = [
        row["seconds"]
        for row in rows
        if row["name"] == "cifar/step" and row.get("variant", "").startswith("cohort")
        and "seconds" in row
    ]  # fmt: skip
    step = min(cohorts, default=None)
    return [
        at_least("norm_act forward, share of copy bandwidth", 0.75,
                 value("share_of_copy", "norm_act forward")),
        at_least("norm_act backward, share of copy bandwidth", 0.6,
                 value("share_of_copy", "norm_act backward")),
        at_least("fine-tune step: graph and cohort over published eager", 4,
                 ratio(value("seconds", "cifar/step", "published"), step)),
        at_least("fine-tune step: graph and cohort over our own eager bf16", 4,
                 ratio(value("seconds", "cifar/step", "bf16"), step)),
        at_most("coalition of the CIFAR-20-sized job, seconds", 10,
                value("ours_seconds", "job/coalition")),
        at_most("answer of 100 coalitions, seconds", 1200,
                value("ours_seconds", "job/answer")),
        at_least("coalition over published", 30, value("ratio", "job/coalition")),
        at_most("peak memory of a coalition at K = 1 over published", 1.2,
                ratio(value("peak_mib", "cifar/coalition", "graph"),
                      value("peak_mib", "cifar/coalition", "published"))),
    ]  # fmt: skip


# -- the machine -----------------------------------------------------------------------------------


def has(package: str, environment: dict[str, str]) -> bool:
    return not missing_packages((package,), environment)


@functools.cache
def _missing(packages: tuple[str, ...], path: str) -> tuple[str, ...]:
    """Ask a Python that sees what the steps see."""
    program = (
        "import importlib.util as u, shutil, sys\n"
        "print(*[p for p in sys.argv[1:] if not u.find_spec(p)"
        " and not (p == 'ninja' and shutil.which(p))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *packages],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return tuple(done.stdout.split())


def missing_packages(packages: tuple[str, ...], environment: dict[str, str]) -> tuple[str, ...]:
    """Return those that the steps' Python does not find."""
    return _missing(packages, environment["PYTHONPATH"]) if packages else ()


def unpack(wheels: str, into: Path) -> None:
    """Unpack the wheels of a folder, pure Python or made for this machine; needs no pip."""
    found = sorted(Path(wheels).glob("*.whl"))
    if not found:
        sys.exit(f"error: no wheels in {wheels}\n  hint: WHEELS names a folder of .whl files")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    say(f"wheels: {', '.join(wheel.name.partition('-')[0] for wheel in found)}")


def machine_facts(rehearsal: bool) -> dict[str, Any]:
    """Return where this is measured, as the other benchmarks say it, and the GPU."""
    import torch
    from measure import envelope

    if shutil.which("git") is None:  # a copy of the sources alone
        facts: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__}
    else:
        facts = envelope([])
        del facts["rows"]
    facts["commit"] = os.environ.get("COMMIT") or facts.get("commit")
    facts["python"] = platform.python_version()
    if rehearsal:
        return {**facts, "rehearsal": True}
    gpu = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    facts |= {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_mib": gpu.total_memory >> 20,
        "driver": first_line(query),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": shutil.which("nvcc") or nvcc_at_home(),
        "tf32": {
            "convolutions": torch.backends.cudnn.allow_tf32,
            "products": torch.backends.cuda.matmul.allow_tf32,
        },
    }
    return facts


def nvcc_at_home() -> str:
    return f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"


def first_line(command: list[str], environment: dict[str, str] | None = None) -> str | None:
    """Return the first line that a command prints; None if it cannot be run."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=30
        )
        return next(iter(done.stdout.strip().splitlines()), None)
    return None


def need_cuda() -> str:
    """Return the GPU's architecture as nvcc names it; end with a hint where there is none."""
    if importlib.util.find_spec("torch") is None:
        hint = "GPU_PYTHON names the machine's Python with torch 2.11 or newer"
        sys.exit(f"error: no torch in {sys.executable}\n  hint: {hint}")
    import torch

    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        hint = "python benchmarks/gpu.py --rehearse --out folder goes through it on a CPU"
        sys.exit(
            f"error: no CUDA device: torch {torch.__version__} in {sys.executable}, "
            f"built {built}, sees none\n  hint: {hint}"
        )
    major, minor = torch.cuda.get_device_capability()
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


# -- the end ---------------------------------------------------------------------------------------


def summary(run: Run) -> None:
    """Print what was found, the shortest last."""
    for row in run.rows:
        if "variant" in row and "seconds" in row:
            memory = "" if row.get("peak_mib") is None else f", {row['peak_mib']} MiB"
            say(
                f"{row['name']:18} {row['variant']:16} {row['seconds']:>10} s "
                f"{row['ratio']:>7}x{memory}"
            )
        elif "ours_seconds" in row:
            kinds = ("ratio", "ratio_eager", "ratio_inductor", "ratio_cudnn", "ratio_randn")
            ratios = [f"{k.removeprefix('ratio_')} {row[k]}x" for k in kinds if k in row]
            shares = [
                f"{row[k]:.0%} of {k[9:]}" for k in ("share_of_copy", "share_of_gemm") if k in row
            ]
            say(f"{row['name']:62} {row['ours_seconds']:>10} s  {', '.join(ratios + shares)}")
        elif "failed" in row:
            say(f"{row['name']:62} {row['failed']}")
    say("")
    for target in targets(run.rows):
        verdict = {True: "holds", False: "missed", None: "not measured"}[target["holds"]]
        found = "-" if target["found"] is None else target["found"]
        say(f"{target['target']:62} wanted {target['wanted']:8} found {found:<10} {verdict}")
    for step in run.steps:
        if not step["ok"]:
            say(f"step {step['step']} failed: {step['why']}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build, test and benchmark on a CUDA machine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--wheels", default="", help="a folder of wheels the machine lacks")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny sizes")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and take the step along
    arch = "" if arguments.rehearse else need_cuda()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    name = "gpu-rehearsal" if arguments.rehearse else "gpu"
    (out / f"{name}.log").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        if arguments.wheels:
            unpack(arguments.wheels, Path(folder))
            places.insert(0, folder)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, places)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if arguments.rehearse:
            environment["OMP_NUM_THREADS"] = "1"
        else:
            environment.setdefault("ATTR_BATCH_CUDA_ARCH", arch)
        run = Run(out, name, arguments.rehearse, environment, until)
        run.facts = machine_facts(arguments.rehearse)
        every = (*(p for group in NEEDS.values() for p in group), *HELPFUL)
        run.facts["missing"] = list(missing_packages(every, environment))
        for key, value in run.facts.items():
            say(f"{key}: {value}")
        failed = work(run, all_steps(arguments.rehearse))
    summary(run)
    say(f"\nwritten to {out / name}.json; what the steps said is in {name}.log")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
