"""What a step of full fine-tuning means in every mode: what is left out, forgotten, looked at between, called oddly."""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import operator
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt import optim
from offload_rt.errors import (
    ConfigError,
    IntegrityError,
    OffloadError,
    StorageError,
    StoreCorrupt,
    UnsupportedModule,
    storage_error,
)
from planners.plans.activations import Action, whole_batch
from planners.plans.plan import StatePlacement, Tier
from tests.conftest import decode_in_place, flip
from tests.tiny_training import PLACES, Plain, batch, differences, engine, model, train

ON_NVME = [place for place in PLACES if "nvme" in PLACES[place]]
TURNS = itertools.cycle(
    [
        ("BACKWARD, split", "SPECULATIVE"),
        ("BACKWARD, tight", "SPECULATIVE, split"),
        ("BACKWARD", "SPECULATIVE, in parts"),
    ]
)
"""Where updates run ahead, state rests in one of three ways: tests take turns, so that each is in every mode, and every
way is met by a third of them. The full matrix has all places."""


def everywhere(test: Callable[..., None], places: Iterable[str] = PLACES) -> Callable[..., None]:
    """The test in every mode."""
    turn = next(TURNS)
    kept = [
        pytest.param(place, marks=() if place in ("in place", "AFTER", *turn) else pytest.mark.full) for place in places
    ]
    return pytest.mark.parametrize("place", kept)(test)  # type: ignore[no-any-return]


def by_turns(name: str, values: tuple[Any, ...], places: Iterable[str] = PLACES) -> Callable[..., Callable[..., None]]:
    """The same, with the values of `name` by turns; the full matrix has each in every place."""

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        turn = next(TURNS)
        met = [place for place in places if place in ("in place", "AFTER", *turn)]
        kept = {(place, values[number % len(values)]) for number, place in enumerate(met)}
        cells = [
            pytest.param(*cell, marks=() if cell in kept else pytest.mark.full)
            for cell in itertools.product(places, values)
        ]
        return pytest.mark.parametrize(f"place, {name}", cells)(test)  # type: ignore[no-any-return]

    return decorated


@everywhere
def test_a_kept_loss_that_is_never_gone_back_through_keeps_no_gradient_from_its_layer(
    place: str, tmp_path: Path
) -> None:
    twin = Plain(model())
    train(twin, range(3))
    with engine(model(), place, tmp_path) as run:
        train(run, range(2))
        kept = run(**batch(9)).loss
        train(run, range(2, 3))
        assert kept.requires_grad
        assert differences(twin.state(), run.state()) == []


@everywhere
def test_a_layer_called_twice_and_one_that_is_skipped_train_as_in_memory(place: str, tmp_path: Path) -> None:
    def go(run):  # type: ignore[no-untyped-def]
        for order in ([0, 1, 2], [0, 1, 1, 2], [0, 2], [2, 1, 0, 2]):
            run.model.order = order
            train(run, [len(order)])
        return run.state()

    with engine(model(), place, tmp_path) as run:
        assert differences(go(Plain(model())), go(run)) == []


@everywhere
def test_micro_batches_whose_forwards_come_first_are_summed_in_fp32(place: str, tmp_path: Path) -> None:
    def go(run):  # type: ignore[no-untyped-def]
        for step in range(3):
            for loss in [run(**batch(2 * step + index)).loss for index in range(2)]:
                run.backward(loss)
            run.step()
        return run.state()

    with engine(model(), place, tmp_path, accumulation_steps=2) as run:
        assert differences(go(Plain(model())), go(run)) == []


def test_gradients_of_a_pass_that_was_cut_off_do_not_reach_the_next(tmp_path: Path) -> None:
    """A layer that is called twice has handed over one gradient of two when the pass ends."""

    def build():  # type: ignore[no-untyped-def]
        made = model()
        made.order = [0, 1, 2, 1]
        return made

    twin = Plain(build())
    train(twin, range(2))
    with engine(build(), "in place", tmp_path) as run:
        train(run, range(1))

        def fail(gradient: torch.Tensor) -> None:
            raise RuntimeError("out of luck")

        handle = run.model.layers[2].register_forward_hook(lambda *a: a[-1].register_hook(fail) and None)
        with pytest.raises(RuntimeError, match="out of luck"):
            run.backward(run(**batch(7)).loss)
        handle.remove()
        run.optimizer.zero_grad()
        train(run, range(1, 2))
        assert differences(twin.state(), run.state()) == []


