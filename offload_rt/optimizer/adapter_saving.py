"""Checkpoints of adapters whose optimizer state rests in tiers: the folder that one in memory has, see
`checkpoint.state`, a piece in memory at a time. So a run goes on from it wherever its state is placed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from offload_rt.checkpoint.optimizer_state import Write
from offload_rt.checkpoint.saved_tensors import SavedTensors, bytes_of, read_tensor
from offload_rt.errors import CheckpointError
from offload_rt.memory.arena import Arena, Slot
from offload_rt.optimizer.pieces import MASTER, Piece, Segment, TrainedBlock
from offload_rt.optimizer.rules import StateTensor
from offload_rt.optimizer.state import begin_state, state_tensors
from offload_rt.optimizer.tiered_training import TieredTraining


class TieredState:
    """State in tiers, as `checkpoint.state` sees it."""

    def __init__(self, training: TieredTraining) -> None:
        self._training = training
        self._tensors: dict[str, dict[str, StateTensor]] = {
            trained.name: {
                tensor.name: tensor
                for tensor in training.rule.state(tuple(trained.parameter.shape), trained.parameter.dtype)
            }
            for block in training.blocks
            for trained in block.parameters
        }
        """Of each parameter, whole; what else there is of it are scalars."""
        self._through: Slot | None = None

    def outline(self) -> dict[str, Tensor]:
        stepped = self._training.progress.steps
        found = {
            f"{name}/{state}": torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            for name, tensors in self._tensors.items()
            if name in stepped
            for state, tensor in tensors.items()
        }
        return found | {name: torch.empty_like(value, device="meta") for name, value in self._scalar_tensors()}

    def write(self, write: Write) -> None:
        stepped = self._training.progress.steps
        for block, piece in self._pieces():
            slot = self._slot(piece)
            for segment in piece.segments:
                name = block.parameters[segment.parameter].name
                if name in stepped:
                    for state, tensor in _moments(slot, segment).items():
                        write(f"{name}/{state}", tensor)
            del slot
        for name, value in self._scalar_tensors():
            write(name, value)

    def values(self) -> dict[str, dict[str, Any]]:
        scalars = self._training.progress.scalars
        return {
            name: {key: value for key, value in scalars.get(name, {}).items() if not isinstance(value, Tensor)}
            for name in self._training.progress.steps
        }

    def check(self, saved: SavedTensors, values: Mapping[str, Mapping[str, Any]]) -> None:
        for name in sorted({key.rpartition("/")[0] for key in saved.outline} | values.keys()):
            for state, tensor in self._tensors.get(name, {}).items():
                entry = saved.outline.get(f"{name}/{state}")
                found = None if entry is None else (tuple(entry.shape), entry.dtype)
                if found != (tuple(tensor.shape), tensor.dtype):
                    raise CheckpointError(
                        f"{saved.path}: holds {found or 'nothing'} as {state} of {name}, where this run's optimizer "
                        f"has {(tuple(tensor.shape), tensor.dtype)}"
                    )

    def load(self, saved: SavedTensors, values: Mapping[str, Mapping[str, Any]]) -> None:
        training = self._training
        training.stop()
        if training.home.log is not None:
            training.home.log.drop()
        with training.commits.broken_unless_done(f"loading {saved.path.parent} failed"):
            done: Counter[str] = Counter()

            def read(name: str, into: Tensor) -> None:
                buffer = bytes_of(into)
                saved.read_into(name, done[name], buffer)
                done[name] += len(buffer)

            for block, piece in self._pieces():
                slot = training.home.pieces.get(piece.name) or self._room(piece)
                begin_state(slot, piece, block, None)
                for segment in piece.segments:
                    name = block.parameters[segment.parameter].name
                    for state, tensor in _moments(slot, segment).items():
                        if f"{name}/{state}" in saved.outline:
                            read(f"{name}/{state}", tensor)
                if piece.name not in training.home.pieces:
                    training.home.links.wait(training.home.write_back(piece, slot))
                del slot
            scalars = {name: dict(entries) for name, entries in values.items()}
            for key in saved.outline:
                name, _, state = key.rpartition("/")
                entries = scalars.setdefault(name, {})
                if state not in self._tensors[name]:
                    entries[state] = read_tensor(saved, key)
        training.progress.scalars = dict(scalars)
        # An optimizer that counts no steps needs to know only whether there was one.
        training.progress.steps = {name: int(entries.get("step", 1)) for name, entries in scalars.items()}

    def _scalar_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, scalars in self._training.progress.scalars.items():
            for key, value in scalars.items():
                if isinstance(value, Tensor):
                    yield f"{name}/{key}", value

    def _pieces(self) -> Iterator[tuple[TrainedBlock, Piece]]:
        for block in self._training.blocks:
            for piece in block.pieces:
                yield block, piece

    def _slot(self, piece: Piece) -> Slot:
        """The piece as it is now. Blocks."""
        home = self._training.home
        slot = home.pieces.get(piece.name)
        if slot is None:
            slot = self._room(piece)
            home.links.wait(home.fetch(piece, slot))
        return slot

    def _room(self, piece: Piece) -> Slot:
        """The same memory for every piece: whoever had it is done with it when the next one comes."""
        if self._through is None:
            largest = max(piece.num_bytes for _, piece in self._pieces())
            self._through = Arena("state of adapters", largest).acquire(largest, "checkpoint")
        return self._through.part(0, piece.num_bytes)


def _moments(slot: Slot, segment: Segment) -> dict[str, Tensor]:
    return {state: tensor for state, tensor in state_tensors(slot, segment).items() if state != MASTER}
