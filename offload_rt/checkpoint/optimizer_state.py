"""An optimizer's state by parameter name, as a checkpoint of adapters holds it, wherever it rests meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from offload_rt.adamw.blockwise import Quantized
from offload_rt.checkpoint.saved_tensors import SavedTensors, read_tensor

Write = Callable[[str, Tensor], None]
"""Takes the elements of a tensor, by its name, that follow those that it was given before."""


class OptimizerState(Protocol):
    """What `state.save_state` and `state.load_state` need of it."""

    def outline(self) -> dict[str, Tensor]:
        """What there is: `<parameter name>/<state name>`, with shapes and dtypes, on the meta device."""

    def write(self, write: Write) -> None:
        """Gives everything that `outline` names. Blocks."""

    def values(self) -> dict[str, dict[str, Any]]:
        """What is kept besides tensors, by parameter name."""

    def check(self, saved: SavedTensors, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises `CheckpointError` where what a checkpoint holds cannot be loaded. Changes nothing."""

    def load(self, saved: SavedTensors, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes it over. Parameters have the checkpoint's values by then. Blocks."""


class TorchState:
    """The state that an optimizer holds itself. 8-bit moments are two tensors, `<state name>.codes` and `.absmax`."""

    def __init__(self, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._trainable = trainable
        self._optimizer = optimizer
        self._names = {id(parameter): name for name, parameter in trainable.items()}

    def outline(self) -> dict[str, Tensor]:
        return {name: torch.empty_like(tensor, device="meta") for name, tensor in self._tensors()}

    def write(self, write: Write) -> None:
        for name, tensor in self._tensors():
            write(name, tensor)

    def values(self) -> dict[str, dict[str, Any]]:
        return {
            self._names[id(parameter)]: {
                key: value for key, value in entries.items() if not isinstance(value, (Tensor, Quantized))
            }
            for parameter, entries in self._optimizer.state.items()
        }

    def check(self, saved: SavedTensors, values: Mapping[str, Mapping[str, Any]]) -> None:
        pass

    def load(self, saved: SavedTensors, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Sets the state itself: `load_state_dict` would cast fp32 moments to the dtype of a bf16 parameter. Tensors go
        to their parameter's device, as there; `step` stays where the optimizer makes it.
        """
        steps_on_device = {
            self._names[id(parameter)]
            for group in self._optimizer.param_groups
            if group.get("capturable") or group.get("fused")
            for parameter in group["params"]
        }

        def placed(key: str) -> Tensor:
            name, _, entry = key.rpartition("/")
            stays = entry == "step" and name not in steps_on_device
            tensor = read_tensor(saved, key)
            return tensor if stays else tensor.to(self._trainable[name].device)

        state = self._optimizer.state
        state.clear()
        for name, entries in values.items():
            state[self._trainable[name]].update(entries)
        tensors = {key: placed(key) for key in saved.outline}
        for key, tensor in tensors.items():
            name, _, entry = key.rpartition("/")
            moment = entry.removesuffix(".codes").removesuffix(".absmax")
            if moment == entry:
                state[self._trainable[name]][entry] = tensor
            elif entry.endswith(".codes"):
                state[self._trainable[name]][moment] = Quantized(tensor, tensors[f"{name}/{moment}.absmax"])

    def _tensors(self) -> Iterable[tuple[str, Tensor]]:
        for parameter, entries in self._optimizer.state.items():
            name = self._names[id(parameter)]
            for key, value in entries.items():
                if isinstance(value, Quantized):
                    yield f"{name}/{key}.codes", value.codes
                    yield f"{name}/{key}.absmax", value.absmax
                elif isinstance(value, Tensor):
                    yield f"{name}/{key}", value
