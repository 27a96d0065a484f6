"""State that one plan saved, another goes on from: under other budgets, from other drives, to the bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.errors import PlanInfeasible
from offload_rt.storage.commit_layout import PAYLOAD_BYTES
from tests.tiny_training import PLACES, Plain, differences, engine, model, train

TWO_DRIVES = "BACKWARD, two drives"
FOLDERS = ("in place", "from HOST", "AFTER", "BACKWARD, tight", "SPECULATIVE, split", TWO_DRIVES)
PAIRS = list(itertools.product(FOLDERS, FOLDERS))


def make(place: str, folder: Path) -> Any:
    folder.mkdir()
    if place != TWO_DRIVES:
        return engine(model(dropout=0.2), place, folder)
    drives = [folder / "one", folder / "two"]
    for drive in drives:
        drive.mkdir()
    return engine(model(dropout=0.2), "BACKWARD", folder, nvme=drives)


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(*pair, marks=() if index % 5 == 1 else pytest.mark.full) for index, pair in enumerate(PAIRS)],
)
def test_a_checkpoint_is_gone_on_from_in_another_place(before: str, after: str, tmp_path: Path) -> None:
    twin = Plain(model(dropout=0.2))
    expected = train(twin, range(5))
    with make(before, tmp_path / "before") as run:
        found = train(run, range(2))
        run.save_checkpoint(tmp_path / "saved")
        train(run, range(7, 9))  # what comes after is not part of it
    with make(after, tmp_path / "after") as run:
        train(run, range(5, 6))  # nor what was before
        run.load_checkpoint(tmp_path / "saved")
        assert run.step_number == 2
        found += train(run, range(2, 4))
        run.save_checkpoint(tmp_path / "again")
        found += train(run, range(4, 5))
        assert found == expected
        assert differences(twin.state(), run.state()) == []


@pytest.mark.parametrize("drives", [0, 1])
def test_a_budget_is_met_to_the_byte_and_one_below_names_what_is_short(drives: int, tmp_path: Path) -> None:
    """The least budget that a plan is found for: the run stays in it."""

    def made(budget: int) -> Any:
        nvme = {"nvme": tmp_path} if drives else {}
        return engine(model(), "in place", tmp_path, host_memory=budget, device_memory="64MiB", **nvme)

    infeasible, fits = 0, 64 << 20
    while fits - infeasible > 1:
        middle = (infeasible + fits) // 2
        try:
            made(middle).close()
            fits = middle
        except PlanInfeasible:
            infeasible = middle
    with pytest.raises(PlanInfeasible, match="state|gradients|saving"):
        made(infeasible)
    twin = Plain(model())
    train(twin, range(3))
    with made(fits) as run:
        train(run, range(3))
        assert differences(twin.state(), run.state()) == []
        memory = run.report()["memory"]
        assert memory["host"] <= fits and memory["device"] <= 64 << 20
        assert memory["host"] > fits - 4096


def test_state_stays_in_memory_down_to_the_byte_that_holds_it_whatever_drives_there_are(tmp_path: Path) -> None:
    def in_memory(budget: int) -> bool:
        try:
            with engine(model(), "in place", tmp_path, host_memory=budget, device_memory="64MiB", nvme=tmp_path) as run:
                return run.report()["training"]["mode"] == "after"
        except PlanInfeasible:
            return False

    less, fits = 0, 64 << 20
    while fits - less > 1:
        middle = (less + fits) // 2
        less, fits = (less, middle) if in_memory(middle) else (middle, fits)
    assert in_memory(fits) and not in_memory(fits - 1)


def test_places_differ(tmp_path: Path) -> None:
    assert set(FOLDERS) - {TWO_DRIVES} <= set(PLACES)
    with make(TWO_DRIVES, tmp_path / "two") as run:
        assert {extent.drive for extent in run._training.home.log.layout.extents} == {0, 1}


class Many(torch.nn.Module):
    """A layer of a thousand parameters: what an optimizer keeps of each besides tensors fills a commit's payload."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = torch.nn.ParameterList(torch.ones(1) for _ in range(1000))

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD * torch.cat(list(self.factors)).mean()


def test_a_commit_has_room_for_what_is_kept_of_thousands_of_parameters(tmp_path: Path) -> None:
    def nadam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.NAdam(parameters, lr=1e-3)

    class Factors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Many(), Many()])

        def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.layers[0](hidden_BTD)).square().sum()

    with engine(Factors(), "BACKWARD", tmp_path, optimizer=nadam) as run:
        for _ in range(2):
            run.backward(run(torch.ones(1, 4, 16)))
            run.step()
        run.save_checkpoint(tmp_path / "saved")
        assert (tmp_path / "saved" / "payload.bin").stat().st_size > PAYLOAD_BYTES
