"""AdamW: the native kernels against the torch twin, both against torch.optim.AdamW, and errors.

Bits are compared as integers, so that -0.0 is not 0.0; any NaN equals any NaN. The time: see
benchmarks/native_adam.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_rt.adamw import cpu_adam
from offload_rt.adamw.cpu_adam import AdamW
from offload_rt.adamw.cpu_adam_torch import multiply_add, square_root
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.native import native_core, why_not

SHARE = 32768  # what a thread gets at least
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 3 * SHARE + 65)
BETAS = ((0.9, 0.999), (0.5, 0.95), (0.3, 0.9), (0.0, 0.0))  # the first moment starts from either end
CORE = native_core()
ISAS = tuple(CORE.kernel_isas()) if CORE is not None else ()
needs_native = pytest.mark.skipif(CORE is None, reason=f"native core not built: {why_not()}")
CAPABILITY = torch.backends.cpu.get_cpu_capability()
needs_fma = pytest.mark.skipif(CAPABILITY not in ("AVX2", "AVX512"), reason=f"torch's kernels are {CAPABILITY}'s")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


class ForcedIsa:
    """The native core with one instruction set chosen, counting the calls that reach it."""

    def __init__(self, core: ModuleType, isa: str) -> None:
        self._core, self._isa = core, isa
        self.calls: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def adamw_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(kwargs)
        self._core.adamw_step(*args, isa=self._isa, **kwargs)


@pytest.fixture(params=ISAS or [pytest.param("none", marks=needs_native)])
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ForcedIsa:
    assert CORE is not None
    core = ForcedIsa(CORE, request.param)
    monkeypatch.setattr(cpu_adam, "native_core", lambda: core)
    return core


class State:
    """One parameter with its optimizer state. `offset_bytes` moves every tensor off its alignment."""

    def __init__(
        self, size: int, *, moments: torch.dtype = FLOAT32, weight: torch.dtype | None = BFLOAT16, offset: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(size)
        self.offset = offset
        self.size = size
        self.master = self._place(torch.randn(size, generator=generator))
        self.exp_avg, self.exp_avg_sq = (self._place(torch.zeros(size, dtype=moments)) for _ in range(2))
        self.weight = None if weight is None else self._place(torch.zeros(size, dtype=weight))

    def _place(self, values: Tensor) -> Tensor:
        """`values` between guards that nobody may write."""
        around = torch.full((self.size + 2 * self.offset,), 42.0, dtype=values.dtype)
        around[self.offset : self.offset + self.size] = values
        return around

    def inside(self) -> list[Tensor]:
        return [
            tensor[self.offset : self.offset + self.size]
            for tensor in (self.master, self.exp_avg, self.exp_avg_sq, self.weight)
            if tensor is not None
        ]

    def update(self, grad: Tensor, step: int, numbers: AdamW, **options: Any) -> None:
        inside = self.inside()
        weight = inside[3] if len(inside) == 4 else None
        cpu_adam.update(grad, *inside[:3], weight, step=step, numbers=numbers, **options)

    def guards_hold(self) -> bool:
        tensors = (self.master, self.exp_avg, self.exp_avg_sq, self.weight)
        ends = [t[: self.offset] for t in tensors if t is not None] + [
            t[self.offset + self.size :] for t in tensors if t is not None
        ]
        return all(bool((end == 42).all()) for end in ends)


def gradients(size: int, num_steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Heavy-tailed, each step of another size, some elements zero."""
    generator = torch.Generator().manual_seed(size + 1)
    drawn = (torch.randn(size, generator=generator) ** 3 * 10.0 ** (1 - step) for step in range(num_steps))
    return [values.where(values.abs() > 1e-4, 0.0).to(dtype) for values in drawn]


def same_bits(left: Tensor, right: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32}[left.element_size()]
    same = (left.view(integers) == right.view(integers)) | (left.isnan() & right.isnan())
    return left.dtype == right.dtype and left.shape == right.shape and bool(same.all())


def all_same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(same_bits(a, b) for a, b in zip(left, right, strict=True))


def in_memory(master: Tensor, grads: list[Tensor], numbers: AdamW) -> list[Tensor]:
    """Master and moments after torch's own single-tensor AdamW."""
    parameter = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=numbers.lr, betas=numbers.betas, eps=numbers.eps, weight_decay=numbers.weight_decay,
        foreach=False, fused=False,
    )  # fmt: skip
    for grad in grads:
        parameter.grad = grad.float()
        optimizer.step()
    state = optimizer.state[parameter]
    return [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]


@pytest.fixture
def ieee_square_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square roots in torch by numpy, which uses the processor's own."""
    monkeypatch.setattr(Tensor, "sqrt", lambda values: torch.from_numpy(np.sqrt(values.numpy())))


# The twin and the kernels against torch.


@needs_fma
@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_twenty_steps_are_those_of_torch_with_ieee_square_roots(
    backend: cpu_adam.Backend, betas: tuple[float, float], ieee_square_root: None
) -> None:
    for size in (0, 1, 17, 4097, 70_001):
        for weight_decay in (0.0, 0.1):
            numbers = AdamW(lr=3e-3, betas=betas, weight_decay=weight_decay)
            state = State(size)
            grads = gradients(size, 20, BFLOAT16)
            expected = in_memory(state.master, grads, numbers)
            for step, grad in enumerate(grads, 1):
                state.update(grad, step, numbers, backend=backend)
            assert all_same_bits(state.inside()[:3], expected), (size, weight_decay)
            assert same_bits(state.inside()[3], expected[0].to(BFLOAT16))


def distance_from_torch(num_elements: int = 100_003) -> tuple[bool, bool, float]:
    """Whether the moments are those of torch as it is here, and the master, and the master's distance in bounds.

    One step from equal state, the second. The bound: 2^-20 of what the change would be without cancellation, plus one
    rounding of the master.
    """
    numbers = AdamW(lr=1e-2, weight_decay=0.1)
    first, second = gradients(num_elements, 2, FLOAT32)
    state = State(num_elements)
    for step, grad in enumerate((first, second), 1):
        if step == 2:
            terms = 0.9 * state.exp_avg.abs() + 0.1 * grad.abs()
        state.update(grad, step, numbers)
    master, exp_avg, exp_avg_sq = in_memory(State(num_elements).master, [first, second], numbers)
    denom = exp_avg_sq.sqrt() / (1 - 0.999**2) ** 0.5 + numbers.eps
    bound = 2**-20 * 1e-2 / (1 - 0.9**2) * terms / denom + 2**-23 * master.abs()
    moments_equal = same_bits(state.exp_avg, exp_avg) and same_bits(state.exp_avg_sq, exp_avg_sq)
    return moments_equal, same_bits(state.master, master), ((state.master - master).abs() / bound).max().item()


@needs_fma
def test_against_torch_as_it_is_moments_are_equal_and_the_master_is_near() -> None:
    moments_equal, _, distance = distance_from_torch()
    assert moments_equal
    assert distance <= 1


@pytest.mark.full  # processes of their own
@pytest.mark.skipif(CAPABILITY != "AVX512", reason="needs a processor that can be told to be a lesser one")
@pytest.mark.parametrize(
    "torch_isa, mkl_isa, fma, ieee",
    [
        ("avx2", "AVX2", True, True),
        pytest.param("default", "AVX512", False, False, marks=pytest.mark.full),
        pytest.param("avx512", "SSE4_2", True, False, marks=pytest.mark.full),
    ],
)
def test_torch_told_to_use_other_instructions(torch_isa: str, mkl_isa: str, fma: bool, ieee: bool) -> None:
    """[Note: AdamW, operation by operation]. Its square root is IEEE's with MKL's AVX2 code, on Intel's processors."""
    script = "from tests.test_cpu_adam import *; print(torch.backends.cpu.get_cpu_capability(), *distance_from_torch())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": torch_isa, "MKL_ENABLE_INSTRUCTIONS": mkl_isa}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    capability, moments_equal, master_equal, distance = done.stdout.split()[-4:]
    if capability.lower() != torch_isa or "Intel" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the environment does not change what torch or MKL use")
    assert (moments_equal == "True") == fma, done.stderr
    assert (master_equal == "True") == (fma and ieee)
    assert float(distance) <= 1


@needs_fma
def test_numbers_at_the_edges_are_those_of_torch(ieee_square_root: None) -> None:
    tiny = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-20, 1e-19, 1e-4, 1.0, -3.0, 1e19, 1e30, 3e38, torch.inf, torch.nan]
    values = torch.tensor(tiny)
    grad, master = (grid.reshape(-1) for grid in torch.meshgrid(values, values, indexing="ij"))
    for eps in (1e-8, 0.0):
        numbers = AdamW(lr=0.1, eps=eps)
        grads = [grad, grad.flip(0), grad * 0.5]
        expected = in_memory(master, grads, numbers)
        for backend in ("torch", "auto"):
            state = State(grad.numel())
            state.master.copy_(master)
            for step, each in enumerate(grads, 1):
                state.update(each, step, numbers, backend=backend)
            assert all_same_bits(state.inside()[:3], expected), (eps, backend)


