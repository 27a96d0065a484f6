"""8-bit block-wise moments: the twin against bitsandbytes, the native kernels against the twin, and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_rt.adamw import blockwise, cpu_adam
from offload_rt.adamw.blockwise import QUANT_BLOCK_SIZE, Quantized
from offload_rt.adamw.cpu_adam import AdamW
from tests.test_cpu_adam import BFLOAT16, CORE, FLOAT32, ISAS, SHARE, ForcedIsa, all_same_bits, gradients, needs_native

SIZES = (0, 1, 255, 256, 257, 4095, 4097, 3 * SHARE + 65)
HALF_STEP = 1.0 / 65535
"""Of the table through which bitsandbytes rounds on a CPU."""


@pytest.fixture(params=ISAS or [pytest.param("none", marks=needs_native)])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ForcedIsa:
    assert CORE is not None
    core = ForcedIsa(CORE, request.param)
    monkeypatch.setattr(cpu_adam, "native_core", lambda: core)
    return core


def run(size: int, grad_dtype: torch.dtype, weight_dtype: torch.dtype | None, **options: Any) -> list[Tensor]:
    """Everything that three steps leave behind. One quant block has no gradient in the first of them."""
    master = torch.linspace(-1, 1, size)
    first, second = blockwise.zeros(size), blockwise.zeros(size)
    weight = None if weight_dtype is None else torch.zeros(size, dtype=weight_dtype)
    for step, grad in enumerate(gradients(size, 3, grad_dtype), 1):
        if step == 1:
            grad[:QUANT_BLOCK_SIZE] = 0
        cpu_adam.update(grad, master, first, second, weight, step=step, numbers=AdamW(lr=1e-2), **options)
    return [master, first.absmax, second.absmax, *(() if weight is None else (weight,)), first.codes, second.codes]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    codes_are_same = all(torch.equal(a, b) for a, b in zip(left[-2:], right[-2:], strict=True))
    return codes_are_same and all_same_bits(left[:-2], right[:-2])


# The native core against the twin.


@pytest.mark.parametrize("grad_dtype, weight", [(BFLOAT16, BFLOAT16), (FLOAT32, FLOAT32), (FLOAT32, None)], ids=str)
def test_native_gives_the_twins_bits(grad_dtype: torch.dtype, weight: torch.dtype | None, forced: ForcedIsa) -> None:
    for size in SIZES:
        expected = run(size, grad_dtype, weight, backend="torch")
        for num_threads in (1, 3) if size > SHARE else (1,):
            forced.calls.clear()
            result = run(size, grad_dtype, weight, backend="native", num_threads=num_threads)
            assert same(result, expected), (size, num_threads)
            assert len(forced.calls) == 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 600),
    exponent=st.integers(-45, 38),
    absmax_exponents=st.tuples(st.integers(-45, 38), st.integers(-45, 38)),
    special=st.sampled_from([0.0, -0.0, 1e-45, torch.inf, -torch.inf, torch.nan]),
)
def test_any_state_gives_the_twins_bits(
    seed: int, size: int, exponent: int, absmax_exponents: tuple[int, int], special: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(size, generator=generator) * torch.tensor(10.0, dtype=torch.float64).pow(exponent).float()
    grad[seed % size] = special
    codes = torch.randint(0, 256, (2, size), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(2, -(-size // 256), generator=generator)
    absmax *= torch.tensor(absmax_exponents, dtype=torch.float64).unsqueeze(1).mul(math.log(10)).exp().float()
    results = []
    for isa in (None, *ISAS):
        master, weight = torch.linspace(-1, 1, size), torch.zeros(size, dtype=BFLOAT16)
        first, second = (Quantized(codes[i].clone(), absmax[i].clone()) for i in range(2))
        with pytest.MonkeyPatch.context() as patch:
            if isa is not None and CORE is not None:
                core = ForcedIsa(CORE, isa)
                patch.setattr(cpu_adam, "native_core", lambda core=core: core)
            cpu_adam.update(
                grad, master, first, second, weight, step=5, numbers=AdamW(), backend="native" if isa else "torch"
            )
        results.append([master, first.absmax, second.absmax, weight, first.codes, second.codes])
    for isa, result in zip(ISAS, results[1:], strict=True):
        assert same(result, results[0]), isa


# The twin: what it must give.


@pytest.mark.parametrize("signed", [True, False])
def test_every_value_is_its_own_nearest_and_ties_take_the_lower(signed: bool) -> None:
    values = blockwise.map_of(signed=signed)
    assert len(values.unique()) == 256
    quantized = blockwise.zeros(256)
    blockwise.encode_into(values * 0.37, quantized, signed=signed)
    assert quantized.codes.tolist() == list(range(256))
    middles = torch.cat([(values[:-1] + values[1:]) / 2, torch.ones(1)])
    blockwise.encode_into(middles, quantized, signed=signed)
    assert quantized.codes.tolist() == [*range(255), 255]


@pytest.mark.parametrize("signed", [True, False])
def test_the_nearest_value_is_taken(signed: bool) -> None:
    elements = torch.randn(4096, generator=torch.Generator().manual_seed(3)) ** 5
    elements = elements if signed else elements.abs()
    quantized = blockwise.zeros(4096)
    blockwise.encode_into(elements, quantized, signed=signed)
    values, scaled = blockwise.map_of(signed=signed), (elements.view(-1, 256) / quantized.absmax.unsqueeze(1)).view(-1)
    distance = (scaled.unsqueeze(1) - values).abs()
    assert torch.equal(distance.amin(1), distance.gather(1, quantized.codes.long().unsqueeze(1)).squeeze(1))


def test_a_block_that_is_not_finite_stays_so_and_its_neighbours_do_not() -> None:
    elements = torch.ones(3 * 256)
    elements[300], elements[301] = torch.inf, 2
    quantized = blockwise.zeros(elements.numel())
    blockwise.encode_into(elements, quantized, signed=True)
    decoded = blockwise.decode(quantized, signed=True)
    assert torch.isinf(decoded[256:512]).all()
    assert (decoded[:256] == 1).all() and (decoded[512:] == 1).all()


# Against bitsandbytes.


@pytest.fixture
def functional() -> Any:
    module = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for signed in (True, False):
        if not torch.equal(module.create_dynamic_map(signed=signed), blockwise.map_of(signed=signed)):
            pytest.skip("torch.linspace rounds differently on this processor, so bitsandbytes' map is another")
    return module


@pytest.mark.parametrize("signed", [True, False])
def test_codes_decode_as_in_bitsandbytes_and_encode_but_for_its_table(functional: Any, signed: bool) -> None:
    values = blockwise.map_of(signed=signed)
    elements = torch.randn(100_001, generator=torch.Generator().manual_seed(1)) ** 3
    elements = elements if signed else elements.abs()
    ours = blockwise.zeros(elements.numel())
    blockwise.encode_into(elements, ours, signed=signed)
    codes, state = functional.quantize_blockwise(elements, code=values, blocksize=256)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(
        blockwise.decode(ours, signed=signed), functional.dequantize_blockwise(ours.codes, state, blocksize=256)
    )
    differs = codes != ours.codes
    scales = ours.absmax.repeat_interleave(256)[: elements.numel()]
    error = (blockwise.decode(Quantized(codes, state.absmax), signed=signed) - elements).abs() / scales
    our_error = (blockwise.decode(ours, signed=signed) - elements).abs() / scales
    assert differs.any()
    assert (our_error <= error + 1e-7).all()
    assert (error - our_error)[differs].max() <= 2 * HALF_STEP + 1e-7


def test_a_step_is_bitsandbytes_step(functional: Any) -> None:
    size, numbers = 5000, AdamW(lr=1e-2, weight_decay=0.1)
    first, second = blockwise.zeros(size), blockwise.zeros(size)
    master = torch.linspace(-1, 1, size)
    for step, grad in enumerate(gradients(size, 4, FLOAT32), 1):
        theirs = [tensor.clone() for tensor in (master, *first, *second)]
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam", grad, theirs[0], theirs[1], theirs[3], *numbers.betas, 0.0, 0.0, numbers.eps, step, numbers.lr,
            blockwise.map_of(signed=True), blockwise.map_of(signed=False), theirs[2], theirs[4],
            numbers.weight_decay, 1.0,
        )  # fmt: skip
        cpu_adam.update(grad, master, first, second, step=step, numbers=numbers)
        torch.testing.assert_close(master, theirs[0], rtol=1e-6, atol=1e-7)
        for moment, codes, absmax, signed in ((first, *theirs[1:3], True), (second, *theirs[3:], False)):
            torch.testing.assert_close(moment.absmax, absmax, rtol=1e-6, atol=0)
            apart = blockwise.decode(moment, signed=signed) - blockwise.decode(Quantized(codes, absmax), signed=signed)
            near = apart.abs() <= 4 * HALF_STEP * absmax.repeat_interleave(256)[:size]
            neighbours = (moment.codes.int() - codes.int()).abs() <= 1
            assert (near | neighbours).all()


# Errors.


def test_wrong_moments_are_named() -> None:
    grad, master = torch.ones(300), torch.ones(300)

    def fails(match: str, exp_avg: Tensor | Quantized, exp_avg_sq: Tensor | Quantized) -> None:
        with pytest.raises(ValueError, match=match):
            cpu_adam.update(grad, master, exp_avg, exp_avg_sq, step=1, numbers=AdamW())

    right = blockwise.zeros(300)
    fails("must both be Quantized, or neither", right, torch.zeros(300))
    fails(r"exp_avg.codes has 299 elements, 300 are needed", blockwise.zeros(299), right)
    fails(r"exp_avg_sq.absmax has 3 elements, 2", right, Quantized(torch.zeros_like(right.codes), torch.zeros(3)))
    fails("exp_avg.codes.dtype is torch.int8", Quantized(right.codes.to(torch.int8), right.absmax), right)
    fails("share memory", right, Quantized(right.codes, torch.zeros(2)))


@needs_native
def test_a_map_that_does_not_ascend_is_refused() -> None:
    assert CORE is not None
    with pytest.raises(ValueError, match="ascending"):
        CORE.DynamicMap(torch.zeros(256).numpy())
    with pytest.raises(ValueError, match="dense near 1"):
        CORE.DynamicMap((torch.arange(256) / 256e6).numpy())
    with pytest.raises(ValueError, match="values has 255 items"):
        CORE.DynamicMap(torch.zeros(255).numpy())
