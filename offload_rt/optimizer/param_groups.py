"""An optimizer's param groups by the names of what is in them: how they are looked up, copied, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offload_rt.errors import ConfigError

Options = dict[str, Any]
"""A param group without its parameters."""


class ParamGroups:
    """The groups of `optimizer`. `names` are those of the parameters that train, by `id`; others have no state."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        self._optimizer = optimizer
        self._names = [
            [names[id(parameter)] for parameter in group["params"] if id(parameter) in names] for group in self._groups
        ]
        self._group_by_name = {
            name: group for group, names in zip(self._groups, self._names, strict=True) for name in names
        }

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def of(self, name: str) -> dict[str, Any]:
        """The group that the parameter `name` is in, as it is now."""
        return self._group_by_name[name]

    def options(self) -> list[Options]:
        """Copies: a learning rate may be a tensor, which schedulers change in place."""
        return [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"} for group in self._groups
        ]

    def values(self) -> list[dict[str, Any]]:
        """What is saved: options, and names in place of parameters."""
        return [{**options, "params": names} for options, names in zip(self.options(), self._names, strict=True)]

    def check(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Raises `ConfigError` where `values` gave other groups than these."""
        if self._names != [group["params"] for group in values]:
            raise ConfigError("the saved optimizer's parameter groups are not those of this run")

    def load(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what `values` gave. ConfigError as `check`; then nothing has changed."""
        self.check(values)
        for group, saved in zip(self._groups, values, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
