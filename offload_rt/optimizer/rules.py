"""The arithmetic of an update: how one parameter, or a range of it, is stepped with its state.

A rule is found by the optimizer that the user made, of which only type and param groups are used. `AdamWRule` steps by
the fused kernel of `cpu_adam`. `TorchRule` steps any optimizer of torch's kind that treats each parameter alone: it
puts master, gradient and state into an instance of that optimizer and lets it step, so that its results are that
optimizer's own, to the bit.

Masters are float32; what is stepped itself (adapters) may be bfloat16 as well, if its optimizer does so in memory.
`step` counts the updates of a parameter from 1, as torch counts them: a parameter without a
gradient is not stepped and not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offload_rt import optim
from offload_rt.adamw import cpu_adam
from offload_rt.adamw.blockwise import QUANT_BLOCK_SIZE, Quantized
from offload_rt.errors import ConfigError

Scalars = Mapping[str, Any]
"""What an optimizer keeps of a parameter besides tensors of its size, such as its own step count."""

_ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, optim.Lion,
)  # fmt: skip
"""Optimizers each element of which is stepped by itself, so that a parameter can be stepped range by range."""
_NOT_BY_PARAMETER = (torch.optim.LBFGS, torch.optim.SparseAdam)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_REHEARSED_SIZES = (5, 7, 11, 13, 17)
"""Distinct, so that the shape of a state says which dimensions of its parameter it has."""


@dataclass(frozen=True)
class StateTensor:
    """A tensor of optimizer state, beside the master."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One update of a parameter, or of a range of it. Tensors are the caller's: contiguous, in one memory, and of one
    shape, but for `state`.
    """

    master: Tensor
    """Stepped in place."""
    grad: Tensor
    """bfloat16 or float32, only read."""
    grad_scale: float
    """What `grad` is multiplied by first."""
    state: Mapping[str, Tensor]
    """Stepped in place; zero at step 1. As `UpdateRule.state` laid it out."""
    scalars: Scalars
    """What the last update returned; empty at step 1."""
    weight: Tensor | None
    """Receives the new master, rounded to its dtype; None: it is wanted nowhere else."""
    group: Mapping[str, Any]
    """The param group of the parameter."""
    step: int
    """Which of the parameter's updates this is, from 1."""


