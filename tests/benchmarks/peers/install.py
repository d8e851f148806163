"""Environments of the peers: each sees the project's packages and has its own beside them."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.benchmarks.measure import ROOT
from tests.benchmarks.peers.table import Peer, python_of

_ASK = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


def install(peer: Peer, environments: Path) -> str | None:
    """Make the peer's environment, if it needs one; returns why that was not possible, None where it was."""
    if peer.package is None:
        return None
    python = Path(python_of(peer, environments))
    try:
        _run(sys.executable, "-m", "venv", str(python.parent.parent))
        # The packages of the project, found after the environment's own.
        purelib = _run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(purelib, "project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        constraints = str(ROOT / "constraints.txt")  # torch for the CPU
        _run(str(python), "-m", "pip", "--quiet", "install", "--constraint", constraints, peer.package)
    except (subprocess.CalledProcessError, OSError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"pip install {peer.package}: {said.strip().splitlines()[-1]}"
    return None


def versions(peer: Peer, environments: Path) -> dict[str, str] | None:
    """What is installed for a peer; None where something is not."""
    try:
        return json.loads(_run(python_of(peer, environments), "-c", _ASK, *peer.versions))
    except (subprocess.CalledProcessError, OSError):
        return None


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout
