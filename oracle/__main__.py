"""`python -m oracle`: compare trees of intermediates, and single files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jaxref.command import run_dump
from jaxref.options import run_options
from oracle.replay_command import replay_options, run_replay
from weights import UserError
from weights.cli import run

if TYPE_CHECKING:
    from jaxref.dump import Job, Progress, Report

FOLDER = click.Path(path_type=Path)
SHORT = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}
DTYPES = list(SHORT.values())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="jaxref", prog_name="oracle")
def main() -> None:
    """Verdicts over trees of intermediates: which one is wrong, and where it begins."""


@main.command()
@click.argument("reference", type=FOLDER)
@click.argument("test", type=FOLDER)
@click.option("--hf", type=FOLDER, help="A third tree in TEST's dtype, the yardstick: how far rounding alone leads.")
@click.option(
    "--tolerance", "tolerances", multiple=True, help="stage:value (relative L2) or regex:predicate; first match wins."
)
@click.option("--min-cosine", type=click.FloatRange(-1, 1), help="Judge every stage by its cosine alone.")
@click.option(
    "--max-ratio",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="How many times the yardstick's error TEST may have.",
)
@click.option("--allow-missing", multiple=True, metavar="REGEX", help="Stages (or layer-N/stage) that may be missing.")
@click.option("--accept-layout", is_flag=True, help="Do not fail where q or k lies head-major.")
@click.option(
    "--test-dtype",
    type=click.Choice([*DTYPES, "q8", *SHORT]),
    callback=lambda context, option, name: SHORT.get(name, name),
    help="TEST's dtype, where its manifest does not say; q8: float32 with activations in int8 blocks.",
)
@click.option("--positions", help="The positions of TEST's rows, like 5,6, where its manifest does not say.")
@click.option("--json", "as_json", is_flag=True, help="JSON records on stdout, one a line, the summary last.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write a JUnit report for CI to this file.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page to look at: one file, no network needed.")
def compare(as_json: bool, junit: Path | None, html: Path | None, **options: Any) -> int:
    """Compare the tree TEST with the tree REFERENCE, stage by stage.

    A tree is a folder of .bin (APRT), .npy or .safetensors files, or one .safetensors or .npz file with names like
    layer-0/attn_norm; REFERENCE needs the manifest of a dump.

    Exit 0: all agree. 1: something diverges. 2: wrong use, or stages are missing.
    """
    from oracle import page, records, report

    if html is not None:
        page.check_html(html)  # before anything long
    if junit is not None:
        records.check_junit(junit)
    result = _compare(options)
    if html is not None:
        page.write_html(result, html)
    if junit is not None:
        records.write_junit(result, junit)
    if as_json:
        records.print_json(result)
    else:
        report.print_report(result)
    return result.exit_code


def _compare(options: dict[str, Any]) -> Any:
    from oracle.comparer import compare as run_compare
    from oracle.rules import Options
    from oracle.tolerances import compile_missing, parse_tolerance

    reference, test, hf = (options.pop(name) for name in ("reference", "test", "hf"))
    tolerances = tuple(parse_tolerance(text) for text in options.pop("tolerances"))
    missing = compile_missing(options.pop("allow_missing"))
    positions = _positions(options.pop("positions"))
    return run_compare(reference, test, hf, Options(tolerances, allow_missing=missing, positions=positions, **options))


def _positions(text: str | None) -> tuple[int, ...] | None:
    from jaxref.selection import whole_number

    if text is None:
        return None
    try:
        positions = tuple(whole_number(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"positions {text!r}: a comma list like 5,6 was expected") from None
    if len(set(positions)) < len(positions):
        raise UserError(f"positions {text!r}: one of them is there twice")
    return positions


@main.command()
@replay_options
def localize(**options: Any) -> int:
    """Find every stage that ENGINE_TREE computes wrongly from its own inputs, whatever it inherited.

    MODEL is the checkpoint that the engine ran, ENGINE_TREE a folder of .bin (APRT), .npy or .safetensors files, or one
    .safetensors or .npz file with names like layer-0/attn_norm.

    Exit 0: clean. 1: faulty. 2: wrong use, or stages cannot be replayed.
    """
    options["positions"] = _positions(options["positions"])
    return run_replay(options, explained=False)


@main.command()
@replay_options
def explain(**options: Any) -> int:
    """As `localize`, and say why: hypotheses are tried on ENGINE_TREE's own tensors.

    One is named only where it alone leaves nothing but rounding. Exit codes are those of `localize`.
    """
    options["positions"] = _positions(options["positions"])
    return run_replay(options, explained=True)


@main.command()
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@click.option("--limit", type=click.IntRange(0), default=10, show_default=True, help="How many differences to list.")
@click.option("--json", "as_json", is_flag=True, help="The schema of `apr diff --values --json`.")
def diff(a: Path, b: Path, limit: int, as_json: bool) -> None:
    """Compare two tensor files value by value, whatever their stages are called."""
    from oracle.diff import diff as run_diff
    from oracle.report import print_diff

    found = run_diff(a, b, limit)
    if as_json:
        click.echo(json.dumps(found, allow_nan=False))
    else:
        print_diff(found)


@main.command()
@click.argument("model")
@click.argument("tensor")
@click.argument("engine_file", type=FOLDER, required=False)
@click.option("--rows", metavar="START..END", help="Which rows ENGINE_FILE has.  [default: all, or the first ones]")
@click.option("--output", type=FOLDER, help="Write the tensor as the checkpoint has it, dequantised, to this .bin.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def weight(
    model: str, tensor: str, engine_file: Path | None, rows: str | None, output: Path | None, as_json: bool
) -> int:
    """Compare one TENSOR of MODEL with what an engine unpacked of it, and say how it was misread.

    TENSOR is its name in Hugging Face's or in GGUF's spelling, ENGINE_FILE its values [out, in] as .bin (APRT), .npy or
    .safetensors; in a .safetensors or .npz file of several it has that name. TENSOR may be `all`: each that such a file
    has.

    Exit 0: the same, or rounded. 1: it differs. 2: wrong use, or of `all` some are missing.
    """
    from oracle.weight_command import run_weight

    return run_weight(model, tensor, engine_file, rows, output, json_wanted=as_json)


@main.command()
@run_options
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float16", show_default=True)
def hf(**options: Any) -> None:
    """Run MODEL by transformers' own modules and write every stage, as `python -m jaxref dump` does."""
    run_dump(options, _write_hf)


