"""The Triton kernels against their twins, bit for bit, in the interpreter; and what they compile to.

What only a GPU can prove, their speed and their bits there, is in benchmarks/gpu.py, which begins with the latter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offload_rt.adamw import cpu_adam_torch
from offload_rt.adamw.cpu_adam import AdamW
from offload_rt.errors import OffloadError
from offload_rt.quantized import codec, nf4_torch
from offload_rt.quantized.nf4_layout import nf4_layout
from tests.interpreter import interpreted, version_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around a word, a byte, a quant block, a program (4096), a nested block (16384).
SIZES = (0, 1, 7, 8, 9, 63, 64, 65, 4095, 4096, 4097, 16383, 16385, 100_003)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@pytest.fixture
def nf4(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = interpreted("offload_rt.quantized.nf4_triton", monkeypatch)
    monkeypatch.setattr(codec, "_load_triton", lambda: (module, ""))
    return module


@pytest.fixture
def adam(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return interpreted("offload_rt.adamw.adam_triton", monkeypatch)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    integers = INTEGERS[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.view(integers), right.view(integers))


def weights_of(num_elements: int, scale: float = 1.0) -> torch.Tensor:
    values = torch.randn(num_elements, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3 * scale
    values[64:128] = 0
    return values.clamp(-3e38, 3e38).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_elements", SIZES)
def test_decode_agrees_with_the_twin_and_writes_no_further(nf4: ModuleType, num_elements: int, dtype) -> None:
    blob = codec.encode(weights_of(num_elements))
    expected = codec.decode(blob, (num_elements,), dtype, backend="torch")
    memory = torch.full((num_elements + 64,), 7.0, dtype=dtype)
    codec.decode_into(blob, memory[:num_elements], backend="triton")
    assert same_bits(memory[:num_elements], expected)
    assert (memory[num_elements:] == 7).all()
    assert nf4.counters.decoded_elements == num_elements
    assert nf4.counters.num_launches == (num_elements > 0)


@pytest.mark.parametrize("scale", [3e4, 1e-5, 1e-37, 1e-40, 1e30, 0.0])
def test_decode_agrees_where_absmax_is_extreme(nf4: ModuleType, scale: float) -> None:
    """Overflow to infinity in half, denormals, scales that are all zero."""
    blob = codec.encode(weights_of(20_011, scale))
    for dtype in DTYPES:
        expected = codec.decode(blob, (20_011,), dtype, backend="torch")
        assert same_bits(codec.decode(blob, (20_011,), dtype, backend="triton"), expected)


def test_decode_rounds_the_scale_twice(nf4: ModuleType) -> None:
    """map * nested + offset, where one rounding and two differ: a fused multiply-add would show."""
    blob = codec.encode(weights_of(16384))
    sections = nf4_torch.sections_of(blob, nf4_layout(16384))
    sections.nested_map.fill_(1 + 2**-12)
    sections.nested_absmax.fill_(1 + 2**-12)
    sections.nested_offset.fill_(-1)
    assert (torch.tensor(1 + 2**-12) ** 2 - 1).item() != (1 + 2**-12) ** 2 - 1
    expected = codec.decode(blob, (16384,), torch.float32, backend="torch")
    assert same_bits(codec.decode(blob, (16384,), torch.float32, backend="triton"), expected)


@pytest.mark.parametrize("words, num_warps", [(32, 1), (128, 4), (2048, 8)])
def test_the_cut_does_not_show_in_the_bits(nf4: ModuleType, words: int, num_warps: int) -> None:
    blob, out = codec.encode(weights_of(50_001)), torch.empty(50_001)
    nf4.decode(blob, nf4_layout(50_001), out, nf4.Launch(words=words, num_warps=num_warps))
    assert same_bits(out, codec.decode(blob, (50_001,), torch.float32, backend="torch"))


def test_transposed_decode_agrees_with_the_twin(nf4: ModuleType) -> None:
    blob, outs = codec.encode(weights_of(96 * 130)), [torch.empty(130, 96, dtype=torch.bfloat16) for _ in range(2)]
    codec.decode_transposed_into(blob, 96, 130, outs[0], backend="torch")
    codec.decode_transposed_into(blob, 96, 130, outs[1], backend="triton")
    assert same_bits(*outs)
    assert nf4.counters.num_launches == 1


def test_triton_is_chosen_by_the_device_and_refused_with_a_reason(nf4: ModuleType, monkeypatch) -> None:
    assert codec.backend(device="cuda:0") == "triton"
    assert codec.backend("torch", device="cuda:0") == "torch"
    blob = codec.encode(weights_of(64))
    codec.decode(blob, (64,), torch.float32)
    assert nf4.counters.num_launches == 0, "a CPU tensor is the native core's"
    monkeypatch.setattr(nf4, "serves", lambda device: False)
    with pytest.raises(OffloadError, match="the blob is in cpu memory"):
        codec.decode(blob, (64,), torch.float32, backend="triton")
    monkeypatch.setattr(codec, "_load_triton", lambda: (None, "No module named 'triton'"))
    assert codec.backend(device="cuda:0") == "torch"
    with pytest.raises(OffloadError, match="No module named 'triton'"):
        codec.decode(blob, (64,), torch.float32, backend="triton")
    with pytest.raises(ValueError, match="allowed: 'auto', 'native', 'triton', 'torch'"):
        codec.decode(blob, (64,), torch.float32, backend="cuda")  # type: ignore[arg-type]


def adam_state(num_elements: int, grad: torch.dtype, moments: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_elements)
    values = torch.randn(4, num_elements, generator=generator) * torch.tensor([[1e-3], [1.0], [1e-3], [1e-6]])
    values[0, ::5] = 0
    values[3] = values[3].abs()
    return [values[0].to(grad), values[1].clone(), values[2].to(moments), values[3].to(moments)]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.95), (0.3, 0.9), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("num_elements", [0, 1, 65, 4097])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
def test_adam_agrees_with_the_twin(adam: ModuleType, num_elements: int, grad: torch.dtype, betas) -> None:
    if version_of(adam.triton) < (3, 9):
        pytest.skip(f"the interpreter of Triton {adam.triton.__version__} rounds tl.fma twice, 3.9's once")
    for moments, weight_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (grad, None)):
        plain, ours = adam_state(num_elements, grad, moments), adam_state(num_elements, grad, moments)
        for state, step_function in ((plain, cpu_adam_torch.step), (ours, adam.step)):
            weight = None if weight_dtype is None else torch.full((num_elements,), 7.0, dtype=weight_dtype)
            for step in (1, 2, 1000):
                scalars = AdamW(lr=1e-2, betas=betas, eps=1e-6).scalars(step, 0.7)
                step_function(scalars, *state, weight)
            if weight is not None:
                state.append(weight)
        assert [same_bits(one, other) for one, other in zip(plain, ours, strict=True)] == [True] * len(plain)
    assert adam.counters.stepped_elements == 9 * num_elements


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"master": torch.zeros(8, dtype=torch.bfloat16)}, "master.dtype is torch.bfloat16"),
        ({"grad": torch.zeros(8, dtype=torch.float16)}, "grad.dtype is torch.float16"),
        ({"exp_avg": torch.zeros(7)}, "exp_avg is .7,."),
        ({"weight": torch.zeros(16)[::2]}, "weight is .8,. with strides .2,."),
    ],
)
def test_adam_refuses_before_it_writes(adam: ModuleType, wrong: dict[str, torch.Tensor], message: str) -> None:
    names = ("grad", "master", "exp_avg", "exp_avg_sq", "weight")
    state = {name: torch.zeros(8) for name in names} | {"grad": torch.ones(8)} | wrong
    with pytest.raises(ValueError, match=message):
        adam.step(AdamW().scalars(1), *(state[name] for name in names))
    assert not any(state[name].any() for name in names[1:])


COMPILE = """
import json, re, subprocess, sys
from collections import Counter
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from offload_rt.adamw import adam_triton
from offload_rt.quantized import nf4_product_triton, nf4_triton

PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

def asked(option, cubin):
    done = subprocess.run([PROGRAMS / "cuobjdump", option, cubin], capture_output=True, text=True, check=True)
    return done.stdout

def compiled(kernel, pointers, integers, floats, constants, capability, **options):
    types = {**pointers, **dict.fromkeys(integers, "i32"), **dict.fromkeys(floats, "fp32")}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # Multiples of 16, as those of nearly all tensors are: Triton asks at each launch.
    multiples = {*pointers, "num_elements", "rows", "columns", "columns_a_part"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if name in multiples and name in types}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": 4, "enable_fp_fusion": False, **options})
    pattern = r"\\b((?:mul|fma|div|sqrt|add|sub|cvt|ld|st)\\.[a-z0-9._]*|\\S*ftz\\S*|\\S*approx\\S*)"
    counts = Counter(re.findall(pattern, made.asm["ptx"]))
    if (PROGRAMS / "cuobjdump").exists():
        cubin = Path(sys.argv[1]) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = asked("--dump-resource-usage", cubin)
        counts["registers"] = int(re.search(r"REG:(\\d+)", usage)[1])
        counts["spilled bytes"] = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\\d+)", usage)))
        instruction = r"/\\*([0-9a-f]{4,5})\\*/ +(?:@!?U?P\\d+ +)?([A-Z0-9_.]+)([^;]*);"
        machine_code = re.findall(instruction, asked("--dump-sass", cubin))
        counts["matrix"] = sum(name.split(".")[0] in ("HMMA", "HGMMA") for _, name, _ in machine_code)
        # The main loop: from where a branch goes back to, with the matrix instructions between.
        for address, name, rest in machine_code:
            back = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
            if back and int(back[1], 16) < int(address, 16):
                body = [n for a, n, _ in machine_code if int(back[1], 16) <= int(a, 16) <= int(address, 16)]
                if any("MMA" in n for n in body):
                    counts["loop"] = max(counts["loop"], len(body))
    return counts

found = {}
for capability in map(int, sys.argv[2:]):
    floats = {name: "*fp32" for name in ("nested_absmax", "nested_offset", "nested_map", "table")}
    found[f"decode {capability}"] = compiled(
        nf4_triton._decode_kernel,
        {"words": "*i32", "codes_of_absmax": "*u8", "floats": "*fp32", "table": "*fp32", "out": "*bf16"},
        ["absmax_begin", "nested_absmax_begin", "nested_offset_begin", "nested_map_begin", "first_word", "num_words",
         "num_elements"], [],
        dict(WORDS=512, CODES_A_WORD=8, WORDS_A_QUANT_BLOCK=8, NESTED_BLOCK_SIZE=256, IS_TAIL=False), capability)
    names = adam_triton._step_kernel.arg_names
    found[f"adam {capability}"] = compiled(
        adam_triton._step_kernel, {**dict.fromkeys(names[:4], "*fp32"), "weight": "*bf16"}, ["num_elements"],
        names[6:14], dict(ELEMENTS=1024, HAS_WEIGHT=True, STARTS_FROM_GRAD=False), capability)
    floats["bias"] = "*bf16"
    numbers = ["num_tokens", "rows", "columns", "columns_a_part"]
    for tokens in (16, 64) if capability == 90 else (16,):
        found[f"product of {tokens} {capability}"] = compiled(
            nf4_product_triton._product_kernel,
            {"x": "*bf16", "codes": "*i32", "absmax": "*u8", **floats, "out": "*fp32"}, numbers, [],
            dict(ROWS=64, COLUMNS=128, TOKENS=tokens, CODES_A_WORD=8, ALL_ZERO=0x77777777, WORDS_A_QUANT_BLOCK=8,
                 NESTED_BLOCK_SIZE=256, HAS_BIAS=False), capability, num_stages=1)
found[f"sum {capability}"] = compiled(
    nf4_product_triton._sum_kernel, {"parts": "*fp32", "bias": "*bf16", "out": "*bf16"}, ["num_elements", "rows"], [],
    dict(PARTS=8, ELEMENTS=256, HAS_BIAS=True), capability)
print(json.dumps(found))
"""


@pytest.mark.parametrize("capabilities", [["89"], pytest.param(["80", "90"], marks=pytest.mark.full)])
def test_the_kernels_compile_for_gpus_with_the_arithmetic_and_the_widths_meant(
    capabilities: list[str], tmp_path: Path
) -> None:
    """To PTX, for a 4090, and for an A100 and an H100: needs Triton and no GPU."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    # What Triton 3.6 makes of the product is right, too, and slower; the other kernels are the same.
    few_registers, instructions = (128, 12) if version_of(triton) >= (3, 9) else (255, 16)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path), *capabilities],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len({name.split()[0] for name in compiled}) == 4
    for name, found in compiled.items():
        assert not [word for word in found if "ftz" in word or "approx" in word], name
        assert found.get("spilled bytes", 0) == 0, name
        if name.startswith("sum"):
            assert found["cvt.rn.bf16x2.f32"] == 1, name
        elif name.startswith("product"):  # 64 rows of 128 columns by 128 threads: 64 weights a thread
            assert not [word for word in found if word.startswith("fma")], name
            assert 2 * found.get("cvt.rn.bf16x2.f32", 0) + found.get("cvt.rn.bf16.f32", 0) == 64, name
            if "registers" in found:
                # Two programs a multiprocessor at least; four where few tokens make memory the limit.
                assert found["registers"] <= (few_registers if " 16 " in name else 255), name
                assert found["matrix"] and found["loop"] / 64 < instructions, (name, found["loop"])
        elif name.startswith("decode"):  # 512 words by 128 threads: 32 weights a thread
            assert not [word for word in found if word.startswith("fma")], name
            assert found["st.global.v4.b32"] == 4, name
            assert sum(count for word, count in found.items() if word.startswith("st.global")) == 4, name
            assert found["cvt.rn.bf16x2.f32"] == 16, name
        else:  # 1024 elements by 128 threads: 8 a thread
            assert (found["fma.rn.f32"], found["div.rn.f32"], found["sqrt.rn.f32"]) == (16, 16, 8), name
            assert found["ld.global.v4.b32"] == 8, name
            assert found["cvt.rn.bf16x2.f32"] == 4, name


MAY_BE_FUSED = re.compile(r"(mul|add|sub)\.f32(x2)?")
"""Without a rounding of its own: the assembler makes fused ones of these, if it is not told otherwise."""


def count_of(words: dict[str, int], operation: str) -> int:
    """Of float32, two at a time counted as two."""
    found = (re.fullmatch(operation + r"\.rn\.f32(x2)?", word) for word in words)
    return sum(words[one[0]] * (2 if one[1] else 1) for one in found if one is not None)


@pytest.mark.full
def test_launches_compile_for_every_gpu_to_arithmetic_that_nothing_can_fuse(tmp_path: Path) -> None:
    """Of what is launched, as it is launched: see launched_without_gpu."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.launched_without_gpu", "80", "86", "89", "90", "120"],
        cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, timeout=500,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FP_FUSION" not in done.stderr, "a launch leaves it to Triton's version whether sums and products are fused"
    found = json.loads(done.stdout)
    assert {one["kernel"] for one in found} == {"_step_kernel", "_decode_kernel", "_product_kernel", "_sum_kernel"}
    for one in found:
        words = one["words"]
        wrong = [word for word in words if MAY_BE_FUSED.fullmatch(word) or "ftz" in word or "approx" in word]
        wrong += [word for word in words if word.startswith(("div", "sqrt", "rcp")) and ".rn." not in word]
        wrong += [word for word in words if re.match(r"cvt\.(?!rn\.)[a-z0-9.]*b?f16(x2)?\.f32", word)]
        assert wrong == [], one
        roots = count_of(words, "sqrt")
        assert (roots > 0) is (one["kernel"] == "_step_kernel"), one
        assert count_of(words, "fma") == count_of(words, "div") == 2 * roots, one
