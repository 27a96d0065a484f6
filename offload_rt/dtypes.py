"""The two names of a dtype: torch's object and safetensors' word."""

from __future__ import annotations

import torch

from offload_rt.errors import UnsupportedModule

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def dtype_name(dtype: torch.dtype, *, of: str) -> str:
    """safetensors' word for `dtype`; UnsupportedModule names the tensor `of` that has another."""
    if dtype not in _NAMES:
        raise UnsupportedModule(f"{of}: dtype {dtype} cannot be stored; supported: {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for safetensors' word."""
    return _DTYPES[name]
