"""How far two tensors are apart: sums in float64, taken block by block in memory that is used again."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SAMPLE = 1 << 20  # ulp distances kept for their median; a file with fewer values gives the exact one
_EXPONENT = np.int64(0x7FF0000000000000)  # of a float64: what is left is the power of two below the value
# dtype -> (bits of mantissa, smallest normal number). q8: float32 whose products take activations in blocks of int8.
PRECISION = {
    "float16": (10, -14),
    "bfloat16": (7, -126),
    "float32": (23, -126),
    "float64": (52, -1022),
    "q8": (8, -126),
}


@dataclass(frozen=True)
class Figures:
    """Distances of a test tensor from a reference, over the values that are finite in both.

    `relative_l2` is ‖t−r‖/‖r‖; `channel_median` the median over channels of the same, which one massive channel cannot
    hide; `ulp_*` are in units of the test's dtype at the reference's value; `snr_db` is −20·log10(relative_l2),
    infinite for equal tensors. `place` is (outer, row, column) of the greatest difference, `mismatch` that of the
    first value that is NaN or infinite in one of the two only (or differently).
    """

    count: int
    relative_l2: float
    cosine: float
    max_abs: float
    rms: float
    snr_db: float
    ulp_median: float
    ulp_max: float
    channel_median: float
    place: tuple[int, int, int] | None
    bad_reference: int = 0
    bad_test: int = 0
    mismatched: int = 0
    mismatch: tuple[int, int, int] | None = None
    kl: float | None = None
    top1: float | None = None
    top10: float | None = None

    @property
    def equal(self) -> bool:
        """Whether every value is the same."""
        return self.count > 0 and self.max_abs == 0 and not self.mismatched

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is infinite or does not apply is null."""
        found = asdict(self)
        return {k: jsonable(v) for k, v in found.items() if k not in ("place", "mismatch")}


