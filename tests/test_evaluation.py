"""Held-out loss while a model trains: the plain model's numbers, and not a bit of the training is another."""

from __future__ import annotations

import io
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from offload_rt.cli.main import main
from offload_rt.cli.report import collect, lines
from offload_rt.errors import ConfigError, NonFiniteLoss
from offload_rt.memory.allocations import AllocationMeter
from offload_rt.training.batches import Batches
from offload_rt.training.data import Example
from offload_rt.training.evaluation import FORWARD_SHARE, Evaluated, Evaluation, Evaluations, num_predicted
from offload_rt.training.events import Events
from offload_rt.training.loop import TrainingResult, train
from offload_rt.training.options import TrainingOptions
from offload_rt.training.run_folder import RunFolder
from tests import tiny_training
from tests.conftest import build_lora
from tests.test_cli import adapter_bytes, fails
from tests.test_cli import arguments as arguments
from tests.test_cli import model_folder as model_folder
from tests.test_cli_full import full as full
from tests.test_cli_full import weights
from tests.test_training_loop import FakeEngine, make_batches, metrics_of

torch.set_num_threads(1)


class FakeEvaluatedEngine(FakeEngine):
    """A stand-in that can be called, and counts that."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Dropout()
        self.num_calls = 0
        self.during_call: dict[int, Any] = {}

    def __call__(self, **batch: Any) -> Any:
        assert not torch.is_grad_enabled() and not self.model.training
        torch.rand(3)
        self.num_calls += 1
        self.during_call.get(self.num_calls, lambda: None)()
        return SimpleNamespace(loss=(self.weight[batch["input_ids"]] - 0.5).square().mean())

    def report(self) -> dict[str, Any]:
        report = super().report()
        return {**report, "bytes_read": report["bytes_read"] + 7 * self.num_calls}


def held_out(shift: int = 0) -> Batches:
    ids = [np.arange(3 + at, dtype=np.int32) + shift for at in range(4)]
    return Batches([Example(each, each, at) for at, each in enumerate(ids)], batch_size=2, seq_len=8)


def run(
    out: Path,
    engine: FakeEvaluatedEngine,
    data: Batches | None = None,
    save_best: Callable[[Path], object] | None = None,
    **options: Any,
) -> tuple[TrainingResult, str]:
    text = io.StringIO()
    evaluation = Evaluation(engine, held_out() if data is None else data)
    options = {"steps": 5, "eval_every": 2, **options}
    result = train(
        engine, make_batches(), TrainingOptions(out=out, **options), console=Console(file=text, width=200),
        evaluation=evaluation, save_best=save_best,
    )  # fmt: skip
    return result, text.getvalue()


def evaluations(out: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in RunFolder(out).evaluations()}


class Labelled(tiny_training.Model):
    """Takes what a batch of examples has."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return super().forward(input_ids)


