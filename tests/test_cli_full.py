"""Full fine-tuning from the command line: what comes out, killed and resumed, and what it says of the drive."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from offload_rt._engine import Engine
from offload_rt.cli.main import main
from offload_rt.errors import ConfigError
from offload_rt.training.drive_care import DriveCare
from tests.test_cli import SOURCE, fails
from tests.test_cli import arguments as arguments
from tests.test_cli import model_folder as model_folder

torch.set_num_threads(1)


@pytest.fixture
def full(arguments: list[str]) -> list[str]:
    """The words of a run of all parameters, in so little memory that state and weights rest on NVMe."""
    words = arguments[:]
    for option in ("--bits", "--adapters", "--host-memory", "--device-memory", "--accumulation-steps"):
        del words[words.index(option) :][:2]
        at = words.index(option) if option in words else None
        if at is not None:
            del words[at : at + 2]
    return [*words, "--full", "--device-memory", "2450KiB", "--accumulation-steps", "1"]


def with_nvme(words: list[str], folder: Path) -> list[str]:
    folder.mkdir()
    at = words.index("--nvme")
    return [*words[:at], "--nvme", str(folder), *words[at + 2 :]]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["step"] for line in lines})
    return {line["step"]: line["loss"] for line in lines}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_train_leaves_a_model_and_goes_on_from_its_commits_without_a_copy(
    full: list[str], optimizer: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full += ["--optimizer", optimizer]
    straight, out = tmp_path / "straight", tmp_path / "out"
    elsewhere = with_nvme(full, tmp_path / "elsewhere")
    assert main([*elsewhere, "--out", str(straight), "--steps", "4"]) == 0
    shown = capsys.readouterr().out
    assert f"all parameters, by {optimizer}" in shown and "on NVME; updates: speculative" in shown
    no_copy_of_state = {"run.json", "metrics.jsonl", "report.json", "model"}
    assert {path.name for path in straight.iterdir()} == no_copy_of_state
    assert not torch.equal(
        AutoModelForCausalLM.from_pretrained(straight / "model").lm_head.weight,
        AutoModelForCausalLM.from_pretrained(model_folder).lm_head.weight,
    )
    kept = ("use_cache", "tie_word_embeddings", "dtype", "architectures")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (straight / "model", model_folder)]
    assert [configs[0][key] for key in kept] == [configs[1][key] for key in kept]

    assert main([*full, "--out", str(out), "--steps", "2"]) == 0
    capsys.readouterr()
    code, line = fails(capsys, *full, "--out", str(out), "--steps", "4")
    assert code == 2 and "finished at step 2" in line
    code, line = fails(capsys, *full, "--out", str(tmp_path / "third"), "--steps", "4")
    assert code == 2 and f"holds step 2 of the run in {out}" in line and "clean --state" in line
    code, line = fails(capsys, *full, "--out", str(tmp_path / "third"), "--steps", "4", "--resume")
    assert code == 2 and f"holds step 2 of the run in {out}" in line
    (tmp_path / "nvme").rename(tmp_path / "lost")
    code, line = fails(capsys, *with_nvme(full, tmp_path / "nvme"), "--out", str(out), "--steps", "4", "--resume")
    assert code == 2 and f"has done 2 steps and committed them in {tmp_path / 'nvme'}" in line
    shutil.rmtree(tmp_path / "nvme")
    (tmp_path / "lost").rename(tmp_path / "nvme")
    assert main([*full, "--out", str(out), "--steps", "4", "--resume"]) == 0
    assert "resuming from the commit of step 2 on NVME" in capsys.readouterr().out
    assert weights(out) == weights(straight) and losses(out) == losses(straight)


PATIENT = """
import signal, sys
from offload_rt._engine import Engine
from offload_rt.cli.main import main
step = Engine.step

def patient_step(engine):
    if engine.step_number == 7:  # the last one waits to be killed
        signal.pause()
    step(engine)

