"""`python -m weights`: make a random checkpoint, or look into one."""

from __future__ import annotations

from pathlib import Path

import click

from weights.cli import run
from weights.config import MODEL_TYPES


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jaxref", prog_name="weights")
def main() -> None:
    """Random checkpoints, and what is in a checkpoint."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--arch", type=click.Choice(MODEL_TYPES), default="qwen2", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--like", help="Layer shapes of a published model, for example 0.5b or 7b.")
@click.option("--layers", type=click.IntRange(min=1), help="How many layers.")
@click.option("--tied/--untied", default=None, help="Whether the head is the embedding.  [default: as the model]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
def tiny(
    folder: Path, arch: str, seed: int, like: str | None, layers: int | None, tied: bool | None, dtype: str
) -> None:
    """Write a checkpoint with random weights into FOLDER, in Hugging Face's format."""
    from weights.tiny import tiny_config, write_random

    changes = {} if tied is None else {"tie_word_embeddings": tied}
    write_random(folder, tiny_config(arch, like, layers, **changes), seed=seed, dtype=dtype)
    click.echo(f"{folder}: {arch}, seed {seed}, {dtype}")


@main.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def inspect(model: str, as_json: bool) -> None:
    """Print the config, the tensors, and what a dump of MODEL would need in memory."""
    from weights.inspect import show

    show(model, as_json=as_json)


if __name__ == "__main__":
    run(main)
