"""NF4: the native kernels against the torch twin, streams against the whole, and errors.

Bits are compared as integers, so that -0.0 is not 0.0. The bytes against bitsandbytes: see
test_nf4_bitsandbytes.py. The time: see benchmarks/native_nf4.py.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_rt.errors import OffloadError
from offload_rt.native import native_core, why_not
from offload_rt.quantized import codec
from offload_rt.quantized.nf4_layout import NF4_TABLE, SECTION_ALIGNMENT_BYTES, nf4_layout
from offload_rt.quantized.nf4_torch import sections_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around a byte, a quant block, a page, a nested block (16384), and the least share of a thread (524288).
SIZES = (0, 1, 2, 63, 64, 65, 4095, 4096, 4097, 16383, 16385, 100_003, 3 * 524_288 + 65)
SCALES = (1.0, 0.02, 3e4, 1e-5, 1e-37, 1e-40, 1e30, 0.0)
CORE = native_core()
ISAS = tuple(CORE.kernel_isas()) if CORE is not None else ()
needs_native = pytest.mark.skipif(CORE is None, reason=f"native core not built: {why_not()}")


class ForcedIsa:
    """The native core with one instruction set chosen, counting the calls that reach it."""

    def __init__(self, core: ModuleType, isa: str) -> None:
        self._core, self._isa = core, isa
        self.calls: list[str] = []
        self.keywords: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._core, name)
        if name not in ("nf4_encode", "nf4_decode", "nf4_decode_transposed"):
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            self.keywords.append(kwargs)
            return function(*args, isa=self._isa, **kwargs)

        return call


@pytest.fixture(params=ISAS or [pytest.param("none", marks=needs_native)])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ForcedIsa:
    assert CORE is not None
    core = ForcedIsa(CORE, request.param)
    monkeypatch.setattr(codec, "native_core", lambda: core)
    return core


def weights_of(num_elements: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Heavy-tailed weights, with one quant block of zeros, clipped to what `dtype` can hold."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_elements, generator=generator, dtype=torch.float64) ** 3 * scale
    values[64:128] = 0
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def weights_at_midpoints(absmax: float) -> Tensor:
    """A partial quant block so near to ties that dividing and multiplying by the inverse give other codes."""
    table = torch.tensor(NF4_TABLE)
    return torch.cat([torch.ones(1), (table[:-1] + table[1:]) / 2]) * absmax


def same_bits(left: Tensor, right: Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.view(integers), right.view(integers))


# Layout.
#
#   0         64-byte aligned, gaps are zero                                          total_bytes
#   |  codes  |gap|  absmax  |gap|  nested_absmax  |gap|  nested_offset  |gap|  nested_map  |


@pytest.mark.parametrize("num_elements", SIZES)
def test_sections_are_aligned_ordered_and_disjoint(num_elements: int) -> None:
    layout = nf4_layout(num_elements)
    end_bytes = 0
    for section in layout.sections:
        assert section.begin_bytes % SECTION_ALIGNMENT_BYTES == 0
        assert end_bytes <= section.begin_bytes <= section.end_bytes
        end_bytes = section.end_bytes
    assert layout.total_bytes % SECTION_ALIGNMENT_BYTES == 0
    assert end_bytes <= layout.total_bytes < end_bytes + SECTION_ALIGNMENT_BYTES
    assert layout.codes.length_bytes == (num_elements + 1) // 2
    assert layout.nested_absmax.length_bytes == 4 * ((num_elements + 16383) // 16384)


def test_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        nf4_layout(-1)


def test_bytes_of_the_format_never_change() -> None:
    # Multiples of 1/128, whose sums are exact: no processor's order of summation can change the offset.
    elements = torch.arange(20_001)
    weight = (elements * 7919 % 17 - 8).float() * (elements // 64 % 13 + 1) / 128
    digest = hashlib.sha256(codec.encode(weight, backend="torch").numpy().tobytes()).hexdigest()
    assert digest == "52375ab2215a0c619a4b937e296dc127385d764fb904f491ecc1e00c2a452a46"


# The native core against the twin.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_elements", SIZES)
def test_native_encodes_the_twins_bytes(num_elements: int, dtype: torch.dtype, forced: ForcedIsa) -> None:
    for scale in SCALES if num_elements < 20_000 else SCALES[:2]:
        weight = weights_of(num_elements, dtype, scale)
        if num_elements and not torch.isfinite(weight.abs().float().mean()):
            continue
        expected = codec.encode(weight, backend="torch")
        for num_threads in (1, 2, 3):
            blob = torch.full_like(expected, 0xAB)
            codec.encode_into(weight, blob, backend="native", num_threads=num_threads)
            assert torch.equal(blob, expected), (scale, num_threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_elements", SIZES)
def test_native_decodes_the_twins_bits(num_elements: int, dtype: torch.dtype, forced: ForcedIsa) -> None:
    for scale in SCALES if num_elements < 20_000 else SCALES[:2]:
        blob = codec.encode(weights_of(num_elements, torch.float32, scale), backend="torch")
        expected = codec.decode(blob, (num_elements,), dtype, backend="torch")
        for num_threads in (1, 2, 3):
            for streaming_stores in (False, True):
                out = torch.full_like(expected, torch.nan)
                codec.decode_into(
                    blob, out, backend="native", num_threads=num_threads, streaming_stores=streaming_stores
                )
                assert same_bits(out, expected), (scale, num_threads, streaming_stores)


def test_large_outputs_are_written_around_the_caches(forced: ForcedIsa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "STREAMED_BYTES", 8192)
    for num_elements, asked_for, streams in ((4095, None, False), (4096, None, True), (4096, False, False)):
        blob = codec.encode(weights_of(num_elements, torch.float32), backend="torch")
        out = torch.empty(num_elements, dtype=torch.bfloat16)
        codec.decode_into(blob, out, backend="native", streaming_stores=asked_for)
        assert forced.keywords[-1]["streaming_stores"] is streams
        assert same_bits(out, codec.decode(blob, (num_elements,), torch.bfloat16, backend="torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_decodes_into_unaligned_memory_and_not_past_its_end(dtype: torch.dtype, forced: ForcedIsa) -> None:
    blob = codec.encode(weights_of(4097, torch.float32), backend="torch")
    expected = codec.decode(blob, (4097,), dtype, backend="torch")
    around = torch.full((4097 + 8,), 42, dtype=dtype)
    codec.decode_into(blob, around[3 : 3 + 4097], backend="native", streaming_stores=True)
    assert same_bits(around[3:-5], expected)
    assert (around[:3] == 42).all() and (around[-5:] == 42).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (64, 64), (65, 33), (130, 100), (48, 129)])
def test_native_decodes_the_transpose(rows: int, columns: int, dtype: torch.dtype, forced: ForcedIsa) -> None:
    blob = codec.encode(weights_of(rows * columns, torch.float32), backend="torch")
    expected = codec.decode(blob, (rows, columns), dtype, backend="torch").t().contiguous()
    for backend in ("torch", "native"):
        out = torch.full_like(expected, torch.nan)
        codec.decode_transposed_into(blob, rows, columns, out, backend=backend, num_threads=3)
        assert same_bits(out, expected), backend


def test_a_large_transpose_is_shared_out_to_threads(forced: ForcedIsa) -> None:
    rows, columns = 1030, 1601
    blob = codec.encode(weights_of(rows * columns, torch.float32), backend="torch")
    out = torch.empty(columns, rows, dtype=torch.bfloat16)
    codec.decode_transposed_into(blob, rows, columns, out, backend="native", num_threads=3)
    assert same_bits(out, codec.decode(blob, (rows, columns), torch.bfloat16, backend="torch").t().contiguous())


@needs_native
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="this torch computes without OpenMP")
def test_a_decode_between_torchs_operators_runs_on_torchs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """See [Note: whose threads] in native/execution.h; that a team is used where one is lent is tested there."""
    blob = codec.encode(weights_of(1 << 20, torch.float32))
    lent = []
    for name in ("nf4_decode", "nf4_decode_transposed"):
        inner = getattr(CORE, name)
        monkeypatch.setattr(CORE, name, lambda *a, inner=inner, **k: (lent.append(k["openmp"]), inner(*a, **k)))
    out = torch.empty(1 << 20)
    codec.decode_into(blob, out, num_threads=2)
    assert same_bits(out, codec.decode(blob, out.shape, out.dtype, backend="torch"))
    codec.decode_transposed_into(blob, 1 << 10, 1 << 10, out.view(1 << 10, 1 << 10), num_threads=2)
    assert lent == [True, True]


@needs_native
def test_threads_are_started_where_no_openmp_was_loaded() -> None:
    code = """
