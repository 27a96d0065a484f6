"""Ways to take a product with a packed weight: each against fp64 beside its twin, and the choice between them.

The kernel runs in Triton's interpreter; how fast it is, and its error on a GPU, are in benchmarks/gpu.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch

from offload_rt.errors import ConfigError
from offload_rt.quantized import codec, nf4_products
from offload_rt.quantized.nf4_layout import nf4_layout
from offload_rt.quantized.nf4_products import MOST_ERROR, TOKENS, Bitsandbytes, Decoded, Fused, Products, measure
from planners.plans.products import products_from_json, way_of
from tests.interpreter import interpreted
from tests.test_triton import same_bits

CPU = torch.device("cpu")
KINDS = (torch.bfloat16, torch.float16)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Fused:
    return Fused(interpreted("offload_rt.quantized.nf4_product_triton", monkeypatch))


def operands(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, the blob, the bias."""
    generator = torch.Generator().manual_seed(tokens + rows + columns)
    weight = torch.randn(rows, columns, generator=generator) ** 3
    x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
    return x.to(dtype), codec.encode(weight), bias.to(dtype)


def error_over_twin(way: Any, x: torch.Tensor, blob: torch.Tensor, bias: torch.Tensor) -> float:
    rows, columns = bias.numel(), x.shape[-1]
    weight = codec.decode(blob, (rows, columns), x.dtype)
    exact = x.double() @ weight.double().t() + bias.double()
    errors = [(one.product(x, blob, rows, bias).double() - exact).norm() for one in (way, Decoded())]
    return float(errors[0] / errors[1])


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(
    "tokens, rows, columns, parts",
    [
        (1, 40, 2048, 4),  # fewer rows than a program has; columns in parts
        (3, 65, 136, 1),  # one row in a second program; columns that are no multiple of a quant block
        (17, 64, 128, 1),
        pytest.param(70, 130, 1032, 2, marks=pytest.mark.full),  # two programs of tokens; the last part is short
    ],
)
def test_the_fused_product_is_as_exact_as_its_twin(
    fused: Fused, tokens: int, rows: int, columns: int, parts: int, dtype: torch.dtype
) -> None:
    x, blob, bias = operands(tokens, rows, columns, dtype)
    assert fused.kernel.parts_of(rows, columns)[0] == parts
    assert error_over_twin(fused, x, blob, bias) <= MOST_ERROR
    assert fused.kernel.counters.num_products == 1
    assert fused.kernel.counters.decoded_elements == rows * columns * (1 if tokens <= 64 else 2)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_the_fused_product_decodes_to_the_twins_bits(fused: Fused, dtype: torch.dtype) -> None:
    """Products with unit vectors are the weights, whatever the order of sums: every one, in its place, to the bit."""
    rows, columns = 65, 200
    _, blob, _ = operands(1, rows, columns, dtype)
    found = fused.product(torch.eye(columns, dtype=dtype), blob, rows, None)
    assert same_bits(found.t().contiguous(), codec.decode(blob, (rows, columns), dtype))


def test_the_fused_product_takes_batches_and_writes_no_further(fused: Fused) -> None:
    x, blob, bias = operands(6, 33, 64, torch.bfloat16)
    whole = fused.product(x.view(2, 3, 64), blob, 33, bias)
    assert whole.shape == (2, 3, 33)
    assert same_bits(whole.view(6, 33), fused.product(x, blob, 33, bias))
    assert fused.product(x[:0], blob, 33, bias).shape == (0, 33)
    strided = torch.stack([x, x], dim=2)[:, :, 0]
    assert not strided.is_contiguous() and same_bits(fused.product(strided, blob, 33, bias), whole.view(6, 33))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(1, 64)}, "x.dtype is torch.float32, allowed: torch.bfloat16, torch.float16"),
        ({"x": torch.zeros(1, 68, dtype=torch.bfloat16)}, "68 columns, which are no multiple of 8"),
        ({"x": torch.zeros(1, 72, dtype=torch.bfloat16)}, "holds 2112 weights, .33, 72. are 2376"),
        ({"bias": torch.zeros(32, dtype=torch.bfloat16)}, "bias is torch.bfloat16.32,., torch.bfloat16.33,. is needed"),
        ({"bias": torch.zeros(33)}, "bias is torch.float32"),
        ({"blob": torch.zeros(64, dtype=torch.uint8)}, "blob has 64 bytes"),
    ],
)
def test_the_fused_product_refuses_with_a_reason(fused: Fused, change: dict[str, torch.Tensor], message: str) -> None:
    x, blob, bias = operands(1, 33, 64, torch.bfloat16)
    given = {"x": x, "blob": blob, "bias": bias} | change
    with pytest.raises(ValueError, match=message):
        fused.kernel.product(given["x"], given["blob"], nf4_layout(33 * 64), 33, given["bias"])


