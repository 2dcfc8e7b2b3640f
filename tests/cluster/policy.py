"""What the Job controller does next with an Indexed Job: a pure function of how its pods ended.

The rules are those of the Kubernetes documentation (concepts/workloads/controllers/job: pod
failure policy, backoff limit per index, pod replacement policy `Failed`), for what our manifests
use. `indexed_job.py` emulates the controller with it; tests/test_k8s.py tests it against outcomes
that the documentation states.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Action = Literal["Ignore", "Count", "FailIndex", "FailJob"]
FIRST_DELAY, LONGEST_DELAY = 10.0, 360.0  # seconds before an index is tried again


@dataclass(frozen=True)
class Ending:
    """How a pod ended. `disrupted`: the cluster ended it (drained, evicted, preempted)."""

    exit_code: int
    disrupted: bool = False


@dataclass(frozen=True)
class Decision:
    """Indexes of which a pod is to be started now; or the job's outcome and its reason."""

    start: tuple[int, ...] = ()
    outcome: Literal["Complete", "Failed"] | None = None
    reason: str = ""


def action(spec: Mapping[str, Any], ending: Ending) -> Action:
    """Return what a JobSpec's pod failure policy says of a failed pod: the first rule that fits.

    A pod has one container here, so a rule's `containerName` is not looked at.
    """
    for rule in spec.get("podFailurePolicy", {}).get("rules", ()):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", ())
        if codes and ending.exit_code:
            fits = (ending.exit_code in codes["values"]) == (codes["operator"] == "In")
        else:
            fits = ending.disrupted and any(
                c["type"] == "DisruptionTarget" and c.get("status", "True") == "True"
                for c in conditions
            )
        if fits:
            return rule["action"]
    return "Count"


def state(spec: Mapping[str, Any], endings: Sequence[Ending]) -> str:
    """Return `pending`, `succeeded` or `failed` of one index, from how its pods ended, in order."""
    if endings and endings[-1].exit_code == 0:
        return "succeeded"
    actions = [action(spec, ending) for ending in endings]
    if "FailIndex" in actions or actions.count("Count") > spec["backoffLimitPerIndex"]:
        return "failed"
    return "pending"


def delay(endings: Sequence[Ending]) -> float:
    """Return the seconds between the end of an index's last pod and its next one."""
    return min(FIRST_DELAY * 2 ** (len(endings) - 1), LONGEST_DELAY) if endings else 0.0


def decide(
    spec: Mapping[str, Any], history: Sequence[Sequence[Ending]], running: Collection[int] = ()
) -> Decision:
    """Return what happens next. `history[i]` says how the pods of index i ended, in order.

    An index that is running is not started again: a pod is replaced once it has ended.
    """
    failed_pods = [e for endings in history for e in endings if e.exit_code]
    if any(action(spec, ending) == "FailJob" for ending in failed_pods):
        return Decision(outcome="Failed", reason="PodFailurePolicy")
    states = [state(spec, endings) for endings in history]
    if states.count("failed") > spec.get("maxFailedIndexes", spec["completions"]):
        return Decision(outcome="Failed", reason="MaxFailedIndexesExceeded")
    pending = [i for i, name in enumerate(states) if name == "pending" and i not in running]
    if not pending and not running:
        if "failed" in states:
            return Decision(outcome="Failed", reason="FailedIndexes")
        return Decision(outcome="Complete", reason="CompletionsReached")
    return Decision(start=tuple(pending[: max(0, spec["parallelism"] - len(running))]))
