"""A managed model's tensors by the names they are saved under, in groups that are in memory one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from offload_rt.checkpoint.base_names import model_tensors
from offload_rt.checkpoint.conversion import is_transformers_model
from offload_rt.dtypes import torch_dtype
from offload_rt.errors import UnsupportedModule
from offload_rt.layers.access import Access
from offload_rt.layers.block import Block
from offload_rt.tensor_spec import TensorSpec
from planners.plans.schedule import Phase


@dataclass(frozen=True, kw_only=True)
class TensorGroup:
    """Tensors that are in memory together: those of a layer, of another block, or all of the rest."""

    names: tuple[str, ...]
    """As `saved_tensors` gives them."""
    shown: Callable[[], AbstractContextManager[Mapping[str, Tensor]]]
    """Inside, the tensors by name. They may be views of memory that is used again afterwards."""


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the name that they are saved under; of tied names, one.

    That is the one that transformers does not tie to another on loading.
    """
    named = {item.name: item.tensor for item in model_tensors(model)}
    declared: Mapping[str, str] = {}
    if is_transformers_model(model):
        ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
        named = {name: tensor for name, tensor in named.items() if name not in ignored}
        declared = getattr(model, "all_tied_weights_keys", None) or {}
    tied: dict[int, list[str]] = {}
    for name, tensor in named.items():
        tied.setdefault(id(tensor), []).append(name)
    kept = {next((name for name in names if name not in declared), names[0]) for names in tied.values()}
    return {name: tensor for name, tensor in named.items() if name in kept}


def tensor_groups(model: nn.Module, blocks: Sequence[tuple[Block, Access]]) -> list[TensorGroup]:
    """All tensors of `model` in groups, a block's through its access. `UnsupportedModule` where one is in 4 bits."""
    left = saved_tensors(model)
    groups = []
    for block, access in blocks:
        spec_of = {id(binding.parameter): binding.spec for binding in block.bindings}
        specs = {name: spec_of[id(tensor)] for name, tensor in left.items() if id(tensor) in spec_of}
        quantized = [name for name, spec in specs.items() if spec.is_quantized]
        if quantized:
            raise UnsupportedModule(
                f"save_pretrained: {quantized[0]} ({len(quantized)} tensors of {block.name}) rests in 4 bits, and its "
                f"original values are not there any more; a whole model is saved from engine(bits=None)"
            )
        # what else a layer has is converted together with it
        others = {name: t for name, t in left.items() if name not in specs and name.startswith(f"{block.name}.")}
        left = {name: tensor for name, tensor in left.items() if name not in specs and name not in others}
        groups.append(TensorGroup(names=(*specs, *others), shown=partial(_of_block, access, specs, others)))
    groups.append(TensorGroup(names=tuple(left), shown=partial(_in_memory, left)))
    return groups


def copies_of(absent: Mapping[str, nn.Parameter], blocks: Sequence[tuple[Block, Access]]) -> dict[str, Tensor]:
    """What these parameters of blocks have, by their names, in memory of the caller's. `UnsupportedModule` where one is
    in 4 bits.
    """
    found: dict[str, Tensor] = {}
    for block, access in blocks:
        spec_of = {id(binding.parameter): binding.spec for binding in block.bindings}
        specs = {name: spec_of[id(parameter)] for name, parameter in absent.items() if id(parameter) in spec_of}
        for name, spec in specs.items():
            if spec.is_quantized:
                raise UnsupportedModule(
                    f"save_pretrained: {name} does not train, and rests in 4 bits: its original values are not there "
                    f"any more. Save adapters that train by engine.model.save_pretrained(..., selected_adapters=)"
                )
        if specs:
            with _of_block(access, specs, {}) as shown:
                found |= {name: tensor.clone() for name, tensor in shown.items()}
    return found


@contextmanager
def _of_block(
    access: Access, specs: Mapping[str, TensorSpec], others: Mapping[str, Tensor]
) -> Iterator[Mapping[str, Tensor]]:
    slot = access.acquire(Phase.FORWARD, training=False)
    try:
        views = {name: slot.tensor(torch_dtype(s.dtype), s.shape, s.offset_bytes) for name, s in specs.items()}
        del slot
        views.update(others)
        yield views
        views.clear()
    finally:
        access.release()


@contextmanager
def _in_memory(tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    yield tensors
