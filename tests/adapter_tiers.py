"""What the gate of adapters' tiered state compares: torch's optimizer over adapters in memory, and an engine's run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_rt import optim
from offload_rt._engine import Engine
from offload_rt.optimizer.adapters import AdapterTraining
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import StatePlacement, Tier
from tests import full_parity, parity
from tests.full_parity import groups_of, scheduled
from tests.parity import BATCH_SIZE, FAMILIES, SEQ_LEN, Trace, covering, run_steps

STEPS = 3
IN_HOST = StatePlacement(in_memory={"adapters": 1}, gradients=Tier.HOST)
ON_NVME = StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=2)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "default": full_parity.OPTIMIZERS["adamw"],
    "adamw kernel": lambda groups: optim.AdamW(groups, lr=1e-2),
    **{name: make for name, make in full_parity.OPTIMIZERS.items() if name != "adamw"},
}

PLACES: dict[str, dict[str, Any]] = {
    "in HOST": {"host_memory": "64MiB", "options": {"state": IN_HOST}},
    "in HOST, committed": {"nvme": True, "host_memory": "64MiB", "commit_every": 2, "options": {"state": IN_HOST}},
    "on NVME": {"nvme": True, "options": {"state": ON_NVME, "piece_elements": 1024}},
    "on NVME, commits of every third": {
        "nvme": True, "commit_every": 3, "options": {"state": ON_NVME, "piece_elements": 1536}
    },
    "stress": {
        "nvme": True, "host_memory": "64MiB",
        "options": {
            "state": StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=1), "piece_elements": 1024,
            "record": True, "poison": True, "delay_seconds": 0.002, "num_slots": 2,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One cell of the gate's matrix. `weights` "plain bf16" are adapters in bf16; peft's are fp32 on any base."""

    family: str
    weights: str
    optimizer: str
    accumulation: int
    max_grad_norm: float | None
    grouped: bool
    place: str

    def __str__(self) -> str:
        clipped = "clip" if self.max_grad_norm else "noclip"
        grouped = "groups" if self.grouped else "nogroups"
        text = f"{self.family}-{self.weights}-{self.optimizer}-x{self.accumulation}-{clipped}-{grouped}-{self.place}"
        return text.replace(" ", "_")


AXES: tuple[tuple[Any, ...], ...] = (
    tuple(FAMILIES), ("nf4", "bf16", "fp32"), tuple(OPTIMIZERS), (1, 2), (None, 0.05), (False, True), tuple(PLACES),
)  # fmt: skip


def is_possible(case: Case) -> bool:
    """Our AdamW steps float32 parameters alone; adapters written by hand have the model's dtype."""
    in_bf16 = case.family == "plain" and case.weights != "fp32"
    return not (in_bf16 and OPTIMIZERS[case.optimizer]([nn.Parameter(torch.ones(1))]).__class__ is optim.AdamW)


def pairwise_cases() -> list[Case]:
    """Without two optimizers that have the rule of a third."""
    axes = [[value for value in axis if value not in ("adamw kernel", "adamw bf16")] for axis in AXES]
    return [case for values in covering(axes, 2, dearest=axes.index([1, 2])) if is_possible(case := Case(*values))]


def more_cases() -> list[Case]:
    """For the full run: every three values of three axes in one of the cells."""
    return [case for values in covering(AXES, 3, dearest=AXES.index((1, 2))) if is_possible(case := Case(*values))]


def build(case: Case) -> nn.Module:
    """The model of a case, equal at every call."""
    return parity.build(parity.Case(case.family, case.weights, case.accumulation, False, False, ""))


def run_plain(case: Case, steps: int = STEPS) -> list[Trace]:
    """Losses, gradients and parameters of every step, in plain PyTorch."""
    model = build(case)
    if case.weights == "nf4":
        parity.decode_in_place(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = OPTIMIZERS[case.optimizer](groups_of(case, list(trainable.values())))  # type: ignore[arg-type]
    scheduler = scheduled(optimizer)

    def update() -> None:
        if case.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(trainable.values()), case.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    return run_steps(case.accumulation, model, lambda loss: loss.backward(), trainable, update, range(steps))


def make_engine(case: Case, folder: Path, place: str | None = None, **arguments: Any) -> Engine:
    """An engine for the case, in another place than the case's if one is given; "memory" is the ordinary optimizer."""
    given = {**PLACES.get(place or case.place, {}), **arguments}
    options = RuntimeOptions(**{"fill": False, **given.pop("options", {})})
    if given.pop("nvme", False):
        given["nvme"] = folder
    make = OPTIMIZERS[case.optimizer]
    return Engine(
        build(case), bits=4 if case.weights == "nf4" else None, batch_size=BATCH_SIZE, seq_len=SEQ_LEN,
        accumulation_steps=case.accumulation, max_grad_norm=case.max_grad_norm, options=options,
        optimizer=lambda parameters: make(groups_of(case, parameters)), **given,  # type: ignore[arg-type]
    )  # fmt: skip


class Running:
    """An engine with its scheduler, which a checkpoint carries."""

    def __init__(self, case: Case, engine: Engine) -> None:
        assert engine.optimizer is not None
        self._case, self._engine = case, engine
        self._scheduler = scheduled(engine.optimizer)
        engine.track("scheduler", self._scheduler)

    def steps(self, numbers: range) -> list[Trace]:
        engine = self._engine

        def update() -> None:
            engine.step()
            self._scheduler.step()

        return run_steps(self._case.accumulation, engine, engine.backward, engine.trainable, update, numbers)


def unequal(expected: list[Trace], found: list[Trace]) -> list[str]:
    """What is not the same, to the bit."""
    assert [trace.keys() for trace in expected] == [trace.keys() for trace in found]
    return [
        f"step {step}: {name}"
        for step, (want, got) in enumerate(zip(expected, found, strict=True), 1)
        for name in want
        if not torch.equal(want[name], got[name])
    ]


def training_of(engine: Engine) -> AdapterTraining:
    training = engine._training
    assert isinstance(training, AdapterTraining)
    return training
