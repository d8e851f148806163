"""A model kept on the device, for prompt after prompt: the same stages as a dump, without reading it again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jaxref.asked import token_ids
from jaxref.devices import memory_limit, out_of_memory_in_words
from jaxref.memory import plan_for, size, trace_bytes
from jaxref.mesh import placed
from jaxref.model import Trace, after_embedding, lm_head, query_rows
from jaxref.pieces import join_blocks
from jaxref.precision import Device, numerics_of
from jaxref.reader import Reader, Warn, warn_on_stderr
from jaxref.selection import Selection, select
from jaxref.stages import STAGES
from jaxref.stream import trace
from weights import Checkpoint, Expert, Layer, UserError, open_checkpoint

if TYPE_CHECKING:
    from jaxref.asked import Tokens
    from jaxref.dump import Job, Report
    from jaxref.named_tree import NamedTree


_program = jax.jit(after_embedding, static_argnames=("config", "numerics"))


class Session:
    """One model, its parameters loaded once in the dtype of the precision onto a device or a mesh of devices.

    `model` is what `open_checkpoint` takes, or a `Checkpoint`; `device` "cpu", "cuda" or a `jax.Device`; `mesh` a text
    like "tp=4" or a `jax.sharding.Mesh` with an axis "tp". Raises `UserError` where there is no such device or where
    the parameters are more than `max_memory` bytes, by default 90 % of what is free where JAX says what that is.

        with jaxref.Session("tiny") as session:
            session.forward([54, 71, 64])["layer-3"]["q_post_rope"]
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        dtype: str = "float32",
        device: str | Device | None = None,
        mesh: str | Mesh | None = None,
        *,
        max_memory: int | None = None,
        warn: Warn = warn_on_stderr,
    ) -> None:
        self.checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        self.device, self.mesh = placed(device, mesh)
        self.config, self.numerics = self.checkpoint.config, numerics_of(dtype).on(self.device, self.mesh)
        self._limit, self._longest = memory_limit(self.device, max_memory), 0  # the longest prompt that is known to fit
        self._fits(self.selection(1))
        place = self.device if self.mesh is None else self.mesh
        self._source: Resident | None = Resident(self.checkpoint, self.numerics, place, warn)
        with self._running() as source, source:
            source.load()

    def forward(self, tokens: Tokens) -> Trace:
        """Every intermediate of one prefill, for all positions, as `jaxref.forward` names them.

        The bytes are those of a dump with `--positions all`. `tokens` [S] are ids. Raises `UserError` where they are
        none or outside the vocabulary, where the trace does not fit beside the parameters, or after `close`.
        """
        ids = token_ids(tokens, self.config)
        selection = self.selection(len(ids), positions="all")
        if len(ids) > self._longest:
            logits = len(ids) * self.config.vocab_size * self.numerics.compute.itemsize  # in blocks, then joined
            self._fits(selection, kept=trace_bytes(self.config, len(ids), self.numerics) + logits)
            self._longest = len(ids)
        if self._fits_one_program(len(ids)):
            with self._running() as source:
                return source.run(ids)
        found: dict[tuple[int | None, str], list[Array]] = {}
        result: Trace = {f"layer-{i}": {} for i in range(self.config.num_hidden_layers)}
        with self._running() as source:
            for layer, (stage, value, *_) in trace(source, ids, selection):
                # What goes on inside experts comes as NumPy arrays.
                found.setdefault((layer, stage), []).append(value if isinstance(value, Array) else jnp.asarray(value))
            for (layer, stage), blocks in found.items():
                (result if layer is None else result[f"layer-{layer}"])[stage] = join_blocks(blocks)
        return result

    def dump(self, tokens: Tokens, output: str | Path, *, form: str = "aprt", **wanted: Any) -> Report:
        """Write the tree that `python -m jaxref dump` writes. `wanted` are `stages`, `layers` and `positions` as there.

        Raises `UserError` before anything is written where it can't be.
        """
        from jaxref.dump import dump

        job = self._job(tokens, Path(output), form, wanted)
        with self._running() as source:
            return dump(job, source=source)

    def make_tree(self, tokens: Tokens, **wanted: Any) -> NamedTree:
        """That tree in memory, with its manifest, as `jaxref.make_tree` gives it. Raises `UserError` as `dump`."""
        from jaxref.made import NOWHERE, made

        job = self._job(tokens, NOWHERE, "aprt", wanted)
        with self._running() as source:
            return made(job, source)

    def _job(self, tokens: Tokens, output: Path, form: str, wanted: dict[str, Any]) -> Job:
        from jaxref.dump import Job

        ids = token_ids(tokens, self.config)
        selection = self.selection(len(ids), **wanted)
        self._fits(selection)
        place = {"device": self.device, "mesh": self.mesh}
        return Job(self.checkpoint, ids, selection, self.numerics, output, form, **place)

    def selection(
        self, count: int, *, stages: str = "all", layers: str = "all", positions: str | None = None
    ) -> Selection:
        """Stages × layers × positions of `count` tokens, as people type them. Raises `UserError`."""
        return select(self.config, count, stages, layers, positions)

    def close(self) -> None:
        """Give the device's memory back."""
        self._source = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        config, where = self.config, self.device if self.mesh is None else f"{self.mesh.size} × {self.device}"
        kept = f"{size(self._source.nbytes)} of parameters" if self._source else "closed"
        model = f"{self.checkpoint.name}: {config.model_type}, {config.num_hidden_layers} layers"
        return f"<Session {model}, {self.numerics.name} on {where}, {kept}>"

    @contextmanager
    def _running(self) -> Iterator[Resident]:
        """Where the work of this session is done. Raises `UserError` after `close`."""
        if self._source is None:
            raise UserError("the session is closed; open another one")
        with out_of_memory_in_words(), self.numerics.context(), jax.default_device(self.device):
            yield self._source

    def _fits_one_program(self, count: int) -> bool:
        """Whether a GPU computes it as one program: a dense model, with all scores of a head in one block.

        To start a stage costs the host as much time as a short prompt's stage takes on the device.
        """
        whole = query_rows(self.config.num_attention_heads, count, count) == count
        routed = any(map(self.config.is_moe, range(self.config.num_hidden_layers)))
        return self.numerics.gpu and whole and not routed

    def _fits(self, selection: Selection, kept: int = 0) -> None:
        """Raise `UserError` where this does not fit, with `kept` bytes of what was computed."""
        mesh = None if self.mesh is None else self.mesh.shape
        plan = plan_for(self.checkpoint, selection, self.numerics, mesh, self.device.platform)
        if self._limit is not None and plan.resident + kept > self._limit:
            raise UserError(
                f"{self.checkpoint.name} with {selection.count} tokens needs {size(plan.resident + kept)} on a device"
                f" ({size(plan.model)} of parameters), {size(self._limit)} may be used: take fewer tokens, a mesh,"
                " or `python -m jaxref dump`, which streams the layers"
            )


