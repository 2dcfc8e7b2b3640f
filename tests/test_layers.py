"""Imports go down the layers, and the modules that only read results leave torch out."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "attr_batch"

# From the bottom; inside a layer, imports go leftwards.
LAYERS = [
    ["errors", "log", "recipe", "coalition", "ops", "store", "bucket"],
    ["data", "models", "pruning", "fused", "graphs", "sampling"],
    ["training"],
    [
        "estimators", "evidence", "lds", "figures", "document", "verdict", "validation_figures",
        "report", "validation_report", "shapes", "ledger", "table", "instruments", "properties",
        "counterfactual", "baselines",
    ],
    ["spec"],
    ["tracking", "predecessor", "job", "facts", "results", "studies", "outlook", "scoring"],
    ["runner", "pilot", "validate", "doctor"],
    ["cli"],
]  # fmt: skip
PLACE = {name: (layer, i) for layer, names in enumerate(LAYERS) for i, name in enumerate(names)}
TORCH_FREE = [
    "errors", "log", "recipe", "coalition", "ops", "store", "bucket", "data", "estimators", "lds",
    "ledger", "report",
    "validation_report", "table", "spec", "job", "facts", "outlook", "results", "studies",
    "scoring", "tracking", "runner", "validate", "cli",
]  # fmt: skip


def module_of(path: Path) -> str:
    """Return the layer name of a source file: packages count as one module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the names in our package that a file imports when it is run (types left out)."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "attr_batch":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attr_batch."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("attr_batch.")}
    return found - {"__version__"}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


def test_every_module_has_its_place():
    assert {module_of(path) for path in FILES} == set(PLACE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_or_leftwards(path):
    here = module_of(path)
    up = [name for name in imports(path) - {here} if PLACE[name] >= PLACE[here]]
    assert not up, f"{here} imports {up}"


def test_mlflow_is_imported_in_tracking_alone():
    users = [
        p.name for p in FILES if "import mlflow" in p.read_text() or "from mlflow" in p.read_text()
    ]
    assert users == ["tracking.py"]


def test_reading_results_needs_no_torch():
    code = (
        f"import sys\nfor name in {TORCH_FREE!r}: __import__('attr_batch.' + name)\n"
        "heavy = {'torch', 'diffusers', 'mlflow', 'sklearn', 'PIL', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_pickle_is_ever_opened():
    for path in FILES:
        text = path.read_text()
        assert "torch.load" not in text
        assert "import pickle" not in text
        assert "allow_pickle=True" not in text
