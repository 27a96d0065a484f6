"""What a week of steps would leave: a process does not hold more and more."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import reduce
from itertools import pairwise
from operator import and_
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.running import replanning, steps
from tests.changing_plans import CHANGE_EVERY, Changes, decisions, results
from tests.killed_training import ADAPTERS, one_step, resume
from tests.tiny_training import batch, engine, model, train

FEW = 4
"""Steps until a run is steady, what is kept of the last ones is full then, and steps in which a leak would show."""

GROWTHS = 5
"""In a row make a leak. What a run's threads hold at the moment of a census counts as well, and goes up and down."""

OURS = ("offload_rt", "planners", "torch", "_io", "_thread", "threading")


@pytest.fixture(autouse=True)
def _short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is kept of the newest steps and decisions, by a bound."""
    monkeypatch.setattr(steps, "KEPT_STEPS", 1)
    monkeypatch.setattr(replanning, "KEPT_DECISIONS", 1)


@pytest.fixture(autouse=True)
def _only_what_is_made_from_now_on() -> Iterator[None]:
    """Is seen by the collector, which is quick then."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def census() -> Counter[str]:
    """What this process holds: descriptors by what they lead to, threads, rings' memory, living objects by type."""
    gc.collect()
    kinds = [type(each) for each in gc.get_objects()]  # Python's own fill caches, which are bounded
    found = Counter(f"{kind.__module__}.{kind.__name__}" for kind in kinds if kind.__module__.split(".")[0] in OURS)
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            found[f"descriptor of {os.readlink(f'/proc/self/fd/{descriptor}')}"] += 1
    found["threads"] = threading.active_count()
    found["rings"] = sum("io_uring" in line for line in Path("/proc/self/maps").read_text().splitlines())
    return found


def grows(take: Callable[[range], Any]) -> Counter[str]:
    """What there is more of each time after as many steps again. `take` takes those with these numbers."""
    take(range(FEW))
    held = [census()]
    for turn in range(1, GROWTHS + 1):
        take(range(turn * FEW, (turn + 1) * FEW))
        held.append(census())
    return reduce(and_, (later - earlier for earlier, later in pairwise(held)))


def train_changing(run: Any, take: Callable[[int], Any]) -> Callable[[range], None]:
    """Takes steps, and changes over to another plan and back all the time."""
    changes = Changes(run)

    def steps_of(numbers: range) -> None:
        for number in numbers:
            take(number)
            changes.after_step()

    return steps_of


@pytest.mark.parametrize("place", ["BACKWARD, split", "SPECULATIVE, in parts"])
def test_steps_of_all_parameters_leave_nothing(place: str, tmp_path: Path) -> None:
    with engine(model(dropout=0.2), place, tmp_path) as run:
        assert not grows(lambda numbers: train(run, numbers))


def test_steps_saves_evaluations_and_reports_of_adapters_leave_nothing(tmp_path: Path) -> None:
    run, scheduler, position = resume(tmp_path, ADAPTERS)

    def steps_of(numbers: range) -> None:
        for _ in numbers:
            one_step(run, scheduler, position)
            run.save_checkpoint(tmp_path / "save")
            run.load_checkpoint(tmp_path / "save")
            shutil.rmtree(tmp_path / "save")
            with torch.no_grad():
                run(**batch(0))
            run.report()

    with run:
        assert not grows(steps_of)


@pytest.mark.parametrize("place", ["BACKWARD, split", ADAPTERS])
def test_changes_of_plans_leave_nothing(place: str, tmp_path: Path) -> None:
    run, scheduler, position = resume(tmp_path, place)
    with run:
        assert not grows(train_changing(run, lambda number: one_step(run, scheduler, position)))
        assert results(run) == ["changed"]
        assert run.report()["replanning"]["num_decisions"] >= FEW


def test_of_decisions_the_newest_are_kept(tmp_path: Path) -> None:
    run, scheduler, position = resume(tmp_path, "BACKWARD, split")
    with run:
        take = train_changing(run, lambda number: one_step(run, scheduler, position))
        take(range(2 * CHANGE_EVERY + 1))
        (decision,) = decisions(run)
        assert decision["step"] == 2 * CHANGE_EVERY
        assert run.report()["replanning"]["num_decisions"] == 2