class Resident(Reader):
    """A reader that has read everything: layers, experts and the head stay on the device, in the dump's own pieces.

    The embedding does not: its rows for a prompt are read from the file, which costs less than the table's memory.
    """

    resident = True

    def load(self) -> None:
        """Read it all."""
        config = self.checkpoint.config
        everyone = list(range(config.num_experts))
        self._layers = list(super().layers(config.num_hidden_layers))
        self._experts: dict[int, list[Expert]] = {}
        for layer in filter(config.is_moe, range(config.num_hidden_layers)):
            self._experts[layer] = list(super().experts(layer, everyone))
        self._norm, self._head = super().norm(), list(super().head())
        self.forget()

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters, of a mesh on all devices together."""
        kept = (self._layers, self._experts, self._norm, self._head)
        return sum(
            math.prod(array.sharding.shard_shape(array.shape)) * array.itemsize * array.sharding.num_devices
            for array in jax.tree.leaves(kept)
        )

    def run(self, tokens: list[int]) -> Trace:
        """All stages of a dense model as one program, with the bits that they have one by one."""
        config, numerics = self.checkpoint.config, self.numerics
        made = _program(self.embed(tokens), self._layers, self._norm, self._head, config, numerics)
        layers = {name: made[name] for name in (f"layer-{i}" for i in range(config.num_hidden_layers))}
        ordered = {name: {key: stages[key] for key in STAGES if key in stages} for name, stages in layers.items()}
        return ordered | {name: made[name] for name in ("final_norm", "lm_head")}  # JAX sorts them by name

    def layers(self, count: int) -> Iterator[Layer]:
        """The first `count` layers."""
        return iter(self._layers[:count])

    def experts(self, layer: int, ids: list[int]) -> Iterator[Expert]:
        """The experts with these ids in their order."""
        return (self._experts[layer][i] for i in ids)

    def norm(self) -> Array:
        """[D]: the weight of the final norm."""
        return self._norm

    def logits(self, x: Array) -> Array:
        """[S, V]: the head on normed rows [S, D]."""
        return lm_head(x, iter(self._head), self.numerics)