def test_the_loss_is_the_mean_over_predicted_tokens_and_the_engine_is_as_before(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain, model = Labelled(dropout=0.5), Labelled(dropout=0.5)
    plain.load_state_dict(model.state_dict())
    model.train().layers[1].eval()  # somebody's own choice
    rows = [*tiny_training.batch(0)["input_ids"], tiny_training.batch(1)["input_ids"][0, :5]]  # fewer weigh less
    examples = [Example(ids, ids, 0) for row in rows for ids in [row.numpy().astype(np.int32)]]
    data = Batches(examples, batch_size=tiny_training.ROWS, seq_len=tiny_training.TOKENS, pad_to_multiple_of=1)
    first, second = next(data), next(data)
    with torch.no_grad():
        plain.eval()
        losses = [num_predicted(batch) * float(plain(batch["input_ids"]).loss) for batch in (first, second)]
    with tiny_training.engine(model, "BACKWARD", tmp_path) as engine:
        evaluation, random = Evaluation(engine, data), torch.get_rng_state()
        found = evaluation.run()
        assert found is not None and found.tokens == 2 * 7 + 4 and found.loss == sum(losses) / found.tokens
        assert (data.epoch, data.position) == (0, 2)  # in the order of every other one
        assert torch.equal(torch.get_rng_state(), random)
        assert [module.training for module in model.layers] == [True, False, True] and model.training
        assert all(p.grad is None for p in model.parameters())
        for number in range(3):
            tiny_training.train(engine, [number])
            evaluation.run()
        assert engine.step_meter.num_steps == 3  # each of them still counts as one that nothing disturbed


def test_an_evaluation_takes_less_memory_than_a_step(make_engine: Any, disk_folder: Path) -> None:
    engine = make_engine(build_lora("llama"), {"stream_edges": True}, bits=4, nvme=disk_folder, batch_size=4)
    ids = np.arange(3, 19, dtype=np.int32)
    data = Batches([Example(ids, ids, 0)] * 16, batch_size=4, seq_len=16)
    engine.train_batch([next(data)])
    with AllocationMeter() as step:
        engine.train_batch([next(data)])
    with AllocationMeter() as evaluated:
        Evaluation(engine, data).run()
    assert 0 < evaluated.peak_bytes < step.peak_bytes / 2


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.full
@pytest.mark.parametrize("what", ["adapters", "packing", "full"])
def test_a_run_that_is_evaluated_trains_to_the_bits_of_one_that_is_not(
    what: str, arguments: list[str], full: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = full if what == "full" else [*arguments, "--adapters", "lora:r=4,dropout=0.2"]
    words += ["--packing"] if what == "packing" else []
    held_out_file = tmp_path / "held_out.jsonl"
    held_out_file.write_text("".join(json.dumps({"text": "abcdefgh" * many}) + "\n" for many in (1, 2, 7)))
    evaluated = [*words, "--eval-data", str(held_out_file), "--eval-every", "1", "--keep-best"]

    def trained(out: Path) -> bytes:
        return weights(out) if what == "full" else adapter_bytes(out)

    def run_to(step: int, out: Path, words: list[str], *more: str) -> str:
        drive = tmp_path / f"nvme {out.name}"
        drive.mkdir(exist_ok=True)
        at = words.index("--nvme")
        words = [*words[: at + 1], str(drive), *words[at + 2 :]]
        assert main([*words, "--out", str(out), "--steps", str(step), *more]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    plain, straight, resumed = (tmp_path / name for name in ("plain", "straight", "resumed"))
    run_to(3, plain, words)
    shown = run_to(3, straight, evaluated)
    assert "held out:" in shown and "1 truncated (25 tokens cut)" in shown and "evaluated every 1 steps" in shown
    run_to(2, resumed, words)
    run_to(3, resumed, evaluated, "--resume")
    names = ("step", "epoch", "loss", "lr", "tokens")
    taken = [
        [[line[name] for name in names] for line in RunFolder(out).metrics()] for out in (plain, straight, resumed)
    ]
    assert taken[0] == taken[1] == taken[2] and len(taken[0]) == 3
    assert trained(plain) == trained(straight) == trained(resumed)
    best = RunFolder(straight).best
    assert best is not None and RunFolder(resumed).best == best
    assert files(straight / "best") == files(resumed / "best")
    result = files(straight / ("model" if what == "full" else "adapter"))
    assert files(straight / "best").keys() == result.keys()
    assert (files(straight / "best") == result) is (best["step"] == 3)
    losses = evaluations(straight)
    assert best["eval_loss"] == min(losses.values())
    assert losses.keys() == {1, 2, 3} and len({*losses.values()}) == 3
    assert evaluations(resumed) == {step: losses[step] for step in (2, 3)}  # of the step before it was made up for
    assert main(["report", str(straight)]) == 0
    assert f"held out:    loss {losses[3]:.4f} at step 3, lowest" in capsys.readouterr().out


def test_evaluations_without_data_are_a_mistake(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = fails(capsys, *arguments, "--out", str(tmp_path / "out"), "--eval-every", "2")
    assert code == 2 and "--eval-every: is for --eval-data" in line
    code, line = fails(capsys, *arguments, "--out", str(tmp_path / "out"), "--eval-data", str(tmp_path / "none"))
    assert code == 2 and "none" in line and list((tmp_path / "nvme").iterdir()) == []


def test_evaluations_come_when_asked_and_at_the_end_and_have_lines_of_their_own(tmp_path: Path) -> None:
    engine, never = FakeEvaluatedEngine(), FakeEngine()
    result, shown = run(tmp_path / "out", engine)
    assert list(evaluations(tmp_path / "out")) == [2, 4, 5]
    assert engine.num_calls == 3 * 2 and result.evaluated is not None
    assert result.evaluated.loss == evaluations(tmp_path / "out")[5] and result.evaluated.tokens == 2 + 3 + 4 + 5
    assert f"step 5/5  held-out loss {result.evaluated.loss:.4f} over 14 tokens" in shown
    train(never, make_batches(), TrainingOptions(out=tmp_path / "never", steps=5), console=Console(file=io.StringIO()))
    names = ("step", "epoch", "loss", "lr", "tokens", "bytes_read")
    steps = RunFolder(tmp_path / "out").metrics()
    assert [[line[name] for name in names] for line in steps] == [
        [line[name] for name in names] for line in metrics_of(tmp_path / "never")
    ]
    assert engine.seen == never.seen and torch.equal(engine.weight, never.weight)
    assert engine.events == ["step"] * 5 + ["save checkpoint-5"]  # before the last evaluation, which may take long


@pytest.mark.parametrize(
    ("every", "due"), [(2, [3, 3, 2, 2, 1, 0]), (1, [5, 4, 3, 2, 1, 0]), (5, [1, 1, 1, 1, 1, 0]), (None, [1] * 5 + [0])]
)
def test_evaluations_still_to_come_are_a_part_of_the_remaining_time(
    every: int | None, due: list[int], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(at_step=0, settings={})
    evaluations = Evaluations(
        Evaluation(FakeEvaluatedEngine(), held_out()), folder, Events(), print, every=every, total_steps=5,
        is_to_stop=lambda: False,
    )  # fmt: skip

    def shown() -> list[float]:
        return [evaluations.seconds_from(step, seconds_of_batch=3.0) for step in range(1, 7)]

    assert shown() == [num * 2 * FORWARD_SHARE * 3.0 for num in due]  # two batches each
    made = [step for step in range(1, 6) if evaluations.behind(step)]
    assert made == [step for step in range(1, 6) if due[step - 1] > due[step]]
    assert evaluations.newest is not None and shown() == [num * evaluations.newest.seconds for num in due]
    folder.close()


def test_a_resumed_run_makes_up_for_an_evaluation_that_a_signal_left_out_and_repeats_none(tmp_path: Path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "out"
    run(straight, FakeEvaluatedEngine())
    engine = FakeEvaluatedEngine()
    engine.during_call[3] = lambda: signal.raise_signal(signal.SIGTERM)  # in the second evaluation
    result, shown = run(out, engine)
    assert (result.step, result.interrupted) == (4, signal.SIGTERM) and list(evaluations(out)) == [2]
    assert "step 4: the evaluation was left out; --resume makes it" in shown and "stopped after step 4" in shown
    engine = FakeEvaluatedEngine()
    engine.during_call[3] = lambda: signal.raise_signal(signal.SIGTERM)  # in the last one, behind the last step
    result, shown = run(out, engine, resume=True)
    assert (result.step, result.interrupted, result.evaluated is not None) == (5, signal.SIGTERM, True)
    assert "all steps are taken, the last evaluation is not made; continue with --resume" in shown
    assert "finished" not in shown and RunFolder(out).finished_at() is None and list(evaluations(out)) == [2, 4]
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        run(out, FakeEvaluatedEngine())
    engine = FakeEvaluatedEngine()
    engine.during_call[1] = lambda: signal.raise_signal(signal.SIGINT)  # in the same one, with no step left
    result, shown = run(out, engine, resume=True)
    assert (result.step, result.interrupted) == (5, signal.SIGINT) and shown.count("was left out") == 1
    engine = FakeEvaluatedEngine()
    engine.during_call[2] = lambda: signal.raise_signal(signal.SIGTERM)  # too late to leave anything out
    result, shown = run(out, engine, resume=True)
    assert result.interrupted is None and "finished at step 5" in shown and engine.events == []
    assert engine.num_calls == 2 and evaluations(out) == evaluations(straight)
    engine = FakeEvaluatedEngine()
    run(out, engine, resume=True)
    assert engine.num_calls == 0
    run(out, engine, held_out(shift=1), resume=True)  # other data are another evaluation
    assert engine.num_calls == 2 and len(RunFolder(out).evaluations()) == 4


def test_a_report_has_the_newest_and_the_lowest_and_what_is_not_finite(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(at_step=0, settings={})

    def said() -> str:
        return dict(lines(collect(tmp_path)))["held out"]

    assert collect(tmp_path)["evaluations"] is None and "held out" not in dict(lines(collect(tmp_path)))
    for step, loss, data in [(1, 0.1, "aa"), (2, 3.0, "bb"), (4, 2.0, "bb"), (6, 2.5, "bb")]:
        folder.append_metrics({"step": step, "eval_loss": loss, "eval_tokens": 9, "eval_data": data})
    assert said() == (
        "loss 2.5000 at step 6, lowest 2.0000 at step 4; 9 tokens, 3 evaluation(s); 1 with other data left out"
    )
    folder.append_metrics({"step": 8, "eval_loss": None, "eval_tokens": 9, "eval_data": "cc"})
    folder.close()
    assert said() == "loss not finite at step 8; 9 tokens, 1 evaluation(s); 4 with other data left out"
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"] is None


class Best:
    """Saves the weight; `losses` are those of evaluations in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: FakeEvaluatedEngine, *losses: float) -> None:
        self._weight, self._losses, self.saved = engine.weight, list(losses), 0
        monkeypatch.setattr(Evaluation, "run", lambda *_: Evaluated(loss=self._losses.pop(0), tokens=1, seconds=0.1))

    def __call__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self._weight.data, folder / "weight.pt")
        self.saved += 1


def best_weight(out: Path) -> torch.Tensor:
    weight: torch.Tensor = torch.load(out / "best" / "weight.pt")
    return weight


def test_the_best_is_kept_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, out = FakeEvaluatedEngine(), tmp_path / "out"
    weights_then: dict[int, torch.Tensor] = {}
    for step in range(1, 7):
        engine.after_step[step] = lambda step=step: weights_then.update({step: engine.weight.data.clone()})  # type: ignore[misc]
    best = Best(monkeypatch, engine, math.nan, 3.0, 1.0, 1.0, math.inf, 2.0)
    _, shown = run(out, engine, save_best=best, steps=6, eval_every=1)
    assert best.saved == 2 and torch.equal(best_weight(out), weights_then[3])
    assert RunFolder(out).best == {"step": 3, "eval_loss": 1.0, "eval_data": evaluation_data(out)}
    assert (
        shown.count("the lowest") == 2 and f"held-out loss 1.0000 over 1 tokens (0:00), the lowest: {out}/best" in shown
    )
    with pytest.raises(ConfigError, match="save_best: there is no evaluation"):
        train(FakeEngine(), make_batches(), TrainingOptions(out=tmp_path, steps=1), save_best=best)


def test_a_run_that_goes_on_keeps_the_best_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, engine = tmp_path / "out", FakeEvaluatedEngine()
    engine.poison_at = 4
    with pytest.raises(NonFiniteLoss):  # with nothing saved but the best
        run(out, engine, save_best=Best(monkeypatch, engine, 3.0, 1.0, 2.0), eval_every=1)
    with pytest.raises(ConfigError, match="best is of step 2 of an unfinished run; continue it with --resume"):
        run(out, FakeEvaluatedEngine())
    kept, engine = best_weight(out), FakeEvaluatedEngine()
    best = Best(monkeypatch, engine, 3.0, 1.0, 2.0, 1.5, 0.5)
    run(out, engine, save_best=best, eval_every=1, steps=4, resume=True)
    assert best.saved == 0 and torch.equal(best_weight(out), kept)  # the steps are those from before, to the bit
    run(out, engine, save_best=best, eval_every=1, resume=True)
    assert best.saved == 1 and RunFolder(out).best is not None and RunFolder(out).best["step"] == 5  # type: ignore[index]
    engine = FakeEvaluatedEngine()
    best = Best(monkeypatch, engine, 9.0)
    run(out, engine, held_out(shift=1), save_best=best, steps=5, resume=True)  # what other data say is no comparison
    assert best.saved == 1


@pytest.mark.parametrize("cut", ["save", "note"])
def test_a_best_that_a_kill_cut_off_is_saved_again(cut: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, engine = tmp_path / "out", FakeEvaluatedEngine()
    best = Best(monkeypatch, engine, 2.0)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if cut == "note":
            patched.setattr(RunFolder, "note_best", killed)
        run(out, engine, save_best=killed if cut == "save" else best, eval_every=None)
    assert evaluations(out) == {} and RunFolder(out).best is None
    best = Best(monkeypatch, engine, 2.0)
    run(out, engine, save_best=best, eval_every=None, resume=True)
    assert best.saved == 1 and evaluations(out) == {5: 2.0} and torch.equal(best_weight(out), engine.weight)


def evaluation_data(out: Path) -> str:
    [data] = {line["eval_data"] for line in RunFolder(out).evaluations()}
    return str(data)


def test_a_loss_that_is_not_finite_ends_no_run(tmp_path: Path) -> None:
    engine = FakeEvaluatedEngine()
    engine.during_call[1] = lambda: engine.weight.data.fill_(math.inf)
    result, shown = run(tmp_path / "out", engine, eval_every=None, steps=3)
    assert result.step == 3 and "held-out loss inf" in shown and evaluations(tmp_path / "out") == {3: None}


def test_tensorboard_gets_evaluations_beside_the_training(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "out", FakeEvaluatedEngine(), logdir=tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 4, 5]
    assert not [name for name in events.Tags()["scalars"] if "eval_" in name or "data" in name]


def test_a_step_between_evaluations_that_has_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_every: there is no evaluation"):
        train(FakeEngine(), make_batches(), TrainingOptions(out=tmp_path, steps=1, eval_every=1))
    with pytest.raises(ConfigError, match="eval_every: must be a whole number"):
        TrainingOptions(out=tmp_path, steps=1, eval_every=0)
