"""How hypotheses about attention are tried: RoPE, scale, heads, mask. The others are in `tries.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from oracle import fits
from oracle.bench import Bench
from oracle.deviations import visible
from oracle.tries import Tries, Try, each
from oracle.tries_rounded import HALF
from weights.config import RopeScaling

OFFSETS = (1, -1, 2, -2, 3, -3, 4, -4)
# What Qwen's models were trained on before they were stretched.
LENGTHS = (32768, 4096, 8192)


def theta(bench: Bench) -> Iterator[Try]:
    """Another rope_theta: those that people use, and a fitted one."""
    for theta in fits.thetas(bench):
        yield Try(
            theta, {"theta": theta}, f"rope_theta = {theta:.10g} (the config says {bench.settings['theta']:.10g})"
        )


def stretch(bench: Bench) -> Iterator[Try]:
    """Positions divided by a fitted factor."""
    for factor in fits.stretches(bench):
        yield Try(factor, {"stretch": factor}, f"positions are divided by {factor:.6g} (linear scaling)")


def yarn(doubled: bool) -> Tries:
    """YaRN missing or applied twice, as a whole or by its halves."""

    def tries(bench: Bench) -> Iterator[Try]:
        scaling = bench.settings["scaling"]
        if scaling is None or scaling.rope_type != "yarn":
            return
        plain, turned = fits.frequencies(bench, None), fits.frequencies(bench, scaling)
        twice, magnitude = turned * turned / plain, scaling.attention_factor
        if not doubled:
            yield Try(None, {"scaling": None}, "YaRN is not applied")
            yield Try("frequencies", {"frequencies": plain}, "YaRN's frequencies are not applied")
            yield Try("attention_factor", {"magnitude": 1.0}, "YaRN's attention factor is not applied")
            return
        yield Try(None, {"frequencies": twice, "magnitude": magnitude**2}, "YaRN is applied twice")
        yield Try("frequencies", {"frequencies": twice}, "YaRN's frequencies are applied twice")
        yield Try("attention_factor", {"magnitude": magnitude**2}, "YaRN's attention factor is applied twice")

    return tries


def yarn_other(bench: Bench) -> Iterator[Try]:
    """YaRN with another factor than the config's, or where it has none."""
    stated = bench.settings["scaling"]
    if stated is not None and stated.rope_type != "yarn":
        return
    for factor in (2.0, 4.0, 8.0, 16.0, 32.0):
        for length in (stated.original_max_position_embeddings,) if stated else LENGTHS:
            if stated is not None and factor == stated.factor:
                continue
            base = stated or RopeScaling("yarn", factor, length)
            scaling = replace(base, factor=factor, attention_factor=0.1 * math.log(factor) + 1)
            says = "has none" if stated is None else f"says {stated.factor:g}"
            words = f"YaRN by {factor:g} from a length of {length} (the config {says})"
            yield Try(factor, {"scaling": scaling}, words, together=(factor, length))


def llama3(bench: Bench) -> Iterator[Try]:
    """The frequencies of Llama 3.1 and 3.2: slow pairs are divided by 8 or 32, fast ones stay, the rest lies between.

    Formula and numbers: `rope_scaling` of type "llama3" in Meta's config.json, as transformers computes it.
    """
    plain = fits.frequencies(bench, None)
    turns = 8192 * plain / (2 * math.pi)  # over the length that Llama 3 was trained on
    kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    for factor, model in ((8.0, "3.1"), (32.0, "3.2")):
        frequencies = plain * kept + plain / factor * (1.0 - kept)
        words = f"frequencies are stretched by {factor:g} as Llama {model}'s are"
        yield Try(factor, {"frequencies": frequencies}, words)


def half_positions(bench: Bench) -> Iterator[Try]:
    """Positions in half precision: above 256 bfloat16 has not all of them, above 2048 float16."""
    positions = np.asarray(bench.case.positions, np.float64)
    for name, dtype in HALF.items():
        offset = positions.astype(dtype).astype(np.float64) - positions
        if offset.any():
            yield Try(name, {"offset": offset}, f"positions are rounded to {name}")


def half_angles(bench: Bench) -> Iterator[Try]:
    """Position times frequency in half precision, as autocast makes it of a product, alone or with the frequencies."""
    for name, dtype in HALF.items():
        yield Try(name, {"angles": dtype}, f"angles are rounded to {name}")
        both = {"angles": dtype, "kept": dtype}
        yield Try(f"{name} both", both, f"angles and frequencies are rounded to {name}")


