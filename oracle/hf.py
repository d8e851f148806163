"""The Hugging Face path: every stage of the contract out of transformers' own modules, run eagerly.

Almost every value is what a module really took or returned, seen by a forward hook or by the stand-in for its attention
function. Four things show nowhere: the qkv product before its bias, the scores before the mask, the router's logits
(transformers 5.0 returns their softmax in their place) and the inside of the experts. They are computed on the side
with the module's own operations, on the same rows in the same order, because the bits of a matmul depend on both.
Nothing computed here flows back into the model, so its logits keep their bits. (On a GPU, Hugging Face's sum over the
experts, `index_add_`, is not deterministic by itself, captured or not.)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from weights.errors import UserError

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Emit = Callable[[int | None, str, Tensor], None]  # layer (None: whole model), stage, value in contract shape
See = Callable[[tuple[Any, ...], Any], None]  # what a module took, what it returned
_one_stand_in = RLock()  # the attention function is the modelling module's, so one run at a time may replace it


def load(folder: str | Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """A checkpoint as transformers' own model: eager attention and experts, eval mode, parameters in `dtype`.

    Only local safetensors are read, and no code of the folder is run. Raises `UserError` for files that are missing or
    broken, tensors that do not fit, and a model or dtype other than `MODEL_TYPES` and `DTYPES`.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: Hugging Face runs in {', '.join(DTYPES)}")
    _check_files(folder)
    options: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    options |= {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=DTYPES[dtype], output_loading_info=True, **options
        )
        model = loaded[0].to(device)
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise UserError(f"{folder}: transformers cannot load it: {' '.join(str(error).split())}") from None
    # transformers fills what is missing with random numbers and drops what it does not know, and only warns.
    faults = {kind: ", ".join(sorted(loaded[1][f"{kind}_keys"])) for kind in ("missing", "unexpected")}
    if any(faults.values()):
        listed = "; ".join(f"{kind} {names}" for kind, names in faults.items() if names)
        raise UserError(f"{folder}: tensors do not fit the config: {listed}")
    return model.eval()


def _check_files(folder: Path) -> None:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model_type = raw.get("model_type")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint needs its config.json") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not readable as a JSON object: {error}") from None
    _check_model_type(model_type, f"{path}: ")
    if raw.get("quantization_config"):
        raise UserError(f"{path}: quantised checkpoints are not supported; the reference reads float weights")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: holds no .safetensors file; other formats are not read")


def _check_model_type(model_type: Any, where: str = "") -> None:
    if model_type not in MODEL_TYPES:
        raise UserError(f"{where}model_type {model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}")


def run(model: PreTrainedModel, tokens: Sequence[int], emit: Emit) -> Tensor:
    """One prefill of S tokens; `emit` is called with each stage as soon as it exists. Returns the logits [S, V].

    Values have the contract's shapes for all S positions, MoE stages and `lm_head` too, and the dtype that the model
    had there; `moe_router_indices` are int64. They may be the model's own memory: `emit` must not write to them.
    """
    _check_run(model, tokens)
    ids = torch.tensor([[int(token) for token in tokens]], device=model.device)
    with torch.no_grad(), _watched(model, emit):
        return model(input_ids=ids, use_cache=False).logits[0]


def capture(model: PreTrainedModel, tokens: Sequence[int]) -> dict[str, Any]:
    """The whole trace: {"layer-0": {stage: array}, ..., "final_norm": [S, D], "lm_head": [S, V]}.

    Arrays are float32 (float16 and bfloat16 upcast, which is exact), indices int64.
    """
    trace: dict[str, Any] = {}

    def keep(layer: int | None, stage: str, value: Tensor) -> None:
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        array: np.ndarray = value.to("cpu", dtype, copy=True).numpy()
        (trace if layer is None else trace.setdefault(f"layer-{layer}", {}))[stage] = array

    run(model, tokens, keep)
    return trace


