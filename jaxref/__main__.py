"""`python -m jaxref`: dump every intermediate of a forward pass; print the table of stages."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxref.command import run_dump
from jaxref.options import prompt_options, read_prompt, run_options
from weights.cli import run

if TYPE_CHECKING:
    from jaxref.dump import Job, Progress, Report

DTYPES = ["float32", "float64", "float16", "bfloat16"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jaxref", prog_name="jaxref")
def main() -> None:
    """The reference forward pass of Qwen2 and Qwen3, with every intermediate."""


@main.command()
@run_options
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option(
    "--activations",
    type=click.Choice(["exact", "stored"]),
    default="exact",
    show_default=True,
    help="stored: round them before each product as the types of a GGUF's weights make an engine do.",
)
def dump(**options: Any) -> None:
    """Run MODEL over a prompt and write every stage of every layer below --output.

    MODEL is a folder, a .safetensors file or an id in the local Hugging Face cache; without it, a tiny built-in model.
    """
    run_dump(options, _write)


def _write(job: Job, device: str, progress: Progress) -> Report:
    from jaxref.dump import dump as write

    use_compilation_cache()
    return write(replace(job, device=find_device(device)), progress=progress)


def find_device(name: str) -> Any:
    """The CPU or the first CUDA device as JAX knows it. Raises `UserError` where there is none."""
    import jax

    from weights import UserError

    try:
        return jax.devices(name)[0]
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"--device {name}: JAX finds none ({reason}); pip install 'jaxref[cuda12]' brings CUDA"
        ) from None


def use_compilation_cache() -> None:
    """Keep compiled stages between runs, in a folder that is safe to delete; JAX_COMPILATION_CACHE_DIR overrides it."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxref" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@main.command()
@prompt_options
@click.option("--max-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def generate(max_tokens: int, dtype: str, device: str, as_json: bool, **options: Any) -> None:
    """Continue a prompt greedily with MODEL and print the token ids and the text."""
    request = read_prompt(**options)
    from jaxref.generate import generate as decode
    from jaxref.precision import numerics_of

    numerics, found = numerics_of(dtype), find_device(device)
    use_compilation_cache()
    with numerics.context():
        steps = decode(request.checkpoint, request.tokens, numerics, max_tokens, device=found)
        ids = [step.token for step in steps]
    text = request.tokenizer.decode(ids) if request.tokenizer else None
    if as_json:
        click.echo(json.dumps({"prompt_tokens": request.tokens, "tokens": ids, "text": text}))
    else:
        click.echo(",".join(map(str, ids)) + ("" if text is None else f"\n{text!r}"))


@main.command()
@click.argument("model", required=False)
def stages(model: str | None) -> None:
    """Print the table of stages; with MODEL, those that it has, with their shapes."""
    from jaxref import show
    from weights import open_checkpoint

    show.print_stages(None if model is None else open_checkpoint(model).config)


if __name__ == "__main__":
    run(main)
