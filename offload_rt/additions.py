"""Parameters that a layer has got since its engine was made, found at each call of the layer for next to nothing.

Who adds an adapter puts entries into dicts of modules. So the layer is walked through again only where one of these
dicts has another length or another last entry than at the last walk. Entries are held as they were: what takes the
place of one that is gone is another object.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def _last(entries: dict[str, Any]) -> Any:
    return next(reversed(entries.values()), None)


class Additions:
    """Of one layer, since this was made."""

    def __init__(self, layer: nn.Module) -> None:
        self.known = tuple(layer.parameters())
        """The layer's parameters as they are now."""
        self.num_walks = 0
        self._layer = layer
        self._known_ids = frozenset(map(id, self.known))
        self._walk()

    def find(self) -> list[tuple[str, nn.Parameter]]:
        """Those that there are now, with their names within the layer."""
        for entries, number, last in self._seen:
            if len(entries) != number or _last(entries) is not last:
                self._walk()
                break
        return self._found

    def _walk(self) -> None:
        self.num_walks += 1
        parts: list[dict[str, Any]] = []
        for module in self._layer.modules():
            parts += (module._parameters, module._modules)
        self._seen = [(entries, len(entries), _last(entries)) for entries in parts]
        self._found = [
            (name, parameter)
            for name, parameter in self._layer.named_parameters()
            if id(parameter) not in self._known_ids
        ]
