"""Full fine-tuning in a process of its own, below a kernel memory limit on what it takes above its imports.

    python -m tests.limited_training PROCS CHECKPOINT NVME SHAPE     SHAPE: a `Shape` as JSON

PROCS is the `cgroup.procs` of a memory cgroup. The process joins it when everything is imported: from then on what it
touches for the first time is charged.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_rt import optim
from offload_rt._engine import Engine
from offload_rt.wiring.runtime_options import RuntimeOptions

STEPS = 3
ROWS = 8


@dataclass(frozen=True)
class Shape:
    """What trains, and in how much memory."""

    width: int
    inner: int
    num_layers: int
    piece_elements: int
    budget_bytes: int
    limit_bytes: int


class Layer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.relu(self.up(hidden))) * self.gain


class Model(nn.Module):
    """Layers and nothing else: all that trains can be elsewhere."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(shape.width, shape.inner) for _ in range(shape.num_layers)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.float().square().mean()


def model(shape: Shape) -> Model:
    """In bfloat16, on the meta device."""
    with torch.device("meta"):
        return Model(shape).to(torch.bfloat16)


def batch(shape: Shape, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 1, shape.width, generator=generator).to(torch.bfloat16)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return optim.AdamW(parameters, lr=1e-3)


def train(run: Any, shape: Shape) -> list[float]:
    """The losses of `STEPS` steps, of an engine or of what has its methods."""
    losses = []
    for step in range(STEPS):
        loss = run(hidden=batch(shape, step))
        run.backward(loss)
        run.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    procs, checkpoint, nvme, shape = *sys.argv[1:4], Shape(**json.loads(sys.argv[4]))
    torch.set_num_threads(1)
    adamw([nn.Parameter(torch.ones(1))])  # imports much, as the first optimizer of a process does
    Path(procs).write_text(str(os.getpid()))
    with Engine(
        model(shape), checkpoint=checkpoint, nvme=nvme, device_memory=shape.budget_bytes, batch_size=ROWS, seq_len=1,
        optimizer=adamw, max_grad_norm=1e9, options=RuntimeOptions(piece_elements=shape.piece_elements),
    ) as engine:  # fmt: skip
        losses = train(engine, shape)
        state = engine.plan.state
        print(json.dumps({"losses": losses, "report": engine.report(), "state": asdict(state) if state else None}))


if __name__ == "__main__":
    main()
