"""The object store, the MLflow server or its database dies, hangs, refuses or loses answers."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from .bench import Bench, NotHere, expect
from .kills import kill_group, met, reach
from .proxy import BadNetwork

OUTAGE = 6.0  # seconds: shorter than the store's patience

# -- S3 ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_s3(bench: Bench, seed: int = 0, share: float = 0.0) -> Iterator[tuple[Any, BadNetwork]]:
    """Let sites lie in a bucket of a real server, behind a network that harms a share of all."""
    from tests.s3 import BUCKET, SeaweedFS

    bench.undisturbed()  # lies in a folder: the bytes are the same
    folder = bench.scratch / f"{bench.row.name}-server-{seed}"
    folder.mkdir()
    try:
        server = SeaweedFS(folder)
    except RuntimeError as error:
        raise NotHere(str(error)) from None
    server.start()
    try:
        with BadNetwork(server.port, share, seed) as network:
            scratch = {"ATTR_BATCH_SCRATCH": str(folder / "scratch")}
            env = {**server.environment, **scratch}
            through = {**env, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{network.port}"}
            with (
                mock.patch.dict(os.environ, env),  # the oracle asks the server itself
                mock.patch.object(bench, "place", lambda name: f"s3://{BUCKET}/{name}"),
                mock.patch.object(bench, "env", through),
            ):
                yield server, network
    finally:
        server.stop(signal.SIGKILL)


def s3_kill_group(bench: Bench) -> None:
    """SIGKILL to the whole process group, the store in a bucket."""
    with in_s3(bench):
        kill_group(bench, bench.times(6, 1))


def s3_restart(bench: Bench) -> None:
    """The S3 server is killed and starts again some seconds later: the run waits for it."""
    with in_s3(bench) as (server, _):
        for phase in ("prepare", "fine-tuning", "publishing")[: bench.times(3, 1)]:
            site = bench.site()
            process = site.start()
            if reach(process, phase, 0.05):
                bench.row.hits[met(process)] += 1
                began = time.monotonic()
                server.stop(signal.SIGKILL)
                time.sleep(OUTAGE)
                server.start()
                bench.row.facts[f"seconds away in {phase}"] = round(time.monotonic() - began, 1)
            process.end(0, 74)
            process.quiet()
            if "error:" in process.log:
                bench.row.facts[f"said in {phase}"] = process.log.partition("error:")[2].strip()
            site.finish()


def s3_away(bench: Bench) -> None:
    """The S3 server is killed and stays away: 74 after the store's patience; back, it goes on."""
    with in_s3(bench) as (server, _):
        site = bench.site()
        process = site.start()
        if reach(process, "fine-tuning", 0.05):
            bench.row.hits[met(process)] += 1
        server.stop(signal.SIGKILL)
        started = time.monotonic()
        process.end(74)
        bench.row.facts["seconds until 74"] = round(time.monotonic() - started, 1)
        process.quiet()
        expect("hint:" in process.log, process.log)
        site.run(codes=(74,))
        server.start()
        site.finish()


def s3_bad_network(bench: Bench) -> None:
    """Of all requests a tenth are reset, answered 503, slow, or done without an answer."""
    for seed in range(bench.times(3, 1)):
        with in_s3(bench, seed, share=0.1) as (_, network):
            site = bench.site()
            site.run(codes=(0, 74))
            site.finish()
            bench.row.hits.update({fault: network.done[fault] for fault in network.FAULTS})
            requests = bench.row.facts.get("requests", 0) + network.done.total()
            bench.row.facts["requests"] = requests


# -- MLflow -----------------------------------------------------------------------------------


@contextlib.contextmanager
def mirrored_by_server(bench: Bench) -> Iterator[tuple[Any, Any]]:
    """Let jobs be mirrored by a real MLflow server on PostgreSQL; yield both servers."""
    from tests.servers import servers

    bench.undisturbed()
    with contextlib.ExitStack() as ending:
        try:
            postgres, mlflow = ending.enter_context(servers())
        except FileNotFoundError as error:
            raise NotHere(str(error)) from None
        with mock.patch.object(bench, "uri", mlflow.uri):
            yield postgres, mlflow


def _outage(bench: Bench, which: int, number: int | None, phases: tuple[str, ...]) -> None:
    with mirrored_by_server(bench) as both:
        server = both[which]
        for phase in phases[: bench.times(len(phases), 1)]:
            site = bench.site()
            process = site.start()
            if reach(process, phase, 0.1):
                bench.row.hits[met(process)] += 1
                server.stop(number)
                time.sleep(OUTAGE)
                server.start()
            process.end(0)
            process.quiet()
            site.run(command="sync")
            site.check()


def mlflow_killed(bench: Bench) -> None:
    """The MLflow server is killed and starts again: the work goes on, `sync` completes."""
    _outage(bench, 1, signal.SIGKILL, ("mirror", "fine-tuning", "report"))


def postgres_restarted(bench: Bench) -> None:
    """MLflow's PostgreSQL restarts: the work goes on, `sync` completes."""
    _outage(bench, 0, None, ("mirror", "fine-tuning", "report"))


def mlflow_hangs(bench: Bench) -> None:
    """The MLflow server is stopped (SIGSTOP) when the run begins: nothing waits for it for long."""
    with mirrored_by_server(bench) as (_, mlflow):
        site = bench.site()
        os.killpg(mlflow._process.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            site.run()
            bench.row.facts["seconds of the run"] = round(time.monotonic() - started, 1)
        finally:
            os.killpg(mlflow._process.pid, signal.SIGCONT)
        site.run(command="sync")
        site.check()


def mlflow_down(bench: Bench) -> None:
    """The MLflow server is down all along: 0 and a warning; back, `sync` makes the mirror."""
    with mirrored_by_server(bench) as (_, mlflow):
        site = bench.site()
        mlflow.stop(signal.SIGKILL)
        process = site.run()
        expect("MLflow" in process.log and "sync" in process.log, process.log)
        mlflow.start()
        site.run(command="sync")
        site.check()


SCENARIOS = {
    f.__name__: f
    for f in (
        s3_kill_group,
        s3_restart,
        s3_away,
        s3_bad_network,
        mlflow_killed,
        mlflow_down,
        mlflow_hangs,
        postgres_restarted,
    )
}
