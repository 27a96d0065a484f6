"""What the gate of full fine-tuning compares: plain PyTorch with fp32 masters in memory, and an engine's run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_rt import optim
from offload_rt._engine import Engine
from offload_rt.config import EngineConfig
from offload_rt.memory.arena import Arena, Slot
from offload_rt.optimizer.state import state_tensors
from offload_rt.optimizer.training import FullTraining
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import find_workload
from planners.plans.activations import Action, ActivationPolicy, whole_batch
from planners.plans.plan import StatePlacement, Tier
from tests.parity import BATCH_SIZE, FAMILIES, SEQ_LEN, Trace, covering, micro_batch

STEPS = 5
LOSS_FACTORS = (1.0, 1.0, 100.0, 1.0, 1.0)
"""Of each step: the third one's gradients are large."""
NORMS = {"not": None, "rarely": 30.0, "always": 0.05}
"""What gradients are clipped to: "rarely" is the third step only."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "adamw bf16": lambda groups: optim.AdamW(groups, lr=1e-2, moments="bfloat16"),
    "adamw 8bit": lambda groups: optim.AdamW(groups, lr=1e-2, moments="8bit"),
    "lion": lambda groups: optim.Lion(groups, lr=1e-3, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, dampening=0.1),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
}

PLACES: dict[str, dict[str, Any]] = {
    "in place": {},
    "from HOST": {"host_memory": "64MiB"},
    "state in HOST, committed": {"nvme": True, "commit_every": 2},
    "on NVME": {"nvme": True, "options": RuntimeOptions(rest=Tier.NVME, piece_elements=4096)},
    "on NVME, after backward": {
        "nvme": True, "commit_every": 3,
        "options": RuntimeOptions(
            rest=Tier.NVME, piece_elements=8192, serial_updates=True,
            state=StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=4, weight_slots=1),
        ),
    },
    "on NVME but for two layers": {
        "nvme": True,
        "options": RuntimeOptions(
            rest=Tier.NVME, piece_elements=12288,
            state=StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=4, weight_slots=2),
        ),
    },
    "split": {
        "nvme": True,
        "options": RuntimeOptions(
            rest=Tier.NVME, piece_elements=4096,
            state=StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=4, weight_slots=2),
        ),
    },
    "recorded, gradients on NVME": {
        "nvme": True,
        "options": RuntimeOptions(
            rest=Tier.NVME, record=True, piece_elements=8192,
            state=StatePlacement(
                in_memory={}, gradients=Tier.NVME, state_slots=2, weight_slots=1, gradient_slots=1
            ),
        ),
    },
    "stress": {
        "nvme": True, "host_memory": "64MiB",
        "options": RuntimeOptions(
            rest=Tier.NVME, num_slots=1, piece_elements=12288, poison=True, delay_seconds=0.002,
            state=StatePlacement(
                in_memory={}, gradients=Tier.NVME, state_slots=3, weight_slots=1, gradient_slots=2
            ),
        ),
    },
}  # fmt: skip


ACTIVATIONS: dict[str, tuple[Tier | None, ...]] = {
    "as planned": (),
    "again": (None, None, None, None),
    "put away": (Tier.HOST, Tier.NVME, Tier.HOST, Tier.NVME),
    "each way": (Tier.NVME, None, Tier.HOST, Tier.DEVICE),
}
"""Where what each layer saves waits, if the place has that tier, else in DEVICE memory; None: it is recomputed. The
fixed rule keeps all of it where there is room."""

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Case:
    """One cell of the gate's matrix."""

    family: str
    dtype: str
    optimizer: str
    accumulation: int
    clipping: str
    grouped: bool
    place: str
    activations: str = "as planned"

    def __str__(self) -> str:
        grouped = "groups" if self.grouped else "nogroups"
        text = f"{self.family}-{self.dtype}-{self.optimizer}-x{self.accumulation}-clip_{self.clipping}-{grouped}-"
        return f"{text}{self.place}-{self.activations}".replace(" ", "_")


AXES: tuple[tuple[Any, ...], ...] = (
    tuple(FAMILIES), ("bfloat16", "float32"), tuple(OPTIMIZERS), (1, 3), tuple(NORMS), (False, True), tuple(PLACES),
    tuple(ACTIVATIONS),
)  # fmt: skip


