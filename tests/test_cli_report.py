"""`offload-rt report`: numbers of a run's folder, counted by hand here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload_rt.cli.main import main
from offload_rt.meter import Reading
from offload_rt.running.comparison import compared
from offload_rt.training.run_folder import RunFolder


def logged(step: int, loss: float, seconds: float) -> dict[str, object]:
    return {"step": step, "epoch": 0, "loss": loss, "lr": 0.1, "tokens": 100, "seconds": seconds, "bytes_read": 4096}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that is under way: twenty steps, the lowest loss in the fifteenth, a slow first step."""
    folder = RunFolder(tmp_path / "run")
    folder.begin(at_step=0, settings={"model": "m", "lr": 0.1, "schedule": "cosine", "adapters": "lora:r=4"})
    for step in range(1, 21):
        folder.append_metrics(logged(step, 0.5 if step == 15 else 20.0 - step, 9.0 if step == 1 else 2.0))
    folder.close()
    return folder


def test_a_run_under_way(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.path / "checkpoint-10").mkdir()
    assert main(["report", str(folder.path)]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.replace("a step:", "step:").splitlines())
    assert shown["run:"] == f"{folder.path}: not finished; checkpoints at 10"
    assert shown["trains:"] == "lora:r=4; lr 0.1, cosine"
    assert shown["steps:"] == "20, in epoch 0; 20 logged"
    assert "19.0000 at first, 0.0000 at last; mean of the last tenth 0.5000" in shown["loss:"]
    assert "lowest 0.0000 at step 20" in shown["loss:"]
    assert shown["step:"] == "2.00 s in the median, quartiles 2.00 to 2.00; 50 tokens a second; 4 KiB read"
    assert "plan:" not in shown  # no process has said anything yet


def test_as_json_and_with_a_line_that_a_kill_cut(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo')
    folder.finish(at_step=20)
    assert main(["report", str(folder.path), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["run"]["finished"] == 20 and numbers["run"]["settings"]["model"] == "m"
    assert numbers["steps"]["logged"] == 20 and numbers["steps"]["seconds"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert numbers["engine"] is None


def test_a_run_without_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(at_step=0, settings={})
    folder.close()
    assert main(["report", str(folder.path)]) == 0
    assert "none was logged" in capsys.readouterr().out


def test_what_is_no_run_or_broken_is_said(
    tmp_path: Path, folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    (folder.path / "report.json").write_text("{")
    assert main(["report", str(folder.path)]) == 1
    assert "report.json: cannot be read" in capsys.readouterr().err


def test_a_steady_step_is_shown_beside_its_prediction(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    reading = Reading(busy_seconds={"compute": 2.0, "ssd_read": 3.0}, moved_bytes={"ssd_read": 4096})
    predicted = {"step_seconds": 2.5, "busy_seconds": {"compute": 2.4, "ssd_read": 1.0}}
    report = {
        "allocator": {"peak_bytes": 1, "planned_bytes": 2}, "memory": {"device": 3}, "plan": "optimiser", "io": "x",
        "nf4": "y", "device": "cpu", "peak_resident_bytes": 4, "bytes_read": 0, "bytes_written": 0,
        "bytes_written_per_step": 0.0, "stall_seconds": 0.0, "prefetch_misses": 0,
        "steady_step": compared(3.5, 0.1, reading, 8, predicted),
    }  # fmt: skip
    folder.write_report(report)
    assert main(["report", str(folder.path)]) == 0
    shown = capsys.readouterr().out
    assert "measured:    a steady step takes 3.500 s in the median of 8, 2.500 s predicted; ssd_read binds" in shown
    assert "ssd_read       3.000 s busy, 1.000 s predicted, 4 KiB" in shown
    assert "rehearsal" not in shown and "at most:" not in shown
    assert "allocator:   2 B planned; beside arenas the process grew by 1 B at most, with what Python and" in shown
    peak = {"bytes": 4096, "beside": {}, "leased": {}}
    peaks = {
        "device": {"planned_bytes": 2048, "budget_bytes": None, "phases": {"ingest": peak, "step": peak}},
        "nvme": {"planned_bytes": 9216, "budget_bytes": 1, "phases": {"save": {"weights": 8192, "checkpoint": 77}}},
        "allocator": {"planned_bytes": 1024, "phases": {"step": 512}},
        "over": [{"tier": "device", "phase": "step", "bytes": 2048}],
    }  # fmt: skip
    folder.write_report({**report, "peaks": peaks})
    assert main(["report", str(folder.path)]) == 0
    shown = capsys.readouterr().out
    assert "at most:     device: ingest 4 KiB, step 4 KiB; 2 KiB planned" in shown
    assert "nvme: save 8 KiB; 9 KiB planned" in shown
    assert "process, beside arenas: step 512 B; 1 KiB planned for steps" in shown
    assert "over the plan: device by 2 KiB in step" in shown
    rehearsed = {
        "result": "within the budget",
        "why": "",
        "measured_bytes": 2048,
        "planned_bytes": 1024,
        "seconds": 1.0,
    }
    folder.write_report({**report, "steady_step": None, "rehearsal": rehearsed})
    assert main(["report", str(folder.path)]) == 0
    shown = capsys.readouterr().out
    assert "steady step" not in shown
    assert "rehearsal:   the longest step takes 2 KiB of tensors, 1 KiB planned: within the budget" in shown
