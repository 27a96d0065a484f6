"""`offload-rt train --resume` under other budgets, on other drives, in other places: the bits of one never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.cli import train_run
from offload_rt.cli.main import main
from offload_rt.errors import StorageError
from offload_rt.optimizer.loop_steps import LoopSteps
from offload_rt.training.evaluation import Evaluated, Evaluation
from offload_rt.training.run_folder import RunFolder
from offload_rt.wiring.runtime_options import RuntimeOptions
from tests.test_cli import adapter_bytes, fails, save_llama
from tests.test_cli import arguments as arguments
from tests.test_cli import model_folder as model_folder
from tests.test_cli_full import full as full
from tests.test_cli_full import losses, weights

torch.set_num_threads(1)

ROOMY, TIGHT, TIGHT_FULL = "60MiB", "2420KiB", "2450KiB"


def without(words: list[str], *options: str) -> list[str]:
    """`words` without these options and their values."""
    left = list(words)
    for option in options:
        while option in left:
            at = left.index(option)
            del left[at : at + 2]
    return left


def budgets(words: list[str], *, device: str, host: str | None = None, nvme: list[Path] | None = None) -> list[str]:
    """`words` with these budgets in place of theirs. The drives' folders are made."""
    for drive in nvme or []:
        drive.mkdir(exist_ok=True)
    return [
        *without(words, "--device-memory", "--host-memory", "--nvme"), "--device-memory", device,
        *(["--host-memory", host] if host is not None else []),
        *[word for drive in nvme or [] for word in ("--nvme", str(drive))],
    ]  # fmt: skip


