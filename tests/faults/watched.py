"""The command line under observation: `python -m tests.faults.watched run JOB.yaml`.

It is attr-batch itself, but every process writes into `$FAULTS_WATCH/<pid>` in which phase it is
and appends each step of a training to `<pid>.steps`. Worker processes import this module again,
and are watched in the same way. A file `nan` in that folder, `COALITION COUNT`, makes the weights
of that coalition's next COUNT models not finite before they are sampled from.
"""

from __future__ import annotations

import fcntl
import functools
import os
import sys
from pathlib import Path
from typing import Any

from attr_batch import cli, results, tracking
from attr_batch.ledger import Ledger
from attr_batch.log import Upkeep
from attr_batch.runner import Laboratory, Worker

WIDTH = 32  # bytes of a phase's name in its file
PHASES = {
    "prepare": [(Worker, "_make")],
    "fine-tuning": [(Laboratory, "model")],
    "sampling": [(Laboratory, "draw")],
    "publishing": [(Laboratory, "keep"), (Laboratory, "publish"), (Ledger, "publish_thing")],
    "report": [(results, "publish")],
    "mirror": [(tracking.Mirror, "_attempt")],
}


def watch(folder: Path) -> None:
    """Let this process tell what it does."""
    place = os.open(folder / str(os.getpid()), os.O_CREAT | os.O_WRONLY)
    steps = os.open(folder / f"{os.getpid()}.steps", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    stack = ["between"]

    def tell() -> None:
        os.pwrite(place, stack[-1].ljust(WIDTH).encode(), 0)

    def during(phase: str, function: Any) -> Any:
        @functools.wraps(function)
        def observed(*args: Any, **kwargs: Any) -> Any:
            stack.append(phase)
            tell()
            try:
                return function(*args, **kwargs)
            finally:
                stack.remove(phase)  # not the last: the mirror has a thread of its own
                tell()

        return observed

    for phase, places in PHASES.items():
        for owner, name in places:
            setattr(owner, name, during(phase, getattr(owner, name)))

    tick = Upkeep.tick

    def counted(self: Upkeep, done: int, total: int, **figures: float) -> bool:
        os.write(steps, f"{done}/{total}\n".encode())
        return tick(self, done, total, **figures)

    Upkeep.tick = counted
    tell()


def poison(folder: Path) -> None:
    """Make the models that the file `nan` asks for not finite."""
    make = Laboratory.model

    def poisoned(self: Laboratory, cohort: Any, upkeep: Upkeep) -> Any:
        model = make(self, cohort, upkeep)
        with (folder / "nan").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            coalition, count = file.read().split()
            meant = [e for e in cohort if str(e.entry.coalition) == coalition]
            if meant and int(count):
                file.seek(0)
                file.write(f"{coalition} {int(count) - 1}")
                file.truncate()
                weights = next(model.parameters()).data
                own = weights if meant[0].cohort == 1 else weights[meant[0].place]
                own.fill_(float("nan"))
        return model

    Laboratory.model = poisoned


if "FAULTS_WATCH" in os.environ:
    _folder = Path(os.environ["FAULTS_WATCH"])
    if (_folder / "nan").exists():
        poison(_folder)
    watch(_folder)

if __name__ == "__main__":
    sys.exit(cli.main())
