"""The tables of README and docs say what the committed result files say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_tables_are_those_of_the_results():
    command = [sys.executable, str(ROOT / "docs/tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