import numpy, _offload_rt_native as core
codes = numpy.arange(1 << 19, dtype=numpy.uint32).astype(numpy.uint8)
absmax, nested = numpy.full(1 << 14, 9, numpy.uint8), numpy.ones(1 << 6, numpy.float32)
table, out = numpy.linspace(-1, 1, 256, dtype=numpy.float32), numpy.empty(1 << 20, numpy.float32)
assert not core.has_openmp()
arguments = codes, absmax, nested, numpy.zeros(1, numpy.float32), table, out, "float32"
core.nf4_decode(*arguments, num_threads=2)
assert numpy.isfinite(out).all()
try:
    core.nf4_decode(*arguments, num_threads=2, openmp=True)
except ValueError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "no OpenMP runtime" in found.stdout


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_finite_16_bit_weight_encodes_alike(dtype: torch.dtype, forced: ForcedIsa) -> None:
    patterns = torch.arange(-32768, 32768, dtype=torch.int16)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(1))
    weight = patterns[order].view(dtype)
    weight = weight[torch.isfinite(weight) & (weight.abs() < 1e36)].clone()
    expected = codec.encode(weight, backend="torch")
    assert torch.equal(codec.encode(weight, backend="native"), expected)


def test_ties_at_midpoints_take_the_lower_code(forced: ForcedIsa) -> None:
    table = torch.tensor(NF4_TABLE)
    weight = torch.cat([(table[:-1] + table[1:]) / 2, table, table, torch.ones(17)])
    expected = [*range(15), *range(16), *range(16), *[15] * 17]
    for backend in ("torch", "native"):
        packed = sections_of(codec.encode(weight, backend=backend), nf4_layout(64)).codes
        assert torch.stack([packed >> 4, packed & 15], 1).view(-1).tolist() == expected, backend


