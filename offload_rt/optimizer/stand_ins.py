"""What `.grad` of a trained parameter is while its gradient waits in a tier: a tensor that says where to look.

Autograd hands the gradients of streamed parameters over by itself. Those of parameters that stay in memory are taken
from `.grad` as soon as they are there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offload_rt.errors import ConfigError, UnsupportedModule
from offload_rt.optimizer.gradients import Gradients
from offload_rt.optimizer.pieces import TrainedBlock


class StandIns:
    """Keeps `.grad` of what trains. `deliver` takes gradients, by index, of a block whose parameters stay in memory."""

    def __init__(
        self, blocks: Sequence[TrainedBlock], deliver: Callable[[TrainedBlock, Mapping[int, Tensor]], None]
    ) -> None:
        self._blocks = tuple(blocks)
        self._deliver = deliver
        self._handles = []
        self._made: dict[nn.Parameter, AbsentGradient] = {}
        """One for each parameter that ever had one; they hold an element, and nothing of a step."""
        self._made_way: set[nn.Parameter] = set()
        """Those whose stand-in is gone because the next gradient comes."""
        # The collector does not see what torch holds for a parameter: nothing there may hold that, or this.
        weakly = weakref.ref(self)
        for number, block in enumerate(blocks):
            for index, trained in enumerate(block.parameters):
                if trained.streamed is None:
                    parameter: Any = trained.parameter  # torch leaves its hooks without types
                    take, make_way = partial(_take, weakly, number, index), partial(_make_way, weakly, number, index)
                    self._handles.append(parameter.register_post_accumulate_grad_hook(take))
                    self._handles.append(parameter.register_hook(make_way))

    def put(self, block: TrainedBlock, indices: Iterable[int]) -> None:
        """Gives these parameters of `block` one, where they have none."""
        for index in indices:
            parameter = block.parameters[index].parameter
            self._made_way.discard(parameter)
            if parameter.grad is None:
                if parameter not in self._made:
                    self._made[parameter] = AbsentGradient.of(parameter)
                parameter.grad = self._made[parameter]

    def were_zeroed(self, gradients: Gradients) -> bool:
        """Whether the model's own zero_grad has taken them away: it does not know of what they stand for.

        ConfigError where only some were, or something else is in their place.
        """
        found = {
            block.parameters[index].name: block.parameters[index].parameter.grad
            for block in gradients.blocks
            for index in gradients.present(block)
            if block.parameters[index].parameter not in self._made_way
        }
        if found and all(stand_in is None for stand_in in found.values()):
            return True
        for name, stand_in in found.items():
            if not isinstance(stand_in, AbsentGradient):
                raise ConfigError(
                    f"the gradient of {name} was {'removed' if stand_in is None else 'replaced'} between backward and "
                    f"step, which would have no effect: it rests in a tier. Drop all by optimizer.zero_grad()"
                )
        return False

    def clear(self) -> None:
        """Takes all away."""
        self._made_way.clear()
        for block in self._blocks:
            for trained in block.parameters:
                trained.parameter.grad = None

    def close(self) -> None:
        """Leaves gradients where autograd puts them."""
        for handle in self._handles:
            handle.remove()

    def take(self, number: int, index: int) -> None:
        """Delivers the gradient that autograd has left with a parameter of a block."""
        block = self._blocks[number]
        parameter = block.parameters[index].parameter
        gradient = parameter.grad
        if gradient is not None:
            parameter.grad = None
            self._deliver(block, {index: gradient})

    def make_way(self, number: int, index: int) -> None:
        """Nothing can be added to a stand-in: it goes before the next gradient comes."""
        parameter = self._blocks[number].parameters[index].parameter
        if isinstance(parameter.grad, AbsentGradient):
            parameter.grad = None
            self._made_way.add(parameter)


def _take(of: weakref.ref[StandIns], number: int, index: int, _: nn.Parameter) -> None:
    if (stand_ins := of()) is not None:
        stand_ins.take(number, index)


def _make_way(of: weakref.ref[StandIns], number: int, index: int, _: Tensor) -> None:
    if (stand_ins := of()) is not None:
        stand_ins.make_way(number, index)


class AbsentGradient(torch.Tensor):
    """Stands for a gradient that rests in a tier: whatever computes with it is told where it is."""

    @staticmethod
    def of(parameter: nn.Parameter) -> AbsentGradient:
        nan = torch.full((1,), float("nan"), dtype=parameter.dtype, device=parameter.device)
        return nan.expand(parameter.shape).as_subclass(AbsentGradient)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise UnsupportedModule(
            "the gradient of a streamed parameter is not in memory: use engine.clip_grad_norm_(max_norm), or "
            "engine.gradients() between backward and step"
        )


_HARMLESS = tuple(
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "is_sparse", "requires_grad", "grad_fn", "is_leaf", "is_cuda")
) + (torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__repr__)
