"""The ways to take a product with a frozen NF4 weight, and which is the fastest, by measurement on the device itself.

`decoded`, the plain twin, decodes the weight and multiplies. `fused` decodes where it multiplies: our kernel
(`nf4_product_triton`). `bitsandbytes` is that library's, where it is installed. Both sum in another order: they are
taken only where a plan's `packed_products` say so (`planners.plans.products`).

[Note: a way is measured before it is taken]
`measure` makes such a table. First each way shows its error: against a product in fp64 with the decoded weights it may
be 1.05 times the twin's at most, and a second call gives the same bits. One that does not, or that raises, is left out
with the reason. Then ways and twin are timed in turns, for one token to 256, and another way is taken where it saves
more than `GAIN`. What came out is remembered for the device and the versions that it was measured with.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from offload_rt.cache import recall, remember
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.quantized import codec
from offload_rt.quantized.nf4_layout import NESTED_BLOCK_SIZE, QUANT_BLOCK_SIZE, nf4_layout
from offload_rt.quantized.nf4_torch import sections_of, tables
from planners.plans.products import DECODED, PackedProducts, products_from_json, shape_key, shape_of, way_of

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GAIN = 0.05
"""What another way has to save: less is noise, and not worth a cut."""
MOST_ERROR = 1.05
"""Of the twin's: what a cut may have."""
ROUNDS = 7
_CALLS = 8
"""Timed as one: launched one behind the other, as layers are."""
_COLD_BYTES = 256 << 20
"""Of different weights in turn, so that none is in a cache."""
_CHECKED_TOKENS, _CHECKED_ROWS = 16, 256
_REVISION = 1
"""Of the measurement: another one makes what was remembered void."""


