"""The commands: exit codes, JSON on stdout and nothing else there, errors without traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import tiny_tree, work_through

from attr_batch import cli
from attr_batch.estimators import GaussianProcess, PairedLS, Ridge
from attr_batch.estimators.bootstrap import bootstrap
from attr_batch.job import Job
from attr_batch.spec import load
from attr_batch.table import read_values

COMMANDS = [
    "run",
    "check",
    "plan",
    "status",
    "periods",
    "report",
    "sync",
    "repair",
    "gc",
    "design",
    "attribute",
    "doctor",
    "schema",
]


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path / "store")))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "job.yaml").write_text(yaml.safe_dump(tiny_tree(folder / "store")))
    work_through(Job(load(folder / "job.yaml")))
    return folder / "job.yaml"


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    example = out.split("example: attr-batch ")[1].split("|")[0].split(">")[0]
    arguments = cli._parser().parse_args(example.split())
    assert callable(arguments.command)


def test_help_is_quick_and_loads_nothing():
    code = (
        "import sys, attr_batch.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'pydantic', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["run"],
        ["run", "nothing.yaml"],
        ["run", "JOB", "--shard", "4/4"],
        ["run", "JOB", "--shard", "\u00b2/4"],
        ["run", "JOB", "--shard", "1"],
        ["run", "JOB", "--set", "\u00b2=3"],
        ["run", "JOB", "--set", "name=!!bool foo"],
        ["run", "JOB", "--set", "name=!!timestamp foo"],
        ["check", "JOB", "--set", 'store="a\\0b"'],
        ["check", "JOB", "--set", "data.path=~nobody-here/x"],
        ["check", "JOB", "--set", "model.base=../../etc"],
        ["check", "JOB", "--set", "store=/dev/null"],
        ["design", "--players", "1"],
        ["design", "--players", "x"],
        ["design", "--players", "6", "--budget", "7"],
        ["design", "--players", "20", "--estimator", "exact"],
        ["design", "--players", "6", "--estimator", "magic"],
        ["design", "--players", "1000000", "--budget", "2"],
        ["attribute", "VALUES", "--confidence", "95"],
        ["attribute", "VALUES", "--semivalue", "magic"],
        ["gc", "no-such-folder"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_64_with_a_place(arguments, job_file, tmp_path, capsys):
    (tmp_path / "values.csv").write_text("coalition,value\n00,0\n11,1\n10,1\n01,1\n")
    given = {"JOB": job_file, "VALUES": tmp_path / "values.csv"}
    code, out, err = call(capsys, *(given.get(a, a) for a in arguments))
    assert code == 64, err
    assert err.startswith("error: ")
    assert out == ""


def test_gc_touches_only_a_store(tmp_path, capsys):
    (tmp_path / "runs/thesis").mkdir(parents=True)
    code, _, err = call(capsys, "gc", tmp_path, "--apply")
    assert code == 64
    assert "not a store" in err
    assert (tmp_path / "runs/thesis").exists()


@pytest.mark.parametrize("command", ["check", "plan", "status", "report", "repair"])
def test_json_alone_on_stdout(command, finished, capsys):
    code, out, _ = call(capsys, command, finished, "--json")
    assert code == 0
    json.loads(out)
    code, text, _ = call(capsys, command, finished)
    assert code == 0
    assert command == "repair" or text


def test_status_of_a_finished_job(finished, capsys):
    facts = json.loads(call(capsys, "status", finished, "--json")[1])
    assert facts["evaluations"] == {
        "planned": 21, "done": 21, "running": 0, "failed": 0, "waiting": 0
    }  # fmt: skip
    assert facts["running"] == []


def test_report_prints_the_table_and_where_it_is(finished, capsys):
    _, out, _ = call(capsys, "report", finished)
    assert "held-out check" in out
    page = Path(out.split("report          ")[1].splitlines()[0])
    assert page.read_text().startswith("<!doctype html>")


def test_report_before_the_work_is_70(job_file, capsys):
    code, _, err = call(capsys, "report", job_file)
    assert code == 70
    assert "no value" in err


@pytest.mark.parametrize("estimator", ["ridge", "paired_ls", "reference", "exact"])
def test_design_and_attribute_close_the_circle(estimator, tmp_path, capsys):
    """An additive game, evaluated by the reader, comes back as it is."""
    worth = [3.0, 1.0, 0.0, -2.0]
    _, out, _ = call(capsys, "design", "--players", 4, "--estimator", estimator)
    header, *rows = out.splitlines()
    lines = [f"{header},value"]
    for row in rows:
        coalition = row.split(",")[1]
        value = sum(w for w, bit in zip(worth, coalition, strict=True) if bit == "1")
        lines.append(f"{row},{value}")
    path = tmp_path / "values.csv"
    path.write_text("\n".join(lines))
    code, out, _ = call(capsys, "attribute", path, "--estimator", estimator, "--json")
    assert code == 0
    found = json.loads(out)
    assert [c["value"] for c in found["contributors"]] == pytest.approx(worth, abs=1e-8)
    assert {"recipe", "spec_digest", "numerics", "interval", "holdout"} <= found.keys()


@pytest.fixture
def measured(tmp_path, capsys) -> Path:
    """Utilities of a saturating game of six with noise, as a CSV file."""
    _, out, _ = call(capsys, "design", "--players", 6, "--budget", 36)
    header, *rows = out.splitlines()
    noise = np.random.default_rng(0).normal(0, 0.05, len(rows))
    lines = [f"{header},value"]
    for row, e in zip(rows, noise, strict=True):
        total = sum(w for w, bit in enumerate(row.split(",")[1], 1) if bit == "1")
        lines.append(f"{row},{np.log1p(total) + e}")
    path = tmp_path / "measured.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("estimator", ["ridge", "paired_ls", "gp"])
def test_draws_are_the_estimators_on_resampled_pairs(estimator, measured, capsys):
    def attribute(*options: object) -> dict[str, Any]:
        command = ("attribute", measured, "--estimator", estimator, "--json", *options)
        return json.loads(call(capsys, *command)[1])

    found = attribute("--draws", 3, "--seed", 5)
    observations, n = read_values(measured)
    reading = {"ridge": Ridge, "paired_ls": PairedLS, "gp": GaussianProcess}[estimator]()
    expected = bootstrap(observations, n, 3, 5, reading.estimate)
    np.testing.assert_allclose(found["draws"], expected, rtol=1e-9)
    assert found == attribute("--draws", 3, "--seed", 5)
    assert found["draws"] != attribute("--draws", 3, "--seed", 6)["draws"]
    assert {**found, "draws": None} == attribute("--seed", 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "--estimator", "reference"], "reference does not read complement pairs"),
        (["--json", "--estimator", "permutation"], "permutation does not read complement pairs"),
        (["--json", "--estimator", "exact"], "exact does not read complement pairs"),
        (["--json", "--draws", "0"], "got 0, wanted 1 to 100,000"),
        ([], "add --json"),
    ],
)
def test_draws_that_cannot_be_are_refused(options, message, measured, capsys):
    code, out, err = call(capsys, "attribute", measured, "--draws", 2, *options)
    assert (code, out) == (64, "")
    assert message in err
    assert "--draws" in err
    assert "hint" in err


@pytest.mark.parametrize("estimator", ["exact", "permutation"])
def test_a_table_too_short_for_an_estimator_is_named(estimator, tmp_path, capsys):
    path = tmp_path / "short.csv"
    path.write_text("coalition,value\n000,0\n111,1\n100,.5\n010,.6\n")
    code, out, err = call(capsys, "attribute", path, "--estimator", estimator)
    assert (code, out) == (65, "")
    assert f"{path}: " in err
    assert "add lines" in err


def test_draws_of_a_complete_table_are_refused(tmp_path, capsys):
    path = tmp_path / "whole.csv"
    path.write_text("coalition,value\n" + "".join(f"{k:03b},{k}.5\n" for k in range(8)))
    code, out, err = call(capsys, "attribute", path, "--json", "--draws", 2)
    assert (code, out) == (64, "")
    assert "every coalition was measured" in err
    assert "--draws" in err


def test_doctor_says_which_ops_are_native(capsys):
    facts = json.loads(call(capsys, "doctor", "--json")[1])
    assert facts["ops"]["solver_step"].split()[0].strip(",") in ("native", "reference")


def test_schema_is_the_committed_one(capsys):
    committed = Path(__file__).parent.parent / "docs/job.schema.json"
    assert call(capsys, "schema")[1] == committed.read_text()
