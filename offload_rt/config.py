"""What the user asked for, checked once: sizes, paths and the arguments of `offload_rt.engine`. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from offload_rt.errors import ConfigError, nearest

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip

NO_COMMIT_FOLDER = "commit_every: commits are written beside the store; give nvme= a folder"


def parse_bytes(value: int | str, *, field: str) -> int:
    """Bytes from a number or a text such as `"22GiB"`: GiB is 2**30 bytes, GB 10**9. Raises `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ConfigError(f"{field}: expected bytes or a size such as '22GiB', got {value!r}")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match is None:
            raise ConfigError(f"{field}: cannot read {value!r} as a size; write bytes or, say, '22GiB'")
        number, unit = match.groups()
        if unit.lower() not in _UNITS:
            raise ConfigError(
                f"{field}: unknown unit {unit!r} in {value!r}; {nearest(unit.lower(), filter(None, _UNITS))}"
            )
        num_bytes = int(Decimal(number) * _UNITS[unit.lower()])
    else:
        num_bytes = value
    if not 0 < num_bytes < 1 << 64:
        raise ConfigError(f"{field}: must be more than zero and less than 16 EiB, got {value!r:.60}")
    return num_bytes


def io_timeout_seconds() -> float:
    """`OFFLOAD_RT_IO_TIMEOUT` in seconds, 60 where it is not set: after so long without an arrival, a wait is an error.

    Raises `ConfigError` for what is no number above zero.
    """
    text = os.environ.get("OFFLOAD_RT_IO_TIMEOUT", "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:  # nor is NaN
        raise ConfigError(f"OFFLOAD_RT_IO_TIMEOUT: must be a number of seconds above zero, got {text!r}")
    return seconds


@dataclass(frozen=True, kw_only=True)
class NvmePath:
    """One drive's folder and how much of it may be used."""

    path: Path
    """An existing folder."""
    capacity_bytes: int | None = None
    """At most this much is written below it; None is what the file system has free."""


def parse_nvme(value: str | Path | Sequence[str | Path] | None) -> tuple[NvmePath, ...]:
    """`"path"`, `"path:500GiB"`, or a sequence of these, one per drive. Raises `ConfigError`."""
    if value is None:
        return ()
    if not isinstance(value, (str, Path, Sequence)):
        raise ConfigError(f"nvme: expected a folder or a list of folders, got {value!r}")
    entries = [value] if isinstance(value, (str, Path)) else list(value)
    if not entries:
        raise ConfigError("nvme: an empty list; give at least one folder, or None")
    drives = []
    for entry in entries:
        if not isinstance(entry, (str, Path)) or not str(entry):
            raise ConfigError(f"nvme: expected a folder, got {entry!r}")
        text = str(entry)
        match = re.fullmatch(r"(.+):(\d[\d.]*\s*[A-Za-z]*)", text)
        if match is not None and not Path(text).exists():
            drive = NvmePath(path=Path(match[1]).expanduser(), capacity_bytes=parse_bytes(match[2], field="nvme"))
        else:
            drive = NvmePath(path=Path(text).expanduser())
        drives.append(drive)
    return tuple(drives)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The scalar arguments of `offload_rt.engine`, parsed and checked."""

    bits: int | None = None
    """4: frozen weights as NF4 with double quantization; None keeps their dtype."""
    device: str = "cpu"
    """"cpu" or "cuda:N"."""
    device_memory_bytes: int | None = None
    """Hard budget of the DEVICE tier; None is what is free."""
    host_memory_bytes: int | None = None
    """Hard budget of the HOST tier. On the CPU device, None makes DEVICE and HOST one tier."""
    nvme: tuple[NvmePath, ...] = ()
    """Folders of the NVME tier, one per drive; empty keeps everything in memory."""
    batch_size: int = 1
    """Rows of the largest batch."""
    seq_len: int = 4096
    """Tokens of the longest row."""
    accumulation_steps: int = 1
    """Backward passes per step, as declared."""
    max_grad_norm: float | None = None
    """Global norm to which `step` clips; None does not clip."""
    commit_every: int | None = None
    """Steps between durable commits beside the store; None commits every step where state rests on NVMe, and otherwise
    leaves saving to the caller."""

    def __post_init__(self) -> None:
        if self.bits not in (None, 4):
            raise ConfigError(f"bits: {self.bits!r} is not offered; allowed: 4, None")
        for field in ("batch_size", "seq_len", "accumulation_steps"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field}: must be a whole number of at least 1, got {value!r}")
        norm = self.max_grad_norm
        if norm is not None and not (isinstance(norm, (int, float)) and not isinstance(norm, bool) and norm > 0):
            raise ConfigError(f"max_grad_norm: must be more than zero, got {self.max_grad_norm!r}")
        if self.commit_every is not None:
            if isinstance(self.commit_every, bool) or not isinstance(self.commit_every, int) or self.commit_every < 1:
                raise ConfigError(f"commit_every: must be a whole number of at least 1, got {self.commit_every!r}")
            if not self.nvme:
                raise ConfigError(NO_COMMIT_FOLDER)


def adapter_folder(text: str) -> Path | None:
    """The folder of a saved adapter that `text` names; None where it describes new ones, as for `parse_adapters`.

    Raises `ConfigError` where it names a folder and describes something besides.
    """
    folder, colon, rest = text.partition(":")
    if folder == "lora" or (os.sep not in text and not Path(folder).is_dir()):
        return None
    if colon and not Path(text).expanduser().is_dir():
        raise ConfigError(f"adapters: {folder} goes on with its own configuration; leave out {rest!r}")
    return Path(text).expanduser()


def parse_adapters(text: str) -> dict[str, Any]:
    """`"lora:r=16,alpha=32,dropout=0.05,targets=q_proj+v_proj"` as keyword arguments of `peft.LoraConfig`.

    Left out, r is 16, alpha twice r, and targets all linears. Raises `ConfigError`.
    """
    allowed = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
    kind, _, rest = text.partition(":")
    if kind != "lora":
        raise ConfigError(f"adapters: {kind!r} is no folder, and no kind; {nearest(kind, ['lora'])}")
    result: dict[str, Any] = {"r": 16, "target_modules": "all-linear"}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in allowed:
            raise ConfigError(f"adapters: unknown key {key!r} in {text!r}; {nearest(key, allowed)}")
        if not equals or not value:
            raise ConfigError(f"adapters: {key!r} has no value in {text!r}")
        try:
            if key in ("r", "alpha"):
                result[allowed[key]] = int(value)
            elif key == "dropout":
                result[allowed[key]] = float(value)
            else:
                names = value.split("+")
                result[allowed[key]] = names[0] if names == ["all-linear"] else names
        except ValueError:
            raise ConfigError(f"adapters: {key}={value!r} is not a number") from None
    if not 0 <= result.get("lora_dropout", 0.0) < 1:
        raise ConfigError(f"adapters: dropout must be at least 0 and below 1, got {result['lora_dropout']}")
    if result["r"] < 1:
        raise ConfigError(f"adapters: r must be at least 1, got {result['r']}")
    result.setdefault("lora_alpha", 2 * result["r"])
    return result