class UpdateRule(Protocol):
    """How one parameter is stepped."""

    name: str
    """Says which state there is and what it means: part of what training state is identified by."""
    elementwise: bool
    """Whether any range of a parameter, begun at a multiple of 256, can be stepped by itself."""

    def state(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[StateTensor, ...]:
        """The state of a parameter, or of a range of it as a flat tensor, that is stepped in `dtype`.

        ConfigError where the rule has none for it.
        """

    def update(self, of: Update) -> Scalars:
        """Does it, on the CPU, and returns the new scalars. Blocks until done."""

    def update_all(self, updates: Sequence[Update]) -> list[Scalars]:
        """The same of several parameters, or ranges, to the same bits: what an update costs besides is paid once."""


class AdamWRule:
    """AdamW in one pass over memory, see `cpu_adam`."""

    elementwise = True

    def __init__(self, moments: optim.Moments) -> None:
        self.name = f"AdamW moments={moments}"
        self.moments = moments

    def state(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[StateTensor, ...]:
        if dtype != torch.float32:
            raise ConfigError(f"optimizer: {self.name} steps float32 adapters, not {dtype}; convert them")
        if self.moments != "8bit":
            of_moments: torch.dtype = getattr(torch, self.moments)
            return tuple(StateTensor(name, of_moments, shape) for name in _MOMENTS)
        size = torch.Size(shape).numel()
        return tuple(
            tensor
            for name in _MOMENTS
            for tensor in (
                StateTensor(f"{name}.codes", torch.uint8, (size,)),
                StateTensor(f"{name}.absmax", torch.float32, (-(-size // QUANT_BLOCK_SIZE),)),
            )
        )

    def update(self, of: Update) -> Scalars:
        first: Tensor | Quantized
        second: Tensor | Quantized
        if self.moments == "8bit":
            first, second = (Quantized(of.state[f"{name}.codes"], of.state[f"{name}.absmax"]) for name in _MOMENTS)
        else:
            first, second = (of.state[name] for name in _MOMENTS)
        cpu_adam.update(
            of.grad, of.master, first, second, of.weight, step=of.step,
            numbers=cpu_adam.AdamW.from_group(of.group), grad_scale=of.grad_scale,
        )  # fmt: skip
        return {"step": of.step}

    def update_all(self, updates: Sequence[Update]) -> list[Scalars]:
        return [self.update(of) for of in updates]


class TorchRule:
    """Any optimizer that steps each parameter by itself, an instance of it for what is updated together."""

    def __init__(
        self, kind: type[torch.optim.Optimizer], options: Mapping[str, Any], *, copies_gradients: bool = True
    ) -> None:
        """`copies_gradients`: an optimizer may write to what it is given; without, it is given the gradient itself."""
        if issubclass(kind, _NOT_BY_PARAMETER):
            raise ConfigError(f"optimizer: {kind.__name__} does not step each parameter by itself from its gradient")
        self.name = f"{kind.__module__}.{kind.__name__}"
        self.elementwise = kind in _ELEMENTWISE
        self._kind = kind
        self._copies_gradients = copies_gradients
        self._options = {key: value for key, value in options.items() if key not in _NOT_OPTIONS}

    def state(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[StateTensor, ...]:
        """Found by stepping a parameter of small sizes."""
        sizes = _REHEARSED_SIZES[: len(shape)]
        rehearsed = tuple(size if of > 1 else 1 for size, of in zip(sizes, shape, strict=True))
        parameter = nn.Parameter(torch.ones(rehearsed, dtype=dtype))
        parameter.grad = torch.ones(rehearsed, dtype=dtype)
        (made,) = self._step([parameter], [{}], self._options)
        real = dict(zip(rehearsed, shape, strict=True)) | {1: 1}
        found = []
        for name, value in made.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if not all(size in real for size in value.shape):
                raise ConfigError(
                    f"optimizer: {self._kind.__name__} keeps {name} of shape {tuple(value.shape)} for a parameter of "
                    f"shape {rehearsed}; such state cannot be laid out"
                )
            found.append(StateTensor(name, value.dtype, tuple(real[size] for size in value.shape)))
        return tuple(found)

    def scalars_on(self, device: torch.device) -> list[str]:
        """What of a parameter's state on `device` are tensors without dimensions, and there: found as `state`."""
        parameter = nn.Parameter(torch.ones(_REHEARSED_SIZES[:1], device=device))
        parameter.grad = torch.ones_like(parameter)
        (made,) = self._step([parameter], [{}], self._options)
        return [
            name
            for name, value in made.items()
            if isinstance(value, Tensor) and value.ndim == 0 and value.device.type == device.type
        ]

    def update(self, of: Update) -> Scalars:
        return self.update_all([of])[0]

    def update_all(self, updates: Sequence[Update]) -> list[Scalars]:
        scalars: dict[int, Scalars] = {}
        of_groups: dict[int, list[int]] = {}
        for index, of in enumerate(updates):
            of_groups.setdefault(id(of.group), []).append(index)
        for indices in of_groups.values():
            together = [updates[index] for index in indices]
            scalars.update(zip(indices, self._update_group(together), strict=True))
        return [scalars[index] for index in range(len(updates))]

    def _update_group(self, updates: Sequence[Update]) -> Iterator[Scalars]:
        """Updates parameters of one param group."""
        parameters, befores = [], []
        for of in updates:
            parameter = nn.Parameter(of.master, requires_grad=True)
            parameter.grad = of.grad.to(of.master.dtype)
            if self._copies_gradients or of.grad_scale != 1.0:
                parameter.grad = parameter.grad * of.grad_scale
            kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in of.scalars.items()}
            parameters.append(parameter)
            befores.append({} if of.step == 1 else {**of.state, **kept})
        for of, after in zip(updates, self._step(parameters, befores, updates[0].group), strict=True):
            for name, tensor in of.state.items():
                if after[name].data_ptr() != tensor.data_ptr():
                    tensor.copy_(after[name])
            if of.weight is not None:
                of.weight.copy_(of.master)
            yield {name: value for name, value in after.items() if name not in of.state}

    def _step(
        self, parameters: Sequence[nn.Parameter], states: Sequence[dict[str, Any]], group: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """One step of a new optimizer that holds only these; returns their states."""
        options = {name: group[name] for name in self._options}
        kind: Any = self._kind
        optimizer: torch.optim.Optimizer = kind(parameters, **options)
        for parameter, state in zip(parameters, states, strict=True):
            if state:
                optimizer.state[parameter] = state
        optimizer.step()
        return [dict(optimizer.state[parameter]) for parameter in parameters]


_NOT_OPTIONS = ("params", "initial_lr", "decoupled_weight_decay")
"""Entries of a param group that are no arguments of the optimizer's constructor."""


def rule_for(optimizer: torch.optim.Optimizer, *, in_place: bool = False) -> UpdateRule:
    """The rule that steps as `optimizer` would. ConfigError where there is none.

    With `in_place` it is for parameters that are stepped themselves, and has the bits of `optimizer` on this machine:
    torch's AdamW may take other square roots than the kernel, see `cpu_adam_torch`.
    """
    if type(optimizer) is optim.AdamW or (type(optimizer) is torch.optim.AdamW and not in_place):
        for group in optimizer.param_groups:
            cpu_adam.AdamW.from_group(group)  # refuses what has no twin
        return AdamWRule(getattr(optimizer, "moments", "float32"))
    return TorchRule(type(optimizer), optimizer.defaults, copies_gradients=not in_place)