def pairwise_cases() -> list[Case]:
    """Without one optimizer that goes the ways of another: moments in bfloat16, of which the full run has cells."""
    axes = [[value for value in axis if value != "adamw bf16"] for axis in AXES]
    return [Case(*values) for values in covering(axes, 2, dearest=axes.index([1, 3]))]


def more_cases() -> list[Case]:
    """For the full run: every three values of three axes in one of the cells."""
    return [Case(*values) for values in covering(AXES, 3, dearest=AXES.index((1, 3)))]


def build(case: Case) -> nn.Module:
    """The model of a case, equal at every call. All of it trains."""
    torch.manual_seed(7)
    return FAMILIES[case.family]().to(getattr(torch, case.dtype)).train().requires_grad_(True)


def groups_of(case: Case, parameters: list[nn.Parameter]) -> Any:
    if not case.grouped:
        return parameters
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]


def scheduled(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)


def run_plain(case: Case, steps: int = STEPS, device: str = "cpu") -> list[Trace]:
    """Losses, gradients, masters and weights of every step, in plain PyTorch. The optimizer steps on the CPU."""
    model = build(case).to(device)
    weights = dict(model.named_parameters())
    masters = {name: nn.Parameter(p.detach().float().cpu().clone()) for name, p in weights.items()}

    def forward(**batch: torch.Tensor) -> Any:
        return model(**{name: value.to(device) for name, value in batch.items()})

    optimizer = OPTIMIZERS[case.optimizer](groups_of(case, list(masters.values())))
    scheduler = scheduled(optimizer)
    max_norm = NORMS[case.clipping]
    traces = []
    for step in range(steps):
        trace: Trace = {}
        for index in range(case.accumulation):
            loss = one_loss(forward, step, index)
            trace[f"loss {index}"] = loss.detach().cpu().clone()
            loss.backward()  # type: ignore[no-untyped-call]
            for name, parameter in weights.items():
                master = masters[name]
                if parameter.grad is not None:
                    gradient = parameter.grad.float().cpu()
                    master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None
        for name, master in masters.items():
            if master.grad is not None:
                trace[f"gradient {name}"] = master.grad.clone()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(masters.values()), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(masters[name])
                trace[f"master {name}"] = masters[name].detach().clone()
                trace[f"weight {name}"] = parameter.detach().cpu().clone()
        traces.append(trace)
    return traces


def make_engine(case: Case, folder: Path, **arguments: Any) -> Engine:
    """An engine for the case, with its place."""
    place = {**PLACES[case.place], **arguments}
    if place.pop("nvme", False):
        place["nvme"] = folder
    make = OPTIMIZERS[case.optimizer]
    model = build(case)
    options = place.get("options", RuntimeOptions())
    if case.activations != "as planned":
        there = {Tier.NVME: "nvme" in place, Tier.HOST: "host_memory" in place}
        place["options"] = options = replace(options, activations=activations_of(case, model, there))
    if case.place in ("on NVME but for two layers", "split"):
        in_memory = pieces_in_memory(case, model, options.piece_elements)
        place["options"] = replace(options, state=replace(options.state, in_memory=in_memory))
    return Engine(
        model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, accumulation_steps=case.accumulation,
        max_grad_norm=NORMS[case.clipping], optimizer=lambda parameters: make(groups_of(case, parameters)), **place,
    )  # fmt: skip


def activations_of(case: Case, model: nn.Module, there: dict[Tier, bool]) -> dict[str, ActivationPolicy]:
    """For each layer that is not recomputed. `there`: whether a tier is."""
    stack, layers = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    tiers = ACTIVATIONS[case.activations]
    kept, away = whole_batch(Action.KEEP), partial(whole_batch, Action.SWAP)
    assert len(layers) == len(tiers)
    return {
        f"{stack}.{index}": away(tier) if there.get(tier, False) else kept
        for index, tier in enumerate(tiers)
        if tier is not None
    }


def pieces_in_memory(case: Case, model: nn.Module, piece_elements: int) -> dict[str, int]:
    """All of two layers. Where blocks are split: one of the first layer, all but one of every other block."""
    optimizer = OPTIMIZERS[case.optimizer](groups_of(case, list(model.parameters())))
    options = RuntimeOptions(piece_elements=piece_elements)
    training = find_workload(model, None, EngineConfig(), optimizer, options).training
    assert training is not None
    layers = [block for block in training.blocks if block.weights is not None]
    if case.place == "on NVME but for two layers":
        return {block.name: len(block.pieces) for block in layers[:2]}
    counts = {block.name: len(block.pieces) - 1 for block in training.blocks} | {layers[0].name: 1}
    return {name: count for name, count in counts.items() if count}


