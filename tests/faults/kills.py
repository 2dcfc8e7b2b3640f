"""kill -9, SIGTERM and Ctrl-C, at random moments of every phase and at exact system calls."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .bench import GRACE, TREE, Bench, NotHere, Process, Site, expect

PHASES = ("prepare", "fine-tuning", "sampling", "publishing")
REPORTING = ("report", "mirror")  # phases of the parent


def reach(process: Process, phase: str, moment: float) -> bool:
    """Wait until some process is in a phase, then so many seconds; False if it ended before."""
    while process.running and phase not in ("starting", *process.phases.values()):
        time.sleep(0.001)
    time.sleep(moment)
    return process.running


def met(process: Process, pid: int | None = None) -> str:
    """Return the phase that a kill meets: of one process, or of a group the least common one."""
    phases = process.phases
    if pid is not None:
        return phases.get(pid, "starting")
    for phase in (*reversed(PHASES), *REPORTING):
        if phase in phases.values():
            return phase
    return "starting" if len(phases) < 2 else "between"


def disturb(
    bench: Bench,
    times: int,
    strike: Callable[[Site, Process], None],
    phases: Sequence[str] = PHASES,
    like: Site | None = None,
    **sections: Any,
) -> None:
    """Strike `times` times, the same job in one phase after the other; it must end undisturbed.

    That is, `like` another job that nobody struck.
    """
    left = times
    while left:
        site = bench.site(**sections)
        for phase in [phase for phase in phases for _ in range(2)]:  # in the order of a run
            if not left:
                break
            process = site.start()
            longest = {"starting": 5.0, "prepare": 1.5, "mirror": 1.5}.get(phase, 0.05)
            if not reach(process, phase, bench.random.uniform(0, longest)):
                process.end(0)
                break
            strike(site, process)
            left -= 1
            process.gone()
            expect(not site.job.ledger.bad_files(), "it left damaged files")
        site.finish(like)


def kill_group(bench: Bench, times: int = 24) -> None:
    """SIGKILL to the whole process group at random moments, several times in one job."""

    def strike(_: Site, process: Process) -> None:
        bench.row.hits[met(process)] += 1
        process.kill()
        process.end(-signal.SIGKILL)

    disturb(bench, bench.times(times, 2), strike)


def kill_worker(bench: Bench) -> None:
    """SIGKILL to one worker: the other takes over, the run ends with 0."""

    def strike(_: Site, process: Process) -> None:
        workers = process.workers
        busy = {p: phase for p, phase in workers.items() if phase in PHASES} or workers
        if busy:
            pid = bench.random.choice(sorted(busy))
            bench.row.hits[met(process, pid)] += 1
            process.kill(pid=pid)
        process.end(0)

    disturb(bench, bench.times(6, 1), strike, resources={"device": "cpu", "workers": 2})


def kill_cohort(bench: Bench) -> None:
    """SIGKILL to the whole group of a job that fine-tunes three coalitions at once."""
    resources = {"device": "cpu", "workers": 2, "cohort": 3}

    def strike(_: Site, process: Process) -> None:
        bench.row.hits[met(process)] += 1
        process.kill()
        process.end(-signal.SIGKILL)

    like = bench.undisturbed(resources=resources)
    phases = ("fine-tuning", "sampling", "publishing")
    disturb(bench, bench.times(12, 1), strike, phases, like, resources=resources)


def kill_parent(bench: Bench) -> None:
    """SIGKILL to the parent alone: its workers end by themselves and leave no orphan."""

    def strike(_: Site, process: Process) -> None:
        pid = process.parent
        bench.row.hits[met(process)] += 1
        process.kill(pid=pid)
        process.end(-signal.SIGKILL)

    disturb(bench, bench.times(14, 1), strike, ("starting", *PHASES, *REPORTING))


def on_host(name: str) -> list[str]:
    """Return a wrapper that gives a process another host name. NotHere if it may not."""
    wrapper = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh"]
    if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode:
        raise NotHere("a host name of its own needs root")
    return wrapper


def kill_new_mirror(bench: Bench) -> None:
    """SIGKILL while MLflow's SQLite file is being made: the mirror comes to be all the same."""
    for i in range(bench.times(5, 1)):
        site = bench.site(uri=f"sqlite:///{bench.scratch}/new-{i}.db")
        process = site.start()
        if reach(process, "mirror", bench.random.uniform(0.2, 4)):
            bench.row.hits[met(process, process.parent)] += 1
        process.kill()
        process.end(0, -signal.SIGKILL)
        site.finish()


