"""Kinds of peft's adapters that an engine cannot train, or that a checkpoint does not fit, refused at its start.

What they need goes past what a layer is called with, so that a layer which runs again in backward would compute
something else, or gradients would not leave it. Where nothing trains they serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from offload_rt.errors import ConfigError, UnsupportedModule

KEEP_THE_BASE = ("gaussian", "eva", "mica", "orthogonal")
"""Ways in which peft begins a LoRA, besides its own, that leave the base model's weights as they are."""
_CACHED = (
    "its keys and values come to layers as a cache, which is not kept for their recompute; prompt tuning "
    "(PromptTuningConfig, PromptEncoderConfig) and LoRA are supported"
)
_UNTRAINED = {
    "PREFIX_TUNING": f"Prefix tuning is not supported: {_CACHED}",
    "CARTRIDGE": f"it is a prefix: {_CACHED}",
    "XLORA": "its scalings come to adapters by hooks, so that their gradients would not leave a layer that runs again "
    "in backward; train a LoRA, or combine trained ones before engine(...) (add_weighted_adapter)",
    "SHADOW": "its layers hand on an object that has tensors inside, which get no gradient where layers run again in "
    "backward; train a LoRA",
}
"""By peft's name: why not, and what else."""


def check_adapters(model: nn.Module, *, has_checkpoint: bool) -> None:
    """Raises `UnsupportedModule` for an adapter that could not be trained, and `ConfigError` for one that has taken
    something out of weights which a checkpoint would bring back. Imports no peft.
    """
    trains = any(parameter.requires_grad for parameter in model.parameters())
    for name, config in _configs(model):
        if trains and (why_not := _why_not(config)):
            raise UnsupportedModule(f"adapters: {name!r} is {_kind(config)}: {why_not}")
        if has_checkpoint and (changed_by := changes_the_base(config)):
            raise ConfigError(
                f"adapters: {name!r} ({changed_by}) takes something out of the base model's weights before it trains, "
                f"and checkpoint= would bring them as they were; leave checkpoint= out: the model has its weights"
            )


def changes_the_base(config: Any) -> str:
    """What in peft's configuration changes the base model's weights where the adapter is made; empty: nothing."""
    begun = getattr(config, "init_lora_weights", True)
    if isinstance(begun, str) and begun.lower() not in KEEP_THE_BASE:
        return f"init_lora_weights={begun!r}"
    return "kasa_config" if getattr(config, "kasa_config", None) else ""


def chooses_by_weights(config: Any) -> bool:
    """Whether peft, where it makes such an adapter, chooses places by the values of weights: numbers, in which NaN does
    not show.
    """
    return _kind(config) == "SUPERTUNING"


def _configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's, by the adapters' names, wherever in `model` there are some; each once."""
    seen: set[int] = set()
    for module in model.modules():
        for attribute in ("peft_config", "_peft_config"):
            configs = vars(module).get(attribute)
            for name, config in configs.items() if isinstance(configs, dict) else ():
                if id(config) not in seen and hasattr(config, "peft_type"):
                    seen.add(id(config))
                    yield name, config


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _why_not(config: Any) -> str:
    if getattr(config, "monteclora_config", None):
        return (
            "its samples (monteclora_config) are drawn ahead and used up, so that a layer that runs again in backward "
            "would get others; leave monteclora_config out"
        )
    if getattr(config, "coft", False):
        return (
            "with coft=True each forward writes into what trains, which a layer that runs again in backward takes for "
            "a step; leave coft out"
        )
    return _UNTRAINED.get(_kind(config), "")
