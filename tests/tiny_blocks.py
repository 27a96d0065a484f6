"""Trained blocks, a log for their state and I/O that can fail: for gradients and for the stepper by themselves."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_rt.config import NvmePath
from offload_rt.errors import storage_error
from offload_rt.optimizer.pieces import TrainedBlock, TrainedParameter, trained_block
from offload_rt.optimizer.rules import Scalars, StateTensor, Update
from offload_rt.optimizer.state import log_extents
from offload_rt.storage.commit_layout import make_log
from offload_rt.storage.commit_log import CommitLog
from offload_rt.transfers.links import Links
from tests.power_loss import PlainIO

ELEMENTS = 8192
"""Of a parameter; a piece is half of it."""


class CountingRule:
    """Adds the gradient to the master, and writes down what came. Fails at `fails_at`."""

    name = "counting"
    elementwise = True

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, int]] = []
        """First element of the master before, scale and step of each update."""
        self.fails_at: int | None = None

    def state(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[StateTensor, ...]:
        return ()

    def update(self, of: Update) -> Scalars:
        if len(self.seen) == self.fails_at:
            raise ArithmeticError("this update fails")
        self.seen.append((int(of.master.view(-1)[0]), of.grad_scale, of.step))
        of.master.add_(of.grad, alpha=of.grad_scale)
        of.weight.copy_(of.master)
        return {"last": of.step}

    def update_all(self, updates: Sequence[Update]) -> list[Scalars]:
        return [self.update(of) for of in updates]


def blocks(num_blocks: int, *, accumulates: bool = False) -> list[TrainedBlock]:
    """Blocks of three pieces: two of one parameter, and a small one. Weights are the block's number times ten."""
    made = []
    for number in range(num_blocks):
        parameters = [
            TrainedParameter(
                f"{number}.{name}", nn.Parameter(torch.full((size,), 10.0 * number, dtype=torch.bfloat16)), None
            )
            for name, size in (("large", ELEMENTS), ("small", 8))
        ]
        made.append(
            trained_block(
                str(number), parameters, CountingRule(), accumulates=accumulates, piece_elements=ELEMENTS // 2
            )
        )
    return made


def gradients_of(block: TrainedBlock, value: float) -> Mapping[int, torch.Tensor]:
    return {i: torch.full_like(t.parameter, value).detach() for i, t in enumerate(block.parameters)}


class FailingIO(PlainIO):
    """Fails what is named in `fails`, when it is waited for; `waited` are the waits so far."""

    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.started: list[tuple[str, int]] = []

    def start(self, kind: str, file: Any, offset_bytes: int, buffer: memoryview) -> Any:
        self.started.append((kind, offset_bytes))
        done = super().start(kind, file, offset_bytes, buffer)  # type: ignore[no-untyped-call]
        if kind not in self.fails:
            return done

        def wait(timeout_seconds: float) -> None:
            raise storage_error(
                f"{kind} failed", path=file.path, offset=offset_bytes, wanted=1, done=0, errno=errno.EIO
            )

        return wait


def state_log(made: list[TrainedBlock], folder: Path, links: Links) -> CommitLog:
    """A log with the extents of these blocks' state. The caller closes it."""
    make_log([NvmePath(path=folder / "log")], log_extents(made, [1.0]), links, payload_bytes=4096)
    return CommitLog([folder / "log"], links)