def on_nvme(test: Callable[..., None]) -> Callable[..., None]:
    """The same, without those whose state stays in memory."""
    return everywhere(test, ON_NVME)


def not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, with gradients that are not finite."""
    return loss + (loss * 0).sqrt()


@on_nvme
def test_a_step_after_loading_is_left_out_without_going_back_before_what_was_loaded(place: str, tmp_path: Path) -> None:
    """The log's weights are older than its masters: the run before had its weights in memory and wrote masters only."""
    twin = Plain(model())
    train(twin, range(5))
    with engine(model(), place, tmp_path) as run:
        train(run, range(2))
        run.save_checkpoint(tmp_path / "two")
    with engine(model(), "in place", tmp_path, nvme=tmp_path, commit_every=1) as run:
        run.load_checkpoint(tmp_path / "two")
        train(run, range(2, 3))
        assert run.report()["training"]["state_in_memory_bytes"]
    with engine(model(), place, tmp_path) as run:
        run.load_checkpoint(run.commit_folder)
        run.backward(not_finite(run(**batch(7)).loss))
        run.step()
        train(run, range(3, 5))
        assert differences(twin.state(), run.state()) == []


@everywhere
def test_saving_and_loading_between_backward_and_step_see_the_last_step(place: str, tmp_path: Path) -> None:
    twin = Plain(model())
    train(twin, range(3))
    with engine(model(), place, tmp_path) as run:
        train(run, range(3))
        run.save_checkpoint(tmp_path / "before")
        run.backward(run(**batch(7)).loss)
        if "BACKWARD" in place:
            with pytest.raises(ConfigError, match="saved between backward and step"):
                run.save_checkpoint(tmp_path / "between")
        else:
            run.save_checkpoint(tmp_path / "between")
        run.optimizer.zero_grad()
        train(run, range(8, 10))
        for folder in ("before", "between"):
            if (tmp_path / folder).exists():
                run.backward(run(**batch(7)).loss)
                run.load_checkpoint(tmp_path / folder)
                assert differences(twin.state(), run.state()) == []
                assert train(run, range(3, 4)) == train(copy.deepcopy(twin), range(3, 4))


@on_nvme
def test_an_earlier_runs_state_is_neither_trained_nor_saved_over_before_it_is_loaded(
    place: str, tmp_path: Path
) -> None:
    twin = Plain(model())
    train(twin, range(4))
    with engine(model(), place, tmp_path) as run:
        train(run, range(3))
    with engine(model(), place, tmp_path) as run:
        for refused in (lambda: run(**batch(3)), lambda: run.save_checkpoint(tmp_path / "no")):
            with pytest.raises(ConfigError, match="holds step 3 of an earlier run.*load_checkpoint"):
                refused()
        run.load_checkpoint(run.commit_folder)
        train(run, range(3, 4))
        assert differences(twin.state(), run.state()) == []


@everywhere
def test_a_log_that_no_step_was_made_in_begins_with_the_models_own_values(place: str, tmp_path: Path) -> None:
    def build():  # type: ignore[no-untyped-def]
        made = model()
        with torch.no_grad():  # the head stays in memory: its values do not name the log
            made.head.weight.mul_(2)
        return made

    engine(model(), place, tmp_path).close()
    twin = Plain(build())
    train(twin, range(2))
    with engine(build(), place, tmp_path) as run:
        train(run, range(2))
        assert differences(twin.state(), run.state()) == []


