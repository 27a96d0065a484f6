"""`python -m tests.launched_without_gpu CAPABILITY...`: what our launches have Triton compile, as JSON, and no GPU.

Triton is told of a GPU that only takes binaries and launches. So arguments are specialised, and options set, as on a
real one; the interpreter knows neither, and a signature that is written by hand may be another one than a launch has.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from offload_rt.adamw import adam_triton
from offload_rt.adamw.cpu_adam import AdamW
from offload_rt.quantized import nf4_product_triton, nf4_triton
from offload_rt.quantized.nf4_layout import nf4_layout

FLOATS, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""That a program may have, by compute capability. Triton refuses to launch one that wants more."""
WORDS = re.compile(r"\b((?:mul|add|sub|fma|div|sqrt|rcp|cvt)\.[a-z0-9._]+|\S*ftz\S*|\S*approx\S*)")


class NoGpu(DriverBase):
    """Of one compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[capability]},
            load_binary=lambda *binary: (0, 0, 0, 0, 1024),
            unload_module=lambda module: None,
        )
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by it

    def get_current_stream(self, device: int) -> int:
        return 0


def step(num_elements: int, grad: torch.dtype, moments: torch.dtype, weight: torch.dtype | None, beta: float) -> None:
    scalars = AdamW(lr=1e-2, betas=(beta, 0.999)).scalars(3, 0.7)
    state = [torch.zeros(num_elements, dtype=dtype) for dtype in (grad, FLOATS, moments, moments)]
    adam_triton.step(scalars, *state, None if weight is None else torch.zeros(num_elements, dtype=weight))


def decode(num_elements: int, dtype: torch.dtype) -> None:
    layout = nf4_layout(num_elements)
    nf4_triton.decode(blob_of(num_elements), layout, torch.empty(num_elements, dtype=dtype))


def product(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    x, bias = torch.zeros(tokens, columns, dtype=dtype), torch.zeros(rows, dtype=dtype)
    nf4_product_triton.product(x, blob_of(rows * columns), nf4_layout(rows * columns), rows, bias)


def blob_of(num_elements: int) -> torch.Tensor:
    return torch.zeros(nf4_layout(num_elements).total_bytes, dtype=torch.uint8)


LAUNCHES = {  # of a program's elements, and with what is not a multiple of anything
    "step, all in 32 bits": lambda: step(1 << 16, FLOATS, FLOATS, None, 0.9),
    "step of one element": lambda: step(1, BF16, FLOATS, BF16, 0.9),
    "step from the gradient": lambda: step(1_000_003, BF16, BF16, BF16, 0.3),
    "decode": lambda: decode(1 << 16, BF16),
    "decode of less than a word": lambda: decode(7, HALF),
    "decode with a tail": lambda: decode(4097, FLOATS),
    "product": lambda: product(1, 256, 4096, BF16),
    "product of odd sizes": lambda: product(33, 65, 136, HALF),
}


def main(*capabilities: str) -> None:
    torch.cuda.device_of = lambda tensor: nullcontext()  # type: ignore[assignment,misc,return-value]
    found: list[dict[str, Any]] = []
    name = ""

    def seen(kernel: Any) -> None:
        run = kernel.run

        def ran(*arguments: Any, **options: Any) -> Any:
            made = run(*arguments, **options)
            found.append(
                {"launch": name, "kernel": kernel.fn.__name__, "shared_bytes": made.metadata.shared,
                 "words": Counter(WORDS.findall(made.asm["ptx"]))}
            )  # fmt: skip
            return made

        kernel.run = ran

    for kernel in (
        adam_triton._step_kernel, nf4_triton._decode_kernel, nf4_product_triton._product_kernel,
        nf4_product_triton._sum_kernel,
    ):  # fmt: skip
        seen(kernel)
    for capability in map(int, capabilities):
        driver.set_active(NoGpu(capability))
        for each, launch in LAUNCHES.items():
            name = f"{each}, sm_{capability}"
            launch()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
