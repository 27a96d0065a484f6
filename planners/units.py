"""Whole pages; sizes and rates as people write them, and fields of JSON files, read with errors that say where.

`ProblemError` is a malformed question: the caller's mistake. It is not `PlanInfeasible`, which is an answer.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 60
"""1 EiB: more than any tier of one machine; a larger number is a slip of the unit."""
PAGE_BYTES = 4096
"""Of a slot, an extent and a read past the page cache, the unit."""

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50,
}  # fmt: skip


def whole_pages(num_bytes: int) -> int:
    """`num_bytes` as a slot takes them."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def seconds(value: float) -> str:
    """A duration with three digits."""
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 600 else f"{value / 60:.4g} min"


class ProblemError(ValueError):
    """The question is malformed: an unknown name, a bad number, a file that does not say what it should."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Ends an error about an unknown name: the nearest match if there is one, otherwise all that is allowed."""
    names = sorted(name for name in allowed if name)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(names)}"


def parse_size(text: str, *, field: str) -> int:
    """Bytes from a text such as `64GiB` or `2TB`. Raises `ProblemError`; zero and negative sizes are refused."""
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None:
        raise ProblemError(f"{field}: cannot read {text!r} as a size; write, say, '64GiB'")
    number, unit = match.groups()
    if unit.lower() not in _UNITS:
        raise ProblemError(f"{field}: unknown unit {unit!r} in {text!r}; {nearest(unit, filter(None, _UNITS))}")
    num_bytes = int(Decimal(number) * _UNITS[unit.lower()])
    if not 0 < num_bytes <= MAX_BYTES:
        raise ProblemError(f"{field}: must be more than zero and at most 1 EiB, got {text!r}")
    return num_bytes


def parse_rate(text: str, *, field: str) -> float:
    """Bytes per second from gigabytes per second (`7.0`), the unit of data sheets."""
    try:
        value = float(text) * 1e9
    except ValueError:
        raise ProblemError(f"{field}: cannot read {text!r} as GB/s") from None
    if not 1e6 <= value <= 1e14:
        raise ProblemError(f"{field}: {text!r} GB/s is not a rate between 0.001 and 100000 GB/s")
    return value


class JsonFile:
    """A JSON object from a file, whose errors name path, line and key."""

    def __init__(self, path: Path | str, text: str) -> None:
        self.path = str(path)
        self.text = text
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ProblemError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        except RecursionError:
            raise ProblemError(f"{path}: nested too deeply") from None
        if not isinstance(data, dict):
            raise ProblemError(f"{path}:1: expected an object, got {type(data).__name__}")
        self.data: dict[str, Any] = data

    @staticmethod
    def load(path: Path | str) -> JsonFile:
        """Reads `path`. `ProblemError` if it cannot be read or is no JSON object."""
        try:
            return JsonFile(path, Path(path).read_text())
        except OSError as error:
            raise ProblemError(f"{path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ProblemError(f"{path}: not text: {error.reason} at byte {error.start}") from None

    def error(self, keys: tuple[str, ...], problem: str) -> ProblemError:
        """The error for the value at `keys` (outermost first)."""
        position = 0
        for key in keys:
            found = re.compile(re.escape(json.dumps(key)) + r"\s*:").search(self.text, position)
            position = found.start() if found else position
        line = self.text.count("\n", 0, position) + 1
        return ProblemError(f"{self.path}:{line}: {'.'.join(keys) or 'file'}: {problem}")

    def number(self, keys: tuple[str, ...], value: Any, *, low: float, high: float, whole: bool = False) -> int | float:
        """`value` as a number within `[low, high]`."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(keys, f"expected a number, got {value!r:.60}")
        if whole and value != int(value):
            raise self.error(keys, f"expected a whole number, got {value!r}")
        if not low <= value <= high:
            raise self.error(keys, f"must be between {low:g} and {high:g}, got {value!r}")
        return int(value) if whole else float(value)

    def section(self, keys: tuple[str, ...], kind: type, limits: Mapping[str, tuple[float, float]]) -> Any:
        """The object at `keys` as the dataclass `kind`; unknown and missing keys are errors.

        `limits` bounds the numeric fields; an `int` field takes whole numbers.
        """
        data: Any = self.data
        for key in keys:
            data = data.get(key, {}) if isinstance(data, dict) else {}
        return self.record(keys, data, kind, limits)

    def record(self, keys: tuple[str, ...], data: Any, kind: type, limits: Mapping[str, tuple[float, float]]) -> Any:
        """`data`, which lies at `keys`, as the dataclass `kind`."""
        if not isinstance(data, dict):
            raise self.error(keys, f"expected an object, got {type(data).__name__}")
        known = {f.name: f for f in fields(kind)}
        for key in data:
            if key not in known:
                raise self.error((*keys, key), f"unknown key; {nearest(key, known)}")
        values: dict[str, Any] = {}
        for name, entry in known.items():
            if name not in data:
                if entry.default is MISSING:
                    raise self.error(keys, f"has no key {name!r}")
            elif name in limits:
                low, high = limits[name]
                values[name] = self.number((*keys, name), data[name], low=low, high=high, whole=entry.type == "int")
            elif not isinstance(data[name], str):
                raise self.error((*keys, name), f"expected a text, got {data[name]!r:.60}")
            else:
                values[name] = data[name]
        return kind(**values)
