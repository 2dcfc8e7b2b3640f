"""What else happens to a process: its clock jumps, its memory ends, its numbers are not finite."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import install

from .bench import ROOT, TREE, Bench, NotHere, Site, expect
from .kills import met, on_host, reach

HOUR = 3600

# -- clocks -----------------------------------------------------------------------------------


def with_clock(bench: Bench, site: Site) -> Path:
    """Let the site's processes read a clock that is off by the seconds in the file returned."""
    library, compiler = bench.scratch / "clock.so", shutil.which("cc")
    if compiler is None:
        raise NotHere("no C compiler for the preloaded clock")
    if not library.exists():
        source = Path(__file__).with_name("clock.c")
        build = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"]
        subprocess.run(build, check=True)
    file = site.folder / "clock"
    set_clock(file, 0)
    site.env |= {"LD_PRELOAD": str(library), "FAULTS_CLOCK": str(file)}
    return file


def set_clock(file: Path, seconds: int) -> None:
    new = file.with_suffix(".new")
    new.write_text(str(seconds))
    new.replace(file)


def clock_jumps(bench: Bench) -> None:
    """The clock jumps by hours, both ways, while two shards run and one of them is killed."""
    site = bench.site()
    clock = with_clock(bench, site)
    pods = [site.start("--shard", f"{i}/2") for i in range(2)]
    for phase, hours in (("prepare", 7), ("prepare", -30), ("fine-tuning", 3), ("sampling", -1)):
        if reach(pods[0], phase, 0.1):
            bench.row.hits[met(pods[0])] += 1
            set_clock(clock, hours * HOUR)
    pods[1].kill()
    pods[1].end(0, -signal.SIGKILL)
    pods[0].end(0)
    set_clock(clock, 48 * HOUR)
    site.finish()


def other_clocks(bench: Bench) -> None:
    """A host with a clock hours ahead, then one hours behind, dies: nobody waits for its beats."""
    for hours in (6, -6):
        site = bench.site()
        clock = with_clock(bench, site)
        set_clock(clock, hours * HOUR)
        other = site.start("--shard", "0/2", wrapper=on_host("elsewhere"))
        if reach(other, "fine-tuning", 0.1):
            bench.row.hits[met(other)] += 1
        other.kill()
        other.end(-signal.SIGKILL)
        left = len(site.job.ledger.heartbeats())
        bench.row.facts[f"heartbeats left by {hours:+} h"] = left
        expect(left, "the kill left no heartbeat")
        set_clock(clock, 0)
        started = time.monotonic()
        site.finish()
        waited = time.monotonic() - started
        bench.row.facts[f"seconds after {hours:+} h"] = round(waited, 1)


def failed_tomorrow(bench: Bench) -> None:
    """A failure that was recorded by a clock hours ahead is tried again all the same."""
    site = bench.site()
    clock = with_clock(bench, site)
    ask_for_nan(site, 99)
    set_clock(clock, 6 * HOUR)
    site.run(codes=(70,))
    set_clock(clock, 0)
    ask_for_nan(site, 0)
    site.run()
    site.sound()
    site.mirrored("FINISHED")


# -- memory -----------------------------------------------------------------------------------

HUNGRY = '''
"""A property that takes 6 GB, once for each file `hunger-*` beside it."""
from pathlib import Path

def share_of_ink(images):
    for flag in Path(__file__).parent.glob("hunger-*"):
        try:
            flag.unlink()
        except FileNotFoundError:
            continue
        return float(len(bytearray(b"x") * (6 << 30))), 0.0
    return float(images.mean()), 0.0
'''


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[list[str]]:
    """Yield a wrapper that puts a command into a memory cgroup of so many bytes."""
    root = Path("/sys/fs/cgroup")
    old = root / "memory"
    group = (old if old.is_dir() else root) / f"faults-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(size))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        raise NotHere(f"no memory cgroup: {error.strerror}") from None
    try:
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        yield ["sh", "-c", enter, "sh"]
    finally:
        group.rmdir()


