"""Qwen2, Qwen3 and their mixtures of experts as one plain NumPy float64 forward: the tests' ground truth.

It shares no code with the package under test and keeps every stage of the contract, always for all positions.
Sources: Qwen2 (arXiv 2407.10671), Qwen3 (2505.09388), attention (1706.03762), GQA (2305.13245), RMSNorm (1910.07467),
RoPE (2104.09864), YaRN (2309.00071), SwiGLU (2002.05202), sparse experts (1701.06538).
Sizes S D H K h F E A M V are those of the contract's key. A checkpoint matrix is [out, in]: a projection is `x @ W.T`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Stages = dict[str, NDArray[Any]]  # Any: the router's ids are int64, all else is float64
Tensors = Mapping[str, NDArray[Any]]
Config = Mapping[str, Any]


class Weights:
    """The tensors below one name prefix, upcast to float64 as they are read, so no second copy of a model is kept."""

    def __init__(self, tensors: Tensors, prefix: str) -> None:
        self.tensors, self.prefix = tensors, prefix

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def __call__(self, name: str, rows: Any = ...) -> Array:
        return np.asarray(self.tensors[self.prefix + name][rows]).astype(np.float64)


def forward(tensors: Tensors, config: Config, tokens: Sequence[int]) -> dict[str, Any]:
    """Every stage and the logits: {"layer-0": {stage: array, ...}, ..., "final_norm": [S,D], "lm_head": [S,V]}."""
    model, eps = Weights(tensors, "model."), config.get("rms_norm_eps", 1e-6)
    hidden = model("embed_tokens.weight", np.asarray(tokens, dtype=np.int64))
    result: dict[str, Any] = {}
    for layer in range(config["num_hidden_layers"]):
        weights = Weights(tensors, f"model.layers.{layer}.")
        stages: Stages = {"embedding": hidden} if layer == 0 else {}
        stages["attn_norm"] = rms_norm(hidden, weights("input_layernorm.weight"), eps)
        stages |= attention_block(weights, config, layer, stages["attn_norm"])
        hidden = stages["post_attn_residual"] = hidden + stages["attn_out"]
        x = stages["ffn_norm"] = rms_norm(hidden, weights("post_attention_layernorm.weight"), eps)
        ffn, inside = moe_block(weights, config, x) if is_moe_layer(config, layer) else dense_block(weights, x)
        hidden = hidden + ffn
        result[f"layer-{layer}"] = stages | inside | {"post_ffn_residual": hidden}
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    result["final_norm"] = rms_norm(hidden, model("norm.weight"), eps)
    return result | {"lm_head": result["final_norm"] @ Weights(tensors, "")(head).T}


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · gain over the last axis (RMSNorm paper), for [S,D] and, per head, [S,heads,h]."""
    mean_square: Array = (x * x).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * gain


def softmax(x: Array) -> Array:
    """exp(x) / Σ exp(x) over the last axis; -inf becomes an exact 0. The maximum is taken out so nothing overflows."""
    powers: Array = np.exp(x - x.max(axis=-1, keepdims=True))
    total: Array = powers.sum(axis=-1, keepdims=True)
    return powers / total


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), through logaddexp so that a large negative x does not overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def rope_frequencies(config: Config, head_dim: int) -> tuple[Array, float]:
    """Radians by which one position turns each pair, θ^(-2i/h) as [h/2] (RoPE paper), and the factor on cos and sin.

    `rope_parameters` is the newer spelling of `rope_scaling` and `rope_theta`. "linear": 2306.15595, positions divided.
    """
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_scaling") or config.get("rope_parameters") or {}
    frequencies = float(rope["rope_theta"]) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "yarn") or rope.get("mscale"):
        raise ValueError(f"this rotary scaling is not part of the reference: {rope}")
    slower = frequencies / rope["factor"] if kind == "linear" else frequencies
    return yarn(frequencies, rope, config) if kind == "yarn" else (slower, 1.0)


