"""How much memory a run needs on one device, computed from the config and the number of tokens before it starts.

Dimension key: S positions, D hidden_size, the rest as in `jaxref/stages.py`. All sizes are bytes on one device; of a
mesh each device holds its share of the parameters, and activations are counted as if each held all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from jaxref.experts import CHUNK_ROWS
from jaxref.mesh import TENSOR, split_axis
from jaxref.model import head_rows, query_rows
from jaxref.precision import Numerics
from jaxref.selection import Selection
from jaxref.stage import Stage
from jaxref.stages import STAGES, inputs_of, stages_of
from weights import Checkpoint, Config, UserError
from weights.names import EXPERTS, TensorRow, layer_rows

WAITING = 64 << 20  # bytes of values that may wait for the disk, and lie on the device until then
GPU_WORKSPACE = 64 << 20  # cuBLAS takes 32 MiB on the newest cards for a product, and two may overlap
HEAD = "lm_head.weight"
BLOCKWISE = ("attn_scores", "attn_softmax")  # made in blocks of query rows


@dataclass(frozen=True)
class MemoryPlan:
    """What a run holds on a device: `parameters` of so many layers and experts at once, and what is computed there."""

    layer: int  # parameters of the largest layer, without its experts
    expert: int  # parameters of one expert
    model: int  # parameters of all layers, all experts and the head
    head: int  # one block of the output projection
    activations: int  # every stage of one layer, and what the largest of them needs beside its operands
    logits: int  # what the head computes
    waiting: int  # values on their way to the host
    read_ahead: bool = True  # the next layer is loaded under the present one

    @property
    def needed(self) -> int:
        """The most that is held at a time while layers are streamed."""
        copies = 2 if self.read_ahead else 1
        # The loop over the experts holds one that is done until it has the next.
        layers = copies * self.layer + (copies + 1) * self.expert + self.activations
        return max(layers, copies * self.head + self.logits) + self.waiting

    def to_json(self) -> dict[str, Any]:
        """The plan for machines."""
        return {**asdict(self), "needed": self.needed}

    def __str__(self) -> str:
        held = "two layers" if self.read_ahead else "one layer"
        experts = f", experts of {size(self.expert)}" if self.expert else ""
        return (
            f"memory on a device: {size(self.needed)} at most; {held} of {size(self.layer)}{experts},"
            f" blocks of the head of {size(self.head)}, {size(self.activations)} of activations"
        )

    @property
    def resident(self) -> int:
        """The same with all parameters kept."""
        return self.model + max(self.activations, self.logits) + self.waiting

    def fit(self, limit: int | None) -> MemoryPlan:
        """The plan, without reading ahead where two layers are too many. Raises `UserError` where one is."""
        slow = replace(self, read_ahead=False)
        if limit is None or self.needed <= limit:
            return self
        if slow.needed <= limit:
            return slow
        raise UserError(
            f"one layer at a time needs {size(slow.needed)} on a device ({size(self.layer)} of parameters,"
            f" {size(self.activations)} of activations, {size(self.waiting)} on their way to the disk),"
            f" {size(limit)} may be used: take fewer tokens or stages, more --max-device-memory, or --mesh"
        )


def size(count: int) -> str:
    """Bytes in MB or GB, for messages."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def plan_for(
    checkpoint: Checkpoint, selection: Selection, numerics: Numerics, mesh: Mapping[str, int] | None, platform: str
) -> MemoryPlan:
    """What a run of a checkpoint needs on each device of a platform: on one, or on each of a mesh of such axes."""
    ways = 1 if mesh is None else mesh[TENSOR]
    stored = checkpoint.widest_dtype() if numerics.gpu else None  # a thousand names are looked up for it
    return plan_memory(selection, numerics, ways=ways, platform=platform, stored=stored)


def plan_memory(
    selection: Selection,
    numerics: Numerics,
    *,
    ways: int = 1,
    platform: str = "cpu",
    stored: np.dtype[Any] | None = None,
) -> MemoryPlan:
    """What a run needs on each of `ways` devices of a platform, "cpu" or another.

    `stored` is the dtype of the checkpoint where one GPU takes parameters as they are.
    """
    workspace = 0 if platform == "cpu" else GPU_WORKSPACE
    kept = numerics.compute if stored is None else replace(numerics, gpu=True).kept(stored)
    config, count = selection.config, max(1, selection.count)
    kinds = sorted({config.is_moe(i): i for i in reversed(range(config.num_hidden_layers))}.values())
    plain = {config.is_moe(i): _share(layer_rows(config, i), config, kept, ways) for i in kinds}
    expert = _share(EXPERTS, config, kept, ways) if config.num_experts else 0
    routed = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
    whole, block = ((rows, config.hidden_size) for rows in (config.vocab_size, head_rows(config, platform)))
    layers = (config.num_hidden_layers - routed) * plain.get(False, 0) + routed * plain.get(True, 0)
    layers += routed * config.num_experts * expert
    ends = config.hidden_size * kept.itemsize + _split_bytes(HEAD, whole, config, kept, ways)
    return MemoryPlan(
        layer=max(plain.values()),
        expert=expert,
        model=layers + ends,
        head=_split_bytes(HEAD, block, config, kept, ways),
        activations=max(_layer_activations(config, i, count, numerics, kept) for i in kinds) + workspace,
        logits=_head_activations(selection, numerics, kept, platform) + workspace,
        waiting=min(WAITING, selection.size(numerics.compute.itemsize)),
    )


