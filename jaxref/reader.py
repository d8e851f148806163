"""Parameters read ahead of the computing: one layer, one expert, a block of the head at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxref import ops
from jaxref.activations import Matrix, Weight, activation_of
from jaxref.mesh import platform_of, put, replicated, sharding, to_host
from jaxref.model import head_rows
from jaxref.precision import Device, Numerics
from weights import Checkpoint, Expert, Layer
from weights.params import expert_names, layer_names

Warn = Callable[[str], None]
ALIGNMENT = 64  # bytes; JAX takes a NumPy array over without a copy where its memory begins on such an address


def warn_on_stderr(message: str) -> None:
    """A line beside whatever stdout is used for."""
    print(f"warning: {message}", file=sys.stderr)


class Reader:
    """Reads parameters ahead of the computing, in a thread of its own, in the dtype of the precision.

    They go to a device, or are split over a mesh of them. With `as_stored`, matrices of a GGUF file want their
    activations rounded as its engine does. Without `read_ahead`, nothing is loaded before what came before it may go.
    """

    resident = False  # whether all parameters stay on the device

    def __init__(
        self,
        checkpoint: Checkpoint,
        numerics: Numerics,
        device: Device | Mesh | None,
        warn: Warn = warn_on_stderr,
        *,
        as_stored: bool = False,
        read_ahead: bool = True,
    ) -> None:
        self.checkpoint, self.numerics, self.device, self.warn = checkpoint, numerics, device, warn
        self._as_stored, self._read_ahead = as_stored, read_ahead
        self._pool = ThreadPoolExecutor(1, "jaxref-read")
        self._buffers = Buffers()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        # A generator that was given up may be closed by the garbage collector, in the midst of whatever a thread does
        # just then, such as starting another: who waits for a thread there may wait for ever.
        self._pool.shutdown(wait=kind is not GeneratorExit, cancel_futures=True)

    def ahead(self, jobs: Iterator[Callable[[], Any]]) -> Iterator[Any]:
        """Results of the jobs in order, one of them always on its way, or each only when it is asked for."""
        if not self._read_ahead:
            yield from (job() for job in jobs)
            return
        job = next(jobs, None)
        coming = None if job is None else self._pool.submit(job)
        while coming is not None:
            ready = coming.result()
            job = next(jobs, None)
            coming = None if job is None else self._pool.submit(job)
            yield ready

    def embed(self, tokens: list[int]) -> Array:
        """[S, D]: the embedding of these tokens; only their rows are read."""
        ids, places = np.unique(np.asarray(tokens), return_inverse=True)
        rows = self.checkpoint.embedding_rows(ids)[places]  # by NumPy: nothing has to be compiled for that
        hidden = self._load("model.embed_tokens.weight", rows, whole=True)
        self.checkpoint.release()
        return hidden

    def final_norm(self, hidden: Array) -> Array:
        """[S, D]: the norm before the head."""
        return ops.rms_norm(hidden, self.norm(), eps=self.checkpoint.config.rms_norm_eps, numerics=self.numerics)

    def logits(self, x: Array) -> np.ndarray | Array:
        """[S, V]: the head on normed rows [S, D], read in blocks."""
        self.forget()
        # `map` lets go of a block before it asks for the next.
        made = map(lambda block: to_host(ops.linear(x, block, numerics=self.numerics)), self.head())
        return np.concatenate(list(made), axis=-1)

    def norm(self) -> Array:
        """[D]: the weight of the final norm."""
        return self.parameters("model.norm.weight", self.checkpoint.norm())

    def head(self) -> Iterator[Matrix]:
        """The output projection in blocks of the vocabulary, one of them always on its way."""
        views = self.checkpoint.head_blocks(head_rows(self.checkpoint.config, platform_of(self.device)))
        return self.ahead(partial(self.parameters, self.checkpoint.head_name, view) for view in views)

    def forget(self) -> None:
        """Give up the memory of the layers, before something of other shapes is read."""
        self._buffers.clear()

    def parameters(self, names: Any, views: Any) -> Any:
        """Copies of a pytree of views in the dtypes of the precision; the pages they lay on are given back."""
        loaded = jax.tree.map(self._matrix, names, views)
        self.checkpoint.release()
        return loaded

    def layers(self, count: int) -> Iterator[Layer]:
        """The first `count` layers in their order."""
        return self.ahead(partial(self.layer, i) for i in range(count))

    def layer(self, index: int) -> Layer:
        """The parameters of one layer."""
        # One tensor after another: those of a GGUF file are dequantised, and a whole layer would be held twice.
        names = layer_names(self.checkpoint.config, index)
        loaded = jax.tree.map(lambda name: self._matrix(name, self.checkpoint.tensor(name)), names)
        self.checkpoint.release()
        return loaded

    def experts(self, layer: int, ids: list[int]) -> Iterator[Expert]:
        """The experts with these ids in their order, one of them always on its way."""
        return self.ahead(partial(self._expert, layer, e) for e in ids)

    def _expert(self, layer: int, index: int) -> Expert:
        return self.parameters(expert_names(layer, index), self.checkpoint.expert(layer, index))

    def _matrix(self, name: str, view: np.ndarray) -> Matrix:
        kind = activation_of(self.checkpoint, name) if self._as_stored else None
        loaded = self._load(name, view)
        return loaded if kind is None else Weight(loaded, kind)

    def _load(self, name: str, view: np.ndarray, *, whole: bool = False) -> Array:
        """A copy on the device; of a mesh each device takes its part, or with `whole`, of a hidden state, all of it."""
        dtype = self.numerics.compute if whole else self.numerics.kept(view.dtype)
        copy = self._buffers.take(view.shape, dtype)
        if not self.checkpoint.copy(view, copy):
            self._report(view, copy, name)
        with self.numerics.context():
            # Without the wait, the copy could be written over while it is on its way. It is the reader's thread that
            # waits, so the transfer still runs under the computing. (On a CPU the copy itself becomes the array.)
            return put(copy, self._place(name, copy.shape, whole)).block_until_ready()

    def _place(self, name: str, shape: tuple[int, ...], whole: bool) -> Any:
        if not isinstance(self.device, Mesh):
            return self.device
        return replicated(self.device) if whole else sharding(self.device, name, shape, self.checkpoint.config)

    def _report(self, view: np.ndarray, copy: np.ndarray, name: str) -> None:
        bad = int((~np.isfinite(copy)).sum())
        stored = int((~np.isfinite(view.astype(np.float32))).sum())
        if stored:
            self.warn(f"{name}: {stored} of {copy.size} values are NaN or infinite")
        if bad > stored:
            self.warn(f"{name}: {bad - stored} values overflow in {self.numerics.name}")


class Buffers:
    """Aligned memory for parameters, used again as soon as nothing refers to it any more.

    Fresh memory costs more than the conversion that fills it: the system clears each page when it is first touched.
    """

    def __init__(self) -> None:
        self._memory: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._memory)

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with arbitrary content. JAX refers to it for as long as an array made of it lives."""
        size = math.prod(shape) * dtype.itemsize
        memory = self._free(size)
        if memory is None:
            memory = np.empty(size + ALIGNMENT, np.uint8)
            self._memory.append(memory)
        start = -memory.ctypes.data % ALIGNMENT
        return memory[start : start + size].view(dtype).reshape(shape)

    def _free(self, size: int) -> np.ndarray | None:
        for memory in self._memory:
            # Three references: the list, this loop's variable, and the call that counts them.
            if memory.nbytes == size + ALIGNMENT and sys.getrefcount(memory) == 3:
                return memory
        return None

    def clear(self) -> None:
        """Give up what lies unused."""
        self._memory.clear()
