"""The loop around a stand-in engine: schedule, metrics, checkpoints, exact resume, signals, kills."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from offload_rt.errors import CheckpointError, ConfigError, NonFiniteLoss, StorageError, StorageFull
from offload_rt.training import saves
from offload_rt.training.batches import Batches
from offload_rt.training.data import Example
from offload_rt.training.display import Display, StepNumbers
from offload_rt.training.loop import TrainingResult, num_tokens, train
from offload_rt.training.options import TrainingOptions, lr_factor
from offload_rt.training.run_folder import RunFolder
from tests.durable import Durable

torch.set_num_threads(1)

SOURCE = Path(__file__).resolve().parent.parent


class FakeEngine:
    """The contract's methods over one small table; keeps what the loop did."""

    committed: Any = None
    commit_folder = Path("nowhere")

    def __init__(self, *, lr: float = 0.1) -> None:
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 16))
        self.optimizer: torch.optim.Optimizer | None = torch.optim.AdamW([self.weight], lr=lr)
        self.tracked: dict[str, Any] = {}
        self.seen: list[list[int]] = []
        self.lrs: list[float] = []
        self.events: list[str] = []
        self.after_step: dict[int, Any] = {}
        self.poison_at = -1
        self.left_out: set[int] = set()
        self.step_number = 0

    def train_batch(self, batches: list[dict[str, Any]]) -> float:
        assert self.optimizer is not None
        losses = [(self.weight[batch["input_ids"]] - 0.5).square().mean() for batch in batches]
        loss = torch.stack(losses).mean()
        loss.backward()
        self.lrs.append(self.optimizer.param_groups[0]["lr"])
        if len(self.seen) + 1 not in self.left_out:
            self.optimizer.step()
            self.step_number += 1
        self.optimizer.zero_grad()
        self.seen.append([int(batch["input_ids"].sum()) for batch in batches])
        self.events.append("step")
        self.after_step.get(len(self.seen), lambda: None)()
        return float("nan") if len(self.seen) == self.poison_at else float(loss.detach())

    def track(self, name: str, tracked: Any) -> None:
        self.tracked[name] = tracked

    def save_checkpoint(self, folder: Path) -> None:
        assert self.optimizer is not None
        self.events.append(f"save {folder.name}")
        states = {name: tracked.state_dict() for name, tracked in self.tracked.items()}
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save([self.weight.data, self.optimizer.state_dict(), states], temporary / "state.pt")
        temporary.rename(folder)

    def load_checkpoint(self, folder: Path) -> None:
        assert self.optimizer is not None
        try:
            weight, optimizer, states = torch.load(folder / "state.pt")
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder}: no state.pt") from error
        self.weight.data.copy_(weight)
        self.optimizer.load_state_dict(optimizer)
        for name, state in states.items():
            self.tracked[name].load_state_dict(state)

    def report(self) -> dict[str, Any]:
        memory = {"DEVICE": 2 << 20, "HOST": 1 << 20}
        return {"bytes_read": 100 * len(self.seen), "stall_seconds": 0.5, "prefetch_misses": 1, "memory": memory}