def out_of_memory(bench: Bench) -> None:
    """The kernel kills a worker that takes too much: 1 and a hint, or another worker takes over."""
    folder = bench.scratch / "hungry"
    folder.mkdir()
    (folder / "faults_hungry.py").write_text(HUNGRY)
    install(folder, "faults_hungry.py")
    sys.path.insert(0, str(folder))  # for the oracle
    properties = [*TREE["properties"], {"kind": "call", "target": "faults_hungry:share_of_ink"}]
    path = {"PYTHONPATH": f"{ROOT}:{folder}"}
    reference = bench.site(properties=properties)
    reference.env |= path
    reference.run()
    for workers, codes in ((1, (1,)), (2, (0,))):
        site = bench.site(properties=properties, resources={"device": "cpu", "workers": workers})
        site.env |= path
        (folder / "hunger-1").touch()
        with memory_limit(4 << 30) as limited:
            process = site.run(codes=codes, wrapper=limited)
            expect(not (folder / "hunger-1").exists(), "nobody was hungry")
            if workers == 1:
                expect("killed by signal 9" in process.log, process.log)
                expect("out of memory?" in process.log, process.log)
            bench.row.hits["measuring"] += 1
            site.run(wrapper=limited)
            process.gone()
        site.check(reference)


# -- numbers ----------------------------------------------------------------------------------


def ask_for_nan(site: Site, count: int) -> Any:
    """Make the weights of one coalition's next `count` models not finite; return its evaluation."""
    evaluation = next(e for e in site.job.plan if e.entry.role == "design")
    (site.folder / "nan").write_text(f"{evaluation.entry.coalition} {count}")
    return evaluation


def nan_once(bench: Bench) -> None:
    """A model that is not finite once leaves no trace."""
    site = bench.site()
    ask_for_nan(site, 1)
    site.run()
    expect((site.folder / "nan").read_text().endswith(" 0"), "there was no NaN")
    bench.row.hits["sampling"] += 1
    site.check()


def nan_twice(bench: Bench) -> None:
    """Not finite twice: the next replicate counts, also after a kill, and all else is the same."""
    undisturbed, states = bench.undisturbed().state(), []
    for kills in (False, True):
        site = bench.site()
        evaluation = ask_for_nan(site, 2)
        if kills:
            process = site.start()
            while process.running and not any(site.store.glob("runs/*/diverged.json")):
                time.sleep(0.001)
            bench.row.hits[met(process)] += 1
            process.kill()
            process.end(-signal.SIGKILL)
        site.run()
        job = site.job
        expect(job.settled(evaluation).key != evaluation.key, "no substitute was taken")
        site.run()
        site.sound()
        site.mirrored("FINISHED")
        states.append(site.state())
    samples = states[0][1]
    same = [key for key, digest in samples.items() if undisturbed[1].get(key) == digest]
    bench.row.compared += 1
    bench.row.same_bytes = states[0] == states[1]
    expect(states[0] == states[1], "killed and not killed differ")
    expect(len(same) == len(samples) - 1, f"{len(same)} of {len(samples)} samples are the same")


def nan_always(bench: Bench) -> None:
    """Never finite: two more replicates, then 70 and no report; finite again, it is completed."""
    site = bench.site()
    evaluation = ask_for_nan(site, 6)
    process = site.run(codes=(70,))
    expect("hint:" in process.log, process.log)
    job = site.job
    expect(not job.ledger.store.exists(f"{job.report_name}/attribution.json"), "it reported")
    expect(sum(job.done(e) for e in job.plan) == len(job.plan) - 1, "the others are not done")
    site.mirrored("FAILED")
    site.run()
    expect(site.job.settled(evaluation).entry.replicate >= 2000, "not the second substitute")
    site.sound()
    site.mirrored("FINISHED")


SCENARIOS = {
    f.__name__: f
    for f in (
        clock_jumps,
        other_clocks,
        failed_tomorrow,
        out_of_memory,
        nan_once,
        nan_twice,
        nan_always,
    )
}
