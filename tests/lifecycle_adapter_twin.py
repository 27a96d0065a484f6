"""What the operations of `lifecycle_of_adapters` work on: a side, and the one in plain PyTorch and peft."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload_rt.checkpoint.optimizer_state import OptimizerState, TorchState
from tests.conftest import decode_in_place
from tests.lifecycle import Counted, options_of, scheduled
from tests.lifecycle_adapter_setting import Place, Setting, build, make_optimizer

Operation = Callable[["Side", random.Random], Any]


class Side:
    """One of the two: what operations work on."""

    model: Any
    optimizer: Any
    scheduler: Any
    trainable: dict[str, nn.Parameter]
    place: Place

    def __init__(self, of: Setting, folder: Path) -> None:
        self.of, self.folder = of, folder
        self.losses: list[Tensor] = []
        """Whose backward pass has not come."""
        self.hooks: list[Any] = []
        self.num_saved = 0
        self.counted = Counted()
        self.is_checkpointing = False
        """Whether transformers was asked for gradient checkpointing, under which it does without a cache."""
        self.is_off = False
        """Whether adapters are."""

    def __call__(self, **batch: Any) -> Any:
        """A forward pass."""
        raise NotImplementedError

    def called(self) -> None:
        """The model, or the optimizer, will be called by itself."""

    def backward(self, loss: Tensor, **options: Any) -> None:
        raise NotImplementedError

    def clip(self, max_norm: float) -> Tensor:
        raise NotImplementedError

    def clip_as_declared(self) -> None:
        if self.of.max_grad_norm is not None:
            self.clip(self.of.max_grad_norm)

    def step(self) -> None:
        raise NotImplementedError

    def stepped(self) -> None:
        """The optimizer was stepped by itself."""

    def reloaded(self) -> None:
        """The optimizer's state was loaded by itself."""

    def train_batch(self, batches: list[Any]) -> float:
        raise NotImplementedError

    def gradients(self) -> list[tuple[str, Tensor]]:
        raise NotImplementedError

    def save(self, number: int) -> None:
        raise NotImplementedError

    def load(self, number: int) -> None:
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> None:
        raise NotImplementedError

    def look(self, how: int) -> None:
        """What only reads."""

    def change_plan(self, how: int) -> None:
        """Another plan is found better."""

    def reopen(self, place: Place, number: int | None) -> None:
        """Begins anew in `place` from checkpoint `number`; None: in the same, from what is committed there."""
        raise NotImplementedError

    def optimizer_state(self) -> dict[str, Any]:
        """By parameter and name."""
        return tensors_of(TorchState(self.trainable, self.optimizer))

    def forget_graphs(self) -> None:
        self.losses.clear()
        while self.hooks:
            self.hooks.pop().remove()
        self.is_checkpointing = self.is_off = False

    def state(self) -> dict[str, Any]:
        """All that is compared."""
        return {
            "step": self.step_number,
            "weights": {name: p.detach() for name, p in self.trainable.items()},
            "gradients": {name: p.grad for name, p in self.trainable.items() if p.grad is not None},
            "requires_grad": {name: p.requires_grad for name, p in self.trainable.items()},
            "optimizer": self.optimizer_state(),
            "groups": options_of(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "counted": self.counted.number,
            "modes": {name: module.training for name, module in self.model.named_modules()},
        }


class Twin(Side):
    """Plain PyTorch and peft, and what an engine has committed: see [Note: when a step is committed]."""

    def __init__(self, of: Setting, folder: Path) -> None:
        super().__init__(of, folder)
        self.saved: list[dict[str, Any]] = []
        self.begin(of.place)

    def begin(self, place: Place) -> None:
        self.place = place
        self.model = build(self.of)
        if self.of.weights == "nf4":
            decode_in_place(self.model)
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.of, list(self.trainable.values()))
        self.scheduler = scheduled(self.optimizer)
        self.step_number = 0
        self.due: dict[str, Any] | None = None
        self.committed: dict[str, Any] | None = None
        self.can_go_back = False
        self.written = self.weights()
        """The weights in the pieces of state that rests in tiers: those of the last step."""

    def __call__(self, **batch: Any) -> Any:
        self.settle()
        return self.model(**batch)

    def called(self) -> None:
        self.settle()

    def backward(self, loss: Tensor, **options: Any) -> None:
        loss.backward(**options)  # type: ignore[no-untyped-call]

    def clip(self, max_norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), max_norm)

    def step(self) -> None:
        self.settle()
        self.clip_as_declared()
        self.optimizer.step()
        self.stepped()
        self.optimizer.zero_grad(set_to_none=True)

    def stepped(self) -> None:
        self.step_number += 1
        self.written, self.can_go_back, self.due = self.weights(), False, None
        every = self.place.commits_every
        if every is not None and self.step_number % every == 0:
            self.due = self.snapshot()
        self.versions = self.versions_now()

    def reloaded(self) -> None:
        if not self.place.in_tiers:
            steps = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
            self.step_number = max(steps, default=self.step_number)

    def settle(self) -> None:
        """A commit that is due is made, but not for an evaluation of other weights than the step has left."""
        if self.due is not None and (torch.is_grad_enabled() or self.versions == self.versions_now()):
            self.commit()

    def commit(self) -> None:
        if self.due is None:
            return
        now = self.snapshot()
        follows = ("groups", "scheduler") if self.place.in_tiers else ("groups", "scheduler", "weights", "state")
        self.committed, self.due = {**self.due, **{key: now[key] for key in follows}}, None
        self.can_go_back = True

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trainable.items()}

    def versions_now(self) -> list[Any]:
        return [(p.data_ptr(), p._version) for p in self.trainable.values()]

    def train_batch(self, batches: list[Any]) -> float:
        total = 0.0
        for batch in batches:
            loss = self(**batch).loss / len(batches)
            loss.backward()
            total += float(loss.detach())
        self.step()
        return total

    def gradients(self) -> list[tuple[str, Tensor]]:
        return [(name, p.grad) for name, p in self.trainable.items() if p.grad is not None]

    def snapshot(self) -> dict[str, Any]:
        state = copy.deepcopy(self.optimizer.state_dict())
        return {
            "step": self.step_number, "weights": self.weights(), "state": state["state"],
            "groups": state["param_groups"], "scheduler": copy.deepcopy(self.scheduler.state_dict()),
            "counted": self.counted.number, "rng": torch.get_rng_state(),
        }  # fmt: skip

    def put_back(self, saved: dict[str, Any]) -> None:
        saved = copy.deepcopy(saved)
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, value in saved["weights"].items():
                self.trainable[name].copy_(value)
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": saved["groups"]})
        self.scheduler.load_state_dict(saved["scheduler"])
        self.counted.number = saved["counted"]
        torch.set_rng_state(saved["rng"])
        self.step_number, self.written = saved["step"], self.weights()

    def save(self, number: int) -> None:
        self.commit()
        self.saved.append(self.snapshot())

    def load(self, number: int) -> None:
        self.commit()
        self.put_back(self.saved[number])
        self.can_go_back = False

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def change_plan(self, how: int) -> None:
        if self.place.in_tiers and self.place.has_log and self.due is None and not self.can_go_back:
            self.due = {**self.snapshot(), "weights": self.written}
            self.versions = self.versions_now()

    def reopen(self, place: Place, number: int | None) -> None:
        self.commit()
        committed = self.committed
        self.forget_graphs()
        self.begin(place)
        if number is not None:
            self.put_back(self.saved[number])
        else:
            assert committed is not None
            self.put_back(committed)
            self.committed, self.can_go_back = committed, True


def tensors_of(state: OptimizerState) -> dict[str, Any]:
    """Copies, by parameter and name."""
    parts: dict[str, list[Tensor]] = {}
    state.write(lambda name, value: parts.setdefault(name, []).append(value.detach().clone().reshape(-1)))
    found: dict[str, Any] = {
        name: torch.cat(parts[name]).view(outline.shape) for name, outline in state.outline().items()
    }
    for name, values in state.values().items():
        found |= {f"{name}/{key}": value for key, value in values.items()}
    return found
