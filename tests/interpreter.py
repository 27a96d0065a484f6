"""The Triton kernels on a machine without a GPU: in Triton's interpreter, and compiled to PTX but not run.

The interpreter executes a kernel's Python in numpy. Triton 3.9's cuts a float32 off where a GPU rounds it to the
nearest bfloat16 (`cvt.rn.bf16`), so that one conversion is replaced here; that the compiled kernels have it is a test.
And it multiplies the bits of bfloat16 matrices as if they were integers; here they are widened first. Triton 3.6's is
not used where it fails: for loops up to a kernel's argument, with numpy 2.4, and for `tl.fma`, which it rounds twice.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch


def interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module `name`, its kernels interpreted, for one test. Skips where Triton is not installed."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    if name.endswith("nf4_product_triton") and version_of(triton) < (3, 9):
        pytest.skip(f"the interpreter of Triton {triton.__version__} cannot count up to an argument, 3.9's can")
    interpret(monkeypatch)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of modules that are imported from now on are interpreted, until `monkeypatch` undoes it."""
    triton = importlib.import_module("triton")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(values, source, target, mode)
        return torch.tensor(values).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")

    def dot(builder, a, b, *rest):
        wide = [interpreter.TensorHandle(widened(x.data), triton.language.float32) if is_bf16(x) else x for x in (a, b)]
        return multiply(builder, *wide, *rest)

    def is_bf16(handle):
        return str(handle.dtype.scalar) == "bf16"

    def widened(values):
        return (values.astype("uint32") << 16).view("float32")

    multiply = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)


def version_of(triton: ModuleType) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(map(int, triton.__version__.split(".")[:2]))
