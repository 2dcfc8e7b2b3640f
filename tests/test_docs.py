"""The documentation does what it says: files load, links lead somewhere, commands run."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_nothing_unfinished_is_left(page):
    assert not re.search(r"\b(TODO|FIXME|XXX|[A-Z]+_TABLE)\b", page.read_text())


def test_every_make_target_in_the_docs_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"`make (\w+)`", page.read_text()):
            assert target in targets, f"{page.name}: make {target}"


def test_every_command_in_the_docs_exists():
    for page in PAGES:
        for command in set(re.findall(r"`?attr-batch (\w[\w-]*)", page.read_text())):
            if command in {"doctor", "run", "is", "measures"}:
                continue
            help_text = subprocess.run(
                [sys.executable, "-m", "attr_batch.cli", "--help"], capture_output=True, text=True
            ).stdout
            assert command in help_text, f"{page.name}: attr-batch {command}"


def test_the_tables_are_those_of_the_results():
    command = [sys.executable, str(ROOT / "docs/tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.e2e
def test_the_tutorial_runs_as_written(tmp_path):
    page = ROOT / "docs/tutorial.md"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(command: str) -> str:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout + done.stderr

    (program,) = blocks(page, "python")
    (tmp_path / "make.py").write_text(program)
    run(f"{sys.executable} make.py")
    (job,) = blocks(page, "yaml")
    (tmp_path / "job.yaml").write_text(job)
    said = {}
    for line in "".join(blocks(page, "sh")).splitlines():
        if line.startswith("attr-batch attribute"):
            answer_the_design(tmp_path)
        if line.startswith("attr-batch"):
            said[line] = run(line)
    assert "sound" in said["attr-batch check job.yaml"]
    assert "Ada" in said["attr-batch run job.yaml"]
    more = "attr-batch run job.yaml --set estimator.budget=16"
    assert re.search(r": 4 of \d+ evaluations to do", said[more])
    assert "evaluations to do" not in said["attr-batch run job.yaml --set estimator.kind=paired_ls"]
    why = said["attr-batch plan job.yaml --set counterfactual.steps=20"]
    assert "counterfactual.steps: 10 -> 20" in why
    assert "trained model reused, pruned model reused" in why


def answer_the_design(folder: Path) -> None:
    """Do what the reader does in step 7: add a column with values (here: of an additive game)."""
    with (folder / "design.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (folder / "values.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "value"])
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "value": row["coalition"].count("1")})