def trace_bytes(config: Config, count: int, numerics: Numerics) -> int:
    """Bytes of every stage of every layer, for all positions."""
    layers = [*range(config.num_hidden_layers), None]
    return numerics.compute.itemsize * sum(
        math.prod(stage.shape(config, count)) for layer in layers for stage in stages_of(config, layer)
    )


def _share(rows: Iterable[TensorRow], config: Config, kept: np.dtype[Any], ways: int) -> int:
    return sum(_split_bytes(row.name, row.shape(config), config, kept, ways) for row in rows)


def _split_bytes(name: str, shape: tuple[int, ...], config: Config, kept: np.dtype[Any], ways: int) -> int:
    """A parameter's bytes on one device."""
    count = math.prod(shape) * kept.itemsize
    return count if split_axis(name, shape, config, ways) is None else count // ways


def _layer_activations(config: Config, layer: int, count: int, numerics: Numerics, kept: np.dtype[Any]) -> int:
    """Every stage of a layer of `count` positions, the hidden states beside it, and the work of the largest stage."""
    stages = [stage for stage in stages_of(config, layer) if "E" not in stage.axes or stage.name == "moe_router_logits"]
    held = sum(_elements(stage, config, count) for stage in stages) * numerics.compute.itemsize
    hidden = 4 * count * config.hidden_size * numerics.compute.itemsize
    # Products of q, k and v before they are rounded.
    sums = math.prod(STAGES["qkv_matmul"].shape(config, count)) * numerics.sums.itemsize
    return held + hidden + sums + max(stage_work(stage, config, layer, count, numerics, kept) for stage in stages)


def stage_work(
    stage: Stage, config: Config, layer: int | None, count: int, numerics: Numerics, kept: np.dtype[Any]
) -> int:
    """What a stage's program may need beside its inputs and outputs: another copy of all of them in its widest dtype.

    Of parameters, which lie on the device in the dtype `kept`, only where they have to be widened.
    """
    upstream = [key for key in inputs_of(stage, config, layer) if not isinstance(key, str)]
    elements = _elements(stage, config, count) + sum(_elements(STAGES[name], config, count) for _, name in upstream)
    if "moe_router_logits" in stage.inputs:
        elements *= 2  # the logits are sorted beside their places
    if numerics.sums != kept:
        elements += sum(_parameters(field, stage, config, layer or 0) for field in stage.params)
    return elements * max(numerics.sums.itemsize, numerics.wide.itemsize)


def _parameters(field: str, stage: Stage, config: Config, layer: int) -> int:
    if field in ("head", "embed_tokens"):
        return head_rows(config) * config.hidden_size
    rows = EXPERTS if stage.per_expert else layer_rows(config, layer)
    return sum(math.prod(row.shape(config)) for row in rows if row.field == field)


def _elements(stage: Stage, config: Config, count: int) -> int:
    """How many numbers of a stage lie on the device at a time."""
    if stage.name in BLOCKWISE:
        heads = config.num_attention_heads
        return heads * query_rows(heads, count, count) * count
    if stage.name.startswith("moe_expert_"):  # of one expert at a time, in chunks
        return min(count, CHUNK_ROWS) * (config.moe_intermediate_size if stage.axes[-1] == "M" else config.hidden_size)
    return math.prod(stage.shape(config, count))


def _head_activations(selection: Selection, numerics: Numerics, kept: np.dtype[Any], platform: str) -> int:
    config, count = selection.config, selection.count
    rows, made = selection.rows(STAGES["lm_head"]), head_rows(config, platform)
    x, block = count * config.hidden_size, made * (count if rows is None else len(rows))
    if numerics.sums != kept:
        block += made * config.hidden_size
    return 3 * x * numerics.compute.itemsize + 2 * (x + block) * numerics.sums.itemsize
