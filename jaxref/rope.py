"""Rotary position embedding (arXiv:2104.09864) with linear interpolation or YaRN (arXiv:2309.00071)."""

from __future__ import annotations

import math

import numpy as np

from weights.config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """[h/2] float64, in radians a position: theta^(-2i/h), stretched by the scaling. Rounded by the caller."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    kept = 1.0 - _ramp(head_dim, theta, scaling)
    return frequencies / scaling.factor * (1.0 - kept) + frequencies * kept


def _ramp(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """[h/2]: 0 where a dimension keeps its frequency, 1 where it is interpolated (section 3.2 of the YaRN paper)."""

    def dimension(rotations: float) -> float:
        positions = scaling.original_max_position_embeddings
        return head_dim * math.log(positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # The same guard against a division by zero as the paper's code and transformers have.
    high = high + 0.001 if low == high else high
    return np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
