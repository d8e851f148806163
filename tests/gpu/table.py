"""The figures of `tests.gpu.all` as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SIDES = {"session": "Session.forward", "jit": "jit(forward)", "hf": "HF eager + hooks"}


def figures(found: dict[str, Any]) -> Iterator[str]:
    """Machine, tests, then one table a model."""
    yield ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    yield f"tests: {found['tests']}"
    models = found["models"]
    if not models:
        return
    copied = models["bandwidth"]
    speed = copied["bytes_a_second"] if copied else None
    yield f"device memory: {speed / 1e9:.0f} GB/s read and written" if speed else "device memory: not measured"
    for like in (key for key in models if key not in ("bandwidth", "left out")):
        yield from _model(like, models[like], speed)
    yield from (f"left out: {reason}" for reason in models["left out"])


def _model(like: str, sides: dict[str, Any], speed: float | None) -> Iterator[str]:
    session, theirs = sides["session"] or {}, sides["hf"] or {}
    yield ""
    yield f"{like}, float32, all stages; load {_seconds(session.get('load'))}"
    yield f"{'tokens':>6}  {'':18}{'resident':>10}{'home':>10}{'HF / this':>11}{'of bound':>10}{'peak':>10}"
    counts = [key for key in session if key.isdecimal()] or [key for key in theirs if key.isdecimal()]
    for count in counts:
        for side, words in SIDES.items():
            row = (sides[side] or {}).get(count)
            if row is None:
                yield f"{count:>6}  {words:18} not measured"
                continue
            other = theirs.get(count, {}).get("resident")
            ratio = f"{other / row['resident']:.2f}" if other else "-"
            bound = session["parameters"] / speed / row["resident"] if speed and "parameters" in session else None
            share = f"{bound:.0%}" if bound else "-"
            memory = (sides[side] or {}).get("peak")
            size = f"{memory / 1e9:.1f} GB" if memory else "-"
            times = f"{_seconds(row['resident']):>10}{_seconds(row['home']):>10}"
            yield f"{count:>6}  {words:18}{times}{ratio:>11}{share:>10}{size:>10}"
    for name, seconds in sides["processes"].items():
        yield f"        whole process, 7 tokens: {name} {_seconds(seconds)}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
