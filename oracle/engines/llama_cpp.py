"""llama.cpp under test: every stage that its graph shows, copied out by its own callback while it computes one prefill.

Flash attention is off and the KV cache is float32: the defaults would hide the scores and round keys and values. Logits
are asked of all positions, else the last layer would hold the last row alone. Nothing flows back into the graph, so the
logits keep their bits. `ffn_silu` shows nowhere: the activation and the product with `up` are one operation there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from oracle.engines.llama_api import ERROR, EVAL, F32, I32, LOG, WARN, Batch, ContextParams, Tensor, load
from oracle.engines.llama_nodes import BY_NAME, BY_WEIGHT, Node, pattern
from weights.errors import UserError

Emit = Callable[[int | None, str, np.ndarray], None]  # layer (None: whole model), stage, value in contract shape
MISSING = ("ffn_silu",)
# Settings of the engine that make it compute something else; what they are for is planting faults.
KNOBS = ("rope_freq_base", "rope_freq_scale", "attention_type")


def run(path: Path, tokens: Sequence[int], emit: Emit | None, *, threads: int = 2, **knobs: float) -> np.ndarray:
    """One prefill of S tokens of a GGUF file; `emit` is called with each stage as soon as it exists. Logits [S, V].

    Values are copies for all S positions, in float32, ids in int32. Without `emit` nothing is watched. `knobs` are some
    of `KNOBS`. Raises `UserError` where llama.cpp is absent or fails, and what `emit` raises.
    """
    library = load()
    watch = _Watch(library, emit, len(tokens))
    settings = _settings(library, len(tokens), threads, knobs)
    if emit is not None:
        settings.cb_eval = watch.callback
    with _listening(library) as said, _model(library, path, said) as model:
        vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        if len(tokens) == 0 or min(tokens) < 0 or max(tokens) >= vocab:
            raise UserError(f"{path}: tokens must be one or more ids from 0 to {vocab - 1}")
        with _context(library, model, settings, said) as context:
            with watch.stoppable():
                status = _decode(library, context, tokens)
            if watch.failed:
                raise watch.failed
            if status or (emit is not None and watch.last != "lm_head"):
                raise UserError(f"{path}: llama.cpp stopped before its logits ({status}): {_last(said)}")
            return np.ctypeslib.as_array(library.llama_get_logits(context), (len(tokens), vocab)).copy()


def _settings(library: Any, count: int, threads: int, knobs: dict[str, float]) -> ContextParams:
    if unknown := sorted(set(knobs) - set(KNOBS)):
        raise UserError(f"llama.cpp has no knob {', '.join(unknown)} here; it has {', '.join(KNOBS)}")
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(count, 64)  # all tokens in one graph
    settings.n_threads = settings.n_threads_batch = threads
    settings.flash_attn_type = 0
    settings.type_k = settings.type_v = F32
    for name, value in knobs.items():
        setattr(settings, name, value)
    return settings


_SILENT = LOG(lambda level, text, ours: None)


@contextmanager
def _listening(library: Any) -> Iterator[list[str]]:
    """What the engine says about faults goes into this list and not to stderr, for good."""
    said: list[str] = []

    def hear(level: int, text: bytes | None, ours: int | None) -> None:
        if level in (WARN, ERROR) and text:
            said.append(" ".join(text.decode(errors="replace").split()))

    log = LOG(hear)  # must live as long as the library may call it
    library.llama_log_set(log, None)
    try:
        yield said
    finally:
        library.llama_log_set(_SILENT, None)


def _last(said: list[str]) -> str:
    return "; ".join(said[-2:]) or "it does not say why"


@contextmanager
def _model(library: Any, path: Path, said: list[str]) -> Iterator[int]:
    params = library.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # repacked quantised weights give other results
    model = library.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise UserError(f"{path}: llama.cpp cannot load it: {_last(said)}")
    try:
        yield model
    finally:
        library.llama_model_free(model)


@contextmanager
def _context(library: Any, model: int, settings: ContextParams, said: list[str]) -> Iterator[int]:
    context = library.llama_init_from_model(model, settings)
    if not context:
        raise UserError(f"llama.cpp cannot run {settings.n_ctx} tokens: {_last(said)}")
    try:
        yield context
    finally:
        library.llama_free(context)


def _decode(library: Any, context: int, tokens: Sequence[int]) -> int:
    batch: Batch = library.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.logits[place] = int(token), place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    try:
        return library.llama_decode(context, batch)
    finally:
        library.llama_batch_free(batch)


@dataclass
class _Watch:
    """The callback of one run over `count` tokens, and what it has seen."""

    library: Any
    emit: Emit | None
    count: int
    failed: BaseException | None = None
    last: str | None = None  # the stage that was handed on last
    parts: dict[tuple[int | None, str], dict[str, np.ndarray]] = field(default_factory=dict)  # held q, k and v

    def __post_init__(self) -> None:
        self.callback = EVAL(self._see)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Let Ctrl-C end the run: Python would raise where it enters the callback, and there it is dropped."""
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return

        def stop(number: int, frame: object) -> None:
            self.failed = KeyboardInterrupt()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _see(self, pointer: Any, asks: bool, ours: int | None) -> bool:
        """Whether a node is wanted; once it is computed, whether to go on. Nothing may be raised through C."""
        try:
            if self.failed:
                return asks  # what is wanted is given, and what is given can be refused, which ends the run
            found = self._known(pointer)
            if asks or found is None:
                return found is not None and asks
            self._give(*found, pointer.contents, self._copy(pointer))
        except BaseException as error:  # noqa: BLE001 - raised again after the run, a Ctrl-C too
            self.failed = error
        return self.failed is None

    def _known(self, pointer: Any) -> tuple[int | None, Node] | None:
        """The layer and the row of the table, if it has one."""
        tensor = pointer.contents
        operation = self.library.ggml_op_desc(pointer).decode()
        name, layer = pattern(tensor.name)
        node = BY_NAME.get((operation, name))
        if node is None and tensor.src[0]:
            weight, layer = pattern(Tensor.from_address(tensor.src[0]).name)
            node = BY_WEIGHT.get((operation, weight))
        return None if node is None else (layer, node)

    def _copy(self, pointer: Any) -> np.ndarray:
        """The node's values in C order, four axes, the slowest first: the engine uses the buffer again."""
        tensor = pointer.contents
        if tensor.type not in (F32, I32):
            raise UserError(f"llama.cpp computes {tensor.name.decode()} in ggml type {tensor.type}, not in float32")
        raw = (ctypes.c_char * self.library.ggml_nbytes(pointer)).from_address(tensor.data)
        dtype = np.float32 if tensor.type == F32 else np.int32
        return np.ndarray(tuple(tensor.ne)[::-1], dtype, raw, 0, tuple(tensor.nb)[::-1]).copy()

    def _give(self, layer: int | None, node: Node, tensor: Tensor, value: np.ndarray) -> None:
        """Hand on a stage in the contract's shape, once all its parts are there."""
        assert self.emit is not None
        if node.stage == "attn_scores":
            value *= np.float32(Tensor.from_address(tensor.src[0]).ne[0] ** -0.5)  # 1/√h, which SOFT_MAX applies there
        if node.stage in ("attn_scores", "attn_softmax"):  # [1, H, S, keys and padding]
            value = np.ascontiguousarray(value[0, :, :, : self.count])
        elif node.stage.startswith("moe_expert_"):  # [1, S, A, M or D]
            value = value[0]
        else:
            value = value.reshape(self.count, -1)
        if node.part:
            parts = self.parts.setdefault((layer, node.stage), {})
            parts[node.part] = value
            if len(parts) < 3:
                return
            value = np.concatenate([parts[part] for part in "qkv"], axis=1)
            del self.parts[layer, node.stage]
        self.emit(0 if node.stage == "embedding" else layer, node.stage, value)
        self.last = node.stage
