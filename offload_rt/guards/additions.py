"""Parameters that a layer has got since its engine was made, found at each call of the layer for next to nothing.

Who adds an adapter puts entries into dicts of modules, or others in the place of those that were there. So the layer is
walked through again only where the entries of its dicts are others than at the last walk. They are held as they were:
what takes the place of one that is gone is another object.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import nn


class Additions:
    """Of one layer, since this was made."""

    def __init__(self, layer: nn.Module) -> None:
        self.known = tuple(layer.parameters())
        """The layer's parameters as they are now."""
        self.num_walks = 0
        self.modules: tuple[nn.Module, ...] = ()
        """The layer, and all modules in it, as of the last walk; another tuple only where there was another walk."""
        self.found: list[tuple[str, nn.Parameter]] = []
        """What the last `find` has returned."""
        self._layer = layer
        self._known_ids = frozenset(map(id, self.known))
        self._walk()

    def find(self) -> list[tuple[str, nn.Parameter]]:
        """Those that there are now, with their names within the layer."""
        if [*map(id, self._entries())] != self._seen_ids:
            self._walk()
        return self.found

    def _entries(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._dicts))

    def _walk(self) -> None:
        self.num_walks += 1
        self._dicts: list[dict[str, Any]] = []
        self.modules = tuple(self._layer.modules())
        for module in self.modules:
            self._dicts += (module._parameters, module._modules)
        self._seen = [*self._entries()]
        self._seen_ids = [*map(id, self._seen)]
        self.found = [
            (name, parameter)
            for name, parameter in self._layer.named_parameters()
            if id(parameter) not in self._known_ids
        ]
