"""SIGKILL at any point of training, inside write-back and commit too: a resumed run is one never killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.killed_training import (
    ACKNOWLEDGEMENT,
    ADAPTERS,
    CHANGE,
    CHANGING,
    COMMIT_EVERY,
    EDGES,
    TIED,
    TILE_ROWS,
    Twin,
    resume,
)
from tests.tiny_training import differences

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs() -> Iterator[subprocess.Popen[str]]:
    """Starts runs."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in [str(ROOT), *sys.path] if path)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.killed_training"],
        cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def twin() -> Twin:
    return Twin()


def kill_many(runs: subprocess.Popen[str], twin: Twin, folder: Path, place: str, num_kills: int) -> tuple[int, int]:
    """Kills a run `num_kills` times: at a random operation, or from outside when it has told of some steps.

    Returns the step that it came to, and how often a step was cut off before its commit.
    """
    os.mkfifo(folder / "pipe")
    draw = random.Random(num_kills)
    found, cut_off = 0, 0
    for number in range(num_kills):
        by_itself = number % 3 > 0
        assert runs.stdin is not None and runs.stdout is not None
        runs.stdin.write(f"{folder} {draw.randrange(1, 250) if by_itself else -1} {place}\n")
        runs.stdin.flush()
        with open(folder / "pipe", "rb", buffering=0) as pipe:
            (process, _) = ACKNOWLEDGEMENT.unpack(pipe.read(ACKNOWLEDGEMENT.size))
            heard = b""
            if not by_itself:
                for _ in range(draw.randrange(1, 4)):
                    heard += pipe.read(ACKNOWLEDGEMENT.size)
                os.kill(process, signal.SIGKILL)
            heard += pipe.readall() or b""
        assert runs.stdout.readline() == "gone\n"
        told = found
        for told, loss in ACKNOWLEDGEMENT.iter_unpack(heard):
            twin.reach(told)
            assert loss == twin.losses[told - 1], f"step {told} of run {number}"
        every = COMMIT_EVERY.get(place, 1)
        # The commit of a step is made before the next one begins, see `optimizer.training`.
        least = max(found, (told - 1) // every * every)
        found = check(twin, folder, place)
        assert least <= found <= told + 1
        cut_off += found < told
    return found, cut_off


def check(twin: Twin, folder: Path, place: str) -> int:
    """What a kill left, opened as the next run does. The step that was found."""
    run, scheduler, position = resume(folder, place)
    with run:
        step = run.step_number
        twin.reach(step)
        assert differences(twin.states[step], run.state()) == []
        assert position.number == twin.positions[step]
        assert scheduler.last_epoch == step
    return step


PARTED = "SPECULATIVE, in parts"
PLACES = ("BACKWARD, tight", "SPECULATIVE, split", "AFTER", CHANGING)
"""In the last one, plans take turns: a change is behind a commit."""


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=pytest.mark.full if place in PLACES[1:3] else ()) for place in PLACES]
)
def test_killed_seven_times_it_trains_as_if_it_had_not_been(
    runs: subprocess.Popen[str], twin: Twin, disk_folder: Path, place: str
) -> None:
    step, _ = kill_many(runs, twin, disk_folder, place, 7)
    assert step >= 3


def test_adapters_killed_seven_times_train_as_if_they_had_not_been(
    runs: subprocess.Popen[str], disk_folder: Path
) -> None:
    step, _ = kill_many(runs, Twin(ADAPTERS), disk_folder, ADAPTERS, 7)
    assert step >= 3


@pytest.mark.parametrize(
    ("place", "num_kills", "least"), [(EDGES, 5, 2), pytest.param(TIED, 20, 10, marks=pytest.mark.full)]
)
def test_rows_and_tiles_killed_many_times_train_as_if_they_had_not_been(
    runs: subprocess.Popen[str], disk_folder: Path, tmp_path: Path, place: str, num_kills: int, least: int
) -> None:
    """The twin is a run by tiles too: they are a cut."""
    with resume(tmp_path, place)[0] as whole:
        step, _ = kill_many(runs, Twin(place, whole), disk_folder, place, num_kills)
        assert step >= least
        assert whole.plan.head_tiles is not None and whole.plan.head_tiles.tile_rows == TILE_ROWS
        assert (whole.plan.head_tiles.block in whole.plan.lookups.blocks) is (place == TIED)
        assert whole.report()["lookups"]["num_pieces"] >= step
        assert [executor.ring.name for executor in whole._runtime.executors] == ["layers", "tiles"]


@pytest.mark.full
@pytest.mark.parametrize("place", [PARTED, ADAPTERS, ADAPTERS + CHANGE])
def test_weights_in_parts_and_adapters_killed_sixty_times_train_as_if_they_had_not_been(
    runs: subprocess.Popen[str], disk_folder: Path, place: str
) -> None:
    step, cut_off = kill_many(runs, Twin(place), disk_folder, place, 60)
    assert step > 30
    assert cut_off > 5


def test_weights_in_parts_killed_seven_times_train_as_if_they_had_not_been(
    runs: subprocess.Popen[str], disk_folder: Path
) -> None:
    with resume(disk_folder, PARTED)[0] as run:
        assert {(p.split.host_bytes, p.split.nvme_bytes) for p in run._training.home.parted.values()} == {(4096, 4096)}
    step, _ = kill_many(runs, Twin(PARTED), disk_folder, PARTED, 7)
    assert step >= 3


@pytest.mark.full
@pytest.mark.parametrize("place", [*PLACES, "BACKWARD", "BACKWARD, split", "SPECULATIVE", "SPECULATIVE, serial"])
def test_killed_sixty_times_it_trains_as_if_it_had_not_been(
    runs: subprocess.Popen[str], twin: Twin, disk_folder: Path, place: str
) -> None:
    step, cut_off = kill_many(runs, twin, disk_folder, place, 60)
    assert step > 30
    assert cut_off > 5
