"""What somebody writes into frozen weights is computed with, with a word, or refused by name: never lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.rule.streaming import plan_streaming
from tests.changing_plans import propose, results
from tests.parity import BATCH_SIZE, SEQ_LEN, VOCABULARY, PlainBlock, PlainModel

NAME = "layers.1.up.weight"
AT_REST = {
    "4 bits": {"bits": 4},
    "HOST": {"host_memory": "64MiB", "options": RuntimeOptions(fill=False)},
    "NVME": {"nvme": True, "options": RuntimeOptions(fill=False)},
}

IN_MEMORY = {"nvme": True, "device_memory": "64MiB"}
"""Though a drive has them, too."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return PlainModel().eval()  # no dropout


def batch(number: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (BATCH_SIZE, SEQ_LEN), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def engine(folder: Path, of: nn.Module | None = None, **arguments: Any) -> Engine:
    if arguments.pop("nvme", False):
        folder.mkdir(exist_ok=True)
        arguments["nvme"] = folder
    return Engine(of or model(), lr=1e-2, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, device="cpu", **arguments)


def steps(run: Any, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        loss = run(**batch(number)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def plain(write: Callable[[Any], object]) -> list[float]:
    """Losses of four steps, with `write` behind the second."""
    of = model()
    optimizer = torch.optim.AdamW([p for p in of.parameters() if p.requires_grad], lr=1e-2)
    before = steps(of, optimizer, range(2))
    with torch.no_grad():
        write(of)
    return before + steps(of, optimizer, range(2, 4))


def replace_data(of: Any) -> None:
    of.get_parameter(NAME).data = torch.full_like(of.get_parameter(NAME), 0.25)


def write_one(of: Any) -> None:
    of.get_parameter(NAME)[0, 0] = 3.0


def write_all(of: Any) -> None:
    of.get_parameter(NAME).fill_(0.25)


@pytest.mark.parametrize("write", [replace_data, write_one, write_all])
@pytest.mark.parametrize("place", AT_REST)
def test_what_is_written_to_a_weight_at_rest_is_refused_by_name_and_changes_nothing(
    place: str, write: Callable[[Any], None], tmp_path: Path
) -> None:
    """Torch refuses other writes to a placeholder: of so many elements in one."""
    with engine(tmp_path / "a", **AT_REST[place]) as run, engine(tmp_path / "b", **AT_REST[place]) as twin:
        steps(run, run.optimizer, range(2))
        with torch.no_grad():
            write(run.model)
            with pytest.raises(ConfigError, match=rf"forward: 1 frozen weights were written to \(first: {NAME}\)"):
                run(**batch(2))
        assert run.model.get_parameter(NAME).isnan().all()
        losses = steps(twin, twin.optimizer, range(4))
        assert steps(run, run.optimizer, range(2, 4)) == losses[2:]


@pytest.mark.parametrize("place", [{}, IN_MEMORY], ids=["no drive", "a drive"])
@pytest.mark.parametrize("write", [replace_data, write_all, lambda of: of.get_parameter(NAME).mul_(2.0)])
def test_what_is_written_to_a_weight_in_memory_is_computed_with_and_said_once(
    write: Callable[[Any], None], place: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with engine(tmp_path, **place) as run:
        losses = steps(run, run.optimizer, range(2))
        with torch.no_grad():
            write(run.model)
            run(**batch(9))
            assert "were written to" not in caplog.text, "an evaluation may swap them and put them back"
        losses += steps(run, run.optimizer, range(2, 4))
        assert caplog.text.count(f"1 frozen weights were written to (first: {NAME})") == 1
    assert losses == plain(write) != plain(lambda of: None)


def test_no_other_plan_follows_that_would_bring_such_a_weight_anew(tmp_path: Path) -> None:
    def write(of: Any) -> None:
        of.get_parameter(NAME).mul_(2.0)

    for writes in (False, True):
        with engine(tmp_path, **IN_MEMORY) as run:
            losses = steps(run, run.optimizer, range(2))
            with torch.no_grad():
                write(run.model if writes else model())
            propose(run, plan_streaming(run._runtime.made_of.problem))
            losses += steps(run, run.optimizer, range(2, 4))
            assert results(run) == ([] if writes else ["changed"])
            assert losses == plain(write if writes else lambda of: None)


def test_a_model_is_not_saved_without_what_was_put_in_a_weights_place(tmp_path: Path) -> None:
    def half_frozen() -> nn.Module:
        made = model().requires_grad_(True)
        made.layers[1].requires_grad_(False)  # type: ignore[index]
        return made

    for write in (write_all, replace_data):
        with engine(tmp_path, half_frozen()) as run:
            with torch.no_grad():
                write(run.model)
            if write is replace_data:
                with pytest.raises(ConfigError, match=rf"1 frozen weights have another tensor .*\(first: {NAME}\)"):
                    run.save_pretrained(tmp_path / "saved")
                continue
            run.save_pretrained(tmp_path / "written")
            from safetensors.torch import load_file

            assert (load_file(tmp_path / "written" / "model.safetensors")[NAME] == 0.25).all()


@pytest.mark.parametrize("place", [{}, *AT_REST.values()], ids=["DEVICE", *AT_REST])
def test_modules_and_parameters_that_take_the_place_of_others_are_computed_with(
    place: dict[str, Any], tmp_path: Path
) -> None:
    def swap(of: Any) -> None:
        torch.manual_seed(5)
        of.layers[1].up = nn.Linear(64, 192).requires_grad_(False)
        of.layers[2].down.weight = nn.Parameter(torch.full((64, 192), 0.01), requires_grad=False)
        of.layers[3] = PlainBlock(64)

    with engine(tmp_path, **place) as run:
        losses = steps(run, run.optimizer, range(2))
        swap(run.model)
        losses += steps(run, run.optimizer, range(2, 4))
    if "bits" not in place:
        assert losses == plain(swap)


def test_a_step_asks_as_many_questions_of_each_weight_however_large_it_is(tmp_path: Path) -> None:
    """Nothing of a weight is read."""
    with engine(tmp_path) as run:
        frozen = run._runtime.frozen
        with torch.autograd.profiler.profile() as seen:
            frozen.check("forward")
        assert [event.key for event in seen.key_averages()] == []
