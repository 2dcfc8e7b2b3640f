"""What can go wrong, and the exit code with which the process says so.

The exit code is the API to the cluster: a Kubernetes podFailurePolicy decides by it whether a retry
can help. One base class; a message says what, where it was, and a hint what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `what`, its place (`where`: a spec path, file, line), a `hint`."""

    what: str
    where: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class AttrBatchError(Exception):
    """Base of all errors that are explained to the user without a traceback."""

    exit_code = 1

    def __init__(self, what: str, where: str | None = None, hint: str | None = None) -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, hint),)
        super().__init__(what)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> AttrBatchError:
        """Return one error that reports all `problems` (at least one) at once."""
        error = cls(problems[0].what, problems[0].where, problems[0].hint)
        error.problems = tuple(problems)
        return error

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def __reduce__(self):  # survives the way back from a worker process
        return (type(self).of, (self.problems,))


class SpecError(AttrBatchError):
    """The job spec or the command line is wrong; a retry cannot help."""

    exit_code = 64


class DataError(AttrBatchError):
    """The data, the model folder or the store's contents do not fit what the spec says."""

    exit_code = 65


class NumericsError(AttrBatchError):
    """A loss, sample or property is not finite, and stayed so on the next replicates."""

    exit_code = 70


class IncompleteDesign(NumericsError):
    """The plan has entries without a value, more than `estimator.max_failed` allows."""


class LedgerConflict(AttrBatchError):
    """A foreign, torn or altered file lies where an immutable fact should be."""

    exit_code = 73


class StoreError(AttrBatchError):
    """The store is full, read-only or away; the work itself is sound."""

    exit_code = 74


class Interrupted(AttrBatchError):
    """Stopped by SIGTERM after a checkpoint, or waited too long for the base: run again."""

    exit_code = 75
