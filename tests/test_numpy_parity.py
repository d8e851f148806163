"""float64 against an independent NumPy forward, written from the papers: the same numbers to 1e-12."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxref
from tests.conftest import ZOO, prompt
from tests.numpy_reference import forward as numpy_forward
from tests.trees import distances
from weights import open_checkpoint

CASES = [(name, count) for name in ZOO for count in ((7,) if ZOO[name][1] else (1, 7, 300))]


@pytest.mark.parametrize(("name", "count"), CASES)
def test_float64_agrees_with_numpy(zoo, name: str, count: int) -> None:
    folder = zoo(name)
    config = json.loads((folder / "config.json").read_text())
    tokens = prompt(count, config["vocab_size"])
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    reference = numpy_forward(tensors, config, tokens)
    checkpoint = open_checkpoint(folder)
    ours = jaxref.forward(checkpoint.params(), np.asarray(tokens), checkpoint.config, "float64")
    found = distances(ours, reference)
    assert max(found.values()) <= 1e-12, max(found.items(), key=lambda item: item[1])