Engine.step = patient_step
main(sys.argv[1:])
"""


@pytest.mark.full  # three whole runs of the command; `test_full_kill` kills runs in every mode
def test_killed_at_any_moment_the_command_goes_on_from_its_last_commit(
    full: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert main([*with_nvme(full, tmp_path / "elsewhere"), "--out", str(straight), "--steps", "8"]) == 0
    words = [*full, "--out", str(out), "--steps", "8"]
    metrics = out / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", PATIENT, *words], env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
                time.sleep(0.002)
        finally:
            process.kill()
        errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (out / "model").exists() and list(out.glob("checkpoint-*")) == []
    assert main([*words, "--resume"]) == 0
    assert re.search(r"resuming from the commit of step [2-7] on NVME", capsys.readouterr().out)
    assert weights(out) == weights(straight)
    # a step that was committed and not yet written down has no line
    assert losses(out).items() <= losses(straight).items() and len(losses(out)) >= 7


def test_copies_are_made_when_asked_for_and_serve_where_the_drive_is_lost(
    full: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*full, "--out", str(out), "--steps", "3", "--copy-every", "2"]) == 0
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    expected, expected_losses = weights(out), losses(out)
    shutil.rmtree(tmp_path / "nvme")
    capsys.readouterr()
    assert main([*with_nvme(full, tmp_path / "new drive"), "--out", str(out), "--steps", "3", "--resume"]) == 0
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    assert weights(out) == expected and losses(out) == expected_losses


def test_without_a_drive_checkpoints_are_folders(full: list[str], tmp_path: Path) -> None:
    at = full.index("--nvme")
    words = [*full[:at], *full[at + 2 :], "--device-memory", "50MiB", "--optimizer", "lion"]
    straight, out = tmp_path / "straight", tmp_path / "out"
    assert main([*words, "--out", str(straight), "--steps", "4"]) == 0
    assert main([*words, "--out", str(out), "--steps", "2"]) == 0
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert main([*words, "--out", str(out), "--steps", "4", "--resume"]) == 0
    assert weights(out) == weights(straight)


def test_state_in_memory_is_committed_as_often_as_save_every_says(
    full: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*full, "--device-memory", "50MiB", "--out", str(tmp_path / "out"), "--steps", "5"]
    assert main([*words, "--save-every", "2", "--tbw", "600TB"]) == 0
    shown = capsys.readouterr().out
    assert "nothing is written to the drive in a step" in shown
    written = re.search(r"written: \S+ MiB; (\S+) MiB a step.*days to the rated 600 TB", shown)
    state = re.search(r"masters and moments: (\S+) MiB in memory", shown)
    assert written is not None and state is not None
    # at steps 2 and 4, and at the end; the state that it begins with is no step's
    assert 5 * float(written[1]) == pytest.approx(3 * float(state[1]), rel=0.05)


def test_more_writes_than_allowed_stop_the_run_with_its_state_saved(
    full: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [*full, "--out", str(out), "--steps", "8"]
    code, line = fails_at_the_end(capsys, *words, "--max-writes-per-day", "20MB")
    assert code == 2 and "allowed are 20 MB" in line and "more of host memory" in line and "--save-every" in line
    assert len(losses(out)) == 4
    assert main([*words, "--resume", "--max-writes-per-day", "100MB"]) == 0  # the rest of the run is less than that
    assert len(losses(out)) == 8


def fails_at_the_end(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(words)
    return code, capsys.readouterr().err.splitlines()[-1]


def test_what_is_allowed_a_day_is_compared_with_what_a_day_takes() -> None:
    care = DriveCare(tbw_bytes=10**12, max_bytes_per_day=10**9)
    report = {"bytes_written_per_step": 10**6, "expected_bytes_written_per_step": 10**6, "bytes_written": 5 * 10**6}
    assert "1 GB in 1000 steps, 0.10% of the rated 1 TB" in care.expectation(report, 1000)
    assert "86.4 GB a day at this speed: 12 days" in care.outcome(report, 5, 5.0)
    care.check(report, steps_done=3, seconds=0.02, steps_left=10**9)  # too early to tell
    care.check(report, steps_done=101, seconds=100 * 87.0, steps_left=10**9)  # 993 steps a day
    care.check(report, steps_done=5, seconds=4.0, steps_left=990)  # the run is over before
    with pytest.raises(ConfigError, match=r"at 80.00 s a step are 1.08 GB a day, allowed are 1 GB"):
        care.check(report, steps_done=101, seconds=100 * 80.0, steps_left=10**9)
    DriveCare().check(report, steps_done=101, seconds=1.0, steps_left=10**9)


@pytest.mark.full
def test_a_run_whose_commits_are_removed_saves_itself_and_says_so(
    full: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, out, drive = tmp_path / "straight", tmp_path / "out", tmp_path / "drive"
    assert main([*with_nvme(full, tmp_path / "other"), "--steps", "4", "--out", str(straight)]) == 0
    words, take_step = with_nvme(full, drive), Engine.train_batch

    def removed_at_the_second(engine: Engine, batches: Any) -> float:
        if engine.step_number == 1:
            shutil.rmtree(engine.commit_folder)
        return take_step(engine, batches)

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "train_batch", removed_at_the_second)
        code, line = fails(capsys, *words, "--steps", "4", "--out", str(out))
    assert code == 1 and f"step 2 was trained; that is saved in {out / 'checkpoint-2'}" in line and "ENOENT" in line
    assert main([*words, "--steps", "4", "--out", str(out), "--resume"]) == 0
    assert "resuming from checkpoint-2" in capsys.readouterr().out
    assert weights(out) == weights(straight) and losses(out) == losses(straight)
