"""Refuses models whose weights another library has quantized in memory: of these, placement would change numbers.

bitsandbytes' 4- and 8-bit linears keep what decodes a weight, or the weight itself, beside the parameter; tensor
subclasses are more than their bytes; GPTQ's and AWQ's linears have no parameters, so nothing of them would stream. What
is refused is found by what it is, not by its name: a model that calls itself quantized may have plain values, as one
that transformers has read from a GGUF file.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from offload_rt.errors import UnsupportedModule

_WHAT_TO_DO = (
    "Give a model on the meta device, with checkpoint= the weights in 16 bits and bits=4 (what bitsandbytes saved as "
    "NF4 is read as it is), or dequantize the model first"
)


def check_not_quantized(model: nn.Module) -> None:
    """Raises `UnsupportedModule`, with the first module, where weights of `model` are not plain tensors of numbers."""
    found = [(name, module, reason) for name, module in model.named_modules() if (reason := _quantized(module))]
    if found:
        name, module, reason = found[0]
        raise UnsupportedModule(
            f"{name} ({type(module).__name__}), the first of {len(found)} modules that another library has quantized: "
            f"{reason}. {_WHAT_TO_DO}"
        )


def _quantized(module: nn.Module) -> str:
    """Why a weight of `module` itself cannot be moved as its bytes; empty where it can."""
    if isinstance(module, LazyModuleMixin):
        return ""  # it may have no numbers yet
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            return f"its {name} is a {type(parameter).__name__}, which is more than its bytes"
        if parameter.dtype.is_floating_point and parameter.dtype.itemsize == 1:
            return f"its {name} is {parameter.dtype}, which has its scales elsewhere"
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
        return ""
    num_weights = sizes[0] * sizes[1]
    has_weight = any(parameter.numel() >= num_weights for parameter in module.parameters(recurse=False))
    code_bits = sum(8 * b.numel() * b.element_size() for b in module.buffers(recurse=False) if _is_of_codes(b))
    if not has_weight and code_bits and code_bits >= num_weights:
        return "its weight is in buffers, which do not stream"
    return ""


def _is_of_codes(buffer: torch.Tensor) -> bool:
    return buffer.dtype != torch.bool and (not buffer.dtype.is_floating_point or buffer.dtype.itemsize == 1)
