"""`python -m jaxref`: dump every intermediate of a forward pass; print the table of stages."""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxref.command import run_dump
from jaxref.options import prompt_options, run_options
from weights.cli import run
from weights.errors import UserError

if TYPE_CHECKING:
    from jaxref.dump import Job, Progress, Report
    from jaxref.memory import MemoryPlan

DTYPES = ["float32", "float64", "float16", "bfloat16"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jaxref", prog_name="jaxref")
def main() -> None:
    """The reference forward pass of Qwen2 and Qwen3, with every intermediate."""


@main.command()
@run_options
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="float64 is the truth; the half precisions round where Hugging Face rounds.",
)
@click.option(
    "--activations",
    type=click.Choice(["exact", "stored"]),
    default="exact",
    show_default=True,
    help="stored: round them before each product as the types of a GGUF's weights make an engine do.",
)
@click.option("--mesh", help="Several devices as one: tp=N splits heads, feed-forward and vocabulary among N.")
@click.option("--max-device-memory", help="For example 8GB or 512MiB.  [default: 90 % of what is free on a GPU]")
@click.option("--hosts", help="Several processes as one mesh: ADDRESS:PORT,COUNT,INDEX, or auto under Slurm or MPI.")
def dump(mesh: str | None, max_device_memory: str | None, hosts: str | None, **options: Any) -> None:
    """Run MODEL over a prompt and write every stage of every layer below --output.

    MODEL is a folder, a .safetensors or .gguf file, or an id in the local Hugging Face cache; without it, a tiny
    built-in model.
    """
    placement = Placement(options["device"], mesh, max_device_memory, hosts)
    run_dump(options, placement.write, planned=placement.memory)


@dataclass(frozen=True)
class Placement:
    """Where a dump runs, as people type it."""

    device: str
    mesh: str | None
    limit: str | None
    hosts: str | None

    def write(self, job: Job, device: str, progress: Progress) -> Report:
        """Find the devices and write the tree."""
        from jaxref.devices import find_devices, parse_size, prepare
        from jaxref.dump import dump as write
        from jaxref.hosts import joined, parse_hosts
        from jaxref.mesh import here, make_mesh, parse_mesh

        limit = None if self.limit is None else parse_size(self.limit)
        sizes = None if self.mesh is None else parse_mesh(self.mesh)
        hosts = None if self.hosts is None else parse_hosts(self.hosts)
        if hosts is not None and sizes is None:
            raise UserError("--hosts: needs --mesh, which says how the model is split; for example --mesh tp=8")
        prepare(device)
        use_compilation_cache()
        with joined(hosts) as crew:
            devices = find_devices(device)
            mesh = None if sizes is None else make_mesh(sizes, devices)
            job = replace(job, device=here(devices), mesh=mesh, max_memory=limit, crew=crew)
            return write(job, progress=progress)

    def memory(self, job: Job) -> MemoryPlan:
        """What the job will need on each device. Raises `UserError` where that is more than the limit."""
        from jaxref.devices import parse_size
        from jaxref.memory import plan_for
        from jaxref.mesh import TENSOR, parse_mesh

        mesh = None if self.mesh is None else parse_mesh(self.mesh)
        alone = self.device == "cuda" and (mesh is None or mesh[TENSOR] == 1)  # on a card of the last years
        plan = plan_for(job.checkpoint, job.selection, replace(job.numerics, gpu=alone), mesh, self.device)
        return plan.fit(None if self.limit is None else parse_size(self.limit))


def use_compilation_cache() -> None:
    """Keep compiled stages between runs, in a folder that is safe to delete; JAX_COMPILATION_CACHE_DIR overrides it."""
    import warnings

    import jax

    # A damaged entry is compiled anew; JAX would tell of each in two lines.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxref" / "xla"
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
            click.echo(f"warning: no cache for what is compiled, so every run compiles anew: {error}", err=True)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@main.command()
@prompt_options
@click.option("--max-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--ignore-eos", is_flag=True, help="Go on after a token that ends the text.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def generate(max_tokens: int, dtype: str, device: str, ignore_eos: bool, as_json: bool, **options: Any) -> None:
    """Continue a prompt greedily with MODEL and print the token ids and the text."""
    from jaxref.asked import read_prompt
    from jaxref.devices import find_devices, out_of_memory_in_words, prepare
    from jaxref.generate import generate as decode
    from jaxref.precision import numerics_of

    request = read_prompt(**options)
    tokenizer = request.checkpoint.tokenizer()
    prepare(device)
    found = find_devices(device)[0]
    numerics = numerics_of(dtype).on(found)
    use_compilation_cache()
    ends = frozenset() if ignore_eos or tokenizer is None else tokenizer.ends()
    steps, ids = decode(request.checkpoint, request.tokens, numerics, max_tokens, device=found), []
    with closing(steps), out_of_memory_in_words(), numerics.context():
        for step in steps:
            ids.append(step.token)
            if step.token in ends:
                break
    text = tokenizer.decode(ids) if tokenizer else None
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
