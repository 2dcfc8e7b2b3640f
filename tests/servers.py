"""Real servers for tests: PostgreSQL, and an MLflow server on it that proxies its artifacts.

    python tests/servers.py     # starts both, prints their URIs, ends them at Ctrl-C or SIGTERM

Both listen on free loopback ports, keep everything in a temporary folder, and end with the process
that started them, even if it is killed.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

APT = "apt-get install -y --no-install-recommends postgresql"
PASSWORD = "hidden-from-all"
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its job queue is other processes
}


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(ready: Callable[[], bool], server: subprocess.Popen, log: Path) -> None:
    """Return once `ready`; RuntimeError with the server's log if it ends or takes a minute."""
    last = time.monotonic() + 60
    while not ready():
        if server.poll() is not None or time.monotonic() > last:
            raise RuntimeError(f"{server.args} is not up:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)


class Server(ABC):
    """A process group with a log, that can be stopped, killed and started again."""

    command: list[str]
    gentle, last_will = signal.SIGTERM, "TERM"  # the second: when the process that started it dies

    def __init__(self, folder: Path, name: str) -> None:
        self.port, self.log = free_port(), folder / f"{name}.log"
        self._process: subprocess.Popen | None = None

    @abstractmethod
    def ready(self) -> bool:
        """Whether it answers."""

    def start(self) -> None:
        """Start and wait until it answers."""
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", self.last_will, *self.command],
                stdout=log,
                stderr=log,
                env={**os.environ, **QUIET},
                cwd=self.log.parent,
                start_new_session=True,
            )
        wait_until(self.ready, self._process, self.log)

    def stop(self, number: int | None = None) -> None:
        """End it: gently, or all its processes by the signal `number`."""
        if self._process is None:
            return
        if number is None:
            self._process.send_signal(self.gentle)
        else:
            os.killpg(self._process.pid, number)
        self._process.wait(60)
        with contextlib.suppress(ProcessLookupError):  # what outlived its parent
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process = None


class Postgres(Server):
    """PostgreSQL in a folder of its own. It refuses to run as root: then another user runs it."""

    gentle, last_will = signal.SIGINT, "INT"  # "fast": does not wait for clients

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "postgres")
        initdb = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
        found = shutil.which("initdb") or (initdb and str(initdb))
        if found is None:
            raise FileNotFoundError(f"initdb is missing: {APT}")
        programs, data, word = Path(found).resolve().parent, folder / "pg", folder / "password"
        word.write_text(PASSWORD)
        user: list[str] = []
        if os.getuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            name = "postgres" if "postgres" in names else "nobody"
            account = pwd.getpwnam(name)
            data.mkdir()
            for path in (data, word):
                os.chown(path, account.pw_uid, account.pw_gid)
            ids = (f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}")
            user = ["setpriv", *ids, "--clear-groups", "--pdeathsig", self.last_will]
        options = ["--auth=scram-sha-256", "--username=mlflow", f"--pwfile={word}", "--no-sync"]
        made = subprocess.run(
            [*user, str(programs / "initdb"), "-D", str(data), *options],
            capture_output=True,
            text=True,
            cwd="/",
            check=False,
        )
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr}")
        settings = [f"-cport={self.port}", "-clisten_addresses=127.0.0.1", "-cmax_connections=200"]
        quiet = ["-cunix_socket_directories=", "-clog_min_messages=fatal"]
        self.command = [*user, str(programs / "postgres"), "-D", str(data), *settings, *quiet]
        self.uri = f"postgresql+psycopg2://mlflow:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def ready(self) -> bool:
        import psycopg2

        try:
            psycopg2.connect(self.uri.replace("+psycopg2", "")).close()
        except psycopg2.OperationalError:
            return False
        return True


class MLflow(Server):
    """`mlflow server` on a database; artifacts go through it into a folder."""

    def __init__(self, folder: Path, backend: str, workers: int = 2) -> None:
        super().__init__(folder, "mlflow")
        self.uri = f"http://127.0.0.1:{self.port}"
        self.artifacts = folder / "artifacts"
        # The command starts its workers elsewhere in the group, and leaves them there.
        self.command = ["sh", "-c", 'trap "kill -9 0" TERM; "$@" & wait', "sh"]
        self.command += [sys.executable, "-m", "mlflow", "server", "--serve-artifacts"]
        self.command += ["--backend-store-uri", backend]
        self.command += ["--artifacts-destination", str(self.artifacts)]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--workers", str(workers), "--uvicorn-opts", "--log-level warning"]

    def ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False


@contextlib.contextmanager
def servers(workers: int = 2) -> Iterator[tuple[Postgres, MLflow]]:
    """Run PostgreSQL and an MLflow server on it. FileNotFoundError names what to install."""
    # Not pytest's tmp_path: another user could not enter it.
    with tempfile.TemporaryDirectory(prefix="attr-batch-servers-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with contextlib.ExitStack() as ending:
            postgres = Postgres(folder)
            ending.callback(postgres.stop)
            postgres.start()
            mlflow = MLflow(folder, postgres.uri, workers)
            ending.callback(mlflow.stop)
            mlflow.start()
            yield postgres, mlflow


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with contextlib.suppress(KeyboardInterrupt), servers() as running:
        for one in running:
            print(one.uri, flush=True)
        signal.pause()