class FailingIO:
    """An engine's I/O; the `countdown`-th operation of a kind from now on fails, a write when it has half arrived."""

    def __init__(self, run, kind: str, countdown: int, error: int) -> None:  # type: ignore[no-untyped-def]
        self._io = run._runtime.links.io
        self._kind, self.left, self._error = kind, countdown, error
        self.failed = 0
        run._runtime.links.io = self

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self._io, name)

    def start(self, kind, file, offset_bytes, buffer):  # type: ignore[no-untyped-def]
        self.left -= kind == self._kind
        if kind != self._kind or self.left != -1:
            return self._io.start(kind, file, offset_bytes, buffer)
        num_bytes = len(buffer)
        arrives = buffer[: num_bytes // 2 // 4096 * 4096] if kind == "write" else buffer
        waiting = (
            self._io.start(kind, file, offset_bytes, arrives) if arrives or kind == "sync" else lambda seconds: None
        )

        def wait(timeout_seconds: float) -> None:
            waiting(timeout_seconds)
            self.failed += 1
            raise storage_error(
                f"{kind} failed", path=file.path, offset=offset_bytes, wanted=num_bytes, done=0, errno=self._error
            )

        return wait


FAIL_AT = {"read": (0, 1, 2, 5, 13, 34, 55), "write": (0, 1, 2, 5, 13, 34, 55), "sync": (0, 1, 2, 3, 4)}
"""Operations of a kind before the one that fails; by default, the first and the last but one are tried."""


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["read", "write", "sync"])
@pytest.mark.parametrize(
    "place",
    [
        "AFTER",
        "BACKWARD, tight",
        *(pytest.param(place, marks=pytest.mark.full) for place in ("BACKWARD", "SPECULATIVE", "SPECULATIVE, serial")),
    ],
)
def test_a_failing_drive_is_told_and_leaves_a_committed_step(
    place: str, kind: str, stride: int, tmp_path: Path
) -> None:
    """Whichever operation of a step fails: the run goes on after loading, with the numbers of one that never failed."""
    twin = Plain(model())
    expected = [state_after(twin, number) for number in range(7)]
    counted = recovered = 0
    for countdown in FAIL_AT[kind][::stride]:
        folder = tmp_path / str(countdown)
        folder.mkdir()
        with contextlib.suppress(StorageError), engine(model(), place, folder) as run:  # the last commit may fail
            train(run, range(4))
            io = FailingIO(run, kind, countdown, errno.EIO if countdown % 2 else errno.ENOSPC)
            try:
                train(run, range(4, 7))
            except StorageError as error:
                assert error.errno in (errno.EIO, errno.ENOSPC) and str(folder) in str(error)
                counted += 1
                run.optimizer.zero_grad()
                with contextlib.suppress(OffloadError):  # refused, or done again: never wrong
                    train(run, range(run.step_number, 7))
                    assert differences(expected[6], run.state()) == []
                    recovered += 1
            assert bool(io.failed) >= (run.step_number < 7)
        with engine(model(), place, folder) as run:
            run.load_checkpoint(run.commit_folder)
            assert run.step_number >= 3
            assert differences(expected[run.step_number - 1], run.state()) == []
            train(run, range(run.step_number, 7))
            assert differences(expected[6], run.state()) == []
    assert counted >= (2 if stride == 1 else 1)
    if kind == "read" and place != "AFTER":
        assert recovered, "the committed step was there to go back to"


def test_a_step_that_fails_between_two_blocks_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the last step is committed, what was stepped of the next one lies in the log's other slots."""
    twin = Plain(model())
    train(twin, range(5))
    with engine(model(), "SPECULATIVE", tmp_path) as run:
        train(run, range(3))
        run._training.ahead.wait_from_now_on("all blocks are to be stepped in step()")
        run.backward(run(**batch(7)).loss)
        stepper = run._training.stepper
        submit, stepped = stepper.submit, []

        def fails(block, *arguments: Any, **options: Any) -> None:  # type: ignore[no-untyped-def]
            if stepped:
                raise storage_error("write failed", path="a drive", errno=errno.EIO)
            stepped.append(block)
            submit(block, *arguments, **options)
            stepper.finish()

        with monkeypatch.context() as patched:
            patched.setattr(stepper, "submit", fails)
            with pytest.raises(StorageError, match="a drive: write failed"):
                run.step()
        assert stepped and run.step_number == 3
        train(run, range(3, 5))
        assert differences(twin.state(), run.state()) == []


