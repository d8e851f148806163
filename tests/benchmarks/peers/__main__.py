"""jaxref beside its peers: the same checkpoint, the same prompts, whole processes, in one run.

    python -m tests.benchmarks.peers --install
    python -m tests.benchmarks.peers [MODEL] [--tokens 7,512,2048] [--repeat 3,3,1] [--only jaxref,hf] [--json FILE]

Without MODEL a random Qwen2 of the 0.5B shape is made. Prints tables in Markdown: medians and ratios, what each peer
captured, and what the machine's own rates would allow jaxref. By hand, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.measure import ROOT
from tests.benchmarks.peers.install import install
from tests.benchmarks.peers.report import report
from tests.benchmarks.peers.series import Plan, Series
from tests.benchmarks.peers.table import NAMES, PEERS


def main(arguments: list[str] | None = None) -> int:
    """0: every peer ran; 1: one that was asked for did not, and the report says why."""
    options = _options(arguments)
    peers = [peer for peer in PEERS if peer.name in options.only]
    if options.install:
        reasons = {peer.name: install(peer, options.environments) for peer in peers}
        for name, reason in reasons.items():
            print(f"{name}: {reason or 'ready'}")
        return int(any(reasons.values()))
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        plan = Plan(
            peers, options.tokens, options.repeat, options.environments, options.limit, options.memory, options.touch
        )
        found = Series(plan, Path(scratch), options.model).run()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(report(found))
    return int(bool(found["failed"]))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a folder with a Qwen2 in Hugging Face's format")
    parser.add_argument("--tokens", type=_numbers, default="7,512,2048")
    parser.add_argument("--repeat", type=_numbers, default="3", help="rounds, or one number for each of --tokens")
    parser.add_argument("--only", type=_names, default=",".join(NAMES), help=", ".join(NAMES))
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv" / "peers")
    parser.add_argument("--install", action="store_true", help="make the environments, which needs a package index")
    parser.add_argument("--folder", type=Path, help="where the scratch folder is made")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which one process is stopped")
    parser.add_argument("--memory", type=float, default=0.95, help="of what is free, what one process may have")
    parser.add_argument(
        "--touch", type=float, default=8.0, help="GB of free memory that are written to before each run"
    )
    parser.add_argument("--json", type=Path, help="write every single run there too")
    options = parser.parse_args(arguments)
    if len(options.repeat) not in (1, len(options.tokens)):
        parser.error(f"--repeat: one number, or {len(options.tokens)} for --tokens")
    options.repeat *= len(options.tokens) // len(options.repeat)
    return options


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers from 1 between commas were expected")
    return [int(word) for word in words]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
