"""A dump's tree in memory: what `python -m jaxref dump` would write, for a test or a notebook that wants no files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxref.asked import token_ids
from jaxref.dump import Job, begun, feeder
from jaxref.mesh import placed
from jaxref.named import Named
from jaxref.named_tree import NamedTree, Open
from jaxref.pieces import Piece
from jaxref.precision import numerics_of
from jaxref.selection import Selection, select, take_rows
from jaxref.stages import STAGES, Key
from jaxref.tree import SCHEMA, stage_path
from weights import Checkpoint, UserError, open_checkpoint

if TYPE_CHECKING:
    from jaxref.asked import Tokens
    from jaxref.precision import Device
    from jaxref.reader import Reader

NOWHERE = Path("memory")  # where a job writes that writes nothing


def make_tree(
    model: str | Path | Checkpoint,
    prompt: str | Tokens,
    dtype: str = "float32",
    *,
    stages: str = "all",
    layers: str = "all",
    positions: str | None = None,
    activations: str = "exact",
    device: str | Device | None = None,
) -> NamedTree:
    """Compute the tree that `python -m jaxref dump` writes, with its options by their names, and keep it in memory.

    `prompt` is a text, or token ids [S]. Layers are streamed, so that of the model's parameters two layers are in
    memory, and of the trace what `stages`, `layers` and `positions` name. Tensors are NumPy's, in the dtype of the
    computation (half precision stays half), by the paths of `jaxref.forward`; `manifest` says whose they are, so that
    `oracle.compare`, `assert_parity` and `explain` take it in place of a folder. Raises `UserError` as the command.

        truth = jaxref.make_tree("tiny", "What is 2+2?", "float64")
        truth["layer-3"]["q_post_rope"]  # [S, H·h]
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    ids = _encoded(checkpoint, prompt) if isinstance(prompt, str) else token_ids(prompt, checkpoint.config)
    selection = select(checkpoint.config, len(ids), stages, layers, positions)
    if activations not in ("exact", "stored"):
        raise UserError(f"activations {activations!r} are not known; known are exact and stored")
    job = Job(
        checkpoint,
        ids,
        selection,
        numerics_of(dtype),
        NOWHERE,
        prompt=prompt if isinstance(prompt, str) else None,
        device=placed(device, None)[0],
        as_stored=activations == "stored",
    )
    return made(job)


def made(job: Job, source: Reader | None = None) -> NamedTree:
    """The tree of a job in memory, its `output` left alone. Raises `UserError` where there is nothing to compute.

    A `source` that holds the parameters already is used in place of the checkpoint's files.
    """
    job.check()
    job, run = begun(job)
    kept = _Kept(job.selection)
    feeder(job, lambda layer: None, source)(kept.offer)
    return NamedTree(f"{job.checkpoint.name} in {job.numerics.name}", {"schema": SCHEMA, **run}, kept.opens())


def _encoded(checkpoint: Checkpoint, text: str) -> list[int]:
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise UserError(f"{checkpoint.folder}: there is no tokenizer; give token ids instead of a text")
    return tokenizer.encode(text)


class _Kept:
    """The pieces of a selection, as a dump writes them."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._blocks: dict[Key, list[np.ndarray]] = {}

    def offer(self, layer: int | None, piece: Piece) -> None:
        """Take a piece if it is wanted."""
        stage = STAGES[piece.stage]
        if not self._selection.wants(layer, piece.stage):
            return
        value = np.asarray(piece.value)
        if not piece.selected:
            value = take_rows(value, stage, self._selection.rows(stage), piece.row)
        self._blocks.setdefault((layer, piece.stage), []).append(value)

    def opens(self) -> dict[int | None, dict[str, Open]]:
        """Each tensor, whole."""
        found: dict[int | None, dict[str, Open]] = {}
        for (layer, stage), blocks in self._blocks.items():
            whole = np.concatenate(blocks, axis=STAGES[stage].row_axis) if len(blocks) > 1 else blocks[0]
            whole.flags.writeable = False
            name = stage_path(layer, stage).removesuffix(".bin")
            found.setdefault(layer, {})[stage] = partial(Named, name, whole, STAGES[stage].axes)
        return found
