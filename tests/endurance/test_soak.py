"""A short soak, in a process of its own: what other tests leave in this one would come and go under it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_nothing_grows() -> None:
    words = [sys.executable, "-m", "tests.endurance.soak", "--dumps", "40", "--warm", "12", "--judged", "8"]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-800:] + done.stderr[-800:]
    assert "nothing grew" in done.stdout  # one layer's parameters kept by each dump would be 60 MB
