"""Optimizers that torch does not have: each a `torch.optim.Optimizer` by itself, and one whose state an engine tiers.

`AdamW` is torch's AdamW with a choice of how its moments are stored; `Lion` is that of Chen et al., arXiv 2302.06675.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from offload_rt.adamw import blockwise, cpu_adam
from offload_rt.adamw.blockwise import Quantized
from offload_rt.errors import ConfigError, nearest

Moments = Literal["float32", "bfloat16", "8bit"]
MOMENTS = ("float32", "bfloat16", "8bit")
_MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """AdamW whose moments are stored in `moments`: "float32", "bfloat16", or "8bit" (bitsandbytes' block-wise codes).

    The arithmetic is that of `cpu_adam_torch`, in float32 however the moments are stored. On its own it steps
    contiguous float32 parameters, on the CPU or, unless its moments are 8-bit, on a GPU by `adam_triton`; under an
    engine, the fp32 masters of parameters. Raises ConfigError for options of torch's AdamW that are not offered here
    (amsgrad, maximize, fused, ...).
    """

    def __init__(self, params: Any, *, moments: Moments = "float32", **options: Any) -> None:
        if moments not in MOMENTS:
            raise ConfigError(f"moments: {moments!r}; {nearest(str(moments), MOMENTS)}")
        super().__init__(params, **options)
        self.moments = moments
        for group in self.param_groups:
            cpu_adam.AdamW.from_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient. Blocks on the CPU. Raises as `check`."""
        loss = run_closure(closure)
        for group in self.param_groups:
            numbers = cpu_adam.AdamW.from_group(group)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    self.check(parameter, parameter.device.type)
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_sq"] = (new_moment(parameter, self.moments) for _ in range(2))
                state["step"] += 1
                tensors = (parameter.grad.contiguous(), parameter.data, state["exp_avg"], state["exp_avg_sq"])
                if parameter.is_cuda:
                    _step_on_gpu()(numbers.scalars(state["step"]), *tensors, None)
                else:
                    cpu_adam.update(*tensors, step=state["step"], numbers=numbers)
                torch.autograd.graph.increment_version(parameter)  # autograd does not see what kernels write
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does; but moments stay as they are stored, which torch would cast to the parameters' dtype, and the
        number of steps stays one.
        """
        saved = state_dict["state"]
        others = {
            number: {key: value for key, value in entries.items() if key not in _MOMENT_NAMES}
            for number, entries in saved.items()
        }
        super().load_state_dict({**state_dict, "state": others})
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(numbers, parameters, strict=True):
            if saved.get(number):
                moments = {key: _on(parameter.device, saved[number][key]) for key in _MOMENT_NAMES}
                self.state[parameter].update({"step": int(saved[number]["step"]), **moments})

    def check(self, parameter: Tensor, device: str) -> None:
        """Raises ConfigError where `parameter` cannot be stepped on a `device` of this type ("cpu", "cuda")."""
        if parameter.dtype is not torch.float32:
            raise ConfigError(
                f"optimizer: AdamW of offload_rt.optim steps float32 parameters, and one of shape "
                f"{tuple(parameter.shape)} is in {parameter.dtype}; load adapters in float32, as peft does by itself, "
                f"or give torch.optim.AdamW"
            )
        if device == "cpu":
            return
        if self.moments == "8bit":
            raise ConfigError(
                f"moments: '8bit' is stepped on the CPU alone, and adapters are on {device}; allowed there: 'float32', "
                f"'bfloat16'"
            )
        _step_on_gpu()


def _on(device: torch.device, moment: Tensor | Quantized) -> Tensor | Quantized:
    if isinstance(moment, Tensor):
        return moment.to(device)
    return Quantized(*(part.to(device) for part in moment))


def _step_on_gpu() -> Callable[..., None]:
    try:
        step: Callable[..., None] = importlib.import_module("offload_rt.adamw.adam_triton").step
    except ImportError as error:
        raise ConfigError(
            f"optimizer: AdamW on a GPU needs Triton ({error}): pip install triton, or give torch.optim.AdamW"
        ) from error
    return step


def new_moment(parameter: Tensor, moments: Moments) -> Tensor | Quantized:
    """A moment of zeros for `parameter`, where it is."""
    if moments == "8bit":
        return blockwise.zeros(parameter.numel())
    return torch.zeros(parameter.shape, dtype=getattr(torch, moments), device=parameter.device)


class Lion(torch.optim.Optimizer):
    """The sign of an interpolation between momentum and gradient. One moment, in the parameter's dtype."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(f"Lion: lr={lr}, betas={betas}, weight_decay={weight_decay}: 0 or more, betas below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient. Blocks."""
        loss = run_closure(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                exp_avg = state["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(exp_avg.lerp(parameter.grad, 1 - beta1).sign_(), alpha=-group["lr"])
                exp_avg.lerp_(parameter.grad, 1 - beta2)
        return loss


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """Runs the closure that `step` was given, with gradients; returns its loss."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
