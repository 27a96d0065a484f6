"""Random lives of runs of full fine-tuning: on an engine and, operation by operation, on a twin in plain PyTorch.

A seed is a configuration (what trains, by which optimizer, where all of it rests) and a program of what users do. After
every operation losses, gradients, weights, masters, moments and random numbers are those of the twin, to the bit; so is
what a commit, a checkpoint and a saved model hold. The engine may refuse with an error of its own: then nothing has
changed, and the life goes on.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_rt._engine import Engine
from offload_rt.adamw.blockwise import Quantized
from offload_rt.errors import BudgetExceeded, ConfigError, OffloadError, PlanInfeasible
from offload_rt.optimizer.state import state_tensors
from offload_rt.optimizer.training import FullTraining
from offload_rt.wiring.runtime_options import RuntimeOptions
from tests.full_parity import room, state_of, training_of
from tests.lifecycle import Counted, Lives, scheduled
from tests.lifecycle_twin import (
    OPTIMIZERS,
    ROWS,
    TOKENS,
    Configuration,
    Saved,
    Twin,
    batch,
    build,
    draw_place,
    groups_of,
)


@dataclass
class Root:
    """Folders on drives, and what is committed there."""

    folders: list[Path]
    committed: Saved | None = None
    """None: nothing but the model's own values."""


class Killed(Exception):
    """The process ends here; what is on the drives stays."""