def test_square_roots_of_the_twin_are_ieee() -> None:
    values = torch.arange(0, 0x7F800001, 1021, dtype=torch.int32).view(FLOAT32)
    assert same_bits(square_root(values), torch.from_numpy(np.sqrt(values.numpy())))


def test_multiply_add_rounds_once() -> None:
    # 1 + 2^-24 is half way between two float32; what the float64 sum loses decides.
    one, half_unit, little = torch.tensor([1.0]), torch.tensor([2.0**-24]), 2.0**-80
    assert multiply_add(half_unit, 1.0, one).item() == 1.0
    above = multiply_add(half_unit * (1 + 2**-23), 1.0, one)
    assert above.item() == 1.0 + 2**-23
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24, a tie that the addend breaks, far below float64's last bit.
    factor = torch.tensor([1 + 2.0**-12])
    for sign, rounded in ((1, 1 + 2**-11 + 2**-23), (-1, 1 + 2**-11)):
        assert multiply_add(factor, factor, torch.tensor([sign * little])).item() == rounded


# The native core against the twin.


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("moments", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("grad_dtype, weight", [(BFLOAT16, BFLOAT16), (FLOAT32, FLOAT32), (FLOAT32, None)], ids=str)
def test_native_gives_the_twins_bits(
    grad_dtype: torch.dtype, weight: torch.dtype | None, moments: torch.dtype, offset: int, forced: ForcedIsa
) -> None:
    numbers = AdamW(lr=1e-2, weight_decay=0.1)
    for size in SIZES:
        grads = gradients(size, 3, grad_dtype)
        expected = State(size, moments=moments, weight=weight)
        for step, grad in enumerate(grads, 1):
            expected.update(grad, step, numbers, grad_scale=0.3, backend="torch")
        for num_threads in (1, 2, 4) if size > SHARE else (1,):
            state = State(size, moments=moments, weight=weight, offset=offset)
            for step, grad in enumerate(grads, 1):
                streaming_stores = step % 2 == 0
                state.update(
                    grad, step, numbers, grad_scale=0.3, backend="native", num_threads=num_threads,
                    streaming_stores=streaming_stores,
                )  # fmt: skip
            assert all_same_bits(state.inside(), expected.inside()), (size, num_threads)
            assert state.guards_hold()


any_float = st.integers(-(2**31), 2**31 - 1)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.lists(st.tuples(any_float, any_float, any_float, any_float), min_size=1, max_size=40),
    lr=st.floats(0, 10),
    beta1=st.floats(0, 0.9999),
    beta2=st.floats(0, 0.999999),
    eps=st.sampled_from([0.0, 1e-45, 1e-8, 1.0]),
    weight_decay=st.floats(0, 10),
    step=st.integers(1, 100_000),
    grad_scale=st.floats(0, 1),
)
def test_any_bits_and_numbers_give_the_twins_bits(
    bits: list[tuple[int, int, int, int]], lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    step: int, grad_scale: float,
) -> None:  # fmt: skip
    numbers = AdamW(lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    grad, *state = torch.tensor(bits, dtype=torch.int32).t().contiguous().view(FLOAT32)
    results = []
    for isa in (None, *ISAS):
        master, exp_avg, exp_avg_sq = (tensor.clone() for tensor in state)
        weight = torch.empty(len(bits), dtype=BFLOAT16)
        with pytest.MonkeyPatch.context() as patch:
            if isa is not None and CORE is not None:
                core = ForcedIsa(CORE, isa)
                patch.setattr(cpu_adam, "native_core", lambda core=core: core)
            cpu_adam.update(
                grad, master, exp_avg, exp_avg_sq, weight, step=step, numbers=numbers, grad_scale=grad_scale,
                backend="torch" if isa is None else "native",
            )  # fmt: skip
        results.append([master, exp_avg, exp_avg_sq, weight])
    for isa, result in zip(ISAS, results[1:], strict=True):
        assert all_same_bits(result, results[0]), isa


def test_the_native_path_is_taken(forced: ForcedIsa) -> None:
    state = State(100)
    state.update(torch.ones(100), 1, AdamW())
    state.update(torch.ones(100), 2, AdamW(), num_threads=3, streaming_stores=False)
    assert [call["num_threads"] for call in forced.calls] == [torch.get_num_threads(), 3]
    assert [call["streaming_stores"] for call in forced.calls] == [True, False]
    state.update(torch.ones(100), 3, AdamW(), backend="torch")
    assert len(forced.calls) == 2
    assert cpu_adam.backend() == f"native {ISAS[-1]}"
    assert cpu_adam.backend("torch") == "torch"


def test_without_the_native_core_the_twin_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_adam, "native_core", lambda: None)
    monkeypatch.setattr(cpu_adam, "why_not", lambda: "switched off by OFFLOAD_RT_NATIVE=0")
    assert cpu_adam.backend() == "torch"
    State(3).update(torch.ones(3), 1, AdamW())
    with pytest.raises(OffloadError, match="OFFLOAD_RT_NATIVE=0"):
        State(3).update(torch.ones(3), 1, AdamW(), backend="native")