class CommittingEngine(FakeEngine):
    """Commits every step in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.commit_folder = folder
        self.commits = True

    @property
    def committed(self) -> Any:  # type: ignore[override]
        if not (self.commit_folder / "state.pt").exists():
            return {"step": 0}
        states = torch.load(self.commit_folder / "state.pt")[2]
        return {"step": states["progress"]["step"] + states["progress"]["in_step"], "tracked": states}

    def train_batch(self, batches: list[dict[str, Any]]) -> float:
        loss = super().train_batch(batches)
        if self.commits:
            self.save_checkpoint(self.commit_folder)
        return loss

    def save_checkpoint(self, folder: Path) -> None:
        if folder == self.commit_folder:
            shutil.rmtree(folder, ignore_errors=True)
        super().save_checkpoint(folder)

    def remove_commits(self) -> None:
        self.commits = False
        shutil.rmtree(self.commit_folder)


def make_batches(seed: int = 0) -> Batches:
    examples = [Example(ids, ids, at) for at in range(23) for ids in [np.arange(2 + at % 5, dtype=np.int32) + at % 9]]
    return Batches(examples, batch_size=2, seq_len=8, seed=seed)


def run(out: Path, engine: FakeEngine | None = None, **options: Any) -> tuple[FakeEngine, TrainingResult, list[str]]:
    engine = engine or FakeEngine()
    text = io.StringIO()
    console = Console(file=text, width=200)
    if "epochs" not in options:
        options.setdefault("steps", 6)
    result = train(engine, make_batches(), TrainingOptions(out=out, **options), console=console)
    return engine, result, text.getvalue().splitlines()


def metrics_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def interrupt(number: signal.Signals) -> None:
    """To this thread: one for the process may come to another, late, and two of them as one."""
    signal.raise_signal(number)


def test_a_run_takes_its_steps_writes_its_metrics_and_saves_at_the_end(tmp_path: Path) -> None:
    engine, result, lines = run(tmp_path / "out", accumulation_steps=3)
    assert [len(batches) for batches in engine.seen] == [3] * 6
    assert (result.step, result.interrupted, result.checkpoint) == (6, None, tmp_path / "out" / "checkpoint-6")
    metrics = metrics_of(tmp_path / "out")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["loss"] == result.loss < metrics[0]["loss"]
    assert all(line["bytes_read"] == 100 and line["memory"]["HOST"] == 1 << 20 for line in metrics)
    assert result.tokens == sum(line["tokens"] for line in metrics) > 0
    assert lines[0].startswith("step 1/6  loss ") and "tokens/s" in lines[0] and "DEVICE 2 MiB" in lines[0]
    assert lines[-1].startswith("finished at step 6")


def test_an_epoch_is_all_batches_rounded_up_to_whole_steps(tmp_path: Path) -> None:
    engine, result, _ = run(tmp_path / "out", epochs=2, accumulation_steps=5)
    assert result.step == len(engine.seen) == 5  # 12 batches an epoch, 24 in two, 5 a step


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_schedule_rises_then_falls_and_no_step_has_a_zero_rate(schedule: str, tmp_path: Path) -> None:
    engine, _, _ = run(tmp_path / "out", steps=20, lr=0.5, warmup_ratio=0.2, schedule=schedule)
    expected = [0.5 * lr_factor(step, total_steps=20, warmup_ratio=0.2, schedule=schedule) for step in range(20)]
    assert engine.lrs == expected == [line["lr"] for line in metrics_of(tmp_path / "out")]
    assert engine.lrs[:4] == sorted(engine.lrs[:4]) and engine.lrs[4] == 0.5 and min(engine.lrs) > 0
    assert (engine.lrs[-1] == 0.5) == (schedule == "constant")


def test_lr_left_out_keeps_the_optimizers_own(tmp_path: Path) -> None:
    engine, _, _ = run(tmp_path / "out", FakeEngine(lr=0.3), schedule="constant")
    assert set(engine.lrs) == {0.3}


def test_checkpoints_come_when_asked_and_the_last_ones_stay(tmp_path: Path) -> None:
    engine, _, _ = run(tmp_path / "out", steps=7, save_every=2, keep_last=2)
    saves = [event for event in engine.events if event != "step"]
    assert saves == ["save checkpoint-2", "save checkpoint-4", "save checkpoint-6", "save checkpoint-7"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-6", "checkpoint-7", "metrics.jsonl", "report.json", "run.json",
    ]  # fmt: skip


def test_a_forked_child_of_the_loop_ends_where_it_is_terminated_and_leaves_ctrl_c_to_the_loop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A pool that is taken down in the middle of a run waits for its workers."""
    engine, ended = FakeEngine(), []

    def forks() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            child = os.fork()
            if child == 0:
                signal.raise_signal(number)
                os._exit(0)
            ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    engine.after_step[1] = forks
    assert run(tmp_path / "out", engine, steps=2)[1].interrupted is None
    assert ended == [-signal.SIGTERM, 0] and capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_resume_is_exact(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"steps": 30, "accumulation_steps": 2, "lr": 0.2, "warmup_ratio": 0.1, "schedule": "cosine"}
    straight, _, _ = run(tmp_path / "straight", **options)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    first = FakeEngine()
    first.after_step[11] = lambda: interrupt(number)
    _, result, lines = run(tmp_path / "out", first, **options)
    assert (result.step, result.interrupted) == (11, number)
    assert f"{number.name}: finishing this step, then saving" in capfd.readouterr().err
    assert first.events[-2:] == ["step", "save checkpoint-11"]
    assert any(f"{number.name}: stopped after step 11 of 30" in line and "--resume" in line for line in lines)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    second, result, lines = run(tmp_path / "out", resume=True, **options)
    assert lines[0] == "resuming from checkpoint-11" and result.step == 30
    assert first.seen + second.seen == straight.seen
    assert first.lrs + second.lrs == straight.lrs
    assert torch.equal(second.weight, straight.weight)
    ours, theirs = metrics_of(tmp_path / "out"), metrics_of(tmp_path / "straight")
    for key in ("step", "loss", "lr", "tokens", "epoch"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.after_step[6] = lambda: interrupt(signal.SIGINT)
    _, result, lines = run(tmp_path / "out", engine)
    assert result.interrupted is None and lines[-1].startswith("finished")


def test_a_second_signal_aborts_at_once(tmp_path: Path) -> None:
    engine = FakeEngine()

    def twice() -> None:
        interrupt(signal.SIGINT)
        interrupt(signal.SIGINT)

    engine.after_step[3] = twice
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", engine)
        assert engine.events == ["step"] * 3
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from tests.test_training_loop import FakeEngine, run
    engine = FakeEngine()
    engine.after_step[8] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    run(Path(sys.argv[1]), engine, steps=12, save_every=3)
"""


def test_a_killed_run_resumes_from_its_last_checkpoint_and_its_metrics_have_each_step_once(tmp_path: Path) -> None:
    straight, _, _ = run(tmp_path / "straight", steps=12)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "out"), str(SOURCE)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6, 7]
    with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # a line that the kill has cut
    (tmp_path / "out" / "checkpoint-9.tmp").mkdir()  # a save that the kill has cut
    (tmp_path / "out" / "checkpoint-1.removing").mkdir()
    (tmp_path / "out" / ".checkpoint-8.partial-999999").mkdir()  # behind a signal, at a step that is not saved again
    with pytest.raises(ConfigError, match=r"unfinished run \(newest checkpoint: step 6\); continue it with --resume"):
        run(tmp_path / "out", steps=12, save_every=3)
    second, result, _ = run(tmp_path / "out", steps=12, save_every=3, resume=True)
    assert result.step == 12 and second.seen == straight.seen[6:]
    assert torch.equal(second.weight, straight.weight)
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == list(range(1, 13))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"checkpoint-1.removing", ".checkpoint-8.partial-999999"}


def test_a_run_killed_between_its_last_save_and_removing_old_ones_removes_them_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "prune", lambda folder, keep_last: None)
        run(tmp_path / "out", steps=6, save_every=2)
    run(tmp_path / "out", steps=6, save_every=2, resume=True)
    assert [step for step, _ in RunFolder(tmp_path / "out").checkpoints()] == [4, 6]


def test_a_finished_run_is_not_overwritten_and_can_be_continued_by_more_steps(tmp_path: Path) -> None:
    run(tmp_path / "out", schedule="constant")
    with pytest.raises(ConfigError, match="finished at step 6"):
        run(tmp_path / "out", schedule="constant")
    engine, result, _ = run(tmp_path / "out", schedule="constant", resume=True)
    assert (engine.seen, result.step, result.loss) == ([], 6, None)
    engine, result, _ = run(tmp_path / "out", schedule="constant", steps=8, resume=True)
    assert (len(engine.seen), result.step) == (2, 8)


def test_resume_without_a_checkpoint_begins_and_says_so(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.poison_at = 2
    with pytest.raises(NonFiniteLoss, match="step 2: the loss is nan; no checkpoint was saved yet"):
        run(tmp_path / "out", engine)
    _, result, lines = run(tmp_path / "out", resume=True)
    assert "the beginning" in lines[0] and result.step == 6
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_takes_over_nothing_of_one_that_left_nothing_to_go_on_from(tmp_path: Path) -> None:
    out, engine = tmp_path / "out", FakeEngine()
    engine.poison_at = 2
    with pytest.raises(NonFiniteLoss):
        run(out, engine)
    aborted = RunFolder(out)
    aborted.note_cuts({"tiles": 3})
    aborted.write_report({"of": "the aborted one"})
    low = {"step": 1, "left_bytes": 1, "total_bytes": 100, "of": "RAM", "resident_bytes": 50, "holdings": {}}
    aborted.memory_file.write_text(f"{json.dumps(low)}\n")
    run(out, FakeEngine(), resume=True, steps=1)  # is the same run, whose memory ran low
    assert RunFolder(out).run_id == aborted.run_id and aborted.memory_file.exists()
    shutil.rmtree(out / "checkpoint-1")
    (out / "run.json").write_text(json.dumps({"id": aborted.run_id, "cuts": {"tiles": 3}, "settings": {"lr": 3}}))
    _, result, _ = run(out, FakeEngine(), steps=2)
    assert result.step == 2 and not aborted.memory_file.exists()
    new = RunFolder(out)
    assert new.run_id != aborted.run_id and new.cuts is None and new.settings()["lr"] is None
    assert [line["step"] for line in new.metrics()] == [1, 2] and "of" not in (new.report() or {})


def test_a_run_whose_commits_lie_elsewhere_is_not_begun_anew_over_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = CommittingEngine(tmp_path / "first")
    first.after_step[2] = lambda: interrupt(signal.SIGTERM)
    run(tmp_path / "out", first)
    states = torch.load(tmp_path / "first" / "state.pt")[2]
    monkeypatch.setattr(saves, "peek", lambda folder: SimpleNamespace(payload={"tracked": states}))
    monkeypatch.setattr(saves, "unpack_values", lambda payload: payload)
    with pytest.raises(
        ConfigError, match=r"unfinished run \(the commit of step 2 in .*first\); continue it with --resume"
    ):
        run(tmp_path / "out", CommittingEngine(tmp_path / "second"))
    assert RunFolder(tmp_path / "out").last_step() == 2


def test_a_nan_loss_stops_the_run_and_the_good_state_stays(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.poison_at = 5
    with pytest.raises(NonFiniteLoss, match=r"step 5: the loss is nan; the last good state is .*checkpoint-4"):
        run(tmp_path / "out", engine, save_every=2)
    assert [step for step, _ in RunFolder(tmp_path / "out").checkpoints()] == [2, 4]


def test_a_step_that_is_left_out_is_not_counted_and_is_taken_with_the_next_batches(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.left_out = {2, 3, 5}
    engine, result, lines = run(tmp_path / "out", engine, save_every=2)
    assert result.step == engine.step_number == 6 and len(engine.seen) == 9
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    assert engine.lrs[1] == engine.lrs[2] == engine.lrs[3] and lines[-1].startswith("finished at step 6")
    assert [event for event in engine.events if event != "step"] == [f"save checkpoint-{step}" for step in (2, 4, 6)]
    again = FakeEngine()
    RunFolder(tmp_path / "out").checkpoint_path(6).rename(tmp_path / "moved")
    assert run(tmp_path / "out", again, resume=True)[1].step == 6
    assert again.seen == engine.seen[7:] and torch.equal(again.weight, engine.weight)


def test_a_commit_that_was_made_before_its_schedule_went_on_is_gone_on_from_with_the_next_rate(tmp_path: Path) -> None:
    """A second Ctrl-C, say, between the engine's step and the schedule's: closing commits what there is then."""
    given: dict[str, Any] = {"schedule": "cosine", "warmup_ratio": 0.4}
    straight, engine = run(tmp_path / "straight", **given)[0], CommittingEngine(tmp_path / "commits")

    def ends() -> None:
        engine.save_checkpoint(engine.commit_folder)
        raise KeyboardInterrupt

    engine.after_step[3] = ends
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", engine, **given)
    again = run(tmp_path / "out", CommittingEngine(tmp_path / "commits"), resume=True, **given)[0]
    assert again.lrs == straight.lrs[3:] and torch.equal(again.weight, straight.weight)


def test_a_run_whose_commits_are_removed_saves_a_copy_and_ends(tmp_path: Path) -> None:
    straight, engine = run(tmp_path / "straight")[0], CommittingEngine(tmp_path / "commits")
    engine.after_step[3] = engine.remove_commits
    with pytest.raises(StorageError, match=r"commits: was removed, or moved, while step 3 .* saved in .*checkpoint-3"):
        run(tmp_path / "out", engine)
    again, result, said = run(tmp_path / "out", CommittingEngine(tmp_path / "commits"), resume=True)
    assert result.step == 6 and any("resuming from checkpoint-3" in line for line in said)
    assert engine.seen + again.seen == straight.seen and torch.equal(again.weight, straight.weight)


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_a_run_whose_folder_was_removed_goes_on_from_its_commits(
    whose: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"schedule": "constant", "warmup_ratio": 0.0}
    straight, engine = run(tmp_path / "straight", **given)[0], CommittingEngine(tmp_path / "commits")

    def removed() -> None:
        shutil.rmtree(tmp_path / "out")

    engine.after_step[4] = removed
    with pytest.raises(StorageError, match="removed.* go on with --resume, from the commit of step 4"):
        run(tmp_path / "out", engine, save_every=1, **given)
    out = tmp_path / ("out" if whose == "its own" else "other")
    go_on = CommittingEngine(tmp_path / "commits")
    if whose == "another's":
        with pytest.raises(ConfigError, match=f"holds step 4 of the run in {tmp_path / 'out'}"):
            run(out, go_on, resume=True, **given)
        return
    again, result, said = run(out, go_on, resume=True, **given)
    assert result.step == 6 and any("the commit of step 4" in line for line in said)
    assert "run.json is gone, and with it the settings" in caplog.text
    assert engine.seen + again.seen == straight.seen and torch.equal(again.weight, straight.weight)
    assert run(out, CommittingEngine(tmp_path / "commits"), resume=True, steps=7, **given)[1].step == 7


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"data": "/a, /b", "data content": "1-3"}, "data: /b has changed"),
        ({"data": "/a, /c", "data content": "1-3"}, "data: /c has other content than /b had"),
        ({"data": "/b, /a", "data content": "2-1"}, "data has the same files in another order, was /a, /b"),
        ({"data": "/a", "data content": "1"}, "data was /a, /b, is /a"),
        ({"model": "/m", "model content": "f"}, "model: /m has changed"),
        ({"adapters": "/s", "adapters content": "1-2"}, "adapters was 'lora:r=4', is '/s'"),
        ({"data": "/a, /b", "data content": "1-2", "lr": 1}, "lr was 0.1, is 1"),
    ],
)
def test_a_resume_with_other_files_says_which_and_shows_no_digest(
    now: dict[str, Any], message: str, tmp_path: Path
) -> None:
    before = {"data": "/a, /b", "data content": "1-2", "model": "/m", "model content": "e", "adapters": "lora:r=4"}
    folder = RunFolder(tmp_path)
    folder.begin(at_step=0, settings={**before, "lr": 0.1})
    folder.close()
    folder.require_same(before)
    with pytest.raises(ConfigError, match=f"was begun with other settings: {message}$"):
        folder.require_same(now)


def test_a_full_drive_is_typed_wherever_the_runs_folder_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin(at_step=0, settings={"lr": 0.1})
    before = (tmp_path / "out" / "run.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: folder.note_cuts({"tiles": 1}),
        lambda: folder.write_report({}),
        lambda: folder.finish(at_step=1),
        lambda: RunFolder(tmp_path / "other").begin(at_step=0, settings={}),
    ):
        with pytest.raises(
            StorageFull, match=r"(/(run|report)\.json: cannot be written|: the names in it cannot) .*is full"
        ):
            write()
    assert (tmp_path / "out" / "run.json").read_bytes() == before
    assert list(tmp_path.rglob("*.tmp")) == [], "they take up what is left of the drive"
    folder.close()


def test_what_is_said_of_a_run_is_on_the_drive_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable, folder = Durable(monkeypatch), RunFolder(tmp_path / "new" / "out")
    folder.begin(at_step=0, settings={"lr": 0.1})
    begun = {folder.path.parent, folder.path, folder.path / "run.json", folder.path / "metrics.jsonl"}
    for write in (
        lambda: None,
        lambda: folder.note_cuts({"tiles": 1}),
        lambda: folder.write_report({}),
        lambda: folder.finish(at_step=1),
    ):
        write()
        begun |= set(folder.path.iterdir())
        assert [path.name for path in begun if not durable.has_name(path)] == []
    assert durable.missing(folder.path) == []
    folder.close()


def test_a_full_drive_is_typed_where_metrics_are_written_and_closing_says_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin(at_step=0, settings={})
    folder.append_metrics({"step": 1})
    folder.close()
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(StorageFull, match=r"metrics\.jsonl: cannot be"):
        folder._metrics = full
        try:
            folder.append_metrics({"step": 2})
        finally:
            folder.close()
    assert [line["step"] for line in folder.metrics()] == [1]


def test_a_line_of_metrics_that_a_drive_takes_in_parts_is_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out")
    folder.begin(at_step=0, settings={})
    whole, written = folder._metrics, []
    assert whole is not None
    folder._metrics = SimpleNamespace(  # type: ignore[assignment]
        write=lambda left: written.append(len(left)) or whole.write(bytes(left[:5])), close=whole.close
    )
    folder.append_metrics({"step": 7})
    folder.close()
    assert len(written) > 1 and [line["step"] for line in folder.metrics()] == [7]


def test_a_folder_that_cannot_be_written_is_found_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder(tmp_path / "new" / "run").require_writable()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file"):
        RunFolder(tmp_path / "file" / "run").require_writable()
    asked: list[Path] = []  # root may write anywhere but on what is mounted read-only
    monkeypatch.setattr("offload_rt.training.run_folder.os.access", lambda path, mode: asked.append(path))
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be written to"):
        RunFolder(tmp_path / "new" / "run").require_writable()
    assert asked == [tmp_path]


def test_resume_with_other_settings_lists_every_difference(tmp_path: Path) -> None:
    run(tmp_path / "out", lr=0.1, schedule="linear")
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "out", lr=0.2, schedule="cosine", resume=True)
    assert "lr was 0.1, is 0.2; schedule was 'linear', is 'cosine'" in str(caught.value)


def test_a_mismatch_between_engine_and_loop_is_an_error(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.config = type("Config", (), {"accumulation_steps": 4})()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="made for 4, the loop has 1"):
        run(tmp_path / "out", engine)
    engine = FakeEngine()
    engine.optimizer = None
    with pytest.raises(ConfigError, match="nothing trains"):
        run(tmp_path / "out", engine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of the two"),
        ({"steps": 1, "epochs": 1}, "give one of the two"),
        ({"steps": 0}, "steps: must be a whole number"),
        ({"steps": 1, "keep_last": 0}, "keep_last"),
        ({"steps": 1, "save_every": True}, "save_every"),
        ({"steps": 1, "lr": 0.0}, "lr: must be more than zero"),
        ({"steps": 1, "warmup_ratio": 1.0}, "warmup_ratio"),
        ({"steps": 1, "schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_options_are_checked_by_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingOptions(out=tmp_path, **options)


def test_tensorboard_gets_its_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path / "out", logdir=tmp_path / "events")
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_shows_steps_that_are_taken_again_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    engine = FakeEngine()
    engine.poison_at = 6
    with pytest.raises(NonFiniteLoss):
        run(tmp_path / "out", engine, logdir=tmp_path / "events", save_every=3)
    (file,) = (tmp_path / "events").iterdir()
    file.rename(file.with_name("events.out.tfevents.0000000000"))  # read first, also where a second has both runs
    run(tmp_path / "out", logdir=tmp_path / "events", resume=True)
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("fails_in", ["add_scalar", "close"])
def test_a_full_drive_of_events_is_said_once_and_ends_no_run(
    fails_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Writer:
        def __init__(self, logdir: str, purge_step: int) -> None:
            self.steps: list[int] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.steps.append(step)
            if fails_in == "add_scalar" and step == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            assert step < 4 or fails_in == "close"

        def close(self) -> None:
            assert fails_in == "close"
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", SimpleNamespace(SummaryWriter=Writer))
    _, result, _ = run(tmp_path / "out", logdir=tmp_path / "events")
    assert result.step == 6 and [line["step"] for line in metrics_of(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    (said,) = [record.getMessage() for record in caplog.records if "events" in record.getMessage()]
    which = "from step 3" if fails_in == "add_scalar" else "of the last steps"
    assert f"events {which} cannot be written ([Errno 28] No space left on device)" in said


class FakeWandb:
    """The part of wandb that is used: runs go on by their ids."""

    class Error(Exception):
        pass

    def __init__(self, fails_at: int | None = None) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.exit_codes: list[int] = []
        self.fails_at = fails_at

    def init(self, **given: Any) -> FakeWandb:
        if self.fails_at == 0:
            raise FakeWandb.Error("no API key")
        self.begun.append(given)
        return self

    def log(self, numbers: dict[str, Any], *, step: int) -> None:
        if step == self.fails_at:
            raise FakeWandb.Error("the service is gone")
        self.logged.append((step, numbers))

    def finish(self, *, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


def test_wandb_gets_the_numbers_and_a_run_that_goes_on_is_one_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    run(tmp_path / "out", wandb=True, steps=2, schedule="constant")
    run(tmp_path / "out", wandb=True, steps=3, schedule="constant", resume=True)
    assert [step for step, _ in fake.logged] == [1, 2, 3] and fake.exit_codes == [0, 0]
    assert [numbers["train/loss"] for _, numbers in fake.logged] == [
        line["loss"] for line in metrics_of(tmp_path / "out")
    ]
    assert [begun["id"] for begun in fake.begun] == [RunFolder(tmp_path / "out").run_id] * 2
    assert fake.begun[0]["resume"] == "allow" and fake.begun[0]["config"]["schedule"] == "constant"


def test_wandb_is_told_of_a_run_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    poisoned, stopped = FakeEngine(), FakeEngine()
    poisoned.poison_at = 2
    with pytest.raises(NonFiniteLoss):
        run(tmp_path / "poisoned", poisoned, wandb=True)
    stopped.after_step[2] = lambda: interrupt(signal.SIGTERM)
    run(tmp_path / "stopped", stopped, wandb=True)
    assert fake.exit_codes == [1, 128 + signal.SIGTERM]


def test_wandb_that_is_missing_ends_a_run_before_it_begins_and_one_that_fails_later_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb: is not installed .* pip install wandb"):
        run(tmp_path / "out", wandb=True)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails_at=0))
    with pytest.raises(ConfigError, match=r"wandb: no API key \(or set WANDB_MODE=offline\)"):
        run(tmp_path / "out", wandb=True)
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(fails_at=3))
    _, result, _ = run(tmp_path / "out", wandb=True)
    assert result.step == 6 and [step for step, _ in fake.logged] == [1, 2]
    assert "wandb: events from step 3 cannot be written (the service is gone)" in caplog.text


def test_an_output_on_a_full_drive_is_said_once_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("offload_rt.training.display.PLAIN_SECONDS", 0.0)
    with open("/dev/full", "w", buffering=1) as full:
        result = train(
            FakeEngine(), make_batches(), TrainingOptions(out=tmp_path / "out", steps=4), console=Console(file=full)
        )
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert result.step == 4 and len(metrics_of(tmp_path / "out")) == 4
    assert sum("output cannot be written" in record.getMessage() for record in caplog.records) == 1


def test_missing_tensorboard_is_an_error_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ConfigError, match=r"logdir: needs TensorBoard .*offload-rt\[logging\]"):
        run(tmp_path / "out", logdir=tmp_path / "events")


def test_without_a_terminal_lines_come_every_few_seconds_and_for_the_last_step() -> None:
    now = 0.0
    text = io.StringIO()
    with Display(Console(file=text, width=200), total_steps=20, first_step=0, clock=lambda: now) as display:
        for step in range(1, 21):
            display.step(
                StepNumbers(step=step, loss=1.0, tokens=10, seconds=1.0, bytes_read=2**20, memory={"HOST": 2**30})
            )
            now += 1.0
    shown = text.getvalue().splitlines()
    assert [line.split()[1] for line in shown] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert "10 tokens/s  ETA 0:14  read 1 MiB/s  HOST 1 GiB" in shown[1]


def test_the_remaining_time_has_what_is_still_to_come_besides_steps() -> None:
    text = io.StringIO()
    with Display(Console(file=text, width=200), total_steps=9, first_step=0) as display:
        display.step(
            StepNumbers(step=2, loss=1.0, tokens=1, seconds=10.0, bytes_read=0, memory={}, seconds_besides=25.0)
        )
    assert "ETA 1:35" in text.getvalue()


def test_on_a_terminal_a_bar_is_drawn(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    train(FakeEngine(), make_batches(), TrainingOptions(out=tmp_path / "out", steps=3), console=console)
    assert "3/3" in text.getvalue() and "tokens/s" in text.getvalue()


def test_tokens_leave_padding_out() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    assert num_tokens({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])}) == 6
    assert num_tokens({"input_ids": ids}) == 8
