"""RoPE, scores, softmax and attention in NumPy float64, with a switch for everything that engines get wrong in them."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxref.rope import inverse_frequencies
from oracle.variants_overflow import held, nearest, shares

Array = np.ndarray
Switches = dict[str, Any]


def capped(x: Array, s: Switches) -> Array:
    """c·tanh(x/c) with `cap` for c."""
    return s["cap"] * np.tanh(x / s["cap"]) if "cap" in s else x


def rope(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """RoPE: `interleaved`, `theta`, `offset`, `sign`, `stretch`, `partial`, `scaling`, `magnitude`, `tables`, `skip`.

    `exchanged`: cos and sin; `by_head`: heads are taken for positions; `times`; `kept`, `angles`: the dtype of these.
    `in_place`: the second of a pair is made of the first one turned; `first`: so many heads are turned.
    `raw` are rows to rotate instead; `after` is applied to what was rotated [S, heads, h]; `offset` may be one a row.
    """
    heads, h = s["heads"], s["head_dim"]
    values = s.get("raw", x[0])
    values = values[:, s["raw_start" if "raw" in s else "start"] :][:, : heads * h].reshape(-1, heads, h)
    if s.get("skip"):
        return values.reshape(len(values), -1)
    width = int(h * s.get("partial", 1.0))
    frequencies = s["frequencies"] if "frequencies" in s else inverse_frequencies(width, s["theta"], s["scaling"])
    if kept := s.get("kept"):
        frequencies = frequencies.astype(kept).astype(np.float64)
    positions = (x[1] + np.asarray(s.get("offset", 0)))[:, None, None]
    if s.get("by_head"):
        positions = np.arange(heads)[None, :, None]
    angles = s.get("sign", 1) * positions * frequencies / s.get("stretch", 1.0)
    if rounded := s.get("angles"):
        angles = angles.astype(rounded).astype(np.float64)
    magnitude = s.get("magnitude", 1.0 if s["scaling"] is None else s["scaling"].attention_factor)
    cos, sin = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    if s.get("exchanged"):
        cos, sin = sin, cos
    if tables := s.get("tables"):
        cos, sin = (t.astype(tables).astype(np.float64) for t in (cos, sin))
    turned, rest = values[..., :width], values[..., width:]
    interleaved = s.get("interleaved")
    half = width // 2
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    first = a * cos - b * sin
    second = b * cos + (first if s.get("in_place") else a) * sin
    turned = np.stack([first, second], -1).reshape(turned.shape) if interleaved else np.concatenate([first, second], -1)
    found = np.concatenate([turned, rest], axis=-1) if width < h else turned
    if "first" in s:
        found = np.where((np.arange(heads) < s["first"])[:, None], found, values)
    found = s["after"](found) if "after" in s else found
    return s.get("times", 1.0) * found.reshape(len(found), -1)


def attn_scores(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`scale` for 1/√h and `times` it; `kv_map`: the kv head of each query head; `cap` as in `linear`.

    `product`: the type of q·k before it is scaled, beside what is `shown` of the result.
    """
    h, K = s["head_dim"], s["kv_heads"]
    q, k = (a.reshape(len(a), -1, h) for a in x)
    kv_map = s.get("kv_map", np.arange(q.shape[1]) // (q.shape[1] // K))
    scale = s.get("scale", h**-0.5) * s.get("times", 1.0)
    raw = q.transpose(1, 0, 2) @ k[:, kv_map].transpose(1, 2, 0)
    if "product" in s:
        raw = nearest(raw, s["product"], s["shown"] / scale) if "shown" in s else held(raw, s["product"])
    return capped(raw * scale, s)


def attn_softmax(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """`nearest` and `window`: how far back keys are seen; `unmasked`, `over_queries`, `masked_after`, `undivided`.

    `seen`: a mask [S, T] or [H, S, T]; `masked`: a number in place of minus infinity; `plus`: what the sum has
    besides, "zero" (a key with score 0) or "greatest" (one as great as the greatest). Of the scores: `cap`, and `heat`,
    which they are multiplied with (0: a mean over keys). `block`: it runs over blocks of so many keys, and of what came
    before a greater score only the `rescaled` is rescaled: "nothing", "sum" or "output". `unshifted`: the type of the
    powers, where the greatest score is not subtracted; `masked_too`: whether masked keys get what follows from it.
    """
    back = x[1][:, None] - x[2][None, :]
    seen = back >= s.get("nearest", 0)
    if s.get("nearest", 0) > 0:
        seen |= (x[1][:, None] == 0) & (back == 0)  # a softmax over nothing would be a NaN
    if s["window"] is not None:
        seen &= back < s["window"]
    seen = s.get("seen", np.ones_like(seen) if s.get("unmasked") else seen)
    allowed = np.ones_like(seen) if s.get("masked_after") else seen
    axis = -2 if s.get("over_queries") else -1
    masked = np.where(allowed, s.get("heat", 1.0) * capped(x[0], s), s.get("masked", -np.inf))
    if "unshifted" in s:
        found = shares(masked, s["unshifted"])
        return found if s["masked_too"] else np.where(seen, found, 0.0)
    with np.errstate(invalid="ignore"):
        greatest = masked.max(axis=axis, keepdims=True)
        powers = np.exp(masked - greatest)
        if "block" in s:
            return _by_blocks(masked, powers, s)
        plus = {"zero": np.exp(-greatest), "greatest": 1.0}.get(s.get("plus", ""), 0.0)
    found = powers / (1 if s.get("undivided") else plus + powers.sum(axis=axis, keepdims=True))
    if not np.isfinite(found).all():
        found = np.nan_to_num(found)
    return found if "masked" in s else np.where(seen, found, 0.0)


def _by_blocks(scores: Array, powers: Array, s: Switches) -> Array:
    """Softmax over blocks of keys (arXiv:2205.14135) that keeps powers as they were by the greatest score so far."""
    count = scores.shape[-1]
    ends = np.minimum(np.arange(count) // s["block"] * s["block"] + s["block"], count) - 1
    kept = np.nan_to_num(np.exp(scores - np.maximum.accumulate(scores, axis=-1)[..., ends]))
    summed = powers if s["rescaled"] == "sum" else kept
    return (powers if s["rescaled"] == "output" else kept) / summed.sum(axis=-1, keepdims=True)


def attention(x: list[Array], w: dict[str, Array], s: Switches) -> Array:
    """softmax·V; `kv_map` as for the scores; `unmerged`: [H, S, h] read as [S, H·h]; `by_dim`: [S, h, H] written.

    `order`: the head that stands in each one's place.
    """
    heads, K, h = x[0].shape[0], s["kv_heads"], s["head_dim"]
    v = x[1][:, s["start"] : s["start"] + K * h].reshape(-1, K, h)
    kv_map = s.get("kv_map", np.arange(heads) // (heads // K))
    mixed = (x[0] @ v[:, kv_map].transpose(1, 0, 2)).transpose(1, 0, 2)
    mixed = mixed.swapaxes(0, 1).reshape(mixed.shape) if s.get("unmerged") else mixed
    mixed = mixed.swapaxes(1, 2) if s.get("by_dim") else mixed
    mixed = mixed[:, s["order"]] if "order" in s else mixed
    return mixed.reshape(len(mixed), -1)