def yarn(frequencies: Array, rope: Config, config: Config) -> tuple[Array, float]:
    """YaRN paper, "NTK-by-parts": fast pairs kept, slow ones interpolated, a ramp between; and the attention factor."""
    head_dim, limit = 2 * len(frequencies), config["max_position_embeddings"]
    trained = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or limit
    factor = rope.get("factor") or limit / trained

    def pair_turning(rotations: float) -> float:  # the (fractional) pair that turns so often over the trained length
        return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    # The paper's ramp is linear in the rotations; the released code's, which checkpoints follow, in the pair's index.
    low, high = pair_turning(rope.get("beta_fast") or 32), pair_turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    slow = np.clip((np.arange(head_dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    # The factor goes on q and on k alike, so that scores carry its square: the paper's 1/t.
    attention_factor = rope.get("attention_factor") or 0.1 * math.log(max(factor, 1.0)) + 1.0
    return frequencies * (1 - slow) + frequencies / factor * slow, attention_factor


def rotate(x: Array, frequencies: Array, factor: float) -> Array:
    """RoPE on [S,heads,h]: channels i and i + h/2 are one pair, the layout of these checkpoints."""
    angles = np.arange(len(x), dtype=np.float64)[:, None, None] * frequencies
    cos, sin = factor * np.cos(angles), factor * np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def visible(config: Config, layer: int, length: int) -> NDArray[np.bool_]:
    """Mask [S,S], True where the query (row) may look: never ahead, in a windowed layer fewer than `window` back.

    `layer_types` says which layers are windowed; without it each family has the rule of its Hugging Face definition.
    """
    back = np.arange(length)[:, None] - np.arange(length)
    window, split = config.get("sliding_window", 4096), config.get("max_window_layers", 28)
    if not config.get("use_sliding_window") or window is None:
        return back >= 0
    rules = {"qwen3_moe": True, "qwen2_moe": layer % 2 == 0 and layer < split}
    windowed = rules.get(config.get("model_type", ""), layer >= split)
    if types := config.get("layer_types"):
        windowed = types[layer] == "sliding_attention"
    return (back >= 0) & (back < window) if windowed else back >= 0


def attention_block(weights: Weights, config: Config, layer: int, x: Array) -> Stages:
    """Grouped-query causal attention on the normalised [S,D]: the stages from qkv_matmul to attn_out."""
    S, H, K = len(x), config["num_attention_heads"], config["num_key_value_heads"]
    qkv = np.concatenate([x @ weights(f"self_attn.{side}_proj.weight").T for side in "qkv"], axis=-1)
    stages: Stages = {"qkv_matmul": qkv}
    if "self_attn.q_proj.bias" in weights:  # Qwen2
        qkv = stages["qkv_bias"] = qkv + np.concatenate([weights(f"self_attn.{side}_proj.bias") for side in "qkv"])
    h = config.get("head_dim") or qkv.shape[-1] // (H + 2 * K)
    q, k, v = np.split(qkv.reshape(S, H + 2 * K, h), [H, H + K], axis=1)
    if "self_attn.q_norm.weight" in weights:  # Qwen3
        eps = config.get("rms_norm_eps", 1e-6)
        q, k = (rms_norm(y, weights(f"self_attn.{side}_norm.weight"), eps) for y, side in ((q, "q"), (k, "k")))
        stages |= {"q_norm": q.reshape(S, H * h), "k_norm": k.reshape(S, K * h)}
    q, k = (rotate(y, *rope_frequencies(config, h)) for y in (q, k))
    stages |= {"q_post_rope": q.reshape(S, H * h), "k_post_rope": k.reshape(S, K * h)}
    scores = np.stack([q[:, j] @ k[:, j // (H // K)].T / math.sqrt(h) for j in range(H)])
    shares = softmax(np.where(visible(config, layer, S), scores, -np.inf))
    mixed = np.concatenate([shares[j] @ v[:, j // (H // K)] for j in range(H)], axis=-1)
    out = mixed @ weights("self_attn.o_proj.weight").T
    if "self_attn.o_proj.bias" in weights:  # a Qwen3 with attention_bias
        out = out + weights("self_attn.o_proj.bias")
    return stages | {"attn_scores": scores, "attn_softmax": shares, "attention": mixed, "attn_out": out}


def is_moe_layer(config: Config, layer: int) -> bool:
    """Every `decoder_sparse_step`-th layer of a model that has experts, but for those named dense."""
    experts = config.get("num_experts") or config.get("num_local_experts") or 0
    named_dense = layer in (config.get("mlp_only_layers") or ())
    return experts > 0 and not named_dense and (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> dict[str, Array]:
    """down(silu(gate·x) ⊙ up·x), silu(z) = z·sigmoid(z) (SwiGLU paper), with all that is computed on the way."""
    gated, upped = x @ gate.T, x @ up.T
    silu = gated * sigmoid(gated)
    return {"gate": gated, "up": upped, "silu": silu, "swigl": silu * upped, "out": (silu * upped) @ down.T}


def matrices(weights: Weights, prefix: str) -> list[Array]:
    """Gate [F,D], up [F,D] and down [D,F] of the feed-forward network below one name."""
    return [weights(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down")]


def expert_matrices(weights: Weights, expert: int) -> list[Array]:
    """Gate [M,D], up [M,D] and down [D,M] of one expert, stored stacked (gate above up) or one tensor each."""
    if "mlp.experts.gate_up_proj" not in weights:
        return matrices(weights, f"mlp.experts.{expert}.")
    return [*np.split(weights("mlp.experts.gate_up_proj", expert), 2), weights("mlp.experts.down_proj", expert)]


def dense_block(weights: Weights, x: Array) -> tuple[Array, Stages]:
    """The dense feed-forward network on the normalised [S,D]: what joins the residual, and its stages."""
    stages: Stages = {f"ffn_{name}": value for name, value in swiglu(x, *matrices(weights, "mlp.")).items()}
    return stages["ffn_out"], stages


def route(x: Array, router: Array, active: int, renormalise: bool) -> tuple[Array, Array, NDArray[np.int64]]:
    """Logits [S,E], weights [S,A] descending, ids [S,A]: softmax over all E, then the top A, a tie to the lower id.

    Each logit is summed alike wherever its row stands, which BLAS does not promise, so that a tie is exactly a tie.
    """
    logits = np.stack([(x * row).sum(axis=-1) for row in router], axis=-1)
    shares = softmax(logits)
    ids = np.argsort(-shares, axis=-1, kind="stable")[:, :active].astype(np.int64)
    top = np.take_along_axis(shares, ids, axis=-1)
    return logits, top / top.sum(axis=-1, keepdims=True) if renormalise else top, ids


def moe_block(weights: Weights, config: Config, x: Array) -> tuple[Array, Stages]:
    """Sparse experts (1701.06538, eq. 1) on the normalised [S,D]: what joins the residual, and its stages.

    Qwen2-MoE adds an expert that every token visits, weighed by a sigmoid of its own. The contract's moe_ffn_out is
    the sum over the A routed experts alone, so only what joins the residual holds the shared one.
    """
    active, M, D = config["num_experts_per_tok"], config["moe_intermediate_size"], x.shape[-1]
    logits, top, ids = route(x, weights("mlp.gate.weight"), active, config.get("norm_topk_prob", False))
    inside = {name: np.empty((*ids.shape, n)) for name, n in (("gate", M), ("up", M), ("swigl", M), ("out", D))}
    for expert in np.unique(ids):
        rows, slots = np.nonzero(ids == expert)
        values = swiglu(x[rows], *expert_matrices(weights, int(expert)))
        for name, whole in inside.items():
            whole[rows, slots] = values[name]
    ffn = (top[..., None] * inside["out"]).sum(axis=1)
    stages: Stages = {"moe_router_logits": logits, "moe_router": top, "moe_router_indices": ids}
    stages |= {f"moe_expert_{name}": whole for name, whole in inside.items()} | {"moe_ffn_out": ffn}
    if "mlp.shared_expert.gate_proj.weight" in weights:
        shared = swiglu(x, *matrices(weights, "mlp.shared_expert."))["out"]
        ffn = ffn + sigmoid(x @ weights("mlp.shared_expert_gate.weight").T) * shared
    return ffn, stages
