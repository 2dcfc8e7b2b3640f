"""What the benchmarks share: sides that take turns, and where a result was measured."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return each side's seconds, the sides taking turns; a first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if i > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def medians(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return each side's median seconds, the sides taking turns."""
    return {name: statistics.median(s) for name, s in interleaved(sides, rounds).items()}


def significant(value: float, digits: int = 3) -> float:
    """Return `value` rounded to so many significant digits."""
    return float(f"{value:.{digits}g}")


def machine() -> str:
    """Return the processor's name, its cores and the vector extensions that decide speed."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []

    def field(name: str) -> str:
        found = [line.partition(":")[2].strip() for line in lines if line.startswith(name)]
        return found[0] if found else ""

    flags = field("flags").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    vectors = " ".join(flag for flag in wanted if flag in flags)
    return f"{field('model name') or platform.machine()}, {os.cpu_count()} cores, {vectors}"


def commit() -> str | None:
    """Return the commit that is measured."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def envelope(rows: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """Return a result as it is committed: where it was measured, other facts, and the rows."""
    import torch

    where = {"machine": machine(), "torch": torch.__version__, "commit": commit()}
    return {**where, **facts, "rows": rows}
