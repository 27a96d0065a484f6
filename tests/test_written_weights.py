"""What somebody writes into weights that train is refused where the next step would lose it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_rt.errors import ConfigError
from tests.changing_plans import propose, results, with_pieces_in_memory
from tests.full_parity import training_of
from tests.killed_training import ADAPTERS, MAX_NORM, built, resume
from tests.tiny_training import Plain, State, adamw, batch, differences, engine, model, train

PLACES_HERE = ("in place", "from HOST", "AFTER", "BACKWARD", "SPECULATIVE, in parts")
IN_MEMORY, AT_REST = "head.weight", "layers.1.up.weight"


def halve(run: Any, *names: str) -> None:
    with torch.no_grad():
        for name in names:
            run.model.get_parameter(name).mul_(0.5)


@pytest.fixture(scope="module")
def expected() -> State:
    """That of three steps without any writing, in plain PyTorch."""
    twin = Plain(model())
    train(twin, range(3))
    return twin.state()


@pytest.mark.parametrize("place", PLACES_HERE)
def test_a_weight_that_is_written_between_steps_is_refused_by_name_and_changes_nothing(
    place: str, expected: State, tmp_path: Path
) -> None:
    with engine(model(), place, tmp_path) as run:
        train(run, range(2))
        halve(run, IN_MEMORY)
        with pytest.raises(ConfigError, match=rf"forward: 1 weights were written .*\(first: {IN_MEMORY}\)"):
            run(**batch(2))
        train(run, range(2, 3))
        assert differences(expected, run.state()) == []


@pytest.mark.parametrize("place", ["in place", "BACKWARD", "SPECULATIVE"])
def test_one_that_is_written_between_backward_and_step_is_refused_by_the_step(
    place: str, expected: State, tmp_path: Path
) -> None:
    with engine(model(), place, tmp_path) as run:
        train(run, range(2))
        run.backward(run(**batch(7)).loss)
        assert bool(training_of(run).ahead.blocks) == (place != "in place")
        halve(run, IN_MEMORY)
        with pytest.raises(ConfigError, match=rf"step: 1 weights were written .*\(first: {IN_MEMORY}\)"):
            run.step()
        train(run, range(2, 3))
        assert differences(expected, run.state()) == []


@pytest.mark.parametrize("place", PLACES_HERE)
def test_weights_that_are_swapped_for_an_evaluation_and_back_are_no_error(
    place: str, expected: State, tmp_path: Path
) -> None:
    with engine(model(), place, tmp_path) as run:
        train(run, range(2))
        with torch.no_grad():
            before = run(**batch(9)).loss
            weight = run.model.get_parameter(IN_MEMORY)
            kept = weight.clone()
            weight.mul_(0.5)
            assert run(**batch(9)).loss != before, "the evaluation sees them"
            assert not training_of(run).settled(), "another plan would round them from their masters"
            weight.copy_(kept)
        train(run, range(2, 3))
        assert differences(expected, run.state()) == []


@pytest.mark.parametrize("write", [nn.init.zeros_, lambda weight: weight[0, 0].fill_(1.0)], ids=["all", "one"])
def test_what_is_written_to_a_placeholder_is_refused_and_taken_away(
    write: Callable[[torch.Tensor], object], expected: State, tmp_path: Path
) -> None:
    """Torch refuses most writes to one, of so many elements in one; not these."""
    with engine(model(), "BACKWARD", tmp_path) as run:
        train(run, range(2))
        weight = run.model.get_parameter(AT_REST)
        with torch.no_grad():
            write(weight)
        with pytest.raises(ConfigError, match=rf"1 weights were written .*\(first: {AT_REST}\)"):
            run(**batch(2))
        assert weight.isnan().all()
        train(run, range(2, 3))
        assert differences(expected, run.state()) == []


def test_several_in_layers_and_outside_are_counted(expected: State, tmp_path: Path) -> None:
    with engine(model(), "in place", tmp_path) as run:
        halve(run, AT_REST, IN_MEMORY, "layers.2.gate")
        with pytest.raises(ConfigError, match="3 weights were written"):
            run(**batch(0))
        train(run, range(3))
        assert differences(expected, run.state()) == []


@pytest.mark.parametrize("place", ["in place", "AFTER"])
def test_a_checkpoint_that_would_be_without_what_was_written_is_refused(
    place: str, expected: State, tmp_path: Path
) -> None:
    with engine(model(), place, tmp_path) as run:
        train(run, range(2))
        halve(run, IN_MEMORY)
        with pytest.raises(ConfigError, match="save_checkpoint: 1 weights were written"):
            run.save_checkpoint(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
        run.save_checkpoint(tmp_path / "saved")
        halve(run, IN_MEMORY)
        run.load_checkpoint(tmp_path / "saved")
        train(run, range(2, 3))
        assert differences(expected, run.state()) == []


def test_one_that_is_written_before_a_step_is_taken_back_is_refused_afterwards(expected: State, tmp_path: Path) -> None:
    """The model's weights are masters, rounded again, where a step that ran ahead is dropped."""
    with engine(model(), "BACKWARD", tmp_path) as run:
        train(run, range(2))
        run.backward(run(**batch(7)).loss)
        halve(run, IN_MEMORY)
        run.optimizer.zero_grad()
        with pytest.raises(ConfigError, match=rf"forward: 1 weights were written .*\(first: {IN_MEMORY}\)"):
            run(**batch(2))
        train(run, range(2, 3))
        assert differences(expected, run.state()) == []


class ClippedSGD(torch.optim.SGD):
    """Weights stay within bounds."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(-0.05, 0.05)


@pytest.mark.parametrize("place", ["in place", "BACKWARD"])
def test_an_optimizer_of_ones_own_changes_masters_as_the_error_says(place: str, tmp_path: Path) -> None:
    def clipped(parameters: Any) -> torch.optim.Optimizer:
        return ClippedSGD(parameters, lr=0.1)

    twin = Plain(model(), clipped)
    train(twin, range(3))
    with engine(model(), place, tmp_path, optimizer=clipped) as run:
        train(run, range(3))
        assert differences(twin.state(), run.state()) == []
        assert float(run.state()[AT_REST][0].abs().max()) == pytest.approx(0.05)


@pytest.mark.parametrize("changes", [False, True], ids=["one plan", "changing"])
def test_adapters_keep_what_is_written_into_them_wherever_their_state_rests(changes: bool, tmp_path: Path) -> None:
    """They are stepped themselves, as in memory. Another plan finds them as they are, not as they were committed."""
    name = "layers.1.mixed"
    twin = built(ADAPTERS).eval()
    optimizer = adamw([parameter for parameter in twin.parameters() if parameter.requires_grad])
    with resume(tmp_path, ADAPTERS)[0] as run:
        run.model.eval()
        for number in range(3):
            for parameters in (twin, run.model):
                with torch.no_grad():
                    parameters.get_parameter(name).mul_(0.5)
            if changes and number == 2:
                propose(run, with_pieces_in_memory(run, 2))
            loss = twin(**batch(number)).loss
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in twin.parameters() if p.requires_grad], MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            train(run, [number])
        assert results(run) == ["changed"] * changes
        unequal = [n for n, p in run.trainable.items() if not torch.equal(p, twin.get_parameter(n))]
        assert unequal == []
