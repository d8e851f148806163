"""An engine's tree as arrays in the contract's shapes, whatever its layout, and what its numerics are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxref.activations import coarsest_activation
from jaxref.stage import axis_size
from jaxref.stages import STAGES, Key
from oracle.conventions import check_positions, of_model, recognise
from oracle.coordinates import heads_of
from oracle.layouts import View, single_position, view
from oracle.same import stated_weights
from oracle.sources import Given
from oracle.trees import Tree
from weights import Checkpoint, UserError
from weights.errors import listed
from weights.identity import differing

# As the command line names them: what the engine computes in.
_SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8": "q8"}
NUMERICS = _SHORT | {name: name for name in _SHORT.values()}
# Stages whose size tells how many positions a tree holds, in the order of trust.
_COUNTING = (
    "embedding",
    "attn_norm",
    "post_attn_residual",
    "ffn_norm",
    "post_ffn_residual",
    "qkv_matmul",
    "final_norm",
)


@dataclass(frozen=True)
class Value:
    """A stage's rows at some positions. `through`: the stages that were computed since the tree lacks them."""

    array: np.ndarray  # the contract's shape with len(positions) rows
    positions: tuple[int, ...]
    through: tuple[str, ...] = ()


def _apart(stated: Sequence[int], given: Sequence[int]) -> str:
    """Where two different lists of tokens part."""
    place = next((i for i, (one, other) in enumerate(zip(stated, given, strict=False)) if one != other), None)
    if place is None:
        return f"{len(stated)} of them, {len(given)} were given"
    return f"{stated[place]} at position {place}, where {given[place]} was given"


class EngineTree:
    """The tree under test beside the checkpoint it should have computed. Raises `UserError` where they do not fit."""

    def __init__(
        self,
        given: Given,
        checkpoint: Checkpoint,
        tokens: Sequence[int] | None = None,
        positions: tuple[int, ...] | None = None,
        role: str = "engine",
    ) -> None:
        self.tree = Tree(given, role, positions)
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.notes: list[str] = []
        stated, where = self.tree.tokens, self.tree.folder
        if stated is not None and tokens is not None and list(tokens) != stated:
            raise UserError(f"{where}: its manifest holds other tokens than the ones given: {_apart(stated, tokens)}")
        self.tokens = list(tokens) if tokens is not None else stated
        if outside := [token for token in self.tokens or () if not 0 <= token < self.config.vocab_size]:
            last = self.config.vocab_size - 1
            raise UserError(f"{where}: its token ids {outside[:8]} are outside the model's vocabulary, 0 to {last}")
        made_of = stated_weights(self.tree)
        if made_of and (others := differing(checkpoint.identity(), made_of)):
            words = f"{where} was made from other bytes of {listed(others)} than the model's"
            self.notes.append(f"weights differ: {words}")
        self.notes += of_model(self.tree, self.config)
        self.keys = [key for key in self.tree.files if STAGES[key[1]].exists(self.config, key[0])]
        self.notes += self._left_out()
        self.count = len(self.tokens) if self.tokens else self._count()
        self.dims: Mapping[str, int] = self.config.dims() | {"S": self.count}
        check_positions(self.tree, self.dims)
        self._single = single_position(self.tree, self.dims)
        self._script = recognise(self.tree)

    def _left_out(self) -> Iterator[str]:
        """Notes on the files that are not replayed."""
        known, places = set(self.keys), defaultdict(list)
        for layer, stage in self.tree.files:
            if (layer, stage) not in known:
                places[stage].append("the model" if layer is None else f"layer-{layer}")
        for stage, where in places.items():
            yield f"{stage} is no stage of this model in {listed(where)}"
        if self.tree.unknown:
            yield f"{self.tree.folder}: no stages, so not replayed: {', '.join(self.tree.unknown[:8])}"

    def _count(self) -> int:
        for stage in _COUNTING:
            for key in self.keys:
                if key[1] == stage:
                    width = axis_size(STAGES[stage].axes[1], self.config.dims())
                    return self._counted(self.tree.open(key).values.size // width or 1)
        raise UserError(f"{self.tree.folder}: no stage there tells the number of tokens; give --tokens or --prompt")

    def _counted(self, rows: int) -> int:
        """As many tokens as rows, if --positions does not say that there were more."""
        if max(self.tree.asked_positions or (0,)) >= rows:
            raise UserError(f"{self.tree.folder}: with --positions the files do not tell the prompt; give --tokens too")
        return rows

    def numerics(self, asked: str | None) -> str:
        """The engine's numerics ("float32", "float16", "bfloat16", "q8"): asked for, stated, or guessed and noted."""
        if asked is not None:
            return NUMERICS[asked]
        dtype, activations = self.tree.stated_dtype, self.tree.stated_activations
        if activations == "q8" or dtype in ("float16", "bfloat16"):
            return "q8" if activations == "q8" else str(dtype)
        if dtype is not None:
            return "float32"
        guess = self.tree.guess_dtype()
        if guess not in ("float16", "bfloat16"):
            if coarsest_activation(self.checkpoint) == "q8":
                self.notes.append(
                    "the weights are quantised: activations are taken to be rounded to int8 blocks (--numerics)"
                )
                return "q8"
            guess = "float32"
        self.notes.append(f"the values are those of {guess} (--numerics)")
        return guess

    def value(self, key: Key) -> Value | None:
        """A stage of the tree; None where it has none. Raises `UserError` for a file whose size fits nothing."""
        if key not in self.tree.files:
            return None
        stage = STAGES[key[1]]
        dims = self._dims_of(key)
        found = view(self.tree, stage, self.tree.open(key), dims, self._single)
        heads = heads_of(stage, self.dims)
        if self._script is not None and self._script.head_major and stage.name in ("q_post_rope", "k_post_rope"):
            found = found.head_major(heads or 1)
        return Value(contract_array(found, stage.name, dims), found.positions)

    def _dims_of(self, key: Key) -> Mapping[str, int]:
        """The dimensions, with as many experts a token as the engine wrote ids where it chose another number."""
        if not any("A" in axis for axis in STAGES[key[1]].axes):
            return self.dims
        ids = (key[0], "moe_router_indices")
        size = self.tree.open(ids).values.size if ids in self.tree.files else 0
        if not size or size in (self.dims["A"], self.dims["A"] * self.count):
            return self.dims
        stated = len(self.tree.stated_positions or ()) or (self.count if size % self.count == 0 else 1)
        return {**self.dims, "A": size // stated} if 0 < size // stated <= self.dims["E"] else self.dims


def contract_array(found: View, stage: str, dims: Mapping[str, int]) -> np.ndarray:
    """A view's values as float64 in the contract's shape; a decode step's scores keep their fewer keys."""
    rows = len(found.positions)
    if found.heads_first:
        return np.asarray(found.block(0, slice(None)), np.float64)
    if STAGES[stage].axes[0] == "H":
        return np.asarray(found.values, np.float64)
    sizes = [axis_size(axis, dims) for axis in STAGES[stage].axes[1:]]
    assert math.prod(sizes) == found.columns
    return np.asarray(found.values, np.float64).reshape(rows, *sizes)