def before_norm(bench: Bench) -> Iterator[Try]:
    """RoPE before the norm of heads."""
    part = bench.stage[0]
    config, field = bench.config, f"{part}_norm"
    raw = bench.value("qkv_bias" if config.qkv_bias else "qkv_matmul") if config.qk_norm else None
    if raw is None:
        return
    weight, eps = bench.tensor(field), config.rms_norm_eps

    def after(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * weight

    start = 0 if part == "q" else config.q_width
    yield Try(None, {"raw": raw, "raw_start": start, "after": after}, "it is rotated before the head norm, not after")


def positions(bench: Bench) -> Iterator[Try]:
    """Positions that are off by a number, or that are what the angles of each row say."""
    yield from each("positions are off by {:+d}", "offset", *OFFSETS)(bench)
    offsets = fits.offsets(bench)
    if offsets is None or (len(set(offsets.tolist())) == 1 and offsets[0] in (0, *OFFSETS)):
        return
    if len(set(offsets.tolist())) == 1:
        yield Try(int(offsets[0]), {"offset": int(offsets[0])}, f"positions are off by {offsets[0]:+d}")
        return
    found = (np.asarray(bench.case.positions) + offsets).tolist()
    first = int(np.flatnonzero(offsets)[0])
    few = ", ".join(map(str, found[first : first + 6]))
    words = f"positions from {bench.case.positions[first]} on are {few}{', …' if len(found) > first + 6 else ''}"
    yield Try(found, {"offset": offsets}, words)


def doubled(bench: Bench) -> Iterator[Try]:
    """RoPE upon RoPE."""
    scaling = bench.settings["scaling"]
    magnitude = 1.0 if scaling is None else scaling.attention_factor
    yield Try(None, {"stretch": 0.5, "magnitude": magnitude**2}, "it is rotated twice, as if positions were doubled")


# --- attention


def scales(bench: Bench) -> dict[str, tuple[float, str]]:
    """The scales that engines use in place of 1/√h, and how to say it."""
    config = bench.config
    H, h = config.num_attention_heads, config.head_dim
    return {
        "scores_unscaled": (1.0, "the scores are not divided by √h"),
        "scores_model_dim": (
            (config.hidden_size / H) ** -0.5,
            f"they are scaled by 1/√(D/H), D/H = {config.hidden_size / H:g}",
        ),
        "scores_head_dim": (1.0 / h, "they are scaled by 1/h, not 1/√h: by 1/√h twice"),
        "scores_hidden_dim": (config.hidden_size**-0.5, "they are scaled by 1/√D, not 1/√h"),
    }


def scale(name: str) -> Tries:
    """One of `scales`."""

    def tries(bench: Bench) -> Iterator[Try]:
        scale, words = scales(bench)[name]
        if scale != bench.config.head_dim**-0.5:
            yield Try(None, {"scale": scale}, words)

    return tries


def kv_map(kind: str) -> Tries:
    """Another kv head for each query head."""

    def tries(bench: Bench) -> Iterator[Try]:
        H, K = bench.config.num_attention_heads, bench.config.num_key_value_heads
        head, group = np.arange(H), np.arange(H) // (H // K)
        maps = {"modulo": (head % K, "h % K"), "reversed": (K - 1 - group, "K-1-h//G"), "first": (0 * head, "always 0")}
        maps |= {"next": ((group + 1) % K, "(h//G + 1) % K"), "previous": ((group - 1) % K, "(h//G - 1) % K")}
        kv_map, words = maps[kind]
        # Of two heads the neighbour is the reversed one.
        if not np.array_equal(kv_map, group) and (K > 2 or kind not in ("next", "previous")):
            yield Try(kind, {"kv_map": kv_map}, f"query head h reads kv head {words}, not h // G")

    return tries


def kv_fitted(bench: Bench) -> Iterator[Try]:
    """For each query head the kv head that comes nearest to what the engine has."""
    H, K = bench.config.num_attention_heads, bench.config.num_key_value_heads
    if not bench.shown:
        for step in (1, -1):  # what is usual: groups that begin a head early or late
            kv_map = (np.arange(H) + step) // (H // K) % K
            yield Try(kv_map.tolist(), {"kv_map": kv_map}, f"query heads read the kv heads {kv_map.tolist()}")
        return
    apart = np.stack([_by_head(bench, np.full(H, head)) for head in range(K)])
    found = apart.argmin(axis=0)
    if np.isfinite(apart).all() and not np.array_equal(found, np.arange(H) // (H // K)):
        yield Try(found.tolist(), {"kv_map": found}, f"query heads read the kv heads {found.tolist()}", fitted=True)


def _by_head(bench: Bench, kv_map: np.ndarray) -> np.ndarray:
    """The square error of each query head [H] with these kv heads."""
    difference = bench.run({"kv_map": kv_map}) - bench.engine
    if bench.stage == "attention":
        return np.square(difference).reshape(len(difference), len(kv_map), -1).sum(axis=(0, 2))
    seen = visible(bench.stage, bench.engine, bench.case.positions)
    return np.square(np.where(seen, difference, 0.0)).sum(axis=(1, 2))


def window(bench: Bench) -> Iterator[Try]:
    """No sliding window, or one as long as the engine shows."""
    stated = bench.settings["window"]
    if stated is not None:
        yield Try("none", {"window": None}, f"no sliding window (the config says {stated})")
    says = "has none" if stated is None else f"says {stated}"
    for window in fits.windows(bench):
        yield Try(window, {"window": window}, f"a sliding window of {window} (the config {says})")


def heat(bench: Bench) -> Iterator[Try]:
    """Powers of 2 in place of e, and a temperature that is read off the rows: 1/√h once more, √h, or any."""
    yield Try(math.log(2), {"heat": math.log(2)}, "powers of 2 in place of e")
    root = math.sqrt(bench.config.head_dim)
    for factor in fits.heats(bench):
        nice = {1 / root: "1/√h, once more", root: "√h"}
        words = next((f"{factor:.6g}, {say}" for value, say in nice.items() if value == factor), f"{factor:.6g}")
        yield Try(factor, {"heat": factor}, f"the scores are multiplied by {words}", fitted=True)