def test_the_last_partial_block_divides_by_its_absmax(forced: ForcedIsa) -> None:
    for absmax in torch.linspace(0.5, 1.5, 50).tolist():
        weight = weights_at_midpoints(absmax)
        assert torch.equal(codec.encode(weight, backend="native"), codec.encode(weight, backend="torch"))


def test_the_native_path_is_taken(forced: ForcedIsa) -> None:
    blob = codec.encode(weights_of(100, torch.float32))
    codec.decode(blob, (100,), torch.float32)
    codec.decode_transposed_into(blob, 10, 10, torch.empty(10, 10))
    # 100 elements are one whole quant block and one partial
    assert forced.calls == ["nf4_encode", "nf4_encode", "nf4_decode", "nf4_decode_transposed"]
    assert codec.backend() == f"native {ISAS[-1]}"
    assert codec.backend("torch") == "torch"
    forced.calls.clear()
    codec.decode(codec.encode(weights_of(100, torch.float32), backend="torch"), (100,), torch.float32, backend="torch")
    assert forced.calls == []


def test_without_the_native_core_the_twin_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "native_core", lambda: None)
    monkeypatch.setattr(codec, "why_not", lambda: "switched off by OFFLOAD_RT_NATIVE=0")
    assert codec.backend() == "torch"
    with pytest.raises(OffloadError, match="OFFLOAD_RT_NATIVE=0"):
        codec.encode(torch.ones(3), backend="native")
    with pytest.raises(ValueError, match="allowed"):
        codec.encode(torch.ones(3), backend="cuda")  # type: ignore[arg-type]


@needs_native
def test_native_refuses_wrong_sizes_and_names() -> None:
    assert CORE is not None
    blob = codec.encode(torch.ones(200))
    sections = [section.numpy() for section in sections_of(blob, nf4_layout(200))]
    out = torch.empty(200).numpy()
    with pytest.raises(ValueError, match="codes has 100 items, 101 are needed"):
        CORE.nf4_decode(*sections, torch.empty(201).numpy(), "float32")
    with pytest.raises(ValueError, match="allows: auto, plain"):
        CORE.nf4_decode(*sections, out, "float32", isa="avx1024")
    with pytest.raises(ValueError, match="allowed: float32"):
        CORE.nf4_decode(*sections, out, "float64")
    with pytest.raises(ValueError, match="2-byte items is needed"):
        CORE.nf4_decode(*sections, out, "bfloat16")
    with pytest.raises(ValueError, match="out has 200 items, 201"):
        CORE.nf4_decode_transposed(*sections, 3, 67, out, "float32")


# Properties, on whatever serves by default.


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    num_elements=st.integers(1, 40_000),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_random_slabs_give_the_bytes_of_the_whole(
    data: st.DataObject, num_elements: int, dtype: torch.dtype, seed: int
) -> None:
    weight = weights_of(num_elements, dtype, seed=seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, num_elements), max_size=12)))
    for backend in ("torch", "auto"):
        blob = torch.full((nf4_layout(num_elements).total_bytes,), 0xAB, dtype=torch.uint8)
        encoder = codec.StreamEncoder(num_elements, blob, backend=backend)
        for begin, end in zip([0, *cuts], [*cuts, num_elements], strict=True):
            slab = weight[begin:end].clone()
            encoder.feed(slab)
            slab.fill_(torch.nan)  # the caller may reuse it
        encoder.finish()
        assert torch.equal(blob, codec.encode(weight, backend="torch"))


