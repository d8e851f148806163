"""The page of a tiny model with a planted fault, for the tests and for the README's picture."""

from __future__ import annotations

from pathlib import Path

from oracle import compare
from oracle.page import write_html
from oracle.result import Result
from tests.conftest import prompt
from tests.oracle.faults import model, run, with_layer, write, write_reference

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
