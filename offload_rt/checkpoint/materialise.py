"""Makes real, on the CPU, what stays in memory of a model on the meta device.

Frozen leftovers (norms, positions) come from the checkpoint; adapters are initialised as peft would; buffers that no
checkpoint holds (rotary frequencies) are computed again by the model's own code. A parameter keeps its identity:
`torch.utils.swap_tensors` changes what is behind it. What is still on meta afterwards is an error that names it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from offload_rt.checkpoint.base_names import base_module, model_tensors
from offload_rt.checkpoint.sources import TensorSource, materialise
from offload_rt.errors import CheckpointError, UnsupportedModule
from offload_rt.layers.block import placeholder

_PLAIN_INITS = (True, "gaussian")
_VARIANTS = ("use_dora", "velora_config", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config")
"""Fields of a `LoraConfig` by which peft begins otherwise than with a plain LoRA's values, or with more than those."""


def begins_plainly(config: Any) -> bool:
    """Whether peft's configuration is of a LoRA that begins with values which are drawn here as peft draws them."""
    is_lora = config.peft_type.value == "LORA" and config.init_lora_weights in _PLAIN_INITS
    return is_lora and not any(getattr(config, field, None) for field in _VARIANTS)


def make_real(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Puts `value` behind `parameter`, without changing its identity or `requires_grad`. Either may be on meta."""
    if parameter.is_meta is value.is_meta:
        parameter.data = value
        return
    fresh = nn.Parameter(value, requires_grad=parameter.requires_grad)
    fresh.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, fresh)  # type: ignore[no-untyped-call]


def make_absent(parameter: nn.Parameter, device: torch.device | None = None) -> None:
    """Lets go of a parameter's values, keeping identity, shape and dtype. What is left of it is on `device`."""
    make_real(parameter, placeholder(parameter.shape, parameter.dtype, device))


def move_rest(model: nn.Module, stored: set[int], device: torch.device) -> None:
    """Moves every parameter and buffer that no block stores to `device`; parameters keep their identity."""
    for parameter in model.parameters():
        if id(parameter) not in stored:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def materialise_rest(model: nn.Module, streams: Mapping[str, TensorSource], stored: set[int]) -> None:
    """Fills every parameter and buffer that no block stores. `stored` holds the ids of those that one does."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in stored and name in streams:
            make_real(parameter, materialise(streams[name]).to(parameter.dtype).view(parameter.shape))
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if name in streams:
            owner = model.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = materialise(streams[name]).to(buffer.dtype).view(buffer.shape)
    _rebuild_buffers(model)
    _initialise_adapters(model)


def check_nothing_on_meta(model: nn.Module, where: str) -> None:
    """Raises `CheckpointError`, naming the first ones, if a tensor of `model` is on the meta device, and
    `UnsupportedModule` for one of an adapter.
    """
    left = [name for name, p in model.named_parameters() if p.is_meta]
    left += [name for name, b in model.named_buffers() if b.is_meta]
    of_adapters = {item.name for item in model_tensors(model) if item.base_name is None} & set(left)
    if of_adapters:
        raise UnsupportedModule(
            f"{min(of_adapters)}: of an adapter that was put on a model on the meta device, where peft gave it no "
            f"values; give its configuration instead (engine(adapters=...)), or put it on a model in memory"
        )
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise CheckpointError(f"{where}: no values for {', '.join(left[:5])}{more}: still on the meta device")


def _rebuild_buffers(model: nn.Module) -> None:
    """Lets a transformers model compute the buffers that no checkpoint holds. Runs while parameters are on meta."""
    inner: Any = base_module(model)
    for path, module in model.named_modules():
        missing = [name for name, b in module._buffers.items() if b is not None and b.is_meta]
        if not missing:
            continue
        for name in missing:
            meta = module._buffers[name]
            if meta is None:
                continue
            module._buffers[name] = torch.full_like(meta, _unset(meta.dtype), device="cpu")
        initialise = getattr(inner, "_init_weights", None)
        if initialise is not None:
            with torch.no_grad():
                initialise(module)
        for name in missing:
            buffer = module._buffers[name]
            if initialise is None or (buffer is not None and _has_unset(buffer)):
                raise UnsupportedModule(
                    f"{path}.{name}: a buffer on the meta device that the checkpoint does not hold and that "
                    f"{type(inner).__name__} does not compute again; build the model with real buffers"
                )


def _unset(dtype: torch.dtype) -> float | int:
    """What no buffer holds once it was computed. Bytes and booleans, all of whose values are used, are zeros."""
    if dtype.is_floating_point:
        return float("nan")
    return torch.iinfo(dtype).min if dtype in (torch.int16, torch.int32, torch.int64) else 0


def _has_unset(buffer: torch.Tensor) -> bool:
    if buffer.is_floating_point():
        return bool(buffer.isnan().any())
    value = _unset(buffer.dtype)
    return value != 0 and bool((buffer == value).any())


def _initialise_adapters(model: nn.Module) -> None:
    """Gives plain LoRA weights on meta the values that peft gives them. Others stay there."""
    on_meta = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad and p.is_meta}
    if not on_meta or "peft" not in sys.modules:  # who has adapters has imported it, which costs seconds and 60 MiB
        return
    from peft.tuners.lora.layer import LoraLayer

    configs = getattr(model, "peft_config", {})
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.r:
            config = configs.get(adapter)
            if config is not None and not begins_plainly(config):
                continue
            linears = [part[adapter] for part in (module.lora_A, module.lora_B) if adapter in part]
            tables = [part[adapter] for part in (module.lora_embedding_A, module.lora_embedding_B) if adapter in part]
            values = [*tables, *(parameter for linear in linears for parameter in linear.parameters())]
            if any(parameter.is_meta for parameter in values):
                for parameter in values:
                    make_real(parameter, torch.zeros(parameter.shape, dtype=parameter.dtype))
                module.reset_lora_parameters(adapter, True if config is None else config.init_lora_weights)
