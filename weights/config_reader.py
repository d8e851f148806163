"""Typed look-ups in the raw dictionary of a config."""

from __future__ import annotations

import math
from typing import Any

from weights.errors import UserError


class ConfigReader:
    """Typed look-ups in a raw config; a wrong type is a `UserError` that names the key."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise UserError(f"{key} must be a positive whole number, not {value!r}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{key} must be true or false, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{key} must be a positive number, not {value!r}")
        return float(value)