def goes_on(words: list[str], out: Path, to_step: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs to that step, as the run in `out` if there is one. What was shown."""
    again = ["--resume"] if (out / "run.json").exists() else []
    assert main([*words, "--out", str(out), "--steps", str(to_step), *again]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_a_run_that_is_resumed_with_other_settings_is_refused_before_its_model_is_read(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lr": 0.01, "warmup_ratio": 0.03, "schedule": "constant", "accumulation_steps": 4, "batch_size": 1}
    RunFolder(tmp_path / "out").begin(at_step=0, settings=options)
    monkeypatch.setattr(train_run, "load_transformers", lambda folder: pytest.fail("the model was read"))
    code, line = fails(capsys, *arguments, "--out", str(tmp_path / "out"), "--resume")
    assert code == 2 and "begun with other settings: accumulation_steps was 4, is 2; batch_size was 1, is 2" in line


def test_a_run_of_all_parameters_moves_through_memory_and_drives(
    full: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    goes_on(budgets(full, device=ROOMY), straight, 12, capsys)
    drives = [tmp_path / name for name in ("a", "b", "c")]
    for number, (words, place, from_where) in enumerate(
        [
            (budgets(full, device=TIGHT_FULL, nvme=drives[:1]), "on NVME", None),
            (budgets(full, device=ROOMY, nvme=drives[:1]), "in memory", "the commit of step 2 on NVME"),
            (budgets(full, device=TIGHT_FULL, nvme=drives[:1]), "on NVME", "the commit of step 4 on NVME"),
            (budgets(full, device=ROOMY), "in memory", "the commit of step 6 in "),
            (budgets(full, device=TIGHT_FULL, nvme=drives[1:]), "on NVME", "checkpoint-8"),
            (budgets(full, device=ROOMY, host=ROOMY), "in memory", "the commit of step 10 in "),
        ]
    ):
        shown = goes_on(words, out, 2 * number + 2, capsys)
        assert (from_where is None) == ("resuming" not in shown), shown
        assert from_where is None or f"resuming from {from_where}" in shown, shown
        state = report(out)["training"]
        assert (2 * state["state_in_memory_bytes"] < state["state_bytes"]) == (place == "on NVME"), state
    assert weights(out) == weights(straight) and losses(out) == losses(straight)


def test_a_run_of_adapters_moves_their_state_through_memory_and_drives(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_run, "RuntimeOptions", partial(RuntimeOptions, piece_elements=4096))
    targets = "q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj"
    words = [*without(arguments, "--adapters"), "--adapters", f"lora:r=24,dropout=0.1,targets={targets}"]
    straight, out = tmp_path / "straight", tmp_path / "out"
    a, b = tmp_path / "a", tmp_path / "b"
    goes_on(budgets(words, device=ROOMY, nvme=[a]), straight, 6, capsys)
    for number, (chosen, place, from_where) in enumerate(
        [
            (budgets(words, device=ROOMY, nvme=[a]), "memory", None),
            (budgets(words, device=TIGHT, nvme=[a]), "NVME", "checkpoint-1"),
            (budgets(words, device=TIGHT, nvme=[b]), "NVME", "the commit of step 2 in "),
            (budgets(words, device=ROOMY, nvme=[a]), "memory", "the commit of step 3 in "),
            (budgets(words, device=TIGHT, host=ROOMY, nvme=[b]), "HOST", "checkpoint-4"),
            (budgets(words, device=ROOMY, host=ROOMY), "memory", "the commit of step 5 in "),
        ]
    ):
        shown = goes_on(chosen, out, number + 1, capsys)
        assert (from_where is None) == ("resuming" not in shown), shown
        assert from_where is None or f"resuming from {from_where}" in shown, shown
        state = report(out)["training"]
        found = "memory" if state is None else "NVME" if not state["state_in_memory_bytes"] else "HOST"
        assert found == place, shown
    assert adapter_bytes(out) == adapter_bytes(straight) and losses(out) == losses(straight)


def test_a_run_that_failed_in_a_step_goes_on_in_memory_from_the_commit_of_the_step_before(
    full: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    goes_on(budgets(full, device=ROOMY), straight, 5, capsys)
    go_back = LoopSteps.backward

    def fails_at_the_fourth(steps: LoopSteps, loss: torch.Tensor) -> None:
        if steps._training().step_number == 3:
            raise StorageError("gone", path="drive", errno=5)
        go_back(steps, loss)

    words = budgets(full, device=TIGHT_FULL, nvme=[tmp_path / "a"])
    with monkeypatch.context() as patched:
        patched.setattr(LoopSteps, "backward", fails_at_the_fourth)
        assert main([*words, "--out", str(out), "--steps", "5"]) == 1
    assert list(out.glob("checkpoint-*")) == []
    assert "resuming from the commit of step 3 in" in goes_on(budgets(full, device=ROOMY), out, 5, capsys)
    assert weights(out) == weights(straight) and losses(out) == losses(straight)


def test_a_run_goes_on_where_everything_lies_elsewhere_and_not_with_other_data(
    full: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home, other, home_data = tmp_path / "home", tmp_path / "other", tmp_path / "data.jsonl"
    home.mkdir()
    shutil.copytree(model_folder, home / "model")
    shutil.copy(tmp_path / "data.jsonl", home / "data.jsonl")

    def words(place: Path) -> list[str]:
        start = ["train", "--model", str(place / "model"), "--data", str(place / "data.jsonl")]
        return budgets(start + without(full[1:], "--model", "--data"), device=TIGHT_FULL, nvme=[place / "drive"])

    goes_on(words(home), home / "out", 4, capsys)
    expected = weights(home / "out"), losses(home / "out")
    shutil.rmtree(home / "drive")
    shutil.rmtree(home / "out")
    goes_on(words(home), home / "out", 2, capsys)
    home.rename(other)
    shutil.copytree(other / "model", tmp_path / "copied")  # whose files are of another time
    shutil.rmtree(other / "model")
    (tmp_path / "copied").rename(other / "model")
    for path in (other / "model").iterdir():
        os.utime(path, (0, 0))
    shown = goes_on(words(other), other / "out", 4, capsys)
    assert "resuming from the commit of step 2" in shown
    assert (weights(other / "out"), losses(other / "out")) == expected

    again = [*words(other), "--out", str(other / "out"), "--steps", "5", "--resume"]
    with open(other / "data.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "a", "completion": "a"}) + "\n")
    code, line = fails(capsys, *again)
    assert code == 2 and "was begun with other settings: data" in line and "data.jsonl has other content than" in line
    shutil.copy(home_data, other / "data.jsonl")
    code, line = fails(capsys, *again, "--data", str(home_data))  # beside the one that it was begun with
    assert code == 2 and f"is {other / 'data.jsonl'}, {home_data}" in line
    (other / "model" / "config.json").write_text("{}")
    code, line = fails(capsys, *again)
    assert code == 2 and "settings: model: " in line and f"{other / 'model'} has other content than" in line


@pytest.fixture(scope="module")
def large_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose loss, where memory is short, is taken in tiles."""
    return save_llama(tmp_path_factory.mktemp("large vocabulary"), vocabulary=4096, width=32, layers=2, heads=2)


def test_a_run_keeps_its_cuts_under_other_budgets_unless_told_otherwise(
    full: list[str], large_vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*without(full, "--model", "--batch-size"), "--model", str(large_vocabulary), "--batch-size", "16"]
    drive = tmp_path / "drive"
    for begun_with, tile_tokens in (("60MiB", None), ("25MiB", 256)):
        straight, out = tmp_path / f"straight {begun_with}", tmp_path / f"out {begun_with}"
        goes_on(budgets(words, device=begun_with), straight, 3, capsys)
        for number, device in enumerate((begun_with, "40MiB", "60MiB")):  # by itself in tiles, and at once
            goes_on(budgets(words, device=device), out, number + 1, capsys)
            assert report(out)["cuts"]["head_chunk_tokens"] == tile_tokens, device
        assert weights(out) == weights(straight) and losses(out) == losses(straight)

    short = [*budgets(words, device="25MiB", nvme=[drive]), "--out", str(tmp_path / "out 60MiB"), "--steps", "4"]
    code, line = fails(capsys, *short, "--resume")
    assert code == 1 and "for the cuts that the run was begun with (the loss at once, layers at once" in line
    assert "other cuts, which take sums in another order (--other-cuts)" in line
    assert main([*short, "--resume", "--other-cuts"]) == 0
    assert report(tmp_path / "out 60MiB")["cuts"]["head_chunk_tokens"] == 256
    capsys.readouterr()
    code, line = fails(capsys, *short, "--other-cuts")
    assert code == 2 and "--other-cuts: is for --resume" in line


def test_a_run_whose_last_evaluation_a_signal_left_out_has_no_result_before_it_is_made(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = [*arguments, "--out", str(out), "--steps", "1", "--keep-best", "--eval-data", arguments[4]]
    evaluated = Evaluation.run

    def interrupted(self: Evaluation, *is_to_stop: Callable[[], object]) -> Evaluated | None:
        signal.raise_signal(signal.SIGTERM)
        return evaluated(self, *is_to_stop)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "run", interrupted)
        assert main(words) == 128 + signal.SIGTERM
    assert "the last evaluation is not made" in capsys.readouterr().out
    assert not (out / "best").exists() and not (out / "adapter").exists()
    assert main([*words, "--resume"]) == 0, capsys.readouterr().err
    best = RunFolder(out).best
    assert best is not None and best["step"] == 1
    assert (out / "best/adapter_model.safetensors").read_bytes() == adapter_bytes(out)