def _check_run(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Refuse what would silently give no stages, or other values than eager ones."""
    config = model.config
    _check_model_type(config.model_type)
    experts = config._experts_implementation if config.model_type == "qwen3_moe" else "eager"
    if (config._attn_implementation, experts, model.training) != ("eager", "eager", False):
        raise UserError("the model must be in eval mode, with eager attention and experts: load it with oracle.hf.load")
    if len(tokens) == 0 or min(tokens) < 0 or max(tokens) >= config.vocab_size:
        raise UserError(f"tokens must be one or more ids from 0 to {config.vocab_size - 1}")


@contextmanager
def _watched(model: Any, emit: Emit) -> Iterator[None]:
    """Hooks on every module that has something to say, and a stand-in for the attention function; gone at the end."""
    with ExitStack() as stack:
        for module, see in _hooks(model, emit):
            stack.enter_context(module.register_forward_hook(_hook(see)))
        stack.enter_context(_attention_watched(model, emit))
        yield


def _hook(see: See) -> Callable[..., None]:
    def hook(module: nn.Module, taken: tuple[Any, ...], returned: Any) -> None:
        see(taken, returned)  # whose result is dropped: what a hook returns would replace the module's output

    return hook


def _hooks(model: Any, emit: Emit) -> Iterator[tuple[nn.Module, See]]:
    yield model.model.embed_tokens, lambda taken, returned: emit(0, "embedding", returned[0])
    for index, layer in enumerate(model.model.layers):
        yield from _Layer(index, layer, emit).hooks()
    yield model.model.norm, lambda taken, returned: emit(None, "final_norm", returned[0])
    yield model.lm_head, lambda taken, returned: emit(None, "lm_head", returned[0])


@contextmanager
def _attention_watched(model: Any, emit: Emit) -> Iterator[None]:
    """For a while, let the modelling module's attention function also tell what it takes, computes and returns.

    (transformers' `AttentionInterface` would be the official place, but 5.0 does not ask it for "eager".)
    """
    ours = {layer.self_attn for layer in model.model.layers}
    modelling: Any = sys.modules[type(model).__module__]

    def stand_in(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **more: Any
    ) -> tuple[Tensor, Tensor]:
        if module not in ours:
            return original(module, query, key, value, mask, scaling=scaling, **more)
        emit(module.layer_idx, "q_post_rope", query[0].transpose(0, 1).flatten(1))
        emit(module.layer_idx, "k_post_rope", key[0].transpose(0, 1).flatten(1))
        keys = modelling.repeat_kv(key, module.num_key_value_groups)
        emit(module.layer_idx, "attn_scores", (torch.matmul(query, keys.transpose(2, 3)) * scaling)[0])
        output, softmax = original(module, query, key, value, mask, scaling=scaling, **more)
        emit(module.layer_idx, "attn_softmax", softmax[0])
        return output, softmax

    with _one_stand_in:
        original = modelling.eager_attention_forward
        modelling.eager_attention_forward = stand_in
        try:
            yield
        finally:
            modelling.eager_attention_forward = original


@dataclass
class _Layer:
    """What is seen in one decoder layer; `held` keeps what transformers computes before its turn in the contract."""

    index: int
    module: Any
    emit: Emit
    held: dict[str, Tensor] = field(default_factory=dict)

    def hooks(self) -> Iterator[tuple[nn.Module, See]]:
        attn, mlp = self.module.self_attn, self.module.mlp
        yield self.module.input_layernorm, self.gives("attn_norm")
        yield attn.q_proj, self.holds("q")
        yield attn.k_proj, self.holds("k")
        if hasattr(attn, "q_norm"):
            yield attn.q_norm, self.holds("q_norm")
            yield attn.k_norm, self.holds("k_norm")
        yield attn.v_proj, self.qkv
        yield attn.o_proj, self.turns("attention", "attn_out")
        yield self.module.post_attention_layernorm, self.turns("post_attn_residual", "ffn_norm")
        if hasattr(mlp, "experts"):
            yield mlp.gate, self.router
            yield mlp.experts, self.experts
        else:
            yield mlp.gate_proj, self.gives("ffn_gate")
            yield mlp.act_fn, self.holds("ffn_silu")
            yield mlp.up_proj, self.up
            yield mlp.down_proj, self.turns("ffn_swigl", "ffn_out")
        yield self.module, self.gives("post_ffn_residual")

    def gives(self, stage: str) -> See:
        return lambda taken, returned: self.emit(self.index, stage, returned[0])

    def turns(self, before: str, after: str) -> See:
        def see(taken: tuple[Any, ...], returned: Tensor) -> None:
            self.emit(self.index, before, taken[0][0])
            self.emit(self.index, after, returned[0])

        return see

    def holds(self, name: str) -> See:
        return lambda taken, returned: self.held.update({name: returned[0].flatten(1)})

    def qkv(self, taken: tuple[Any, ...], returned: Tensor) -> None:
        attn = self.module.self_attn
        projected = torch.cat([self.held.pop("q"), self.held.pop("k"), returned[0]], dim=-1)
        if attn.v_proj.bias is None:
            self.emit(self.index, "qkv_matmul", projected)
        else:
            products = [F.linear(taken[0], part.weight) for part in (attn.q_proj, attn.k_proj, attn.v_proj)]
            self.emit(self.index, "qkv_matmul", torch.cat(products, dim=-1)[0])
            self.emit(self.index, "qkv_bias", projected)
        for name in ("q_norm", "k_norm"):
            if name in self.held:
                self.emit(self.index, name, self.held.pop(name))

    def up(self, taken: tuple[Any, ...], returned: Tensor) -> None:
        self.emit(self.index, "ffn_up", returned[0])
        self.emit(self.index, "ffn_silu", self.held.pop("ffn_silu"))

    def router(self, taken: tuple[Any, ...], returned: tuple[Tensor, ...]) -> None:
        _, weights, indices = returned
        self.emit(self.index, "moe_router_logits", F.linear(taken[0], self.module.mlp.gate.weight))
        self.emit(self.index, "moe_router", weights)
        self.emit(self.index, "moe_router_indices", indices)

    def experts(self, taken: tuple[Any, ...], returned: Tensor) -> None:
        for stage, value in _inside_experts(self.module.mlp.experts, *taken[:2]).items():
            self.emit(self.index, stage, value)
        self.emit(self.index, "moe_ffn_out", returned)


def _inside_experts(experts: Any, hidden: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """Gate, up and swigl [S, A, M] and out [S, A, D] of the chosen experts, in the order of `indices` [S, A]."""
    _, D, M = experts.down_proj.shape
    sizes = {"moe_expert_gate": M, "moe_expert_up": M, "moe_expert_swigl": M, "moe_expert_out": D}
    found = {stage: hidden.new_empty(*indices.shape, size) for stage, size in sizes.items()}
    for expert in indices.unique():
        rank, token = torch.where((indices == expert).T)  # transposed: the order in which the module puts the rows
        gate, up = F.linear(hidden[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        swigl = experts.act_fn(gate) * up
        out = F.linear(swigl, experts.down_proj[expert])
        for stage, value in zip(sizes, (gate, up, swigl, out), strict=True):
            found[stage][token, rank] = value
    return found
