"""Adapters that read the weight of the module that they stand around, beside calling it.

DoRA takes the norm of the weight, trained rows are put into a copy of it. What is shown for the time of the module's
own call is gone by then. Plain LoRA is what is known to call alone; every other layer of peft counts as a reader.
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
    return not type(module).__module__.startswith("peft.tuners.lora.") or bool(getattr(module, "lora_variant", None))


def innermost(module: nn.Module) -> nn.Module | None:
    """What `module` stands around, be it by several others; None if it stands around nothing."""
    found = None
    inner = module._modules.get(_BASE)
    while inner is not None:
        found, inner = inner, inner._modules.get(_BASE)
    return found
