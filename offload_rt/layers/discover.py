"""Finds the blocks of a model: its layers, and what outside them can stream; and decides how each tensor is stored.

Layers are the elements of every `ModuleList` that is not itself inside another one's element. Outside the layers, an
embedding or a linear (the head) is a block of its own, a tied pair one block; all else is small and stays in memory.
So does an embedding or head whose weight an adapter around it reads, instead of calling it (`_read_from_outside`).
A block is frozen or trains. A layer most of which is frozen stores its frozen parameters, and what trains (adapters)
stays where it is; a layer most of which trains stores that, in its own dtype, and the rest stays. Outside the layers
only frozen blocks are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from offload_rt.dtypes import dtype_name
from offload_rt.errors import ConfigError, QuantCoverageError, UnsupportedModule
from offload_rt.layers.readers import is_reader
from offload_rt.tensor_spec import BlockSpec, Encoding, TensorSpec, layout_block

MAX_UNQUANTIZED_SHARE = 0.05
"""Of the frozen bytes inside layers that `bits=4` may leave in 16 bits."""


@dataclass(frozen=True)
class StoredParameter:
    """A parameter that a block stores, under the first name it has in the model, and the modules that own it."""

    name: str
    parameter: nn.Parameter
    owners: tuple[nn.Module, ...]
    is_adapters: bool = False
    """Of peft's, which keeps its dtype."""


@dataclass(frozen=True)
class BlockDraft:
    """A block before its bytes are anywhere."""

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[StoredParameter, ...]
    spec: BlockSpec
    is_layer: bool
    trains: bool = False
    """Its parameters train: their bytes change with every step."""


@dataclass(frozen=True)
class Coverage:
    """What share of the frozen bytes `bits=4` reached. Bytes as they would be without quantization."""

    quantized_bytes: int
    layer_bytes: int
    edge_bytes: int
    left_in_layers: tuple[str, ...]

    def __str__(self) -> str:
        share = self.quantized_bytes / self.layer_bytes if self.layer_bytes else 0.0
        return (
            f"4-bit: {share:.1%} of the {self.layer_bytes / 2**20:.1f} MiB of frozen weights in layers; "
            f"{self.edge_bytes / 2**20:.1f} MiB of embeddings and head keep their dtype"
        )


def find_blocks(model: nn.Module, *, bits: int | None, prequantized: frozenset[str] = frozenset()) -> list[BlockDraft]:
    """All blocks of `model`, edges before and after the layers as they stand in it. Raises `UnsupportedModule`.

    `prequantized` names parameters whose checkpoint holds NF4 already: they stay so whatever `bits` says.
    """
    layers = list(_layers(model))
    owners = _owners(model)
    in_layer: dict[int, set[int]] = {}
    for index, (_, layer) in enumerate(layers):
        for parameter in layer.parameters():
            in_layer.setdefault(id(parameter), set()).add(index)
    outside = {id(p) for module in _outside(model, layers) for p in module.parameters(recurse=False)}
    adapters = of_adapters(model)
    drafts = []
    for index, (name, layer) in enumerate(layers):
        # A parameter that several layers share belongs to none of them: it stays in memory.
        own = [
            StoredParameter(parameter_name, parameter, owners[id(parameter)], id(parameter) in adapters)
            for parameter_name, parameter in layer.named_parameters(prefix=name)
            if in_layer[id(parameter)] == {index} and id(parameter) not in outside and parameter.numel()
        ]
        trained = [entry for entry in own if entry.parameter.requires_grad]
        frozen = [entry for entry in own if not entry.parameter.requires_grad]
        if _num_elements(trained) > _num_elements(frozen):
            _check_replicated(trained)
            drafts.append(
                _draft(name, (layer,), trained, bits=None, prequantized=frozenset(), is_layer=True, trains=True)
            )
        elif frozen:
            drafts.append(_draft(name, (layer,), frozen, bits=bits, prequantized=prequantized, is_layer=True))
    if not any(draft.is_layer for draft in drafts):
        raise UnsupportedModule(
            f"{type(model).__name__}: found no ModuleList whose elements have parameters. The layers to stream are the "
            f"elements of a ModuleList"
        )
    if bits is not None and all(draft.trains for draft in drafts):
        advice = "give adapters=, or bits=None"
        if all(entry.is_adapters for draft in drafts for entry in draft.parameters):
            advice = "the adapters have more parameters than they stand on: give them a lower rank, or bits=None"
        raise ConfigError(f"bits={bits}: quantizes frozen weights, and all layers train; {advice}")
    return drafts + _edges(model, layers, owners)


def _check_replicated(trained: list[StoredParameter]) -> None:
    """Raises `UnsupportedModule` where all that trains in a layer are adapters that fp32 masters would change: with
    peft's layer_replication, weights belong to several layers, so that a layer may have nothing else of its own.
    """
    rounded = [entry for entry in trained if entry.parameter.dtype != torch.float32]
    if rounded and all(entry.is_adapters for entry in trained):
        raise UnsupportedModule(
            f"{rounded[0].name}: adapters in {rounded[0].parameter.dtype} would have float32 masters, unlike in "
            f"peft: they are most of what the layer has of its own (peft's layer_replication shares the rest); make "
            f"them in float32 (autocast_adapter_dtype=True)"
        )


def coverage(drafts: list[BlockDraft]) -> Coverage:
    """How much of the drafts is quantized, adapters aside."""
    layers = [
        tensor
        for draft in drafts
        if draft.is_layer and not draft.trains
        for tensor, stored in zip(draft.spec.tensors, draft.parameters, strict=True)
        if not stored.is_adapters
    ]
    edges = [tensor for draft in drafts if not draft.is_layer for tensor in draft.spec.tensors]
    return Coverage(
        quantized_bytes=sum(t.compute_bytes for t in layers if t.is_quantized),
        layer_bytes=sum(t.compute_bytes for t in layers),
        edge_bytes=sum(t.compute_bytes for t in edges),
        left_in_layers=tuple(t.name for t in sorted(layers, key=lambda t: -t.compute_bytes) if not t.is_quantized),
    )