def test_how_columns_are_cut_depends_on_the_shape_alone(fused: Fused) -> None:
    parts_of = fused.kernel.parts_of
    assert parts_of(28672, 8192) == (1, 8192), "rows enough for a GPU"
    assert parts_of(4096, 4096) == (8, 512)
    for rows, columns in ((1, 8), (64, 4104), (1000, 100_000), (128256, 8192)):
        parts, columns_a_part = parts_of(rows, columns)
        assert (parts - 1) * columns_a_part < columns <= parts * columns_a_part
        assert columns_a_part % fused.kernel.DEFAULT.columns == 0


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_bitsandbytes_own_operation_reads_the_blob_as_it_is(dtype: torch.dtype) -> None:
    """On the CPU, where it decodes first: this is about the layout."""
    pytest.importorskip("bitsandbytes")
    way = nf4_products.find_ways().get("bitsandbytes")
    if way is None:
        pytest.skip("this bitsandbytes has no gemm_4bit; 0.50 has")
    x, blob, bias = operands(3, 48, 512, dtype)
    assert error_over_twin(way, x, blob, bias) <= MOST_ERROR


def test_bitsandbytes_is_given_the_sections_and_refused_what_it_would_decode_first() -> None:
    given: list[Any] = []

    def operation(*args: Any, **kwargs: Any) -> torch.Tensor:
        given.extend([args, kwargs])
        return torch.zeros(2, 4)

    way = Bitsandbytes(operation)
    blob = codec.encode(torch.randn(4, 128))
    way.product(torch.zeros(2, 128, dtype=torch.bfloat16), blob, 4, None)
    (_, codes, shape, nested_absmax, block_size, kind), named = given
    assert (codes.shape, shape, block_size, kind) == ((256, 1), (4, 128), 64, "nf4")
    assert codes.data_ptr() == blob.data_ptr(), "nothing is copied"
    assert (nested_absmax.dtype, named["absmax_8bit"].dtype) == (torch.float32, torch.uint8)
    assert (named["absmax_code"].shape, named["absmax_offset"].shape) == ((256,), ())
    assert "100 columns" in way.why_not(4, 100, torch.bfloat16, CPU)
    assert "torch.float32" in way.why_not(4, 128, torch.float32, CPU)
    assert not way.why_not(4, 128, torch.bfloat16, CPU)


