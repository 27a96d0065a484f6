"""Random lives of adapters: whatever users do, they have the bits of plain PyTorch and peft."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lifecycle_adapter_operations import OPERATIONS, program_of
from tests.lifecycle_of_adapters import AdapterLife

FULL = pytest.mark.full
SEEDS = range(60)
FAST: dict[int, tuple[str, ...]] = {
    4: ("resumed", "freeze", "other_adapter", "without_adapters", "load_state_dict", "backward_of_sum"),
    7: ("train_batch", "plan changed", "checkpointing", "average", "step_by_optimizer", "mode"),
    10: ("load", "evaluate", "state_dict", "zero_grad"),
}
"""What a life of each seed that stays by default comes to."""


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=() if seed in FAST else FULL) for seed in SEEDS])
def test_a_life_is_that_of_plain_pytorch(seed: int, tmp_path: Path) -> None:
    life = AdapterLife(seed, tmp_path)
    life.live(program_of(seed), OPERATIONS)
    assert set(FAST.get(seed, ())) <= (+life.fired).keys()
