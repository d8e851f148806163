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
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from weights.errors import UserError

MODEL_TYPES = ("qwen2", "qwen3", "qwen3_moe")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Emit = Callable[[int | None, str, Tensor], None]  # layer (None: whole model), stage, value in contract shape
Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]  # module, what it took, what it returned; see `_Seen`
# What transformers raises for a broken config or file.
_BROKEN = (OSError, ValueError, TypeError, LookupError, RuntimeError, AssertionError)
_BROKEN += (SafetensorError, StrictDataclassError)
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
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that they can be named below
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=DTYPES[dtype], **options)
        model = loaded[0].to(device)
    except _BROKEN as error:
        words = " ".join(str(error).split())  # one line
        raise UserError(f"{folder}: transformers cannot load it: {type(error).__name__}: {words}") from error
    # transformers fills what is missing with random numbers and drops what it does not know, and only warns.
    faults = [f"{kind} {key}" for kind in ("missing", "unexpected", "mismatched") for key in loaded[1][f"{kind}_keys"]]
    if faults:
        raise UserError(f"{folder}: tensors do not fit the config: {'; '.join(sorted(faults))}")
    return model.eval()


def _check_files(folder: Path) -> None:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model_type = raw.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: a checkpoint needs a config.json that holds a JSON object: {error}") from None
    if model_type not in MODEL_TYPES:
        raise UserError(f"{path}: model_type {model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}")
    if raw.get("quantization_config"):
        raise UserError(f"{path}: quantised checkpoints are not supported; the reference reads float weights")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: holds no .safetensors file; other formats are not read")


def run(model: PreTrainedModel, tokens: Sequence[int], emit: Emit) -> Tensor:
    """One prefill of S tokens; `emit` is called with each stage as soon as it exists. Returns the logits [S, V].

    Values have the contract's shapes for all S positions, MoE stages and `lm_head` too, and the dtype that the model
    had there; `moe_router_indices` are int64. They may be the model's own memory: `emit` must not write to them.
    """
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"model_type {config.model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}")
    experts = config._experts_implementation if config.model_type == "qwen3_moe" else "eager"
    if (config._attn_implementation, experts, model.training) != ("eager", "eager", False):
        raise UserError("the model must be in eval mode, with eager attention and experts: load it with oracle.hf.load")
    if len(tokens) == 0 or min(tokens) < 0 or max(tokens) >= config.vocab_size:
        raise UserError(f"tokens must be one or more ids from 0 to {config.vocab_size - 1}")
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


@contextmanager
def _watched(model: Any, emit: Emit) -> Iterator[None]:
    """Hooks on every module that has something to say, and a stand-in for the attention function; gone at the end."""
    with ExitStack() as stack:
        for module, hook in _hooks(model, emit):
            stack.enter_context(module.register_forward_hook(hook))
        stack.enter_context(_attention_watched(model, emit))
        yield


def _hooks(model: Any, emit: Emit) -> Iterator[tuple[nn.Module, Hook]]:
    yield model.model.embed_tokens, _Seen(partial(emit, 0)).gives("embedding")
    for index, layer in enumerate(model.model.layers):
        yield from _Seen(partial(emit, index)).hooks(layer)
    yield model.model.norm, _Seen(partial(emit, None)).gives("final_norm")
    yield model.lm_head, _Seen(partial(emit, None)).gives("lm_head")


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
        say = partial(emit, module.layer_idx)
        say("q_post_rope", query[0].transpose(0, 1).flatten(1))
        say("k_post_rope", key[0].transpose(0, 1).flatten(1))
        keys = modelling.repeat_kv(key, module.num_key_value_groups)
        say("attn_scores", (torch.matmul(query, keys.transpose(2, 3)) * scaling)[0])
        output, softmax = original(module, query, key, value, mask, scaling=scaling, **more)
        say("attn_softmax", softmax[0])
        return output, softmax

    with _one_stand_in:
        original = modelling.eager_attention_forward
        modelling.eager_attention_forward = stand_in
        try:
            yield
        finally:
            modelling.eager_attention_forward = original


@dataclass
class _Seen:
    """Hooks of one layer. Each must return None: anything else would replace the module's output."""

    say: Callable[[str, Tensor], None]
    held: dict[str, Tensor] = field(default_factory=dict)  # what transformers computes before its turn in the contract

    def hooks(self, layer: Any) -> Iterator[tuple[nn.Module, Hook]]:
        attn, mlp = layer.self_attn, layer.mlp
        yield layer.input_layernorm, self.gives("attn_norm")
        yield attn.q_proj, self.holds("q")
        yield attn.k_proj, self.holds("k")
        if hasattr(attn, "q_norm"):
            yield attn.q_norm, self.holds("q_norm")
            yield attn.k_norm, self.holds("k_norm")
        yield attn.v_proj, partial(self.qkv, attn)
        yield attn.o_proj, self.gives("attn_out", takes="attention")
        yield layer.post_attention_layernorm, self.gives("ffn_norm", takes="post_attn_residual")
        if hasattr(mlp, "experts"):
            yield mlp.gate, self.router
            yield mlp.experts, self.experts
        else:
            yield mlp.gate_proj, self.gives("ffn_gate")
            yield mlp.act_fn, self.holds("ffn_silu")
            yield mlp.up_proj, self.gives("ffn_up", "ffn_silu")
            yield mlp.down_proj, self.gives("ffn_out", takes="ffn_swigl")
        yield layer, self.gives("post_ffn_residual")

    def holds(self, name: str) -> Hook:
        return lambda module, taken, returned: self.held.update({name: returned[0].flatten(1)})

    def release(self, *names: str) -> None:
        for name in names:
            if name in self.held:
                self.say(name, self.held.pop(name))

    def gives(self, stage: str, *held: str, takes: str | None = None) -> Hook:
        """What the module takes is the stage `takes`, what it returns is `stage`; those held come after it."""

        def hook(module: nn.Module, taken: tuple[Any, ...], returned: Tensor) -> None:
            if takes:
                self.say(takes, taken[0][0])
            self.say(stage, returned[0])
            self.release(*held)

        return hook

    def qkv(self, attn: Any, v_proj: Any, taken: tuple[Any, ...], returned: Tensor) -> None:
        projected = torch.cat([self.held.pop("q"), self.held.pop("k"), returned[0]], dim=-1)
        if v_proj.bias is None:
            self.say("qkv_matmul", projected)
        else:
            products = [F.linear(taken[0], part.weight) for part in (attn.q_proj, attn.k_proj, v_proj)]
            self.say("qkv_matmul", torch.cat(products, dim=-1)[0])
            self.say("qkv_bias", projected)
        self.release("q_norm", "k_norm")

    def router(self, router: Any, taken: tuple[Any, ...], returned: tuple[Tensor, ...]) -> None:
        self.say("moe_router_logits", F.linear(taken[0], router.weight))
        self.say("moe_router", returned[1])
        self.say("moe_router_indices", returned[2])

    def experts(self, experts: Any, taken: tuple[Any, ...], returned: Tensor) -> None:
        for stage, value in _inside_experts(experts, *taken[:2]).items():
            self.say(stage, value)
        self.say("moe_ffn_out", returned)


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
