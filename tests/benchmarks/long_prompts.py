"""Peak memory of a dump of long prompts, without the stages that are S × S: it must grow as S.

    python -m tests.benchmarks.long_prompts [MODEL] [--tokens 512,1024,2048,4096]

Without MODEL a random checkpoint of the 0.5B shape is made.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from jaxref.stages import STAGES
from tests.benchmarks.measure import dump_command, measure, random_model, write_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokens", default="512,1024,2048,4096")
    options = parser.parse_args()
    wanted = [s.name for s in STAGES.values() if "S" not in s.axes[1:] and not s.name.startswith("moe_")]
    wanted = [name for name in wanted if name not in ("q_norm", "k_norm")]
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or random_model(Path(scratch) / "model", "--like", "0.5b")
        for count in map(int, options.tokens.split(",")):
            tree = Path(scratch) / "tree"
            command = dump_command(model, write_tokens(Path(scratch), model, count), tree)
            run = measure([*command, "--stages", ",".join(wanted)], tree, touch=8.0)
            print(
                f"{count:5} tokens  {run.seconds:6.2f} s  {run.peak_mb:5.0f} MB peak  {run.size / 1e9:5.2f} GB written"
            )


if __name__ == "__main__":
    main()
