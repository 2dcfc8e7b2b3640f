"""`make gpu` without a GPU: the script and all it runs, tiny, on the CPU."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks/gpu.py"
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402


def test_it_runs_and_says_what_it_found(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "attr_batch").glob("*.so")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--rehearse", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=500,
    )
    log = (tmp_path / "gpu-rehearsal.log").read_text()
    assert done.returncode == 0, done.stdout + log
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-rehearsal.json",
        "gpu-rehearsal.log",
    ]
    found = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    assert {"machine", "torch", "commit", "python", "build", "missing"} <= set(found)
    assert found["rehearsal"]
    assert [step["step"] for step in found["steps"]] == [
        "build", *(f"check {op}" for op in gpu.OPS), "tests", "ops", "pipeline", "job",
    ]  # fmt: skip
    assert all(step["ok"] for step in found["steps"])
    assert "passed" in log
    names = {row["name"].partition(" ")[0] for row in found["rows"]}
    assert {"check", "ceiling", *gpu.OPS, "counter_normal"} <= names
    assert {"small/step", "small/image", "small/coalition", "job/coalition"} <= names
    for row in found["rows"]:
        assert row["rehearsal"]
        assert "failed" not in row, row
        seconds = [
            v for k, v in row.items() if k.endswith("seconds") and "fixed" not in row["name"]
        ]
        assert all(s > 0 for s in seconds)
    derived = [row["name"] for row in found["rows"] if row.get("derived")]
    assert {"small/coalition", "job/coalition", "job/answer"} == set(derived)
    # The tree is left as it was.
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "attr_batch").glob("*.so")}


def test_without_a_gpu_it_says_so(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: no CUDA device" in done.stderr
    assert "hint:" in done.stderr
    assert not list(tmp_path.iterdir())


# -- what becomes of steps that fail ---------------------------------------------------------------


def run_of(tmp_path, seconds=100):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return gpu.Run(tmp_path, "gpu", True, environment, time.monotonic() + seconds)


def python(program):
    """Return the command of a step that runs a program; its argument is the file of rows."""
    return lambda run, seconds: [sys.executable, "-c", program, str(run.out / "gpu.rows")]


WRITE = 'import sys; open(sys.argv[1], \'a\').write(\'{"name": "%s", "seconds": 1}\\n\');'
TEAR = "import os, sys; open(sys.argv[1], 'w').write('{\"na'); os.abort()"


def test_a_step_that_fails_does_not_lose_the_others(tmp_path):
    run = run_of(tmp_path)
    steps = [
        gpu.Step("good", python(WRITE % "first"), 1, 30),
        gpu.Step("bad", python(WRITE % "second" + "print('what happened'); sys.exit(3)"), 1, 30),
        gpu.Step("torn", python(TEAR), 1, 30),
        gpu.Step("hangs", python(WRITE % "third" + "import time; time.sleep(60)"), 1, 2),
        gpu.Step("poor", python(""), 1, 30, needs=("json", "no_such_package")),
        gpu.Step("empty", python(""), 1, 30, after=lambda _: "nothing came of it"),
        gpu.Step("last", python(WRITE % "fourth"), 1, 30),
    ]  # fmt: skip
    assert gpu.work(run, steps) == 5
    found = json.loads((tmp_path / "gpu.json").read_text())
    why = {step["step"]: step.get("why") for step in found["steps"]}
    assert why["good"] is why["last"] is None
    assert why["bad"] == "exit code 3"
    assert why["torn"] == "killed by signal 6"
    assert why["hangs"] == "stopped after 2 s"
    assert "no_such_package" in why["poor"]
    assert "json" not in why["poor"]
    assert why["empty"] == "nothing came of it"
    assert [row["name"] for row in found["rows"]] == ["first", "second", "third", "fourth"]
    (bad,) = (step for step in found["steps"] if step["step"] == "bad")
    assert bad["tail"] == ["what happened"]


def test_time_is_kept_for_later_steps(tmp_path):
    given = []

    def command(run, seconds):
        given.append(seconds)
        return ["true"]

    steps = [gpu.Step(str(i), command, 10, 60) for i in range(3)]
    gpu.work(run_of(tmp_path, 75.5), steps)
    assert given == [55, 60, 60]
    run = run_of(tmp_path, 25)
    assert gpu.work(run, steps) == 1
    assert "no time was left" in run.steps[0]["why"]


def test_ops_that_did_not_pass_are_left_out(tmp_path):
    run = run_of(tmp_path)
    assert run.broken == list(gpu.OPS)
    run.rows = [{"name": "check norm_act", "ok": True}, {"name": "check solver_step", "ok": True}]
    assert run.broken == ["pruned_conv2d"]
    words = gpu.reference_if_broken("pipeline")(run, 50)
    assert words[-3:] == ["--without", "pruned_conv2d", "--rehearse"]
    assert words[words.index("--seconds") + 1] == "35"
    run.rows[0]["ok"] = False
    assert gpu.reference_if_broken("job")(run, 50)[:2] == ["env", "ATTR_BATCH_OPS=reference"]


def test_wheels_are_seen_without_being_installed(tmp_path):
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "")
    gpu.unpack(str(tmp_path), tmp_path / "site")
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    assert gpu.missing_packages(("carried", "left_behind"), environment) == ("left_behind",)
    with pytest.raises(SystemExit, match="no wheels"):
        gpu.unpack(str(tmp_path / "site"), tmp_path)


# -- targets ---------------------------------------------------------------------------------------

ROWS = [
    {"name": "norm_act forward 512x64x32x32 bfloat16", "share_of_copy": 0.8},
    {"name": "norm_act forward 512x128x4x4 bfloat16", "share_of_copy": 0.1},
    {"name": "norm_act backward 512x64x32x32 bfloat16", "share_of_copy": 0.5},
    {"name": "cifar/step", "variant": "published", "seconds": 0.05},
    {"name": "cifar/step", "variant": "bf16", "seconds": 0.03},
    {"name": "cifar/step", "variant": "graph", "seconds": 0.01},
    {"name": "cifar/step", "variant": "cohort 2", "failed": "out of memory"},
    {"name": "cifar/step", "variant": "cohort 4", "seconds": 0.01},
    {"name": "cifar/coalition", "variant": "published", "seconds": 300, "peak_mib": 1000},
    {"name": "cifar/coalition", "variant": "graph", "seconds": 9, "peak_mib": 1100},
    {"name": "cifar/coalition", "variant": "cohort 4", "seconds": 8, "peak_mib": 4000},
    {"name": "job/coalition", "ours_seconds": 9.5, "ratio": 29.0},
]


def test_targets_are_held_against_what_was_found():
    found = {t["target"]: (t["found"], t["holds"]) for t in gpu.targets(ROWS)}
    assert list(found.values()) == [
        (0.8, True),
        (0.5, False),
        (5.0, True),
        (3.0, False),
        (9.5, True),
        (None, None),
        (29.0, False),
        (1.1, True),
    ]
    assert {(t["found"], t["holds"]) for t in gpu.targets([])} == {(None, None)}
    assert gpu.best_cohort(ROWS) == gpu.best_cohort([]) == 4
    assert gpu.best_cohort(ROWS[:-2]) == 1