def jsonable(value: Any) -> Any:
    """JSON knows no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Sums:
    """Takes in blocks [rows, columns] of a pair of tensors of `size` values, `block` at most at a time.

    A channel is a column, or what `add` calls one where it is given (a head of attention). `dtype` is the test's.
    """

    def __init__(self, dtype: str, size: int, channels: int, block: int) -> None:
        self._mantissa, least = PRECISION[dtype]
        self._least = 2.0**least
        self._work = np.empty((4, block))
        self._channels = np.zeros((2, channels))  # Σd², Σr²
        self._test = self._cross = 0.0
        self._count = 0
        self._stride = max(1, -(-size // SAMPLE)) | 1  # odd, so that it meets every column
        self._ulps: list[np.ndarray] = []
        self._ulp_max = 0.0
        self._max = -1.0
        self._place: tuple[int, int, int] | None = None
        self._bad, self._mismatched = [0, 0], 0
        self._mismatch: tuple[int, int, int] | None = None
        self.logits: Logits | None = None

    def add(
        self,
        reference: np.ndarray,
        test: np.ndarray,
        origin: tuple[int, int] = (0, 0),
        channel: int | None = None,
        visible: np.ndarray | None = None,
    ) -> None:
        """Take in a block whose first row is `origin` = (outer, row). Only the `visible` values count."""
        r, t, d, u = (part[: reference.size].reshape(reference.shape) for part in self._work)
        np.copyto(r, reference, casting="unsafe")
        np.copyto(t, test, casting="unsafe")
        hidden = 0
        if visible is not None:
            r[~visible] = t[~visible] = 0.0
            hidden = r.size - int(np.broadcast_to(visible, r.shape).sum())
        with np.errstate(all="ignore"):
            squares = _dot(t, t)
            if not math.isfinite(squares + _dot(r, r)):
                hidden += self._set_aside(r, t, origin)
                squares = _dot(t, t)
            self._count += r.size - hidden
            self._test += squares
            self._cross += _dot(t, r)
            np.subtract(t, r, out=d)
            self._add_channels(d, r, channel)
            self._add_extremes(d, r, u, origin, hidden)

    def _set_aside(self, r: np.ndarray, t: np.ndarray, origin: tuple[int, int]) -> int:
        """Count what is not finite, and put zeros there so that the sums leave it out."""
        bad_r, bad_t = ~np.isfinite(r), ~np.isfinite(t)
        bad = bad_r | bad_t
        nan_r, nan_t = np.isnan(r), np.isnan(t)
        wrong = bad & ~((nan_r & nan_t) | (r == t))
        self._bad[0] += int(bad_r.sum())
        self._bad[1] += int(bad_t.sum())
        if self._mismatch is None and wrong.any():
            row, column = divmod(int(wrong.argmax()), r.shape[1])
            self._mismatch = (origin[0], origin[1] + row, column)
        self._mismatched += int(wrong.sum())
        r[bad] = t[bad] = 0.0
        return int(bad.sum())

    def _add_channels(self, d: np.ndarray, r: np.ndarray, channel: int | None) -> None:
        for sums, part in zip(self._channels, (d, r), strict=True):
            if channel is None:
                sums += np.einsum("ij,ij->j", part, part)
            else:
                sums[channel] += _dot(part, part)

    def _add_extremes(self, d: np.ndarray, r: np.ndarray, u: np.ndarray, origin: tuple[int, int], hidden: int) -> None:
        np.abs(d, out=d)
        greatest = float(d.max())
        if greatest > self._max:
            row, column = divmod(int(d.argmax()), d.shape[1])
            self._max, self._place = greatest, (origin[0], origin[1] + row, column)
        np.bitwise_and(r.view(np.int64), _EXPONENT, out=u.view(np.int64))
        np.maximum(u, self._least, out=u)
        np.divide(d, u, out=u)
        self._ulp_max = max(self._ulp_max, float(u.max()))
        sample = np.sort(u.reshape(-1)[:: self._stride]).astype(np.float32)
        # What was hidden is zero in both tensors, so it lies among the first.
        self._ulps.append(sample[hidden // self._stride :])

    def figures(self) -> Figures:
        """The figures of all that was taken in."""
        difference, reference = (float(part.sum()) for part in self._channels)
        relative = _ratio(math.sqrt(difference), math.sqrt(reference))
        norms = math.sqrt(self._test) * math.sqrt(reference)
        ulps = np.concatenate(self._ulps) if self._ulps else np.zeros(0)
        scale = 2.0**self._mantissa
        return Figures(
            count=self._count,
            relative_l2=relative,
            cosine=self._cross / norms if norms else 0.0,
            max_abs=max(self._max, 0.0),
            rms=math.sqrt(difference / self._count) if self._count else 0.0,
            snr_db=-20 * math.log10(relative) if 0 < relative < math.inf else math.inf if not relative else -math.inf,
            ulp_median=float(np.median(ulps)) * scale if ulps.size else 0.0,
            ulp_max=self._ulp_max * scale,
            channel_median=self._channel_median(),
            place=self._place if self._count else None,
            bad_reference=self._bad[0],
            bad_test=self._bad[1],
            mismatched=self._mismatched,
            mismatch=self._mismatch,
            **(self.logits.figures() if self.logits else {}),
        )

    def _channel_median(self) -> float:
        difference, reference = self._channels
        used = (reference > 0) | (difference > 0)
        if not used.any():
            return 0.0
        with np.errstate(divide="ignore"):
            return float(np.median(np.sqrt(difference[used] / reference[used])))


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    # Not np.dot: BLAS would start threads of its own, against those that compare other files.
    return float(np.einsum("i,i->", a.reshape(-1), b.reshape(-1)))


def _ratio(above: float, below: float) -> float:
    return above / below if below else (math.inf if above else 0.0)


class Logits:
    """KL(reference ‖ test) in nats, and how often the likeliest and the ten likeliest tokens agree; means over rows."""

    def __init__(self) -> None:
        self._rows = 0
        self._sums = np.zeros(3)

    def add(self, reference: np.ndarray, test: np.ndarray) -> None:
        """Take in whole rows [rows, V]; a row with a NaN or an infinity is left out."""
        for r, t in zip(reference.astype(np.float64), test.astype(np.float64), strict=True):
            if not (np.isfinite(r).all() and np.isfinite(t).all()):
                continue
            log_p, log_q = (x - x.max() - math.log(np.exp(x - x.max()).sum()) for x in (r, t))
            many = min(10, r.size)
            ours, theirs = (set(np.argpartition(-x, many - 1)[:many].tolist()) for x in (r, t))
            kl = max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))
            self._sums += kl, float(r.argmax() == t.argmax()), len(ours & theirs) / many
            self._rows += 1

    def figures(self) -> dict[str, float]:
        """Empty where no row was finite."""
        if not self._rows:
            return {}
        return dict(zip(("kl", "top1", "top10"), (self._sums / self._rows).tolist(), strict=True))