class Way(Protocol):
    """One way to take a product."""

    @property
    def name(self) -> str:
        """As plans say it."""

    def why_not(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str:
        """Why it cannot be taken with such a weight; empty where it can."""

    def product(self, x: Tensor, blob: Tensor, rows: int, bias: Tensor | None) -> Tensor:
        """x[..., columns] times the transposed weight [rows, columns], and `bias`[rows]: [..., rows] in x's dtype."""


@dataclass(frozen=True)
class Decoded:
    """The plain twin."""

    name: str = DECODED

    def why_not(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str:
        return ""

    def product(self, x: Tensor, blob: Tensor, rows: int, bias: Tensor | None) -> Tensor:
        return functional.linear(x, codec.decode(blob, (rows, x.shape[-1]), x.dtype), bias)


@dataclass(frozen=True)
class Fused:
    """Our kernel, of the module `nf4_product_triton`."""

    kernel: Any
    name: str = "fused"

    def why_not(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str:
        if not self.kernel.serves(device):
            return f"Triton's kernel does not run on {device.type}"
        reason: str = self.kernel.why_not(rows, columns, dtype)
        return reason

    def product(self, x: Tensor, blob: Tensor, rows: int, bias: Tensor | None) -> Tensor:
        out: Tensor = self.kernel.product(x, blob, nf4_layout(rows * x.shape[-1]), rows, bias)
        return out


@dataclass(frozen=True)
class Bitsandbytes:
    """bitsandbytes' `gemm_4bit` (0.50), whose bytes a blob's sections are: nothing is copied."""

    operation: Callable[..., Tensor]
    name: str = "bitsandbytes"

    def why_not(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str:
        if dtype not in (torch.bfloat16, torch.float16):
            return f"x.dtype is {dtype}, allowed: torch.bfloat16, torch.float16"
        if columns % QUANT_BLOCK_SIZE:
            return f"{columns} columns are no multiple of {QUANT_BLOCK_SIZE}: bitsandbytes decodes such a weight first"
        return ""

    def product(self, x: Tensor, blob: Tensor, rows: int, bias: Tensor | None) -> Tensor:
        codes, absmax, nested_absmax, nested_offset, nested_map = sections_of(blob, nf4_layout(rows * x.shape[-1]))
        if nested_absmax.numel() * NESTED_BLOCK_SIZE < absmax.numel():
            raise OffloadError(f"the blob has {nested_absmax.numel()} nested absmax for {absmax.numel()} quant blocks")
        return self.operation(
            x, codes.view(-1, 1), (rows, x.shape[-1]), nested_absmax, QUANT_BLOCK_SIZE, "nf4", bias=bias,
            absmax_8bit=absmax, absmax_code=nested_map, absmax_offset=nested_offset.view(()),
        )  # fmt: skip


def find_ways() -> dict[str, Way]:
    """What is installed, by name, besides the twin. Imports it."""
    found: list[Way] = []
    with contextlib.suppress(ImportError):
        found.append(Fused(importlib.import_module("offload_rt.quantized.nf4_product_triton")))
    with contextlib.suppress(ImportError, AttributeError, RuntimeError):  # before 0.50, or no library that loads
        importlib.import_module("bitsandbytes")
        found.append(Bitsandbytes(torch.ops.bitsandbytes.gemm_4bit.default))
    return {way.name: way for way in found}


@dataclass
class ProductCounters:
    """Products that went another way than the twin's since the start."""

    num_packed_products: int = 0


class Products:
    """Which way each product of a plan goes. Raises `ConfigError` for ways that cannot be had."""

    def __init__(
        self,
        table: PackedProducts,
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        ways: Mapping[str, Way] | None = None,
    ) -> None:
        """`dtypes` are those that the weights of each shape are decoded to."""
        found = (find_ways() if ways is None else ways) if table else {}
        self.counters = ProductCounters()
        self._table = table
        self._ways = {name: found[name] for ranges in table.values() for _, name in ranges if name in found}
        for key, ranges in table.items():
            for _, name in ranges:
                if name == DECODED:
                    continue
                reason = "is not installed here"
                if name in found and not (reason := found[name].why_not(*shape_of(key), dtypes[key], device)):
                    continue
                raise ConfigError(
                    f"plan: packed_products: {key}: {name!r} cannot be had on {device}: {reason}. Without it sums are "
                    f"taken in another order: give a plan without, or --other-cuts to a run that goes on"
                )

    def way(self, rows: int, columns: int, num_tokens: int) -> Way | None:
        """The way of a product of so many tokens; None is the twin's."""
        return self._ways.get(way_of(self._table.get(shape_key(rows, columns), ()), num_tokens))

    def names(self, rows: int, columns: int) -> bool:
        """Whether the table says anything of such weights."""
        return shape_key(rows, columns) in self._table


@dataclass(frozen=True)
class Measured:
    """What the ways of one shape's products took."""

    ranges: tuple[tuple[int, str], ...]
    """As in a plan."""
    seconds: dict[str, list[float]]
    """Of one product, by way, for each of `TOKENS`; medians."""
    errors: dict[str, float]
    """By way, times the twin's."""
    left_out: dict[str, str]
    """Ways that were not timed, and why."""


SecondsOf = Callable[[Callable[[], object]], float]


def measured_products(shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> PackedProducts:
    """The table for weights of `shapes`, as remembered for this device or measured now: seconds a shape. Blocks.

    Takes device memory for a quarter GiB of weights and one that is decoded, and gives it back.
    """
    if device.type != "cuda":
        return {}  # there is no other way on a CPU
    name = f"nf4_products_{_digest(dtype, device)}"
    try:
        table = products_from_json((recall(name) or {}).get("packed_products", {}))
    except (ValueError, AttributeError):
        table = {}
    missing = sorted({shape for shape in shapes if shape_key(*shape) not in table})
    if missing:
        ways = find_ways()
        table |= {shape_key(*shape): measure(*shape, dtype, device, ways).ranges for shape in missing}
        torch.cuda.empty_cache()
        remember(name, {"device": torch.cuda.get_device_name(device), "packed_products": table})
    wanted = {shape_key(*shape) for shape in shapes}
    return {key: ranges for key, ranges in table.items() if key in wanted and ranges}


def measure(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device,
    ways: Mapping[str, Way],
    seconds_of: SecondsOf | None = None,
    *,
    most_error: float = MOST_ERROR,
    rounds: int = ROUNDS,
) -> Measured:
    """See [Note: a way is measured before it is taken]. seconds_of: a clock, in place of the device's own."""
    seconds_of = seconds_of or _clock(device)
    layout = nf4_layout(rows * columns)
    copies = max(1, min(_CALLS, _COLD_BYTES // layout.total_bytes))
    blobs = [random_blob(rows * columns, device) for _ in range(copies)]
    twin = Decoded()
    left_out: dict[str, str] = {}
    errors: dict[str, float] = {}
    taken: dict[str, Way] = {DECODED: twin}
    for name, way in ways.items():
        reason = way.why_not(rows, columns, dtype, device)
        if not reason:
            reason, errors[name] = _check(way, twin, blobs[0], rows, columns, dtype, most_error)
        if reason:
            left_out[name] = reason
        else:
            taken[name] = way
    seconds: dict[str, list[float]] = {name: [] for name in taken}
    best: list[tuple[int, str]] = []
    for tokens in TOKENS if len(taken) > 1 else ():
        x = _random((tokens, columns), dtype, device)
        times: dict[str, list[float]] = {name: [] for name in taken}
        for turn in range(rounds + 1):
            for name, way in list(taken.items()):
                try:
                    took = seconds_of(partial(_products, way, x, blobs, rows)) / copies
                except Exception as raised:  # a kernel of its own for so many tokens, as `_check` says
                    if way is twin:
                        raise
                    left_out[name] = f"{tokens} tokens: {type(raised).__name__}: {raised}"
                    del taken[name], seconds[name]
                    continue
                if turn:  # the first compiles, and fills what caches there are
                    times[name].append(took)
        for name in taken:
            seconds[name].append(statistics.median(times[name]))
        fastest = min(taken, key=lambda name: seconds[name][-1])
        saves = seconds[fastest][-1] < (1 - GAIN) * seconds[DECODED][-1]
        best.append((tokens, fastest if saves else DECODED))
    best = [(tokens, name if name in taken else DECODED) for tokens, name in best]
    return Measured(_ranges(best), seconds, errors, left_out)


def _products(way: Way, x: Tensor, blobs: Sequence[Tensor], rows: int) -> None:
    for blob in blobs:
        way.product(x, blob, rows, None)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """By a generator of its own: the user's go on as if nothing had been measured."""
    return torch.randn(shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(0))


def random_blob(num_elements: int, device: torch.device) -> Tensor:
    """A weight of random codes and scales of about one, made where it is needed: encoding one takes seconds."""
    layout = nf4_layout(num_elements)
    generator = torch.Generator(device).manual_seed(0)
    blob = torch.randint(0, 256, (layout.total_bytes,), dtype=torch.uint8, device=device, generator=generator)
    sections = sections_of(blob, layout)
    sections.nested_absmax.fill_(0.25)
    sections.nested_offset.fill_(1.0)
    sections.nested_map.copy_(tables(device).dynamic_map)
    return blob


def _check(
    way: Way, twin: Way, blob: Tensor, rows: int, columns: int, dtype: torch.dtype, most_error: float
) -> tuple[str, float]:
    """Why `way` is not to be taken, or nothing; its error over the twin's."""
    x = _random((_CHECKED_TOKENS, columns), dtype, blob.device)
    bias = _random((rows,), dtype, blob.device)
    weight = codec.decode(blob, (rows, columns), dtype)[:_CHECKED_ROWS]
    exact = x.double() @ weight.double().t() + bias[:_CHECKED_ROWS].double()

    def error_of(out: Tensor) -> float:
        return float((out[:, :_CHECKED_ROWS].double() - exact).norm())

    try:
        out, again = (way.product(x, blob, rows, bias) for _ in range(2))
        error, plain = error_of(out), error_of(twin.product(x, blob, rows, bias))
    except Exception as raised:  # noqa: BLE001 - somebody else's compiler and kernels: the twin serves
        return f"{type(raised).__name__}: {raised}", float("nan")
    over = error / plain if plain else float(error > 0)
    if not error <= most_error * plain:
        return f"its error is {over:.3g} times that of decoding first, more than {most_error}", over
    if not torch.equal(out, again):
        return "a second call gave other bits", over
    return "", over


def _ranges(best: Sequence[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    """Neighbours of one way as one range, up to where the twin is the best for all that follow."""
    ranges: list[tuple[int, str]] = []
    for tokens, name in best:
        if ranges and ranges[-1][1] == name:
            ranges.pop()
        ranges.append((tokens, name))
    if ranges and ranges[-1][1] == DECODED:
        ranges.pop()
    return tuple(ranges)


def _clock(device: torch.device) -> SecondsOf:
    """Seconds of a call, by the GPU's clock where there is one; launching it counts where the GPU waits for that."""

    def on_gpu(call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):  # whose stream it is that an event is recorded in
            begin.record()
            call()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def on_cpu(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return on_gpu if device.type == "cuda" else on_cpu


def _digest(dtype: torch.dtype, device: torch.device) -> str:
    """What a measurement is good for: device, versions, and how it was made."""
    versions = []
    for package in ("torch", "triton", "bitsandbytes"):
        try:
            versions.append(version(package))
        except PackageNotFoundError:
            versions.append("")
    properties = torch.cuda.get_device_properties(device)
    device_is = [properties.name, properties.multi_processor_count, properties.major, properties.minor]
    text = json.dumps([device_is, versions, str(dtype), GAIN, ROUNDS, TOKENS, _REVISION])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
