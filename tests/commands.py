"""The commands of this project as people start them, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(*words: object, module: str = "jaxref") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, cwd=ROOT, check=False
    )


def refused(*words: object, module: str = "jaxref") -> str:
    """Run a command that must be refused: exit 2, one line on stderr, nothing on stdout."""
    done = command(*words, module=module)
    assert done.returncode == 2, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]
