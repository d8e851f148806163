"""Typed look-ups in the raw dictionary of a config."""

from __future__ import annotations

import sys
from typing import Any

from weights.errors import UserError, brief

MOST = (1 << 31) - 1  # what an index of 32 bits can count


class ConfigReader:
    """Typed look-ups in a raw config; a wrong type is a `UserError` that names the key."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """A whole number from 1 to `most`."""
        value = self.raw.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise UserError(f"{key} must be a positive whole number, not {brief(value)}")
        if value > most:
            raise UserError(f"{key} must be at most {most}, not {brief(value)}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise UserError(f"{key} must be true or false, not {brief(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise UserError(f"{key} must be a positive number, not {brief(value)}")
        return float(value)
