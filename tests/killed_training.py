"""A run of full fine-tuning that is made to be killed, and its twin that never is. For test_full_kill.

As a program it waits for lines `<folder> <operations until it kills itself, or -1> <place>` and forks a run for each,
so that a kill costs no import of torch. A run acknowledges in the folder's pipe: its process, then step and loss of
every step that has returned. What it draws (data, dropout) comes from torch's generator, which a commit carries.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from offload_rt.optimizer.training import FullTraining
from offload_rt.transfers import links
from planners.plans.plan import StatePlacement, Tier
from tests.changing_plans import CHANGE_EVERY, Changes
from tests.tiny_training import ROWS, TOKENS, VOCABULARY, Made, Model, Plain, State, adamw, engine, model

ACKNOWLEDGEMENT = struct.Struct("<qd")
ADAPTERS = "adapters, state on NVME"
EDGES = ADAPTERS + ", embedding by rows, head by tiles"
TIED = EDGES + ", which are one matrix"
EDGE_ROWS, TILE_ROWS = 160, 64
CHANGE = ", changing"
"""Of a place: the run changes over to another plan and back, and commits where it does."""
CHANGING = "SPECULATIVE, split" + CHANGE
COMMIT_EVERY = {"AFTER": 3, CHANGING: CHANGE_EVERY, ADAPTERS + CHANGE: CHANGE_EVERY}
MAX_NORM = 2.9
"""Clips some of the steps, so that runs are killed in steps that are done again."""
SKIPPED = 5
"""Every so many batches, gradients are not finite."""


class Position:
    """Where a run is in its data."""

    def __init__(self) -> None:
        self.number = 0

    def state_dict(self) -> dict[str, Any]:
        """What it goes on changing: whoever wants it as it is now takes a copy."""
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def scheduled(run: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1 / (1 + step))


def one_step(run: Any, scheduler: Any, position: Position) -> float:
    """Goes on to the next batch that gives a step; its loss."""
    while True:
        position.number += 1
        ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
        loss = run(input_ids=ids).loss
        if position.number % SKIPPED:
            break
        if isinstance(run, Made) and isinstance(run._training, FullTraining):  # the others leave it out
            run.backward(loss + (loss * 0).sqrt())
            run.step()
    run.backward(loss)
    run.step()
    scheduler.step()
    return float(loss.detach())


def built(place: str) -> Model:
    """What is trained in `place`: all of it, or what stands for adapters, which are fp32 as peft's are."""
    if not place.startswith(ADAPTERS):
        return model(torch.float32 if "in parts" in place else torch.bfloat16, dropout=0.2)
    num_rows = EDGE_ROWS if place in (EDGES, TIED) else VOCABULARY
    made = model(torch.float32, dropout=0.2, num_rows=num_rows, tied=place == TIED).requires_grad_(False)
    for layer in made.layers:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in ("up.weight", "down.weight"))
    return made


class Twin:
    """The run that never was killed: what it is after each of its steps. A plain one, unless `run` is given."""

    def __init__(self, place: str = "", run: Made | None = None) -> None:
        torch.manual_seed(11)
        self._generator = torch.get_rng_state()
        self._run = Plain(built(place), adamw, max_grad_norm=MAX_NORM) if run is None else run
        self._scheduler, self._position = scheduled(self._run), Position()
        self.losses: list[float] = []
        self.states: list[State] = [self._run.state()]
        self.positions = [0]

    def reach(self, step: int) -> None:
        before = torch.get_rng_state()
        while len(self.losses) < step:
            torch.set_rng_state(self._generator)
            self.losses.append(one_step(self._run, self._scheduler, self._position))
            self._generator = torch.get_rng_state()
            self.states.append(self._run.state())
            self.positions.append(self._position.number)
        torch.set_rng_state(before)


def resume(folder: Path, place: str) -> tuple[Made, Any, Position]:
    """An engine at the last commit in `folder`; at the beginning where there is none."""
    torch.manual_seed(11)
    begin = torch.get_rng_state()
    arguments: dict[str, Any] = {"max_grad_norm": MAX_NORM}
    place = place.removesuffix(CHANGE)
    if place.startswith(ADAPTERS):
        state = StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=2)
        arguments |= {"nvme": folder, "options": {"state": state, "piece_elements": 50}}
    if place in (EDGES, TIED):
        arguments["options"] |= {"stream_edges": True, "head_tile_rows": TILE_ROWS}
    run = engine(built(place), place, folder, **arguments)
    torch.set_rng_state(begin)
    scheduler, position = scheduled(run), Position()
    run.track("scheduler", scheduler)
    run.track("position", position)
    assert run._training is not None
    if run._training.commits.found_step is not None:
        run.load_checkpoint(run.commit_folder)
    return run, scheduler, position


def kill_after(num_operations: int) -> Callable[..., Any]:
    """`file_io` of a process that ends in place of so many operations later. -1: never."""
    make, left = links.file_io, num_operations

    def made() -> Any:
        io = make()
        start = io.start

        def starting(kind: str, file: Any, offset_bytes: int, buffer: memoryview) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return start(kind, file, offset_bytes, buffer)

        io.start = starting  # type: ignore[method-assign]
        return io

    return made


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, operations, place = line.rstrip("\n").split(" ", 2)
        child = os.fork()
        if child == 0:
            pipe = os.open(Path(folder) / "pipe", os.O_WRONLY)
            links.file_io = kill_after(int(operations))
            os.write(pipe, ACKNOWLEDGEMENT.pack(os.getpid(), 0))
            run, scheduler, position = resume(Path(folder), place)
            changes = Changes(run) if place.endswith(CHANGE) else None
            while True:
                loss = one_step(run, scheduler, position)
                if changes is not None:
                    changes.after_step()
                os.write(pipe, ACKNOWLEDGEMENT.pack(run.step_number, loss))
        os.waitpid(child, 0)
        sys.stdout.write("gone\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
