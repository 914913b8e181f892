"""The fields of a request's body, checked one by one: null is as if the field were not there, unknown fields are not looked at."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from typing import Any

from .errors import bad

LARGEST = 1 << 31


def parse(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        found = json.loads(body.decode("utf-8"), parse_constant=refuse)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except RecursionError:
        raise bad("The body is nested too deep.") from None
    except UnicodeError:
        raise bad("The body is not UTF-8 text.") from None
    except ValueError as e:
        raise bad(f"The body is not JSON: {e}.") from None
    if not isinstance(found, dict):
        raise bad("The body must be a JSON object.")
    return found


class Fields:
    """Typed access to a JSON object; what has another type raises ApiError with the field's name."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values, self._where = values, where

    def name(self, key: str) -> str:
        """The field's whole name."""
        return f"{self._where}.{key}" if self._where else key

    def get(self, *keys: str) -> Any:
        """The first of these fields that is there, or None."""
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)

    def number(self, key: str, default: float, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number within bounds."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or not math.isfinite(value):
            raise bad(f"{self.name(key)} must be a number{_bounds(low, high)}.", self.name(key))
        return float(value)

    def whole(self, key: str, default: int, low: int = -LARGEST, high: int = LARGEST) -> int:
        """A whole number within bounds."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad(f"{self.name(key)} must be a whole number{_bounds(low, high)}.", self.name(key))
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad(f"{self.name(key)} must be true or false.", self.name(key))
        return value

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise bad(f"{self.name(key)} must be a string.", self.name(key))
        return value

    def record(self, key: str) -> Fields | None:
        """An object, or None."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise bad(f"{self.name(key)} must be an object.", self.name(key))
        return Fields(value, self.name(key))

    def rows(self, key: str) -> list[Any]:
        """A list; none is an empty one."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise bad(f"{self.name(key)} must be a list.", self.name(key))
        return value

    def records(self, key: str) -> list[Fields]:
        """A list of objects."""
        for i, row in enumerate(self.rows(key)):
            if not isinstance(row, dict):
                raise bad(f"{self.name(key)}[{i}] must be an object.", f"{self.name(key)}[{i}]")
        return [Fields(row, f"{self.name(key)}[{i}]") for i, row in enumerate(self.rows(key))]

    def words(self, key: str, most: int = 64) -> list[str]:
        """A string, or a list of strings."""
        value = self.get(key)
        value = [value] if isinstance(value, str) else self.rows(key)
        if len(value) > most or not all(isinstance(word, str) for word in value):
            raise bad(f"{self.name(key)} must be a string or a list of at most {most} strings.", self.name(key))
        return [word for word in value if word]

    def seed(self) -> int:
        """Of the sampler: as given, modulo 2**32; random if it is not, or -1."""
        value = self.whole("seed", -1, -(1 << 63), 1 << 64)
        return secrets.randbits(32) if value == -1 else value % (1 << 32)


def _bounds(low: float, high: float) -> str:
    if low > -LARGEST and high < LARGEST:
        return f" from {low:g} to {high:g}"
    return f", at least {low:g}" if low > -LARGEST else f", at most {high:g}" if high < LARGEST else ""