@settings(max_examples=40, deadline=None)
@given(num_elements=st.integers(1, 40_000), log2_scale=st.integers(-20, 20), seed=st.integers(0, 999))
def test_decoded_weights_are_near(num_elements: int, log2_scale: int, seed: int) -> None:
    weight = weights_of(num_elements, torch.float32, 2.0**log2_scale, seed)
    decoded = codec.decode(codec.encode(weight), (num_elements,), torch.float32)
    absmax = torch.zeros(-(-num_elements // 64) * 64).index_copy(0, torch.arange(num_elements), weight.abs())
    absmax = absmax.view(-1, 64).amax(1)
    # Half the widest gap of the table is 0.152; 8 bits keep a scale to 0.7 % of the largest deviation.
    bound = 0.153 * absmax + 0.008 * (absmax - absmax.mean()).abs().max()
    assert ((decoded - weight).abs() <= bound.repeat_interleave(64)[:num_elements] + 1e-30).all()


# Errors.


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("element", [0, 63, 64, 70_000, 600_001, 1_600_000])
def test_a_weight_that_is_not_finite_is_named(backend: codec.Backend, value: float, element: int) -> None:
    weight = weights_of(1_600_001, torch.bfloat16)
    weight[element:] = value
    with pytest.raises(codec.NonFiniteWeight, match=f"weight {element} of 1600001") as caught:
        codec.encode(weight, backend=backend, num_threads=3)
    assert caught.value.element == element
    assert isinstance(caught.value, ValueError)


def test_scales_whose_mean_overflows_are_refused() -> None:
    with pytest.raises(codec.NonFiniteWeight, match="overflows") as caught:
        codec.encode(torch.full((200,), 3e38))
    assert caught.value.element is None


def test_mistakes_are_named() -> None:
    blob = codec.encode(torch.ones(100))
    with pytest.raises(ValueError, match=r"blob has \d+ bytes, 1000 elements need"):
        codec.decode(blob, (1000,), torch.float32)
    with pytest.raises(ValueError, match=r"out.dtype is torch.float64, allowed: float32"):
        codec.decode(blob, (100,), torch.float64)
    with pytest.raises(ValueError, match="contiguous"):
        codec.encode(torch.ones(10, 10).t()[:, :5])
    with pytest.raises(ValueError, match="blob must be contiguous uint8"):
        codec.decode(blob.float(), (100,), torch.float32)
    with pytest.raises(ValueError, match="behind a multiple of 64"):
        codec.decode(torch.cat([blob, blob])[4 : 4 + blob.numel()], (100,), torch.float32)
    with pytest.raises(ValueError, match=r"\(10, 10\) is needed"):
        codec.decode_transposed_into(blob, 10, 10, torch.empty(100))
    with pytest.raises(ValueError, match="num_threads is 0"):
        codec.decode_into(blob, torch.empty(100), num_threads=0)


def test_a_stream_refuses_too_many_too_few_and_mixed_dtypes() -> None:
    def encoder() -> codec.StreamEncoder:
        return codec.StreamEncoder(100, torch.empty(nf4_layout(100).total_bytes, dtype=torch.uint8))

    with pytest.raises(ValueError, match="101 elements, only 100 of 100"):
        encoder().feed(torch.ones(101))
    started = encoder()
    started.feed(torch.ones(70))
    with pytest.raises(ValueError, match="70 of 100"):
        started.finish()
    with pytest.raises(ValueError, match="the slabs before it were torch.float32"):
        started.feed(torch.ones(30, dtype=torch.bfloat16))


@pytest.mark.parametrize("num_elements", [0, 1, 63, 64, 65, 4096, 4097, 70_001])
def test_pieces_are_the_blob_and_hold_one_slab_of_codes(num_elements: int) -> None:
    weight = torch.randn(num_elements, generator=torch.Generator().manual_seed(num_elements)).to(torch.bfloat16)
    whole = codec.encode(weight)
    blob = torch.zeros_like(whole)
    encoder = codec.PieceEncoder(num_elements)
    position, largest = 0, 0
    for slab in [*weight.split(1000), None]:
        if slab is None:
            encoder.finish()
        else:
            encoder.feed(slab)
        for codes in encoder.take_codes():
            blob[position : position + codes.numel()] = codes
            position += codes.numel()
            largest = max(largest, codes.untyped_storage().nbytes())
    blob[encoder.scales_offset_bytes :] = encoder.scales
    assert torch.equal(blob, whole)
    assert largest <= 1064 // 2
