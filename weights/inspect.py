"""What is in a checkpoint, for a person or as JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from weights import names
from weights.checkpoint import Checkpoint
from weights.config import Config
from weights.opening import open_checkpoint


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Config, tensors and sizes as JSON values; sizes in bytes."""
    config = checkpoint.config
    tensors = [
        {
            "name": name,
            "shape": list(checkpoint.shape(name)),
            "dtype": str(checkpoint.dtype(name)),
            "stored_as": checkpoint.stored_as(name),
        }
        for name in checkpoint.tensor_names
    ]
    return {
        "name": checkpoint.name,
        "config": config.to_json(),
        "files": checkpoint.identity(),
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "tensors": tensors,
        "largest_layer_bytes": {name: layer_parameters(config) * size for name, size in _SIZES.items()},
        "expert_bytes": {name: expert_parameters(config) * size for name, size in _SIZES.items()},
    }


_SIZES = {"float16": 2, "float32": 4, "float64": 8}


def layer_parameters(config: Config) -> int:
    """How many numbers the largest layer holds, without its experts."""
    return max(
        sum(math.prod(row.shape(config)) for row in names.layer_rows(config, layer))
        for layer in range(config.num_hidden_layers)
    )


def expert_parameters(config: Config) -> int:
    """How many numbers one expert holds; 0 in a dense model."""
    return sum(math.prod(row.shape(config)) for row in names.EXPERTS) if config.num_experts else 0


def show(model: str, *, as_json: bool) -> None:
    """Print what `describe` found."""
    checkpoint = open_checkpoint(model)
    facts = describe(checkpoint)
    if as_json:
        print(json.dumps(facts))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    size = f"{facts['parameters']:,} parameters in {len(facts['files'])} file(s)"
    console.print(f"[b]{escape(facts['name'])}[/b]: {size}")
    for key, value in facts["config"].items():
        console.print(f"  {key} = {_brief(value)}", highlight=False, markup=False)
    table = Table("tensor", "shape", "stored as")
    for row in _grouped(checkpoint):
        table.add_row(*map(escape, row))
    console.print(table)
    needs = ", ".join(f"{size / 1e6:,.1f} MB in {name}" for name, size in facts["largest_layer_bytes"].items())
    console.print(f"A dump holds two layers at a time, one in use and one being read. One layer: {needs}.")
    if checkpoint.config.num_experts:
        needs = ", ".join(f"{size / 1e6:,.1f} MB in {name}" for name, size in facts["expert_bytes"].items())
        console.print(f"Beside them two experts, read only if a token is routed to them. One expert: {needs}.")


def _brief(value: Any) -> str:
    """A list of equal values in one word."""
    if isinstance(value, list) and len(value) > 4 and len(set(map(str, value))) == 1:
        return f"{len(value)} × {value[0]}"
    return str(value)


def _grouped(checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    """One line a kind of tensor: layers and experts are told together."""
    lines: dict[str, tuple[str, set[str]]] = {}
    for name in checkpoint.tensor_names:
        label = re.sub(r"\.\d+\.", ".*.", name)
        lines.setdefault(label, (str(list(checkpoint.shape(name))), set()))[1].add(checkpoint.stored_as(name))
    return [(label, shape, ", ".join(sorted(dtypes))) for label, (shape, dtypes) in lines.items()]