def test_a_step_that_was_taken_does_not_raise_what_became_of_its_writes(tmp_path: Path) -> None:
    """Its commit does. `step` has begun to read for the next one, and met a write that failed."""
    state = StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=64, weight_slots=64)
    run = engine(model(), "AFTER", tmp_path, options={"state": state})
    train(run, range(1))
    run.backward(run(**batch(1)).loss)
    io = FailingIO(run, "write", 0, errno.EIO)
    run.step()
    assert run.step_number == 2 and io.failed
    with pytest.raises(StorageError, match="EIO"):
        run.save_checkpoint(run.commit_folder)
    slots = run._training.stepper.slots
    slots.forget()
    assert slots._state_pool.arena.held_bytes() == 0, "what failed has kept its slots"
    with contextlib.suppress(OffloadError):
        run.close()


def state_after(twin: Plain, number: int):  # type: ignore[no-untyped-def]
    train(twin, [number])
    return twin.state()


@by_turns("count", (1, 4))
def test_a_gradient_that_is_not_finite_is_left_out_of_the_state(
    place: str, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    twin = Plain(model())
    train(twin, range(5))
    with engine(model(), place, tmp_path) as run:
        train(run, range(3))
        for _ in range(count):
            run.backward(not_finite(run(**batch(7)).loss))
            run.step()
        assert run.report()["training"]["num_skipped"] == count and run.step_number == 3
        told = [line for line in caplog.messages if "left out" in line]
        assert told == [
            f"step 4 was left out: a gradient is not finite ({number} in a row, of 5 that end the run)"
            for number in range(1, count + 1)
        ]
        train(run, range(3, 5))
        assert differences(twin.state(), run.state()) == []
        assert run.report()["training"]["num_steps"] == 5


def test_five_gradients_in_a_row_that_are_not_finite_raise(tmp_path: Path) -> None:
    twin = Plain(model())
    train(twin, range(2))
    with engine(model(), "SPECULATIVE", tmp_path) as run:
        train(run, range(2))
        with pytest.raises(IntegrityError, match="5 steps in a row .* state is that of step 2"):
            for _ in range(9):
                run.backward(not_finite(run(**batch(7)).loss))
                run.step()
        assert run.report()["training"]["num_skipped"] == 5
        assert differences(twin.state(), run.state()) == []


@by_turns("how", ("optimizer.zero_grad", "model.zero_grad"))
def test_zeroed_gradients_are_dropped_with_what_ran_ahead(place: str, how: str, tmp_path: Path) -> None:
    twin = Plain(model())
    train(twin, range(4))
    with engine(model(), place, tmp_path) as run:
        train(run, range(2))
        for number in range(2, 4):
            run.backward(run(**batch(7)).loss)
            operator.attrgetter(how)(run)()
            train(run, [number])
        assert differences(twin.state(), run.state()) == []
        run.backward(run(**batch(7)).loss)
        operator.attrgetter(how)(run)()
        with pytest.raises(IntegrityError, match="no gradient has arrived"):
            run.step()
        assert differences(twin.state(), run.state()) == []


@everywhere
def test_what_the_models_own_zero_grad_takes_away_is_in_no_later_sum(place: str, tmp_path: Path) -> None:
    """Between a forward and its backward, where no forward comes any more that would see it."""
    twin, arguments = Plain(model(), max_grad_norm=PLACES[place].get("max_grad_norm")), {"accumulation_steps": 3}
    with engine(model(), place, tmp_path, **arguments) as run:
        for one in (twin, run):
            train(one, [0])
            losses = [one(**batch(number)).loss for number in (1, 2)]
            one.backward(losses[0])
            one.model.zero_grad()
            if one is twin:
                one.optimizer.zero_grad()
            else:
                assert list(run.gradients()) == []
                with pytest.raises(IntegrityError, match="no gradient has arrived"):
                    run.step()
                one.backward(one(**batch(1)).loss)
                one.model.zero_grad()
            one.backward(losses[1])
            one.step()
        assert differences(twin.state(), run.state()) == []


@pytest.mark.parametrize("kept", [False, True])
def test_a_pass_that_asks_for_no_gradients_of_parameters_leaves_none(kept: bool, tmp_path: Path) -> None:
    """`torch.autograd.grad` of an activation, as adversarial training and attributions take it."""
    options = {"activations": whole_batch(Action.KEEP)} if kept else {}

    def go(run):  # type: ignore[no-untyped-def]
        found = []
        seen: list[torch.Tensor] = []
        handle = run.model.embedding.register_forward_hook(lambda module, args, output: seen.append(output))
        for number in range(3):
            loss = run(**batch(number)).loss
            found += torch.autograd.grad(loss, seen, retain_graph=number == 1)
            if number != 1:
                loss = run(**batch(number)).loss
            seen.clear()
            run.backward(loss)
            run.step()
        handle.remove()
        return found

    twin = Plain(model())
    expected = go(twin)
    with engine(model(), "BACKWARD", tmp_path, accumulation_steps=2, options=options) as run:
        assert all(map(torch.equal, go(run), expected))
        assert differences(twin.state(), run.state()) == []


def test_a_call_is_over_where_a_pass_has_freed_its_graph_whatever_that_asked_for(tmp_path: Path) -> None:
    """Plans are made again between calls: one whose graph somebody holds does not keep that waiting for ever."""
    seen: list[torch.Tensor] = []
    with engine(model(), "BACKWARD", tmp_path) as run:
        run.model.embedding.register_forward_hook(lambda module, args, output: seen.append(output))
        loss = run(**batch(0)).loss
        torch.autograd.grad(loss, seen, retain_graph=True)
        assert run._runtime.is_in_flight
        torch.autograd.grad(loss, seen)
        assert not run._runtime.is_in_flight and loss.grad_fn is not None


def test_a_first_call_in_inference_mode_leaves_parameters_that_train(tmp_path: Path) -> None:
    twin = Plain(model())
    with engine(model(), "BACKWARD", tmp_path) as run:
        with torch.inference_mode():
            run(**batch(9))
        assert not any(parameter.is_inference() for parameter in run.model.parameters())
        assert train(run, range(3)) == train(twin, range(3))
        assert differences(twin.state(), run.state()) == []


def test_a_pass_that_asks_for_some_gradients_leaves_those(tmp_path: Path) -> None:
    chosen = ("embedding.weight", "layers.0.up.weight", "layers.2.norm.bias")
    twin = Plain(model())
    with engine(model(), "AFTER", tmp_path) as run:
        for one in (twin, run):
            train(one, [0])
            parameters = dict(one.model.named_parameters())
            one(**batch(1)).loss.backward(inputs=[parameters[name] for name in chosen])
        assert {name for name, _ in run.gradients()} == set(chosen)
        assert all(torch.equal(gradient, twin.weights[name].grad) for name, gradient in run.gradients())


@by_turns("training", (False, True))
def test_a_forward_between_backward_and_step_sees_the_old_weights_or_is_refused(
    place: str, training: bool, tmp_path: Path
) -> None:
    def go(run):  # type: ignore[no-untyped-def]
        train(run, range(2))
        run.backward(run(**batch(2)).loss)
        with torch.set_grad_enabled(training):
            between = float(run(**batch(8)).loss.detach())
        run.step()
        return [between, *train(run, range(3, 5))]

    twin = Plain(model())
    expected = go(twin)
    with engine(model(), place, tmp_path) as run:
        if "BACKWARD" not in place:
            assert go(run) == expected
            waits = run.report()["training"]["waits_because"]
            assert ("between backward and step" in waits) if "SPECULATIVE" in place else waits is None
        else:
            with pytest.raises(ConfigError, match="the model was called between backward and step; .* It was dropped"):
                go(run)
            assert run.step_number == 2
            train(run, range(2, 5))  # and goes on without it
        assert differences(twin.state(), run.state()) == []


@everywhere
def test_more_micro_batches_than_declared_are_summed_or_refused(place: str, tmp_path: Path) -> None:
    """Their forwards came first: nothing could be told before their gradients arrive."""

    def go(run, count):  # type: ignore[no-untyped-def]
        for loss in [run(**batch(index)).loss for index in range(count)]:
            run.backward(loss)
        run.step()

    twin = Plain(model())
    go(twin, 2)
    before = twin.state()
    go(twin, 3)
    with engine(model(), place, tmp_path, accumulation_steps=2) as run:
        go(run, 2)
        if PLACES[place].get("nvme") and place != "AFTER":
            with pytest.raises(ConfigError, match="once more after accumulation_steps=2 .* dropped"):
                go(run, 3)
            assert differences(before, run.state()) == []
        go(run, 3)  # now they wait for step()
        assert differences(twin.state(), run.state()) == []


@everywhere
def test_clipping_and_learning_rates_between_backward_and_step_are_followed(place: str, tmp_path: Path) -> None:
    """Not declared: seen in the first step, from which on updates wait."""

    def go(run):  # type: ignore[no-untyped-def]
        norms = []
        for step in range(4):
            run.backward(run(**batch(step)).loss)
            norms.append(run.clip_grad_norm_(0.05).clone())
            for group in run.optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 2)
            run.step()
        return norms

    twin = Plain(model())
    expected = go(twin)
    with engine(model(), place, tmp_path, max_grad_norm=None) as run:
        assert torch.equal(torch.stack(go(run)), torch.stack(expected))
        assert differences(twin.state(), run.state()) == []


