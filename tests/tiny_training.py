"""A model small enough to train whole in milliseconds, its twin in plain PyTorch with fp32 masters, and places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from offload_rt import optim
from offload_rt._engine import Engine
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import StatePlacement, Tier
from tests.full_parity import state_of, training_of

VOCABULARY, WIDTH, ROWS, TOKENS = 32, 16, 2, 8
ON_NVME = StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=4, weight_slots=2)
SPLIT = {"layers.1": 3, "layers.2": 1}
"""Pieces in memory: of the second layer all but one, of the third one."""

PLACES: dict[str, dict[str, Any]] = {
    "in place": {},
    "from HOST": {"host_memory": "64MiB"},
    "AFTER": {"nvme": True, "commit_every": 3, "options": {"rest": Tier.NVME}},
    "BACKWARD": {"nvme": True, "options": {"rest": Tier.NVME}},
    "SPECULATIVE": {"nvme": True, "options": {"rest": Tier.NVME}, "max_grad_norm": 1e6},
    "SPECULATIVE, serial": {
        "nvme": True, "options": {"rest": Tier.NVME, "serial_updates": True}, "max_grad_norm": 1e6
    },
    "BACKWARD, split": {
        "nvme": True,
        "options": {"rest": Tier.NVME, "state": replace(ON_NVME, in_memory=SPLIT)},
    },
    "SPECULATIVE, split": {
        "nvme": True, "max_grad_norm": 1e6,
        "options": {
            "rest": Tier.NVME,
            "state": StatePlacement(
                in_memory=SPLIT, gradients=Tier.NVME, state_slots=2, weight_slots=1, gradient_slots=1
            ),
        },
    },
    "SPECULATIVE, in parts": {
        "nvme": True, "max_grad_norm": 1e6, "host_memory": "64MiB",
        "options": {"rest": Tier.NVME, "state": replace(ON_NVME, in_memory=SPLIT), "weight_shares": (0.0, 0.5)},
    },
    "BACKWARD, tight": {
        "nvme": True,
        "options": {
            "rest": Tier.NVME, "num_slots": 1,
            "state": StatePlacement(
                in_memory={}, gradients=Tier.NVME, state_slots=1, weight_slots=1, gradient_slots=1
            ),
        },
    },
}  # fmt: skip


class Layer(nn.Module):
    """A residual layer with parameters of one, two and three dimensions, and of one element."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.gate = nn.Parameter(torch.ones(1))
        self.mixed = nn.Parameter(torch.randn(2, 1, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        inner = self.down(torch.tanh(self.up(self.norm(hidden_BTD)))) + self.mixed.sum(0)
        return hidden_BTD + self.gate * self.dropout(inner)


class Model(nn.Module):
    """`order` says which layers a forward calls. `num_rows`: of embedding and head; batches have the first of them."""

    def __init__(
        self, num_layers: int = 3, *, tied: bool = False, dropout: float = 0.0, num_rows: int = VOCABULARY
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_rows, WIDTH)
        self.layers = nn.ModuleList([Layer(dropout) for _ in range(num_layers)])
        self.head = nn.Linear(WIDTH, num_rows, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.order = list(range(num_layers))

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.embedding(input_ids)
        for index in self.order:
            hidden = self.layers[index](hidden)
        logits = self.head(hidden).float()
        return SimpleNamespace(
            loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        )


def model(dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> Model:
    """Equal at every call."""
    torch.manual_seed(3)
    return Model(**arguments).to(dtype).train()


def batch(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"input_ids": torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator)}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return optim.AdamW(parameters, lr=1e-2)


def adamw_of_groups(parameters: Any) -> torch.optim.Optimizer:
    """Of two groups, which decay differently."""
    return optim.AdamW([{"params": parameters[:3], "weight_decay": 0.3}, {"params": parameters[3:]}], lr=1e-2)


State = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Plain:
    """The twin: an engine's methods in plain PyTorch, gradients summed in fp32."""

    def __init__(
        self, model: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
        max_grad_norm: float | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in self.weights.items()}
        self.optimizer = optimizer(list(self.masters.values()))
        self._max_grad_norm = max_grad_norm

    def __call__(self, **arguments: Any) -> Any:
        return self.model(**arguments)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        for name, weight in self.weights.items():
            if weight.grad is not None:
                master, gradient = self.masters[name], weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                weight.grad = None

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(list(self.masters.values()), max_norm)

    def step(self) -> None:
        if self._max_grad_norm is not None:
            self.clip_grad_norm_(self._max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.masters[name])

    def state(self) -> State:
        return {name: (self.masters[name].detach().clone(), w.detach().clone()) for name, w in self.weights.items()}


class Made(Engine):
    """An engine that says what its state is."""

    def state(self) -> State:
        return state_of(training_of(self))


def engine(made: nn.Module, place: str, folder: Path, **arguments: Any) -> Made:
    """An engine around `made` in one of `PLACES`, or one of the caller's; `options` are added to the place's. Layers
    stream, in whatever memory, but for `fill=True` there.
    """
    of_place = PLACES.get(place, {})
    given = {"optimizer": adamw, "batch_size": ROWS, "seq_len": TOKENS, **of_place, **arguments}
    options = {"piece_elements": 600, "fill": False, **of_place.get("options", {}), **arguments.get("options", {})}
    if options.get("state") is not None:
        trains = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
        split = {n: c for n, c in options["state"].in_memory.items() if any(t.startswith(f"{n}.") for t in trains)}
        options["state"] = replace(options["state"], in_memory=split)
    if given.pop("nvme", False) is True:
        given["nvme"] = folder
    elif "nvme" in arguments:
        given["nvme"] = arguments["nvme"]
    return Made(made, **{**given, "options": RuntimeOptions(**options)})


def train(run: Any, numbers: Any) -> list[float]:
    """One step for each batch number, with dropout's numbers drawn alike everywhere. The losses."""
    losses = []
    for number in numbers:
        torch.manual_seed(number)
        loss = run(**batch(number)).loss
        run.backward(loss)
        run.step()
        losses.append(float(loss.detach()))
    return losses


def accumulated_step(run: Any, scheduler: Any, number: int, accumulation: int) -> float:
    """One step of so many micro-batches, with dropout's numbers drawn alike everywhere. The sum of their losses."""
    total = 0.0
    for part in range(accumulation):
        torch.manual_seed(10 * number + part)
        loss = run(**batch(10 * number + part)).loss
        run.backward(loss)
        total += float(loss.detach())
    run.step()
    scheduler.step()
    return total


def differences(one: State, other: State) -> list[str]:
    """Names of parameters whose master or weight is not the same, to the bit."""
    assert one.keys() == other.keys() and one
    return [name for name in one if not all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True))]
