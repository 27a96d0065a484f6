"""A model as its user made it, to be put back where an engine could not be made.

Adapters, hooks, guards and what stands in place of a method are entries of modules' dictionaries; a weight that went to
where a plan has it is other memory behind the same parameter. So copies of these dictionaries, and references to that
memory, undo all of it, whoever did it, and however far it had come.
"""

from __future__ import annotations

import torch
from torch import nn

from offload_rt.checkpoint.materialise import make_real

_TORCHS_OWN = tuple(key for key, value in vars(nn.Module()).items() if isinstance(value, dict))
"""Dictionaries that a module has by torch: of parameters, modules and hooks. Those of a user's are left alone."""


class Original:
    """Holds the values of `model`, which are there anyway until an engine is made, until `restore` or `let_go`."""

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
        self._entries = [
            (value, dict(value))  # handles of hooks know the dictionary itself
            for _, attributes in self._attributes
            for value in (attributes[key] for key in _TORCHS_OWN if key in attributes)
        ]
        self._values: list[tuple[nn.Parameter, torch.Tensor, bool]] = [
            (parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()
        ]

    def let_go(self) -> None:
        """Holds nothing any more, and restores nothing."""
        self._attributes.clear()
        self._entries.clear()
        self._values.clear()

    def restore(self) -> None:
        """Puts the model back as it was, its parameters the same objects; lets go."""
        for now, before in self._attributes + self._entries:
            now.clear()
            now.update(before)
        for parameter, value, requires_grad in self._values:
            make_real(parameter, value)
            parameter.requires_grad_(requires_grad)
        self.let_go()
