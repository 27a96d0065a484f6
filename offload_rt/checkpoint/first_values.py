"""The first values of an adapter whose base model is on the meta device: peft's own.

peft puts an adapter where its module's weight is: on the meta device it would have no values. So every weight is one
NaN in memory, under its shape, for as long as peft makes the adapter; what peft computes from weights is NaN then, and
is refused by name. What it is not: the way of a plain LoRA, whose values `materialise` draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from offload_rt.checkpoint.base_names import model_tensors
from offload_rt.checkpoint.materialise import make_absent, make_real
from offload_rt.errors import UnsupportedModule
from offload_rt.guards.adapter_kinds import chooses_by_weights


@contextmanager
def weights_as_nan(model: nn.Module, config: Any) -> Iterator[list[nn.Module]]:
    """Inside, peft puts an adapter on `model`, and appends what it has made to the list. Weights on meta are there
    again afterwards, and so are an adapter's copies of them, which get the values of the checkpoint.

    Raises `UnsupportedModule` where a first value of the adapter needs those of weights.
    """
    needs_weights = (
        f"{config.peft_type.value}: begins with values of the base model's weights, and the model is on the meta device"
    )
    if chooses_by_weights(config):
        raise UnsupportedModule(f"{needs_weights}; put the adapter on a model in memory")
    absent = [(parameter, parameter.shape, parameter.dtype) for parameter in model.parameters() if parameter.is_meta]
    made: list[nn.Module] = []
    for parameter, _, _ in absent:
        make_absent(parameter)
    try:
        yield made
        changed = sum(parameter.untyped_storage().nbytes() > parameter.element_size() for parameter, _, _ in absent)
    finally:
        for parameter, shape, dtype in absent:
            make_real(parameter, torch.empty(shape, dtype=dtype, device="meta"))
    if changed:
        raise UnsupportedModule(f"{needs_weights}, which it would change too; put the adapter on a model in memory")
    for tuned in made:
        _check(tuned, needs_weights)


def _check(tuned: nn.Module, needs_weights: str) -> None:
    of_base = set()
    for item in model_tensors(tuned):
        if item.base_name is not None:
            of_base.add(id(item.tensor))
            if item.is_copy and isinstance(item.tensor, nn.Parameter) and item.tensor.isnan().any():
                make_real(item.tensor, torch.empty_like(item.tensor, device="meta"))
    for name, tensor in chain(tuned.named_parameters(), tuned.named_buffers()):
        if id(tensor) in of_base or tensor.is_meta or not tensor.dtype.is_floating_point:
            continue
        if tensor.to_dense().isnan().any():
            raise UnsupportedModule(f"{needs_weights} (first: {name}); put the adapter on a model in memory")
