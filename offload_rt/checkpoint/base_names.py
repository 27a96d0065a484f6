"""The names that a checkpoint uses for the tensors of a live model, which peft may have wrapped.

peft puts modules of its own between those of the model: `base_model.model.` in front, `.base_layer` inside an
adapted layer, `.original_module` and `.modules_to_save.<adapter>` around a module that trains in full. What
belongs to the model is decided by the type of the module around it, as peft does it, and not by the text of a
name, which a model may use for itself. What it is not: a rule for renaming checkpoint keys; those are in
`conversion`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class ModelTensor:
    """A parameter or a persistent buffer."""

    name: str
    """As in `model.named_parameters(remove_duplicate=False)`."""
    base_name: str | None
    """Its name without peft's modules; None for a tensor that belongs to an adapter."""
    tensor: torch.Tensor
    is_copy: bool = False
    """It is an adapter's own copy of the tensor of that base name (`modules_to_save`)."""


@dataclass(frozen=True)
class _PeftTypes:
    """peft's classes, by what they do to names. Empty where peft is not imported: then nothing is wrapped."""

    models: tuple[type, ...] = ()
    tuners: tuple[type, ...] = ()
    layers: tuple[type, ...] = ()
    wrappers: tuple[type, ...] = ()

    @staticmethod
    def load() -> _PeftTypes:
        if "peft" not in sys.modules:  # importing it costs seconds, and a model that peft wrapped has done so
            return _PeftTypes()
        from peft import PeftMixedModel, PeftModel
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        return _PeftTypes((PeftModel, PeftMixedModel), (BaseTuner,), (BaseTunerLayer,), (AuxiliaryTrainingWrapper,))


def base_module(model: nn.Module) -> nn.Module:
    """The user's model inside peft's wrappers, or the model itself."""
    types = _PeftTypes.load()
    while True:
        if isinstance(model, types.models):
            inner = model._modules["base_model"]
        elif isinstance(model, types.tuners):
            inner = model._modules["model"]
        else:
            return model
        if inner is None:
            return model
        model = inner


def model_tensors(model: nn.Module) -> list[ModelTensor]:
    """Every parameter and persistent buffer under every name it has."""
    found = list(_visit(model, "", "", False, _PeftTypes.load()))
    # peft keeps a base tensor under names of its own as well (`word_embeddings` of prompt tuning)
    bases = {id(item.tensor): item.base_name for item in found if item.base_name is not None}
    return [
        replace(item, base_name=bases[id(item.tensor)]) if item.base_name is None and id(item.tensor) in bases else item
        for item in found
    ]


def _visit(module: nn.Module, name: str, base: str | None, is_copy: bool, types: _PeftTypes) -> Iterator[ModelTensor]:
    wrapped = (*types.models, *types.tuners, *types.layers, *types.wrappers)
    own = None if isinstance(module, wrapped) else base
    persistent = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
    for key, tensor in (*module._parameters.items(), *persistent.items()):
        if tensor is not None:
            base_name = None if own is None else own + key
            yield ModelTensor(name=name + key, base_name=base_name, tensor=tensor, is_copy=is_copy)
    for key, child in module._modules.items():
        if child is None:
            continue
        if isinstance(module, types.wrappers) and key == "modules_to_save":
            for adapter, copy in child._modules.items():
                if copy is not None:
                    yield from _visit(copy, f"{name}{key}.{adapter}.", base, True, types)
            continue
        yield from _visit(child, f"{name}{key}.", _child_base(module, key, base, types), is_copy, types)


def _child_base(module: nn.Module, key: str, base: str | None, types: _PeftTypes) -> str | None:
    """A child's base name: unchanged where peft inserted the step, None where the child is an adapter's."""
    if base is None:
        return None
    if isinstance(module, types.models):
        return base if key == "base_model" else None
    if isinstance(module, types.tuners):
        return base if key == "model" else None
    if isinstance(module, types.layers):
        return base if key == "base_layer" else None
    if isinstance(module, types.wrappers):
        return base if key in ("original_module", "token_adapter") else None
    return f"{base}{key}."