@by_turns("as_tensor", (False, True), ON_NVME)
def test_a_learning_rate_changed_once_updates_ran_is_done_again_or_refused(
    place: str, as_tensor: bool, tmp_path: Path
) -> None:
    def go(run):  # type: ignore[no-untyped-def]
        train(run, range(2))
        run.backward(run(**batch(2)).loss)
        for group in run.optimizer.param_groups:
            group["lr"] = group["lr"].mul_(2) if as_tensor else group["lr"] * 2
        run.step()

    def adamw(parameters):  # type: ignore[no-untyped-def]
        made = optim.AdamW(parameters, lr=1e-2)
        for group in made.param_groups:
            group["lr"] = torch.tensor(1e-2) if as_tensor else 1e-2
        return made

    twin = Plain(model(), adamw)
    go(twin)
    with engine(model(), place, tmp_path, optimizer=adamw) as run:
        if "BACKWARD" in place:
            with pytest.raises(ConfigError, match="options of the optimizer were changed between"):
                go(run)
            assert run.step_number == 2
        else:
            go(run)
            assert run.report()["training"]["num_redone"] == ("SPECULATIVE" in place)
            assert differences(twin.state(), run.state()) == []


@everywhere
def test_gradients_are_those_of_plain_pytorch_and_are_found_nowhere_else(place: str, tmp_path: Path) -> None:
    twin = Plain(model())
    train(twin, range(1))
    twin.backward(twin(**batch(1)).loss)
    with engine(model(), place, tmp_path) as run:
        train(run, range(1))
        if "BACKWARD" in place:
            run._training.ahead.wait_from_now_on("gradients are to be looked at")
        run.backward(run(**batch(1)).loss)
        found = dict(run.gradients())
        assert found.keys() == twin.masters.keys()
        assert all(torch.equal(found[name].float(), master.grad) for name, master in twin.masters.items())
        norm = run.clip_grad_norm_(1e6)
        assert torch.equal(norm, twin.clip_grad_norm_(1e6)) and norm > 0
        for parameters in (run.model.parameters(), run.model.head.parameters(), run.model.layers[1].parameters()):
            with pytest.raises(UnsupportedModule, match=r"not in memory: use engine.clip_grad_norm_\(max_norm\)"):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        run.model.head.weight.grad = torch.zeros_like(run.model.head.weight)
        with pytest.raises(ConfigError, match="gradient of head.weight was replaced between backward and step"):
            run.step()


