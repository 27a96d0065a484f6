"""Arguments of `offload_rt.engine` that stand for more than a number: a plan, a machine to plan for, what trains."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_rt.checkpoint.adapters import add_adapters
from offload_rt.config import EngineConfig
from offload_rt.errors import ConfigError, nearest
from offload_rt.guards.adapter_kinds import check_adapters
from offload_rt.guards.integrity import check_optimizer
from offload_rt.profiling.calibrate import calibrated
from planners.plans.plan import Plan
from planners.problems.hardware import Hardware

AUTO = "auto"
"""The fixed rule's plan, or the optimiser's where that is expected to be faster: see `plans.plan_choice`."""
OPTIMISE = "optimise"
"""The plan that the optimiser makes of this model and machine."""
OptimizerSpec = type[torch.optim.Optimizer] | Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class WantedPlan:
    """What `plan=` and `emulate=` ask for."""

    given: Plan | None
    """None where a plan is to be made: by the optimiser, or by the fixed rule."""
    optimise_for: Hardware | None
    """The machine that the optimiser plans for; None where it is not asked, or only to choose."""
    choose_for: Hardware | None
    """The machine, as calibrated, on which the optimiser's plan is taken if it is expected to be faster than the fixed
    rule's; None where the rule's is."""
    emulated: Hardware | None
    """The machine whose links are imposed."""

    @classmethod
    def read(cls, plan: Plan | str | Path, config: EngineConfig, emulated: Hardware | None) -> WantedPlan:
        """Raises `ConfigError` where the plan cannot be read, or needs a machine that was not calibrated."""
        return cls(
            given=read_plan(plan),
            optimise_for=machine_to_plan_for(plan, config, emulated),
            choose_for=machine_to_choose_for(plan, config, emulated),
            emulated=emulated,
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model with its adapters, what trains of it, and by which optimizer."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    """What trains, by name."""
    optimizer: torch.optim.Optimizer | None
    """None where nothing trains."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        checkpoint: Path | None,
        *,
        adapters: Any,
        optimizer: OptimizerSpec | None,
        lr: float | None,
    ) -> Trained:
        """Adds `adapters`, unless None, to `model`, whose weights `checkpoint` has, unless None.

        Raises `ConfigError`, `CheckpointError` and `UnsupportedModule`, and leaves what it has put on the model to the
        caller (`checkpoint.original`); `IntegrityError` for an optimizer of other parameters.
        """
        model = model if adapters is None else add_adapters(model, adapters, checkpoint)
        check_adapters(model, has_checkpoint=checkpoint is not None)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        made = make_optimizer(optimizer, lr, list(parameters.values()))
        if made is not None:
            check_optimizer(made, parameters)
        return cls(model=model, parameters=parameters, optimizer=made)

    @property
    def held_bytes(self) -> int:
        """What the model's parameters hold of memory, those on meta nothing."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.is_meta)


def read_plan(plan: Plan | str | Path) -> Plan | None:
    """The plan that is given; None where one is to be made. Raises `ConfigError`."""
    if isinstance(plan, Plan):
        return plan
    if plan in (AUTO, OPTIMISE):
        return None
    if not isinstance(plan, (str, Path)):
        raise ConfigError(f"plan: expected {AUTO!r}, {OPTIMISE!r}, a Plan or the path of one, got {plan!r}")
    try:
        return Plan.load(Path(plan))
    except FileNotFoundError:
        raise ConfigError(f"plan: there is no file {str(plan)!r}; {nearest(str(plan), (AUTO, OPTIMISE))}") from None
    except OSError as error:
        raise ConfigError(f"plan: {plan} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"plan: {error}") from None


def machine_to_plan_for(plan: Plan | str | Path, config: EngineConfig, emulated: Hardware | None) -> Hardware | None:
    """The machine that the optimiser plans for: the emulated one, or what was calibrated here. None for another plan.

    Raises `ConfigError` where this machine was not calibrated.
    """
    if plan != OPTIMISE:
        return None
    if emulated is not None:
        return emulated
    found = calibrated_for(config)
    if found is None:
        raise ConfigError(f"plan: {OPTIMISE!r} needs this machine's rates: run `{calibration(config)}` once")
    return found


def machine_to_choose_for(plan: Plan | str | Path, config: EngineConfig, emulated: Hardware | None) -> Hardware | None:
    """The machine that plan="auto" may ask the optimiser about: this one, if it was calibrated. None otherwise."""
    if plan != AUTO or emulated is not None:
        return None
    return calibrated_for(config)


def calibration(config: EngineConfig) -> str:
    """The command that measures this machine for an engine of `config`."""
    return shlex.join(["offload-rt", *calibration_words(config)])


def calibration_words(config: EngineConfig) -> list[str]:
    """That command without its program."""
    folders = [word for drive in config.nvme for word in ("--nvme", str(drive.path))]
    return ["calibrate", "--device", config.device, *folders]


def calibrated_for(config: EngineConfig) -> Hardware | None:
    """What was measured of the machine of an engine of `config`; None where that was not."""
    if not all(drive.path.is_dir() for drive in config.nvme):
        return None  # a folder that is not there is told where it is used
    return calibrated(config.device, tuple(drive.path.resolve() for drive in config.nvme))


def make_optimizer(
    spec: OptimizerSpec | None, lr: float | None, parameters: list[nn.Parameter]
) -> torch.optim.Optimizer | None:
    """The optimizer of `parameters`, AdamW where `spec` is None; None where there are none. Raises `ConfigError`."""
    if not parameters:
        return None
    arguments: dict[str, Any] = {} if lr is None else {"lr": lr}
    if spec is None:
        return torch.optim.AdamW(parameters, **arguments)
    if isinstance(spec, type) and issubclass(spec, torch.optim.Optimizer):
        kind: Any = spec
        made: torch.optim.Optimizer = kind(parameters, **arguments)
        return made
    if not callable(spec):
        raise ConfigError(
            "optimizer: expected a class or a function of the parameters, got "
            + ("an optimizer that is built" if isinstance(spec, torch.optim.Optimizer) else repr(spec))
        )
    if lr is not None:
        raise ConfigError("lr: belongs into the function given as optimizer=, which makes the optimizer")
    factory: Any = spec
    built = factory(parameters)
    if not isinstance(built, torch.optim.Optimizer):
        raise ConfigError(f"optimizer: the function returned {type(built).__name__}, not a torch.optim.Optimizer")
    try:
        built.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:  # of a wrapper that is one by name
        raise ConfigError(
            f"optimizer: {type(built).__name__}.__init__ does not call torch.optim.Optimizer.__init__, so nobody could "
            f"see its steps"
        ) from None
    return built
