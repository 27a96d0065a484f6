"""Random lives of adapters that train: on an engine and, operation by operation, on a twin in plain PyTorch and peft.

After every operation its results, weights, gradients, optimizer state, schedules and random numbers are those of the
twin, to the bit; so is what is resumed from a commit or a checkpoint, and what a saved adapter holds.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from offload_rt._engine import Engine
from offload_rt.errors import OffloadError
from offload_rt.optimizer.adapter_saving import TieredState
from offload_rt.optimizer.adapters import AdapterTraining
from offload_rt.plans.plan_options import with_options
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import Tier
from planners.rule.streaming import plan_streaming
from tests.changing_plans import propose, results, with_pieces_in_memory
from tests.lifecycle import Lives, same, scheduled
from tests.lifecycle_adapter_setting import ROWS, TOKENS, Place, Setting, build, make_optimizer, setting_of
from tests.lifecycle_adapter_twin import Operation, Side, Twin, tensors_of

EXPECTED = (
    "received no gradient in step", "gradients are zero", "this backward pass is of a", "seq_len: a batch of",
    "its forward ran before a change of plans", "was frozen when the engine was made",
)  # fmt: skip
"""What an engine may refuse with: a step that would change nothing or not all, a backward pass behind a step or
a change of plans, a batch that is longer than it was made for, another adapter that is to train.
"""
PASSES = (
    "backward",
    "backward_of_sum",
    "backward_twice",
    "bad_backward",
    "train_batch",
    "step_by_closure",
    "step_by_optimizer",
)
"""Operations that leave gradients of no step behind where they fail."""


class Managed(Side):
    """An engine."""

    def __init__(self, of: Setting, folder: Path) -> None:
        super().__init__(of, folder)
        self.num_stores = self.num_changed = 0
        self.begin(of.place, self.new_store())

    def new_store(self) -> Path:
        self.num_stores += 1
        return self.folder / f"store {self.num_stores}"

    def begin(self, place: Place, store: Path) -> None:
        of = self.of
        model = build(of)
        self.place, self.store = place, store
        self.engine = Engine(
            model, bits=4 if of.weights == "nf4" else None, batch_size=ROWS, seq_len=TOKENS + 4,
            accumulation_steps=of.accumulation, max_grad_norm=of.max_grad_norm,
            optimizer=lambda parameters: make_optimizer(of, parameters), **place.arguments(model, store),
        )  # fmt: skip
        self.model, self.trainable = self.engine.model, self.engine.trainable
        self.optimizer = self.engine.optimizer
        self.scheduler = scheduled(self.optimizer)
        self.engine.track("scheduler", self.scheduler)
        self.engine.track("counted", self.counted)

    def __call__(self, **batch: Any) -> Any:
        return self.engine(**batch)

    @property
    def step_number(self) -> int:
        return self.engine.step_number

    def backward(self, loss: Tensor, **options: Any) -> None:
        if options:
            loss.backward(**options)  # type: ignore[no-untyped-call]
        else:
            self.engine.backward(loss)

    def clip(self, max_norm: float) -> Tensor:
        return self.engine.clip_grad_norm_(max_norm)

    def step(self) -> None:
        self.engine.step()

    def train_batch(self, batches: list[Any]) -> float:
        return self.engine.train_batch(batches)

    def gradients(self) -> list[tuple[str, Tensor]]:
        return list(self.engine.gradients())

    def save(self, number: int) -> None:
        self.engine.save_checkpoint(self.folder / f"checkpoint {number}")

    def load(self, number: int) -> None:
        self.engine.load_checkpoint(self.folder / f"checkpoint {number}")

    def save_pretrained(self, folder: Path) -> None:
        self.engine.save_pretrained(folder)

    def look(self, how: int) -> None:
        if how == 0:
            self.engine.report()
        elif how == 1:
            self.engine.summary()
        elif how == 2:
            repr(self.model), [str(p) for p in self.model.parameters()]
        elif how == 3:
            self.optimizer.state_dict()
        elif how == 4:
            self.engine.trace(self.folder / f"trace of {self.step_number}.json", wait=0, on_ready=lambda text: None)
        elif how == 5:
            with contextlib.suppress(OffloadError):
                copy.deepcopy(self.model)

    def change_plan(self, how: int) -> None:
        made_of = self.engine._runtime.made_of
        if isinstance(self.engine._training, AdapterTraining):
            plan = with_pieces_in_memory(self.engine, 1 + how % 3)
        else:
            rest = [Tier.NVME if self.engine.config.nvme else Tier.HOST, Tier.DEVICE][how % 2]
            options = RuntimeOptions(fill=False, num_slots=None if rest is Tier.DEVICE else 1 + how % 3)
            try:
                plan = plan_streaming(made_of.problem, rest=rest)
                plan = with_options(plan, made_of.workload, options, made_of.problem.training)
            except ValueError:
                return
        propose(self.engine, plan)

    def reopen(self, place: Place, number: int | None) -> None:
        self.close()
        self.begin(place, self.store if number is None else self.new_store())
        folder = self.engine.commit_folder if number is None else self.folder / f"checkpoint {number}"
        self.engine.load_checkpoint(folder)

    def optimizer_state(self) -> dict[str, Any]:
        training = self.engine._training
        if not isinstance(training, AdapterTraining):
            return super().optimizer_state()
        return tensors_of(TieredState(training))

    def close(self) -> None:
        self.forget_graphs()
        self.num_changed += results(self.engine).count("changed")
        self.engine.close()


class AdapterLife(Lives):
    """One seed's run of adapters."""

    def __init__(self, seed: int, folder: Path) -> None:
        super().__init__()
        self.of = setting_of(seed)
        self.folder = folder
        self.managed: Managed | None = None

    def begin(self) -> None:
        self.managed, self.twin = Managed(self.of, self.folder), Twin(self.of, self.folder)

    def do(self, name: str, operation: Operation) -> None:
        if name == "resume" and self.twin.committed is None and self.twin.due is None:
            return
        number = self.draw.randrange(1 << 30)
        self.both(name, *(partial(operation, side, random.Random(number)) for side in self.sides()))
        self.fired["resumed"] += name == "resume"

    def sides(self) -> Iterator[Side]:
        assert self.managed is not None
        return iter((self.managed, self.twin))

    def after_refusal(self, name: str, error: BaseException | None) -> None:
        if not any(each in str(error) for each in EXPECTED):
            raise AssertionError(f"{name} was refused") from error
        for side in self.sides() if name in PASSES else ():
            side.losses.clear()
            side.optimizer.zero_grad()
        for side in self.sides() if name == "other_adapter" else ():
            side.model.set_adapter("default")  # which lets it train again, whatever was frozen

    def after_failure(self, name: str, error: BaseException | None) -> None:
        for side in self.sides() if name in PASSES else ():
            side.optimizer.zero_grad()

    def check(self) -> None:
        assert self.managed is not None
        same("state", self.managed.state(), self.twin.state())

    def close(self) -> None:
        assert self.managed is not None
        self.managed.close()
        self.fired["plan changed"] = self.managed.num_changed
        self.managed = None

    def end(self) -> None:
        if self.managed is not None:
            with contextlib.suppress(OffloadError):
                self.managed.engine.close()
