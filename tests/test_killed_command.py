"""Signals at any operation of `offload-rt train`, of one that resumes too: the files of a run that got none."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import SOURCE
from tests.test_cli import arguments as arguments
from tests.test_cli import model_folder as model_folder
from tests.test_cli_full import full as full
from tests.test_cli_resume import TIGHT, budgets, without

STEPS, NUM_RUNS = 6, 5
NUM_OPERATIONS = {"full": 400, "adapters": 100, "adapters, state on NVME": 400}
"""Of a run, about: signals come before one of them."""
KILL, TERMINATE, INTERRUPT = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGINT)
TARGETS = "q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj"
CUT_OFF = (-KILL, 128 + TERMINATE, 128 + INTERRUPT, -TERMINATE, -INTERRUPT)


@pytest.fixture(scope="module")
def runs() -> Iterator[subprocess.Popen[str]]:
    """Starts runs."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.killed_command"],
        cwd=SOURCE, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process
        assert process.stdin is not None
        process.stdin.close()


class Killed:
    """One run's folder and drive, and the command that goes on with it."""

    def __init__(self, runs: subprocess.Popen[str], words: list[str], folder: Path, pieces: int | None) -> None:
        folder.mkdir()
        (folder / "drive").mkdir()
        self._runs, self._pieces, self._shown = runs, pieces, folder / "shown"
        self.out, self.drive = folder / "out", folder / "drive"
        self._words = [
            *without(words, "--nvme"), "--nvme", str(self.drive), "--out", str(self.out), "--steps", str(STEPS),
        ]  # fmt: skip

    def run(self, *signals: tuple[int, int]) -> tuple[int, str]:
        """Goes on, or begins; the exit code and what was shown."""
        again = ["--resume"] if (self.out / "run.json").exists() else []
        self._shown.unlink(missing_ok=True)
        asked = {
            "words": [*self._words, *again], "signals": signals, "shown": str(self._shown), "pieces": self._pieces,
        }  # fmt: skip
        assert self._runs.stdin is not None and self._runs.stdout is not None
        self._runs.stdin.write(f"{json.dumps(asked)}\n")
        self._runs.stdin.flush()
        return int(self._runs.stdout.readline()), self._shown.read_text()

    def steps_written(self) -> int:
        """The last step that metrics tell of."""
        file = self.out / "metrics.jsonl"
        return max((line["step"] for line in _lines(file) if "loss" in line), default=0) if file.exists() else 0

    def result(self) -> dict[str, Any]:
        """What must not depend on kills: the numbers of metrics, names of files, bytes of what has no place in it."""
        names = sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*"))
        content: dict[str, Any] = {
            name: (self.out / name).read_bytes()
            for name in names
            if name.endswith((".safetensors", "state.bin", "layout.json"))
        }
        kept = ("step", "epoch", "loss", "lr", "tokens", "grad_norm", "eval_loss", "eval_tokens")
        content["metrics"] = [
            {key: line[key] for key in kept if key in line} for line in _lines(self.out / "metrics.jsonl")
        ]
        content["best"] = json.loads((self.out / "run.json").read_text())["best"]
        content["names"] = names
        content["drive"] = sorted(
            path.name for path in self.drive.rglob("*") if not path.name.startswith("offload_rt-")
        )
        return content


def _lines(file: Path) -> list[dict[str, Any]]:
    found = []
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            found.append(json.loads(line))
    return found


def place_words(place: str, arguments: list[str], full: list[str], tmp_path: Path) -> tuple[list[str], int | None]:
    """The words of a run in `place`, and how many elements its pieces of state have."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(f'{{"prompt": "{word}", "completion": "{word[::-1]}"}}\n' for word in ("abc", "hgf")))
    often = ["--save-every", "1", "--eval-data", str(held_out), "--eval-every", "2", "--keep-best"]
    if place == "full":
        return [*budgets(full, device="2500KiB"), *often, "--copy-every", "2", "--accumulation-steps", "2"], None
    if place == "adapters":
        return [*arguments, *often], None
    words = [*without(arguments, "--adapters"), "--adapters", f"lora:r=24,dropout=0.1,targets={TARGETS}"]
    return [*budgets(words, device=TIGHT), *often], 4096


def signals_drawn(draw: random.Random, num_operations: int) -> list[tuple[int, int]]:
    """A kill; or a signal that asks for an end, alone, followed by a kill, or by another one."""
    at = draw.randrange(num_operations)
    ask = draw.choice((TERMINATE, INTERRUPT))
    kind = draw.randrange(5)
    if kind < 2:
        return [(at, KILL)]
    if kind == 2:
        return [(at, ask)]
    return [(at, ask), (at + draw.randrange(1, 12), KILL if kind == 3 else ask)]


def cut_off_often(killed: Killed, draw: random.Random, num_operations: int, num_cuts: int) -> tuple[int, str]:
    """Cuts a run off at most so many times, then lets it end. How often it was, and what all calls have shown."""
    told: list[str] = []
    for number in range(num_cuts + 1):
        done = killed.steps_written()
        signals = signals_drawn(draw, num_operations) if number < num_cuts else []
        code, shown = killed.run(*signals)
        told.append(f"{signals}, {code}:\n{shown}")
        allowed = (0, *CUT_OFF) if signals else (0,)
        assert code in allowed, "".join(told)
        found = re.search(r"resuming from (?:checkpoint-|the commit of step )(\d+)", shown)
        if found:
            step = int(found[1])
            assert done - 1 <= step <= done + 1, "".join(told)
            again = f"; {done - step} step(s) after it are taken again"
            assert (again in shown) == (step < done), "".join(told)
        elif "resuming from the beginning" in shown:
            assert done <= 1, "".join(told)
        if code == 0 and "--resume makes it" not in shown:  # an evaluation that a signal left out, behind the last step
            break
    return len(told) - 1, "".join(told)


@pytest.mark.full
@pytest.mark.parametrize("place", list(NUM_OPERATIONS))
def test_cut_off_at_any_operation_the_command_leaves_what_one_that_was_not_leaves(
    runs: subprocess.Popen[str], arguments: list[str], full: list[str], tmp_path: Path, place: str
) -> None:
    words, pieces = place_words(place, arguments, full, tmp_path)
    straight = Killed(runs, words, tmp_path / "straight", pieces)
    code, shown = straight.run()
    assert code == 0, shown
    expected = straight.result()
    assert [line["step"] for line in expected["metrics"] if "loss" in line] == list(range(1, STEPS + 1))
    num_cuts = 0
    for seed in range(NUM_RUNS):
        killed = Killed(runs, words, tmp_path / f"killed {seed}", pieces)
        cuts, told = cut_off_often(killed, random.Random(seed), NUM_OPERATIONS[place], 8)
        num_cuts += cuts
        found = killed.result()
        wrong = [name for name in {*expected, *found} if found.get(name) != expected.get(name)]
        assert not wrong, (seed, wrong, set(found["names"]) ^ set(expected["names"]), found["metrics"], told)
    assert num_cuts >= 4 * NUM_RUNS
