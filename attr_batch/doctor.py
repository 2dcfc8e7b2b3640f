"""What `attr-batch doctor` tells: what this installation can do, and why not more."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from attr_batch import __version__, ops

PACKAGES = (
    "torch",
    "diffusers",
    "torch-pruning",
    "numpy",
    "scipy",
    "pydantic",
    "mlflow",
    "obstore",
)


def facts() -> dict[str, dict[str, Any]]:
    """Return sections of findings: versions, devices, native ops, disk. Imports torch."""
    import torch

    versions = {"attr-batch": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = {
        f"cuda:{i}": f"{torch.cuda.get_device_name(i)}, "
        f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    }
    built_for = torch.version.cuda or "CPU only"
    devices = {
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {len(os.sched_getaffinity(0))} cores",
        "torch built for": f"CUDA {built_for}" if torch.version.cuda else built_for,
        **(gpus or {"cuda": "no device"}),
    }
    info = ops.build_info()
    native = {
        **{name: _served("cpu") for name in ("counter_normal", "solver_step", "norm_act")},
        "conv3x3": f"{_served('cpu')}; where a native one pays, else oneDNN",
        **({"on cuda": _served("cuda"), "cohorts": _cohorts()} if torch.version.cuda else {}),
        "libraries": info["libraries"] or "none",
        **(info.get("build") or {"build": f"none: {info.get('why')}"}),
    }
    free = shutil.disk_usage(Path.cwd()).free
    return {
        "versions": versions,
        "devices": devices,
        "ops": native,
        "weights": {"shipped": "none: every model and classifier is made from the job's own data"},
        "MLflow": {
            "default": "SQLite in the store; tracking.uri or $MLFLOW_TRACKING_URI names a server"
        },
        "disk": {"free here": f"{free / 2**30:.1f} GiB", "folder": str(Path.cwd())},
    }


def _cohorts() -> str:
    return "pruned_conv2d in bf16, else cuDNN" if ops.backend("cuda") == "native" else "cuDNN"


def _served(device: str) -> str:
    mode = os.environ.get("ATTR_BATCH_OPS", "auto")
    backend = ops.backend(device)
    if backend == "native":
        return f"native (ATTR_BATCH_OPS={mode})"
    why = "asked for" if mode == "reference" else "no library was built: no C++ compiler?"
    return f"reference, {why} (ATTR_BATCH_OPS={mode})"