@by_turns("kind", ("tied", "edges frozen", "last layers", "empty"))
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16])
def test_odd_models_train_as_in_memory(place: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tied, frozen edges, only the last layers, parameters without elements; all with dropout."""

    def build():  # type: ignore[no-untyped-def]
        made = model(dtype, tied=kind == "tied", dropout=0.3)
        if kind == "edges frozen":
            made.embedding.requires_grad_(False)
            made.head.requires_grad_(False)
        if kind == "last layers":
            made.requires_grad_(False)
            made.layers[1:].requires_grad_(True)
        if kind == "empty":
            made.nothing = torch.nn.Parameter(torch.empty(0, 3, dtype=dtype))
        return made

    twin = Plain(build())
    expected = train(twin, range(3))
    with engine(build(), place, tmp_path) as run:
        assert train(run, range(3)) == expected
        state = twin.state()
        state.pop("nothing", None)
        assert differences(state, run.state()) == []


@by_turns("inside", (False, True))
def test_autocast_trains_as_in_memory(place: str, inside: bool, tmp_path: Path) -> None:
    def go(run):  # type: ignore[no-untyped-def]
        for step in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = run(**batch(step)).loss
                if inside:
                    run.backward(loss)
            if not inside:
                run.backward(loss)
            run.step()
        return run.state()

    with engine(model(torch.float32), place, tmp_path) as run:
        assert differences(go(Plain(model(torch.float32))), go(run)) == []


@on_nvme
def test_frozen_layers_in_four_bits_below_layers_that_train(place: str, tmp_path: Path) -> None:
    def build():  # type: ignore[no-untyped-def]
        made = model().requires_grad_(False)
        made.layers[2].requires_grad_(True)
        return made

    twin = Plain(decode_in_place(build()))
    expected = train(twin, range(3))
    with engine(build(), place, tmp_path, bits=4) as run:
        assert train(run, range(3)) == expected
        assert differences(twin.state(), run.state()) == []
        assert run.report()["decodes"] > 0


@everywhere
def test_the_optimizer_refuses_what_it_cannot_do_and_says_what_can(place: str, tmp_path: Path) -> None:
    with engine(model(), place, tmp_path) as run:
        train(run, range(1))
        optimizer = run.optimizer
        optimizer.load_state_dict(optimizer.state_dict())  # accelerate does that; there is no state in it
        for call, instead in (
            (lambda: optimizer.load_state_dict({}), "engine.load_checkpoint"),
            (lambda: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}), "laid out"),
        ):
            with pytest.raises(UnsupportedModule, match=instead):
                call()


@pytest.mark.parametrize("place", ["in place", "SPECULATIVE"])
def test_a_closure_takes_the_gradients_once_before_the_step(place: str, tmp_path: Path) -> None:
    expected = Plain(model())
    losses = train(expected, range(3))
    with engine(model(), place, tmp_path) as run:
        found = []
        for number in range(3):

            def closure(number: int = number) -> torch.Tensor:
                torch.manual_seed(number)
                run.optimizer.zero_grad()
                loss = run(**batch(number)).loss
                loss.backward()
                return loss

            found.append(float(run.optimizer.step(closure).detach()))
            run.optimizer.zero_grad()
        assert found == losses and run.step_number == 3
        assert differences(expected.state(), run.state()) == []


@on_nvme
def test_threaded_and_serial_updates_read_ahead_and_give_the_same_bits(place: str, tmp_path: Path) -> None:
    """A layer that comes out of order is read on demand, and what was read in vain changes nothing."""
    states = []
    for serial in (False, True):
        (tmp_path / str(serial)).mkdir()
        options = {"serial_updates": serial}
        with engine(model(), place, tmp_path / str(serial), options=options) as run:
            assert (run._training.stepper._thread is None) == serial
            for number, order in enumerate(([0, 1, 2], [0, 1, 2], [2, 0, 1], [1, 2], [0, 1, 2])):
                run.model.order = order
                train(run, [number])
            states.append(run.state())
            report = run.report()["training"]
            assert report["num_read_ahead"] > 0
            num_read = report["num_read_ahead"] + report["num_read_on_demand"]
            # each step but one has both layers, of which four pieces rest in memory
            assert num_read == report["num_pieces"] - (20 if "split" in place or "in parts" in place else 0)
    assert differences(*states) == []


@pytest.mark.parametrize("extent", ["state/layers.1/0", "weights/layers.2"])
def test_a_flipped_bit_in_what_was_committed_is_found_and_named(extent: str, tmp_path: Path) -> None:
    with engine(model(), "BACKWARD", tmp_path) as run:
        train(run, range(3))
        run.save_checkpoint(tmp_path / "saved")
        folder, log = run.commit_folder, run._training.home.log
        place = next(place for place in log.layout.extents if place.name == extent)
        offset = place.slot_offset(log.version(extent).slot) + place.length_bytes // 8
    flip(folder / "state.bin", offset, mask=4)
    with engine(model(), "BACKWARD", tmp_path) as run:
        run.load_checkpoint(run.commit_folder)
        with pytest.raises(StoreCorrupt, match=f"extent {extent}, slot . at offset .* since step 3; go back to a snap"):
            train(run, range(3, 5))
        run.load_checkpoint(tmp_path / "saved")
        twin = Plain(model())
        train(twin, range(5))
        train(run, range(3, 5))
        assert differences(twin.state(), run.state()) == []