class Life(Lives):
    """One seed's run of full fine-tuning."""

    def __init__(self, seed: int, folder: Path, of: Configuration | None = None) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.of = Configuration.draw(random.Random(f"configuration {seed}")) if of is None else of
        self.folder = folder
        self.twin = Twin(self.of)
        self.numbers = itertools.count()
        self.checkpoints: list[tuple[Path, Saved]] = []
        self.roots: list[Root] = []
        self.root: Root | None = None
        self.due: Saved | None = None
        self.can_go_back = False
        self.off: set[str] = set()
        """Parameters that somebody has switched off."""
        self.engine: Engine | None = None
        self.place: dict[str, Any] = {}

    # ---- engines -----------------------------------------------------------------------------------------------

    def open(self, *, root: Root | None | str = "any") -> None:
        """An engine in a place that is drawn; it holds what its drive has committed, or the model's own values."""
        draw = self.draw
        if root == "any":
            kind = draw.random()
            if kind < 0.3:
                root = None
            elif kind < 0.6 and self.roots:
                root = draw.choice(self.roots)
            else:
                number = next(self.numbers)
                folders = [self.folder / f"nvme-{number}-{i}" for i in range(draw.choice((1, 1, 1, 2)))]
                for each in folders:
                    each.mkdir()
                root = Root(folders)
                self.roots.append(root)
        self.root = root
        for _ in range(40):
            place = draw_place(draw, self.of, root.folders if root is not None else ())
            try:
                self.engine = self._make(place)
                self._check_cuts()
                break
            except (PlanInfeasible, ConfigError, BudgetExceeded) as error:
                with suppress(OffloadError):
                    if self.engine is not None:
                        self.engine.close()
                self.engine = None
                self.fired[f"no engine: {str(error)[:90]}"] += 1
        else:
            raise AssertionError("no place was found")
        self.place = place
        assert self.engine is not None
        changed = {k: v for k, v in vars(place["options"]).items() if v != getattr(RuntimeOptions(), k)}
        if "activations" in changed:
            changed["activations"] = {
                n: (p.chunks[0].action.value, p.chunks[0].tier) for n, p in changed["activations"].items()
            }
        self.history.append(f"open { {**place, 'options': changed} }")
        self.scheduler = None
        if self.of.scheduled:
            self.scheduler = scheduled(self.engine.optimizer)
            self.engine.track("scheduler", self.scheduler)
        self.counted = Counted()
        self.engine.track("counted", self.counted)
        self.due, self.can_go_back = None, self.has_log
        committed = root.committed if root is not None else None
        if self.has_log:
            assert self.engine.committed is not None
            assert self.engine.committed["step"] == (committed.step if committed is not None else 0)
        if self.is_full and committed is not None and committed.step and draw.random() < 0.3:
            self.fired["forward before the run was loaded"] += 1
            self._expect(ConfigError, lambda: self.engine(**self._batch(1)))
        if committed is not None and committed.step:
            self.engine.load_checkpoint(self.engine.commit_folder)
            self._restored(committed)
        else:
            self.twin.restore(self.twin.begun)
            if self.scheduler is not None:
                self.twin.scheduler.load_state_dict(copy.deepcopy(self.scheduler.state_dict()))
        self.off.clear()
        self.twin.model.requires_grad_(False)
        for weight in self.twin.weights.values():
            weight.requires_grad_(True)

    def _make(self, place: dict[str, Any]) -> Engine:
        of, make = self.of, OPTIMIZERS[self.of.optimizer]
        before = torch.get_rng_state()
        engine = Engine(
            build(of), batch_size=ROWS, seq_len=TOKENS, accumulation_steps=of.accumulation,
            max_grad_norm=of.max_grad_norm, commit_every=of.commit_every if "nvme" in place else None,
            optimizer=lambda parameters: make(groups_of(of, parameters)), **place,
        )  # fmt: skip
        assert torch.equal(before, torch.get_rng_state()), "making an engine has drawn random numbers"
        self.is_full = isinstance(engine._training, FullTraining)
        return engine

    def _check_cuts(self) -> None:
        cuts = self.engine._runtime.cuts
        if (cuts.head_chunk_tokens or ROWS * TOKENS) < ROWS * TOKENS or cuts.chunk_tokens or cuts.head_tile_rows:
            raise ConfigError("the plan has cuts")
        if cuts.layer_major and self.of.dropout:
            raise ConfigError("the plan has cuts: layer_major")

    @property
    def has_log(self) -> bool:
        return self.is_full and self.root is not None

    @property
    def every(self) -> int | None:
        training = self.engine._training
        return training.commits.every if self.is_full else (self.of.commit_every if self.root else None)

    def close(self) -> None:
        self.engine.close()
        self.finish()
        self.engine = None

    def end(self) -> None:
        if self.engine is not None:
            with suppress(OffloadError):
                self.engine.close()

    # ---- commits -----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The commit of the last step is made."""
        if self.due is not None and self.root is not None:
            scheduler = self.twin.of_scheduler()
            self.root.committed = replace(self.due, groups=self.twin.options(), scheduler=scheduler)
            self.due, self.can_go_back = None, True

    def stepped(self) -> None:
        self.due, self.can_go_back = None, False
        if self.root is not None and self.every is not None and self.twin.step_number % self.every == 0:
            self.due = self.twin.saved()

    def _restored(self, saved: Saved, *, from_commit: bool = True) -> None:
        self.twin.restore(saved)
        assert torch.equal(saved.rng, torch.get_rng_state()), "random numbers are not those that were saved"
        self.due = None
        self.can_go_back = from_commit

    # ---- on both sides -----------------------------------------------------------------------------------------

    def _batch(self, number: int) -> dict[str, Tensor]:
        made = batch(number)
        return made if self.of.model.startswith("tiny") else {**made, "labels": made["input_ids"]}

    def forward(self, number: int) -> tuple[Tensor, Tensor]:
        arguments = self._batch(number)

        def on_engine() -> Tensor:
            loss = self.engine(**arguments).loss
            return loss

        def on_twin() -> Tensor:
            self.finish()
            return self.twin(**arguments).loss

        return self.both("forward", on_engine, on_twin)

    def backward(self, losses: tuple[Tensor, Tensor]) -> None:
        self.both("backward", lambda: self.engine.backward(losses[0]), lambda: self.twin.backward(losses[1]))

    def step(self) -> bool:
        """Whether it was taken."""
        taken: list[bool] = []
        before = self.engine.step_number

        def on_twin() -> None:
            self.finish()
            taken.append(self.twin.step())
            if taken[0]:
                self.stepped()

        self.both("step", self.engine.step, on_twin)
        assert self.engine.step_number == before + taken[0]
        return taken[0]

    def _expect(self, kind: type[Exception], does: Callable[[], Any]) -> None:
        try:
            does()
        except kind:
            return
        raise AssertionError(f"{kind.__name__} was not raised")

    # ---- the life ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        if self.engine is None:
            self.open()

    def do(self, name: str, operation: Callable[[Life], None]) -> None:
        try:
            operation(self)
        except Killed:
            self.resume_elsewhere()

    def after_refusal(self, name: str, error: BaseException | None) -> None:
        self.engine.optimizer.zero_grad()
        self.engine.model.train()
        self.twin.model.train()
        self.twin.zero_grad()
        assert self.engine.step_number == self.twin.step_number

    def check(self) -> None:
        """Weights, masters, moments, options and commits are the twin's. No gradient is there."""
        engine, twin = self.engine, self.twin
        assert engine is not None
        assert engine.step_number == twin.step_number
        assert list(engine.gradients()) == []
        for group, options in zip(engine.optimizer.param_groups, twin.options(), strict=True):
            mine = {k: v for k, v in group.items() if k != "params"}
            assert mine == options, (mine, options)
        if self.of.scheduled:
            assert self.scheduler.state_dict() == twin.scheduler.state_dict()
        assert self.counted.number == twin.counted.number
        if not self.is_full:
            for name, parameter in engine.trainable.items():
                assert torch.equal(parameter, twin.weights[name]), f"weight {name}"
            return
        training = training_of(engine)
        if self.has_log:
            wanted = self.root.committed.step if self.root.committed is not None else 0
            found = engine.committed["step"]
            if self.due is None:
                assert found == wanted, f"committed: step {found}, wanted {wanted}"
        training.stepper.finish()
        state = state_of(training)
        assert state.keys() == twin.masters.keys()
        for name, (master, weight) in state.items():
            assert torch.equal(master, twin.masters[name]), f"master of {name}"
            assert torch.equal(weight, twin.weights[name]), f"weight {name}"
        for name, moments in moments_of(training).items():
            wanted = dict(twin.optimizer.state.get(twin.masters[name], {}))
            for key, found in moments.items():
                expected = _moment(wanted, key)
                if expected is None:
                    assert not found.float().any(), f"{key} of {name}: there, and not in plain PyTorch"
                else:
                    assert torch.equal(found, expected.reshape(-1)), f"{key} of {name}"
            steps = training.progress.steps.get(name, 0)
            if "step" in wanted:
                assert steps == int(wanted["step"]), f"step of {name}: {steps}"
        for name, parameter in engine.trainable.items():
            if parameter.numel() and (parameter.numel() == 1 or any(parameter.stride())):
                shown = next(
                    training.home.shows(block, each)
                    for block in training.blocks for each in block.parameters if each.name == name
                )  # fmt: skip
                assert not shown or torch.equal(parameter, twin.weights[name]), f"shown weight {name}"

    def resume_elsewhere(self) -> None:
        """The drives as they were when the process was killed."""
        root = self.killed_root
        with suppress(OffloadError):
            self.engine.close()
        self.engine = None
        self.twin.model.train()
        self.open(root=root)


def moments_of(training: FullTraining) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors by parameter, flat."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for block in training.blocks:
        for piece in block.pieces:
            slot = training.home.pieces.get(piece.name)
            if slot is None:
                slot = room(piece.num_bytes)
                training.home.links.wait(training.home.fetch(piece, slot))
            for segment in piece.segments:
                of = found.setdefault(block.parameters[segment.parameter].name, {})
                for name, tensor in state_tensors(slot, segment).items():
                    if name != "master":
                        of.setdefault(name, []).append(tensor.clone().reshape(-1))
    return {name: {key: torch.cat(parts) for key, parts in of.items()} for name, of in found.items()}


def _moment(state: Mapping[str, Any], key: str) -> Tensor | None:
    name, _, part = key.partition(".")
    value = state.get(name)
    return getattr(value, part) if isinstance(value, Quantized) else value