@dataclass
class StandIn:
    """A way that takes as long as it is told, by a clock of its own, and is as wrong as it is told."""

    name: str
    seconds: dict[int, float]
    wrong: float = 0.0
    reason: str = ""
    tokens: list[int] = field(default_factory=list)

    def why_not(self, *of: Any) -> str:
        return self.reason

    def product(self, x: torch.Tensor, blob: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
        self.tokens.append(x.shape[0])
        if self.name == "raises":
            raise RuntimeError("no kernel image")
        out = Decoded().product(x, blob, rows, bias)
        return out * (1 + self.wrong)


def clock_of(ways: dict[str, Any]) -> Any:
    """A second for a decoded product, and what the stand-ins say, for as many weights as are multiplied."""

    def seconds_of(call: Any) -> float:
        way, x, blobs, _ = call.args
        return len(blobs) * (way.seconds[x.shape[0]] if isinstance(way, StandIn) else 1.0)

    return seconds_of


def test_measurement_chooses_by_shape_and_tokens_and_goes_both_ways() -> None:
    few = StandIn("few", {tokens: 0.5 if tokens <= 16 else 2.0 for tokens in TOKENS})
    one = StandIn("one", {tokens: 0.1 if tokens == 1 else 3.0 for tokens in TOKENS})
    hardly = StandIn("hardly", dict.fromkeys(TOKENS, 0.96))
    ways = {way.name: way for way in (few, one, hardly)}
    state = torch.get_rng_state()
    found = measure(8, 64, torch.bfloat16, CPU, ways, clock_of(ways))
    assert found.ranges == ((1, "one"), (16, "few")), "and decoded from there on: 4 % are no reason to cut"
    assert [way_of(found.ranges, n) for n in (1, 2, 3, 16, 17)] == ["one", "few", "few", "few", "decoded"]
    assert torch.equal(torch.get_rng_state(), state), "nobody's random numbers are used up"
    assert found.seconds["few"][0] == 0.5 and found.seconds["decoded"] == [1.0] * len(TOKENS)
    slow = {"few": StandIn("few", dict.fromkeys(TOKENS, 1.0))}
    assert measure(8, 64, torch.bfloat16, CPU, slow, clock_of(slow)).ranges == ()
    gap = {"few": StandIn("few", {tokens: 2.0 if tokens == 4 else 0.5 for tokens in TOKENS})}
    assert measure(8, 64, torch.bfloat16, CPU, gap, clock_of(gap)).ranges == ((2, "few"), (4, "decoded"), (256, "few"))


def test_a_way_that_fails_for_some_number_of_tokens_is_left_out_and_the_others_are_measured() -> None:
    breaks = StandIn("breaks", dict.fromkeys(TOKENS[:4], 0.1))  # and has no time for 16
    ways = {"breaks": breaks, "few": StandIn("few", {tokens: 0.5 if tokens > 8 else 2.0 for tokens in TOKENS})}
    found = measure(8, 64, torch.bfloat16, CPU, ways, clock_of(ways))
    assert found.left_out == {"breaks": "16 tokens: KeyError: 16"} and "breaks" not in found.seconds
    assert found.ranges == ((8, "decoded"), (256, "few"))
    assert [len(each) for each in found.seconds.values()] == [len(TOKENS)] * 2
    with pytest.raises(ZeroDivisionError):  # what even decoding first has is no way's own failure
        measure(8, 64, torch.bfloat16, CPU, ways, lambda call: 1 / (not isinstance(call.args[0], Decoded)))


@pytest.mark.parametrize(
    "way, message",
    [
        (StandIn("wrong", {}, wrong=0.01), "its error is .* more than 1.05"),
        (StandIn("wrong", {}, wrong=float("nan")), "its error is nan"),
        (StandIn("raises", {}), "RuntimeError: no kernel image"),
        (StandIn("refuses", {}, reason="not here"), "not here"),
    ],
    ids=["inexact", "nan", "raises", "refuses"],
)
def test_a_way_that_is_wrong_is_never_timed(way: StandIn, message: str) -> None:
    found = measure(64, 256, torch.bfloat16, CPU, {way.name: way}, clock_of({}))
    assert found.ranges == () and list(found.left_out) == [way.name]
    assert re.search(message, found.left_out[way.name])
    assert set(way.tokens) <= {16}, "checked, and no more"


def test_a_way_that_gives_other_bits_a_second_time_is_left_out() -> None:
    class Wavers(StandIn):
        def product(self, x: torch.Tensor, blob: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
            out = Decoded().product(x, blob, rows, bias)
            self.tokens.append(1)
            smallest = out.abs().argmin()  # the last bit of which is within the bound
            out.view(torch.int16).view(-1)[smallest] += len(self.tokens) % 2
            return out

    found = measure(64, 256, torch.bfloat16, CPU, {"wavers": Wavers("wavers", {})}, clock_of({}))
    assert found.left_out == {"wavers": "a second call gave other bits"}


def test_the_fused_kernel_passes_its_own_check(fused: Fused) -> None:
    seconds = {"fused": dict.fromkeys(TOKENS, 0.5)}

    def seconds_of(call: Any) -> float:
        way, x, blobs, _ = call.args
        return len(blobs) * seconds.get(way.name, dict.fromkeys(TOKENS, 1.0))[x.shape[0]]

    found = measure(16, 64, torch.bfloat16, CPU, {"fused": fused}, seconds_of)
    assert found.left_out == {} and found.ranges == ((256, "fused"),)
    assert found.errors["fused"] <= MOST_ERROR


def test_what_was_measured_is_remembered_for_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path))
    asked: list[tuple[int, int]] = []

    def measured(rows: int, columns: int, *rest: Any) -> nf4_products.Measured:
        asked.append((rows, columns))
        return nf4_products.Measured(((1, "fused"),) if rows > 8 else (), {}, {}, {})

    gpu: Any = type("Gpu", (), {"type": "cuda"})()
    for name, value in (("get_device_name", "a GPU"), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(nf4_products, "_digest", lambda dtype, device: "x")
    monkeypatch.setattr(nf4_products, "measure", measured)
    monkeypatch.setattr(nf4_products, "find_ways", dict)
    ask = nf4_products.measured_products
    assert ask([(16, 64), (8, 64), (16, 64)], torch.bfloat16, gpu) == {"16x64": ((1, "fused"),)}
    assert ask([(16, 64), (8, 64)], torch.bfloat16, gpu) == {"16x64": ((1, "fused"),)}
    assert asked == [(8, 64), (16, 64)], "each once, also what decoding won"
    assert ask([(32, 64)], torch.bfloat16, gpu) == {"32x64": ((1, "fused"),)} and asked[2:] == [(32, 64)]
    (file,) = tmp_path.glob("nf4_products_*.json")
    file.write_text('{"packed_products": {"16x64": 3}}')
    assert ask([(16, 64)], torch.bfloat16, gpu) == {"16x64": ((1, "fused"),)} and asked[3:] == [(16, 64)]
    assert ask([(16, 64)], torch.bfloat16, CPU) == {} and len(asked) == 4


def test_products_refuse_a_way_that_cannot_be_had() -> None:
    table = {"8x64": ((4, "few"), (8, "decoded"), (16, "few"))}
    few, dtypes = StandIn("few", {}), {"8x64": torch.bfloat16}
    products = Products(table, dtypes, CPU, {"few": few})
    assert [products.way(8, 64, n) for n in (1, 4, 5, 8, 9, 16, 17)] == [few, few, None, None, few, few, None]
    assert products.way(8, 72, 1) is None
    with pytest.raises(ConfigError, match="8x64: 'few' cannot be had on cpu: is not installed here"):
        Products(table, dtypes, CPU, {})
    with pytest.raises(ConfigError, match="'few' cannot be had on cpu: no such thing"):
        Products(table, dtypes, CPU, {"few": StandIn("few", {}, reason="no such thing")})
    assert Products({}, {}, CPU).way(8, 64, 1) is None


@pytest.mark.parametrize(
    "data, message",
    [
        ({"8": []}, "'8' is no shape"),
        ({"8x64": 3}, "expected pairs"),
        ({"8x64": [[1]]}, "expected pairs"),
        ({"8x64": [[0, "fused"]]}, "0 tokens after 0"),
        ({"8x64": [[4, "fused"], [4, "decoded"]]}, "4 tokens after 4"),
        ({"8x64": [[True, "fused"]]}, "True tokens"),
        ({"8x64": [[1, ""]]}, "'' is no way's name"),
    ],
)
def test_a_table_that_is_malformed_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        products_from_json(data)


def test_a_kernels_module_is_found_where_triton_is(fused: Fused) -> None:
    assert isinstance(fused.kernel, ModuleType) and "fused" in nf4_products.find_ways()
