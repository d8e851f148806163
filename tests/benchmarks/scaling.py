"""How a dump of all stages grows with layers, with tokens and with the model: one table of Markdown each.

    python -m tests.benchmarks.scaling [--folder DIR] [--layers 6,12,24] [--tokens 7,64,512,2048]
        [--models 0.5b,1.5b,7b] [--repeat 3]

Layers and tokens are those of the 0.5B shape. The checkpoints are random and kept in DIR; 7b takes 15 GB. An option
that is "" leaves its table out. By hand, on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.measure import Run, dump_command, into_page_cache, measure, medians, random_model, write_tokens

HEAD = "| {} | seconds | CPU seconds | peak MB | GB of weights read | GB written |\n|---|---|---|---|---|---|"
PROMPT, LONG = 7, 512  # tokens


def table(name: str, rows: Iterator[tuple[str, Run, float]]) -> None:
    """Print one, row by row as they come."""
    print(HEAD.format(name))
    for label, run, read in rows:
        cells = [label, f"{run.seconds:.2f}", f"{run.cpu_seconds:.2f}", f"{run.peak_mb:.0f}"]
        print(f"| {' | '.join([*cells, f'{read:.2f}', f'{run.size / 1e9:.2f}'])} |", flush=True)
    print()


class Scaling:
    """What is measured, in a folder for checkpoints and one for trees."""

    def __init__(self, folder: Path, scratch: Path, repeat: int) -> None:
        self.folder, self.scratch, self.repeat = folder, scratch, repeat

    def row(self, label: str, model: Path, tokens: int) -> tuple[str, Run, float]:
        """Medians of runs after one that compiles; the GB of weights that the dump says it read."""
        tree = self.scratch / "tree"
        command = dump_command(model, write_tokens(self.scratch, model, tokens), tree)
        shutil.rmtree(tree, ignore_errors=True)
        first = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
        files = sorted(model.glob("*.safetensors"))
        runs = []
        for _ in range(self.repeat):
            into_page_cache(files)
            runs.append(measure(command, tree, touch=6.0))
        return label, medians(runs), json.loads(first.stdout)["bytes_read"] / 1e9

    def layers(self, counts: list[int], tokens: int) -> Iterator[tuple[str, Run, float]]:
        """The 0.5B shape with fewer layers."""
        for count in counts:
            model = random_model(self.folder / f"0.5b-{count}", "--like", "0.5b", "--layers", str(count))
            yield str(count), *self.row("", model, tokens)[1:]

    def tokens(self, counts: list[int]) -> Iterator[tuple[str, Run, float]]:
        """The 0.5B shape with longer prompts."""
        model = random_model(self.folder / "0.5b-24", "--like", "0.5b")
        return (self.row(str(count), model, count) for count in counts)

    def models(self, shapes: list[str]) -> Iterator[tuple[str, Run, float]]:
        """Shapes of published models, with the short prompt."""
        for shape in shapes:
            model = random_model(self.folder / (f"{shape}-24" if shape == "0.5b" else shape), "--like", shape)
            yield self.row(shape, model, PROMPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layers", default="6,12,24")
    parser.add_argument("--tokens", default="7,64,512,2048")
    parser.add_argument("--models", default="0.5b,1.5b,7b")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        found = Scaling(options.folder or Path(scratch), Path(scratch), options.repeat)
        if options.layers:
            for tokens in (PROMPT, LONG):
                table(f"layers, {tokens} tokens", found.layers([int(n) for n in options.layers.split(",")], tokens))
        if options.tokens:
            table("tokens, 24 layers", found.tokens([int(n) for n in options.tokens.split(",")]))
        if options.models:
            table(f"shape, {PROMPT} tokens", found.models(options.models.split(",")))


if __name__ == "__main__":
    main()
