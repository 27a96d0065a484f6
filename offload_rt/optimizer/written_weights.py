"""Refuses what somebody else writes into weights that train, where the next step would lose it.

Weights are their masters, rounded: so what is written into them is gone when they are stepped, loaded or taken back.
Torch counts what is written to a tensor, unless by `.data`, which nobody sees. Where it has counted more than the
engine's own changes, weights are rounded from their masters again: if their bits stay the same, as those do that were
swapped out for an evaluation and in again, nothing is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from offload_rt.checksum import crc32c
from offload_rt.errors import ConfigError
from offload_rt.optimizer.pieces import TrainedBlock, TrainedParameter
from offload_rt.optimizer.state import StateHome
from offload_rt.optimizer.stepper import Stepper

_CHUNK_BYTES = 1 << 20
"""Of weights in a device's memory that are copied to look at their bits."""


class WrittenWeights:
    """Of one training. Used by one thread."""

    def __init__(self, blocks: Sequence[TrainedBlock], home: StateHome, stepper: Stepper) -> None:
        """`all_are_known` says when the engine has made them."""
        self._blocks = tuple(blocks)
        self._home = home
        self._stepper = stepper
        self._versions: dict[int, int] = {}
        self._lost: list[str] = []
        """Weights whose new values were overwritten before anybody was told."""
        self.all_are_known()

    def all_are_known(self) -> None:
        """All are as the engine has made them."""
        self.are_known(trained.parameter for block in self._blocks for trained in block.parameters)

    def are_known(self, parameters: Iterable[Tensor]) -> None:
        """These are as the engine has made them."""
        self._versions |= {id(parameter): parameter._version for parameter in parameters}

    def __bool__(self) -> bool:
        """Whether somebody has written into weights."""
        return bool(self._lost) or any(map(self._written, self._blocks))

    def are_overwritten(self, blocks: Iterable[TrainedBlock]) -> None:
        """These were stepped, or are to be rounded from their masters: what was written into them is lost."""
        for block in blocks:
            for trained in self._written(block):
                self._lose(block, trained)

    def check(self, asked: str, stepped: Collection[TrainedBlock] = ()) -> None:
        """Raises `ConfigError` where what was written would be lost, and leaves the weights of the last step. `asked`
        is what somebody has called. The caller takes `stepped` back, blocks that were stepped since. Nothing is under
        way. Blocks where something was written.
        """
        self.are_overwritten(stepped)
        for block in self._blocks:
            if written := self._written(block):
                self._take_back(block, written)
        lost, self._lost = self._lost, []
        if lost:
            raise ConfigError(
                f"{asked}: {len(lost)} weights were written to since the last step (first: {lost[0]}), which would be "
                f"lost: weights that train are their float32 masters, rounded. They are those of the last step again. "
                f"Change them before engine(...), or with each step, by an optimizer of your own (engine(optimizer=)), "
                f"whose step has the masters; for an evaluation, under torch.no_grad() and taken back to the bit"
            )

    def forget(self) -> None:
        """Other state was loaded, as whoever asked for that knows."""
        self._lost.clear()

    def _written(self, block: TrainedBlock) -> list[TrainedParameter]:
        return [each for each in block.parameters if each.parameter._version != self._versions[id(each.parameter)]]

    def _take_back(self, block: TrainedBlock, written: Sequence[TrainedParameter]) -> None:
        shown = {each.name: _checksum(each.parameter) for each in written if self._home.shows(block, each)}
        if shown:
            self._stepper.rebuild_weights(block)
        for trained in written:
            if trained.name in shown and shown[trained.name] == _checksum(trained.parameter):
                self.are_known([trained.parameter])
            else:
                self._lose(block, trained)

    def _lose(self, block: TrainedBlock, trained: TrainedParameter) -> None:
        if not self._home.shows(block, trained):
            trained.parameter.data.fill_(float("nan"))  # a placeholder, whatever was written there
        self._lost.append(trained.name)
        torch.autograd.graph.increment_version([trained.parameter])
        self.are_known([trained.parameter])


def _checksum(parameter: Tensor) -> int:
    """Of its bits. Blocks for a device."""
    flat = parameter.detach().view(-1).view(torch.uint8)
    found = 0
    for begin in range(0, len(flat), _CHUNK_BYTES):
        found = crc32c(flat[begin : begin + _CHUNK_BYTES].cpu().numpy().data, found)
    return found