def strace(log: Path, calls: str) -> list[str]:
    """Return a wrapper that injects faults into these system calls. NotHere if it may not."""
    found = shutil.which("strace")
    if found is None or subprocess.run([found, "true"], capture_output=True).returncode:
        raise NotHere("strace is missing or may not trace")
    # Not --seccomp-bpf: it is faster, but with it strace 6.1 delivers no signal.
    return [found, "-f", "-q", "-o", str(log), "-e", f"trace={calls}"]


def kill_at_calls(bench: Bench) -> None:
    """SIGKILL to whoever comes first to the n-th call of link, rename, fsync or unlink (strace)."""
    calls = ("link,linkat", "rename", "fsync", "unlink")
    left = bench.times(10, 1)
    while left:
        site = bench.site()
        for _ in range(5):
            if not left:
                break
            call, when = calls[left % len(calls)], bench.random.randint(1, 8)
            inject = ["-e", f"inject={call}:signal=SIGKILL:when={when}"]
            log = site.folder / "strace"
            process = site.start(wrapper=[*strace(log, call), *inject])
            process.end(0, 1, -signal.SIGKILL)
            process.gone()
            expect(not site.job.ledger.bad_files(), f"killed at {call} {when}: damaged files")
            if "killed by SIGKILL" not in log.read_text():
                break  # it never came to that call so often
            bench.row.hits[call] += 1
            left -= 1
        site.finish()


# -- asked to stop ----------------------------------------------------------------------------


def stopped(bench: Bench, process: Process, codes: Sequence[int] = (75,)) -> None:
    """Wait until a stopped run has ended as promised; note how long that took."""
    started = time.monotonic()
    process.end(*codes, seconds=GRACE)
    seconds = round(time.monotonic() - started, 2)
    bench.row.facts["longest_seconds"] = max(seconds, bench.row.facts.get("longest_seconds", 0))
    process.quiet()


def sigterm(bench: Bench) -> None:
    """SIGTERM to the parent at random moments: 75 within the grace, then the same bytes."""

    def strike(site: Site, process: Process) -> None:
        bench.row.hits[met(process)] += 1
        process.kill(signal.SIGTERM, process.parent)
        stopped(bench, process)
        site.mirrored("KILLED")

    disturb(bench, bench.times(8, 1), strike)


def steps(process: Process, total: int) -> int:
    """Return how many steps of trainings of `total` steps a run's processes took."""
    logs = [log.read_text().splitlines() for log in process.watch.glob("*.steps")]
    return sum(line.endswith(f"/{total}") for lines in logs for line in lines)


def checkpoint(bench: Bench) -> None:
    """SIGTERM within a training: the next run goes on from there and repeats no step."""
    total = 401
    model = {**TREE["model"], "training": {"steps": total, "batch": 32, "warmup": 2}}
    site = bench.site(model=model)
    first = site.start()
    expect(reach(first, "prepare", 1.0), "it ended before")
    first.kill(signal.SIGTERM, first.parent)
    stopped(bench, first)
    again = site.run()
    taken = steps(first, total), steps(again, total)
    bench.row.facts["steps"] = taken
    expect(0 < taken[0] < total, f"the stop did not meet the training: {taken}")
    expect(sum(taken) == total, f"{sum(taken)} steps in all, wanted {total}")
    site.check(bench.undisturbed(model=model))


def sigterm_twice(bench: Bench) -> None:
    """SIGTERM, and again while it stops."""
    site = bench.site()
    process = site.start()
    expect(reach(process, "prepare", 0.2), "it ended before")
    for _ in range(2):
        bench.row.hits[met(process)] += 1
        process.kill(signal.SIGTERM, process.parent)
        time.sleep(0.05)
    stopped(bench, process)
    site.finish()


def group_signals(bench: Bench) -> None:
    """Ctrl-C or SIGTERM to the whole group, as a terminal and some process managers send them."""

    def strike(_: Site, process: Process) -> None:
        bench.row.hits[met(process)] += 1
        process.kill(bench.random.choice((signal.SIGINT, signal.SIGTERM)))
        stopped(bench, process)

    disturb(bench, bench.times(4, 2), strike, ("prepare", "fine-tuning"))


def sigterm_early(bench: Bench) -> None:
    """SIGTERM while it starts, when it may not listen yet: 75, or died of the signal."""

    def strike(_: Site, process: Process) -> None:
        bench.row.hits[met(process)] += 1
        process.kill(signal.SIGTERM, process.parent)
        stopped(bench, process, (75, -signal.SIGTERM))

    disturb(bench, bench.times(4, 1), strike, ("starting",))


SCENARIOS = {
    f.__name__: f
    for f in (
        kill_group,
        kill_worker,
        kill_cohort,
        kill_parent,
        kill_at_calls,
        kill_new_mirror,
        sigterm,
        sigterm_twice,
        checkpoint,
        group_signals,
        sigterm_early,
    )
}
