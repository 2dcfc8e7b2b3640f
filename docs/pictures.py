"""Make the pictures of README and docs from a finished demo: `python docs/pictures.py [STORE]`.

Needs Debian's chromium (or `CHROMIUM=/path`); reads the store that `make demo` leaves, or another,
of which the newest report is taken; docs/validation.md's picture comes from the newest validation.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs/images"
STORE = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "attr-batch-store").absolute()
PORT = 5187


def screenshot(url: str, target: Path, width: int, height: int, wait_ms: int = 3000) -> None:
    """Take a picture of the top of a page."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            os.environ.get("CHROMIUM", "chromium"),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--virtual-time-budget={wait_ms}",
            f"--window-size={width},{height}",
            f"--screenshot={target}",
            url,
        ]
        subprocess.run(command, check=True, capture_output=True)
    Image.open(target).convert("P", palette=Image.Palette.ADAPTIVE, colors=96).save(
        target, optimize=True
    )


def samples(evidence: dict, target: Path) -> None:
    """Put four sample grids side by side: trained, pruned, a small and a larger coalition."""
    grids = evidence["grids"]
    coalitions = [g for g in grids if g["caption"].startswith("Coalition of")]
    chosen = [grids[0], grids[1], coalitions[1], coalitions[2]]
    pictures = [Image.open(io.BytesIO(base64.b64decode(g["png_base64"]))) for g in chosen]
    width, height = pictures[0].size
    sheet = Image.new("L", (4 * (width + 12), height + 34), 255)
    for i, (grid, picture) in enumerate(zip(chosen, pictures, strict=True)):
        sheet.paste(picture.convert("L"), ((width + 12) * i, 0))
        who = f": {', '.join(grid['members'])}" if grid["members"] else ""
        caption = f"{grid['caption']}{who}".replace(", before any coalition", "")
        ImageDraw.Draw(sheet).text(((width + 12) * i, height + 8), caption, fill=0)
    sheet.save(target, optimize=True)


def mlflow_ui(target: Path) -> None:
    """Take a picture of the job's run in the MLflow UI."""
    uri = f"sqlite:///{STORE / 'mlflow.db'}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri,
         "--artifacts-destination", str(STORE / "mlartifacts"), "--port", str(PORT)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health")
                break
            except OSError:
                time.sleep(0.5)
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        experiments = [e.experiment_id for e in client.search_experiments()]
        run = client.search_runs(experiments, "tags.`attr_batch.kind` = 'job'")[0]
        page = f"http://127.0.0.1:{PORT}/#/experiments/{run.info.experiment_id}"
        screenshot(f"{page}/runs/{run.info.run_id}", target, 1750, 1000, 25_000)
    finally:
        server.terminate()
        server.wait()


def newest(name: str) -> Path | None:
    """Return the newest file of this name among the store's finished reports."""
    found = [p for p in (STORE / "reports").glob(f"*/{name}") if "provisional" not in p.parent.name]
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


def main() -> None:
    """Make all that the store has something for."""
    IMAGES.mkdir(exist_ok=True)
    if (validation := newest("validation.html")) is not None:
        screenshot(f"file://{validation}", IMAGES / "validation.png", 1100, 1500)
    if (index := newest("index.html")) is None:
        return
    report = index.parent
    screenshot(f"file://{report / 'index.html'}", IMAGES / "report.png", 1100, 1330)
    samples(json.loads((report / "evidence.json").read_text()), IMAGES / "samples.png")
    mlflow_ui(IMAGES / "mlflow.png")


if __name__ == "__main__":
    main()