def run_engine(case: Case, engine: Engine, first: int = 0, steps: int = STEPS) -> list[Trace]:
    """The same with an engine. Gradients are looked at in the first step, and where that undoes nothing."""
    assert engine.optimizer is not None
    scheduler = scheduled(engine.optimizer)
    engine.track("scheduler", scheduler)
    return [one_step(case, engine, scheduler, step) for step in range(first, steps)]


def one_step(case: Case, engine: Engine, scheduler: torch.optim.lr_scheduler.LRScheduler, step: int) -> Trace:
    training = training_of(engine)
    trace: Trace = {}
    for index in range(case.accumulation):
        loss = one_loss(engine, step, index)
        trace[f"loss {index}"] = loss.detach().cpu().clone()
        engine.backward(loss)
    if step == 0:
        trace |= {f"gradient {name}": gradient.float() for name, gradient in engine.gradients()}
    engine.step()
    scheduler.step()
    for name, (master, weight) in state_of(training).items():
        trace[f"master {name}"] = master
        trace[f"weight {name}"] = weight
    return trace


def one_loss(model: Callable[..., Any], step: int, index: int) -> torch.Tensor:
    torch.manual_seed(5000 + 10 * step + index)
    loss: torch.Tensor = model(**micro_batch(step, index)).loss
    return loss * LOSS_FACTORS[step]


def check_activations(case: Case, engine: Engine) -> None:
    """Each layer is recomputed, or what it saves waits where the case says, all of it."""
    report, tiers = engine.report(), ACTIVATIONS[case.activations]
    if case.activations == "as planned":
        return
    assert report["recomputes"] == tiers.count(None) * STEPS * case.accumulation
    tokenwise = report["tokenwise"]
    if case.activations == "again":
        assert tokenwise is None
        return
    assert tokenwise["num_passes"] == (4 - tiers.count(None)) * STEPS * case.accumulation
    assert tokenwise["num_whole"] == tokenwise["no_room_bytes"] == 0
    assert tokenwise["loaded_bytes"] == tokenwise["swapped_bytes"]
    there = {Tier.NVME: bool(engine.config.nvme), Tier.HOST: not engine._runtime.tiers.unified}
    for tier, is_there in there.items():
        assert (tokenwise["bytes_by_group"][f"chunk in {tier.value}"] > 0) is (is_there and tier in tiers)


def training_of(engine: Engine) -> FullTraining:
    training = engine._training
    assert training is not None
    return training


def room(num_bytes: int) -> Slot:
    return Arena(f"look {next(_NUMBERS)}", num_bytes).acquire(num_bytes, "look")


def state_of(training: FullTraining) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Master and weight of every parameter, from wherever they rest."""
    found = {}
    home = training.home
    for block in training.blocks:
        weights: Any = None
        if block.weights is not None:
            weights = home.weights.get(block.name)
            parts = home.parted.get(block.name)
            if parts is not None:
                weights = parts.room(room(parts.split.streamed_bytes) if parts.split.nvme_bytes else None)
            elif weights is None:
                weights = room(block.weights.stored_bytes)
            if home.collects_weights(block):
                home.links.wait(home.fetch_weights(block, weights))
        masters: dict[int, list[torch.Tensor]] = {}
        for piece in block.pieces:
            slot = home.pieces.get(piece.name)
            if slot is None:
                slot = room(piece.num_bytes)
                home.links.wait(home.fetch(piece, slot))
            for segment in piece.segments:
                masters.setdefault(segment.parameter, []).append(state_tensors(slot, segment)["master"].clone())
        for index, trained in enumerate(block.parameters):
            shape = trained.parameter.shape
            weight = trained.parameter.data
            if trained.streamed is not None:
                assert weights is not None
                weight = weights.tensor(weight.dtype, shape, trained.streamed.offset_bytes)
            found[trained.name] = (torch.cat(masters[index]).view(shape), weight.detach().cpu().clone())
    return found
