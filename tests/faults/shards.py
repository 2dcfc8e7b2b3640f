"""Several processes on one job: twins, shards that come late, die or never come."""

from __future__ import annotations

import signal
import time

from .bench import PATIENCE, Bench, expect
from .kills import met, on_host, reach


def twins(bench: Bench) -> None:
    """Two processes, both shard 0 of 1, started at the same moment on one store."""
    for _ in range(bench.times(2, 1)):
        site = bench.site()
        both = [site.start() for _ in range(2)]
        for process in both:
            process.end(0)
            process.quiet()
        site.check()


def twin_shards_killed(bench: Bench) -> None:
    """Two pods on the same shard of two beside the other; one of the twins is killed."""
    site = bench.site()
    pods = [site.start("--shard", f"{i}/2") for i in (0, 1, 1)]
    for process in pods[1:]:
        if reach(process, "fine-tuning", 0.2):
            bench.row.hits[met(process)] += 1
            process.kill()
            process.end(-signal.SIGKILL)
            break
    for process in pods:
        if process.running:
            process.end(0)
            process.quiet()
    site.finish()


def never_comes(bench: Bench) -> None:
    """Shards 0/3 and 1/3 run, 2/3 never does: the others do its part and report."""
    site = bench.site()
    for process in [site.start("--shard", f"{i}/3") for i in range(2)]:
        process.end(0)
        process.quiet()
    site.check()


def comes_early(bench: Bench) -> None:
    """Shard 1/2 starts long before shard 0/2, which prepares."""
    site = bench.site()
    early = site.start("--shard", "1/2")
    time.sleep(bench.times(15, 6))
    expect(early.running, f"shard 1 did not wait:\n{early.log}")
    bench.row.hits["waiting"] += 1
    for process in (site.start("--shard", "0/2"), early):
        process.end(0)
        process.quiet()
    site.check()


def base_wait(bench: Bench) -> None:
    """Shard 1/2 alone waits no longer than resources.base_wait and exits 75."""
    site = bench.site()
    started = time.monotonic()
    process = site.run("--shard", "1/2", "--set", "resources.base_wait=3", codes=(75,))
    expect(time.monotonic() - started < PATIENCE / 5, "it waited much longer")
    expect("waited 3 s" in process.log and "hint:" in process.log, process.log)
    site.finish()


def reporter_killed(bench: Bench) -> None:
    """The shard that writes the report dies on its host; begun again on another, it is written."""
    site = bench.site()
    pods = {i: site.start("--shard", f"{i}/2", wrapper=on_host(f"host-{i}")) for i in range(2)}
    writing: list[int] = []
    while not writing and any(pod.running for pod in pods.values()):
        writing = [i for i, pod in pods.items() if "report" in pod.phases.values()]
        time.sleep(0.001)
    expect(writing, "nobody came to the report")
    first = writing[0]
    bench.row.hits[met(pods[first])] += 1
    pods[first].kill()
    pods[first].end(-signal.SIGKILL)
    pods[1 - first].end(0)
    site.run("--shard", f"{first}/2", wrapper=on_host("host-2"))
    site.check()


SCENARIOS = {
    f.__name__: f
    for f in (twins, twin_shards_killed, never_comes, comes_early, base_wait, reporter_killed)
}
