"""Random lives of runs that train all parameters: whatever users do, they have the bits of plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lifecycle_of_parameters import Life
from tests.lifecycle_operations import OPERATIONS, program_of

FULL = pytest.mark.full
SEEDS = range(60)
FAST: dict[int, tuple[str, ...]] = {
    0: ("forward: kill", "plan proposed", "micro-batches: zero", "after: load"),
    7: ("close and reopen", "plan proposed", "load", "micro-batches: save", "swap"),
    19: ("not finite", "forward before the run was loaded", "kill", "step: gradients"),
}
"""What a life of each seed that stays by default comes to."""


@pytest.fixture(autouse=True)
def ieee_square_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """See test_full_parity."""
    of_torch = torch.Tensor.sqrt

    def sqrt(values: torch.Tensor) -> torch.Tensor:
        if values.requires_grad or values.dtype != torch.float32:
            return of_torch(values)
        return torch.as_tensor(np.sqrt(values.numpy()))

    monkeypatch.setattr(torch.Tensor, "sqrt", sqrt)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=() if seed in FAST else FULL) for seed in SEEDS])
def test_a_life_is_that_of_plain_pytorch(seed: int, tmp_path: Path) -> None:
    life = Life(seed, tmp_path)
    life.live(program_of(seed), OPERATIONS)
    assert set(FAST.get(seed, ())) <= life.fired.keys()