def _write_hf(job: Job, device: str, progress: Progress) -> Report:
    try:
        from oracle.hf_dump import dump_hf
    except ImportError as error:
        raise UserError(f"the Hugging Face path needs torch ({error}): pip install 'jaxref[hf]'") from None
    return dump_hf(job, device, progress)


@main.command()
@run_options
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), default="float32", show_default=True)
@click.option(
    "--fault", default="rope_theta", show_default=True, help="A name that `explain` may give; `list` prints them."
)
@click.option("--at", default="all", show_default=True, help="The layers that have it: all, START..END or 0,3,7.")
def plant(fault: str, at: str, **options: Any) -> None:
    """Write the tree of an engine that computes one thing wrongly, to try `compare`, `localize` and `explain` on."""
    if fault == "list":
        from oracle.plant import names

        click.echo("\n".join(names()))
        return
    run_dump(options, partial(_write_planted, fault, at))


def _write_planted(fault: str, at: str, job: Job, device: str, progress: Progress) -> Report:
    from jaxref.devices import on_cpu
    from jaxref.selection import parse_layers
    from oracle.plant import Plant, dump_planted

    layers = parse_layers(at, job.checkpoint.config.num_hidden_layers)
    with on_cpu():
        return dump_planted(job, Plant(fault, layers), progress, platform="cpu")


@main.command("llama-cpp")
@run_options
def llama_cpp(**options: Any) -> None:
    """Run MODEL, a GGUF file, by llama.cpp on the CPU and write every stage it shows, as `jaxref dump` does."""
    from oracle.engines.llama_dump import shown

    run_dump(options | {"dtype": "float32"}, _write_llama_cpp, shown)


def _write_llama_cpp(job: Job, device: str, progress: Progress) -> Report:
    from oracle.engines.llama_dump import dump_llama_cpp

    return dump_llama_cpp(job, device, progress)


if __name__ == "__main__":
    run(main)