# Clipping.


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs_of_gradients_in_float32(max_norm: float, dtype: torch.dtype) -> None:
    sizes = (1, 17, 4097, 70_001)
    grads = [gradients(size, 1, dtype)[0] for size in sizes]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.float() if dtype == BFLOAT16 else grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    total, scale = cpu_adam.clip_scale([cpu_adam.gradient_norm(grad) for grad in grads], max_norm)
    assert total == expected.item()
    assert (scale < 1) == (max_norm == 0.5)
    for parameter, grad in zip(parameters, grads, strict=True):
        # What the step multiplies is what torch multiplied.
        unscaled, scaled = State(grad.numel()), State(grad.numel())
        assert parameter.grad is not None
        unscaled.update(parameter.grad, 1, AdamW())
        scaled.update(grad, 1, AdamW(), grad_scale=scale)
        assert all_same_bits(scaled.inside(), unscaled.inside())


def test_nothing_to_clip() -> None:
    assert cpu_adam.clip_scale([], 1.0) == (0.0, 1.0)
    assert cpu_adam.gradient_norm(torch.full((4,), 1e30, dtype=BFLOAT16)).isinf()


# Errors.


def test_wrong_tensors_are_named_and_nothing_is_written() -> None:
    def fails(match: str, **changes: Any) -> None:
        tensors: dict[str, Any] = {name: torch.ones(8) for name in ("grad", "master", "exp_avg", "exp_avg_sq")}
        tensors.update(changes)
        before = [tensor.clone() for tensor in tensors.values()]
        for backend in ("torch", *(("native",) if CORE is not None else ())):
            with pytest.raises(ValueError, match=match):
                cpu_adam.update(**tensors, step=1, numbers=AdamW(), backend=backend)
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors.values(), before, strict=True))

    fails("grad.dtype is torch.float16", grad=torch.ones(8, dtype=torch.float16))
    fails("grad has 7 elements, 8 are needed", grad=torch.ones(7))
    fails("exp_avg must be contiguous", exp_avg=torch.ones(16)[::2])
    fails("master.dtype is torch.bfloat16", master=torch.ones(8, dtype=BFLOAT16))
    fails("exp_avg_sq.dtype is torch.bfloat16, allowed: torch.float32", exp_avg_sq=torch.ones(8, dtype=BFLOAT16))
    fails("weight has 9 elements", weight=torch.ones(9))
    shared = torch.ones(12)
    fails("(master and exp_avg|exp_avg and master) share memory", master=shared[:8], exp_avg=shared[4:])
    fails("(grad and weight|weight and grad) share memory", grad=shared[:8], weight=shared[4:])


def test_wrong_numbers_are_named() -> None:
    for field, value, match in (
        ("lr", -1.0, "lr is -1.0, allowed: 0 or more"),
        ("eps", float("nan"), "eps is nan"),
        ("weight_decay", float("inf"), "weight_decay is inf"),
        ("betas", (1.0, 0.9), r"betas\[0\] is 1.0, allowed: 0 <= beta < 1"),
        ("betas", (0.9, -0.1), r"betas\[1\] is -0.1"),
    ):
        with pytest.raises(ConfigError, match=match):
            AdamW(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="step is 0"):
        State(3).update(torch.ones(3), 0, AdamW())
    with pytest.raises(ValueError, match="num_threads is 0"):
        State(3).update(torch.ones(3), 1, AdamW(), num_threads=0)
    with pytest.raises(ValueError, match="allowed: 'auto'"):
        State(3).update(torch.ones(3), 1, AdamW(), backend="cuda")


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "fused"])
def test_a_param_group_is_read_and_its_other_options_are_refused(option: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    group = torch.optim.AdamW([parameter], lr=0.5, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2).param_groups[0]
    assert AdamW.from_group(group) == AdamW(lr=0.5, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    with pytest.raises(ConfigError, match=option):
        AdamW.from_group({**group, option: True})
    with pytest.raises(ConfigError, match="decouple"):
        AdamW.from_group(torch.optim.Adam([parameter]).param_groups[0])