def check_coverage(drafts: list[BlockDraft]) -> Coverage:
    """Raises `QuantCoverageError` where `bits=4` leaves more than 5% of the layers' frozen bytes unquantized."""
    found = coverage(drafts)
    left = found.layer_bytes - found.quantized_bytes
    if left > MAX_UNQUANTIZED_SHARE * found.layer_bytes:
        raise QuantCoverageError(
            f"bits=4 would leave {left / found.layer_bytes:.0%} of the frozen bytes in layers unquantized, at most "
            f"{MAX_UNQUANTIZED_SHARE:.0%} is accepted. The largest: {', '.join(found.left_in_layers[:5])}. Quantized "
            f"are the weights of nn.Linear and Conv1D and stacked experts"
        )
    return found


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    def descend(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not isinstance(
                child, (nn.ModuleList, nn.ModuleDict)
            ):
                # peft keeps adapters in ModuleDicts; a frozen one (a second adapter) is not a layer
                if isinstance(module, nn.ModuleList) and any(True for _ in child.parameters()):
                    yield path, child
            else:
                yield from descend(path, child)

    seen: set[int] = set()
    for name, layer in descend("", model):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield name, layer


def _outside(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> list[nn.Module]:
    inside = {id(module) for _, layer in layers for module in layer.modules()}
    return [module for module in model.modules() if id(module) not in inside]


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, ...]]:
    found: dict[int, tuple[nn.Module, ...]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found[id(parameter)] = (*found.get(id(parameter), ()), module)
    return found


def _edges(
    model: nn.Module,
    layers: list[tuple[str, nn.Module]],
    owners: dict[int, tuple[nn.Module, ...]],
) -> list[BlockDraft]:
    names = {id(p): name for name, p in model.named_parameters()}
    drafts: list[BlockDraft] = []
    taken: set[int] = set()
    outside = {id(module) for module in _outside(model, layers)}
    read = _read_from_outside(model)
    for module in _outside(model, layers):
        own = list(module.parameters(recurse=False))
        if any(id(p) in taken for p in own):
            continue  # tied: what else it has, a bias, is small
        streams = isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and module.max_norm is None)
        if not streams or not own or any(p.requires_grad or not p.numel() for p in own):
            continue
        users = {id(owner): owner for p in own for owner in owners[id(p)]}
        if any(user not in outside or user in read for user in users):
            continue
        stored = [StoredParameter(names[id(p)], p, owners[id(p)]) for p in own]
        taken.update(id(p) for p in own)
        name = stored[0].name.rpartition(".")[0]
        drafts.append(_draft(name, tuple(users.values()), stored, bits=None, prequantized=frozenset(), is_layer=False))
    return drafts


def _read_from_outside(model: nn.Module) -> set[int]:
    """The ids of modules whose weights peft's layers around them take, for DoRA's norms or to put trained rows into it:
    they are not called, so that nobody would fetch what rests.
    """
    return {id(around._modules["base_layer"]) for around in model.modules() if is_reader(around)}


def _draft(
    name: str,
    modules: tuple[nn.Module, ...],
    stored: list[StoredParameter],
    *,
    bits: int | None,
    prequantized: frozenset[str],
    is_layer: bool,
    trains: bool = False,
) -> BlockDraft:
    specs = []
    for entry in stored:
        encoding = _encoding(entry, bits=bits, prequantized=entry.name in prequantized)
        specs.append(
            TensorSpec(
                name=entry.name,
                shape=tuple(entry.parameter.shape),
                dtype=dtype_name(entry.parameter.dtype, of=entry.name),
                encoding=encoding,
            )
        )
    return BlockDraft(name, modules, tuple(stored), layout_block(name, specs), is_layer, trains)


def of_adapters(model: nn.Module) -> frozenset[int]:
    """The ids of parameters of peft's adapters: those that do not train keep their dtype, like those that do."""
    return frozenset(
        id(parameter)
        for module in model.modules()
        for name in getattr(module, "adapter_layer_names", ())
        if isinstance(part := getattr(module, name, None), (nn.Module, nn.ParameterDict))
        for parameter in part.parameters()
    )


def _num_elements(stored: list[StoredParameter]) -> int:
    return sum(entry.parameter.numel() for entry in stored)


def _encoding(entry: StoredParameter, *, bits: int | None, prequantized: bool) -> Encoding:
    parameter, owner = entry.parameter, entry.owners[0]
    weight = owner._parameters.get("weight") is parameter  # to read a parametrized one is to compute it
    is_conv1d = type(owner).__name__ == "Conv1D" and weight and parameter.ndim == 2
    if prequantized:
        return Encoding.NF4_TRANSPOSED if is_conv1d else Encoding.NF4
    if bits is None or entry.is_adapters or parameter.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Encoding.RAW
    # nn.MultiheadAttention reads the weight of its out_proj without calling it: no hook would decode it.
    if isinstance(owner, nn.Linear) and weight and type(owner).__name__ != "NonDynamicallyQuantizableLinear":
        return Encoding.NF4
    if is_conv1d:
        return Encoding.NF4_TRANSPOSED
    # A stack of experts is a parameter of a model's own module; torch's own with three dimensions are convolutions.
    if parameter.ndim == 3 and parameter.shape[0] > 1 and not type(owner).__module__.startswith("torch.nn."):
        return Encoding.NF4_EXPERTS
    return Encoding.RAW
