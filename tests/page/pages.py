"""The page of a tiny model with a planted fault, for the tests and for the README's picture."""

from __future__ import annotations

from pathlib import Path

from jaxref.dump import Job
from jaxref.precision import numerics_of
from jaxref.selection import Selection, parse_layers, parse_stages
from oracle import compare
from oracle.explain import explain
from oracle.page import write_html, write_told
from oracle.plant import Plant, dump_planted
from oracle.result import Result
from tests.conftest import prompt
from tests.oracle.faults import model, run, with_layer, write, write_reference
from weights import open_checkpoint
from weights.tiny import tiny_config, write_random

FAULTY = (3, "qkv_bias")


def planted(folder: Path, layers: int = 5, tokens: int = 23, yardstick: bool = True) -> Result:
    """Qwen2 in float16 whose k loses its bias in layer 3, against float64, with a clean float16 run beside."""
    ids = prompt(tokens, 272)
    params, config = model("qwen2", num_hidden_layers=layers)
    at = FAULTY[0]
    faulty = with_layer(params, at, k_bias=0 * params.layers[at].k_bias)
    names = {name: folder / name for name in ("truth", "engine-trace", "yardstick")}
    exact = run(params, config, ids, "float64")
    write_reference(names["truth"], exact, config, ids, "float64", producer="jaxref")
    write(names["engine-trace"], run(faulty, config, ids, "float16"))
    if not yardstick:
        return compare(names["truth"], names["engine-trace"])
    half = run(params, config, ids, "float16")
    write_reference(names["yardstick"], half, config, ids, "float16", producer="transformers")
    return compare(names["truth"], names["engine-trace"], names["yardstick"])


def page(folder: Path, **options: int) -> Path:
    """The same as a page."""
    path = folder / "report.html"
    write_html(planted(folder, **options), path)
    return path


def explained(folder: Path, arch: str = "qwen2", fault: str = "kv_heads_modulo", at: int = 2) -> Path:
    """The page of an explain: a fault of the table, planted in one layer."""
    write_random(folder / "model", tiny_config(arch, None, 3), seed=5)
    checkpoint, ids = open_checkpoint(folder / "model"), prompt(19, 272)
    selection = Selection(
        checkpoint.config, len(ids), parse_stages("all", checkpoint.config), parse_layers("all", 3), "all"
    )
    job = Job(checkpoint, ids, selection, numerics_of("float16"), folder / "engine")
    dump_planted(job, Plant(fault, (at,)), lambda layer: None)
    path = folder / "told.html"
    write_told(explain(checkpoint, folder / "engine"), path)
    return path
