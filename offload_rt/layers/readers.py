"""Adapters that read the weight of the module that they stand around, beside calling it.

DoRA takes the norm of the weight, trained rows are put into a copy of it; for the time of a call, a LoRA on a parameter
(`target_parameters`) has the module compute with a sum in the parameter's place. What is shown for the time of the
module's own call is gone by then. Plain LoRA is what is known to call alone; every other layer of peft counts as a
reader.
"""

from __future__ import annotations

from torch import nn

_BASE = "base_layer"
"""peft's name for what an adapter stands around."""


def is_reader(module: nn.Module) -> bool:
    """Whether `module` stands around another one, and is not known to leave its weight alone. It may get another
    adapter at any time.
    """
    if module._modules.get(_BASE) is None:
        return False
    if replaced_by(module):
        return True
    return not type(module).__module__.startswith("peft.tuners.lora.") or bool(getattr(module, "lora_variant", None))


def replaced_by(module: nn.Module) -> str:
    """The name of the parameter in whose place `module` puts another tensor while it calls what it stands around; empty
    for most. torch sets the parameter to itself for that, which it counts as writing to it.
    """
    is_of_peft = type(module).__module__.startswith("peft.tuners.")
    return str(vars(module).get("parameter_name", "")) if is_of_peft else ""


def innermost(module: nn.Module) -> nn.Module | None:
    """What `module` stands around, be it by several others; None if it stands around nothing."""
    found = None
    inner = module._modules.get(_BASE)
    while inner is not None:
        found, inner = inner, inner._modules.get(_BASE)
    return found
