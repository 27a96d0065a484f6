"""What a step of full fine-tuning means in every mode: what is left out, forgotten, looked at between, called oddly."""

from __future__ import annotations

import contextlib
import copy
import errno
from pathlib import Path

import pytest
import torch

from offload_rt.errors import ConfigError, OffloadError, StorageError
from offload_rt.file_io import storage_error
from tests.tiny_training import PLACES, Plain, batch, differences, engine, model, train

everywhere = pytest.mark.parametrize("place", PLACES)


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


on_nvme = pytest.mark.parametrize("place", [place for place in PLACES if "nvme" in PLACES[place]])


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


@pytest.mark.parametrize("kind", ["read", "write", "sync"])
@pytest.mark.parametrize(
    "place",
    [
        "AFTER",
        "SPECULATIVE",
        "BACKWARD, tight",
        *(pytest.param(place, marks=pytest.mark.full) for place in ("BACKWARD", "SPECULATIVE, serial")),
    ],
)
def test_a_failing_drive_is_told_and_leaves_a_committed_step(place: str, kind: str, tmp_path: Path) -> None:
    """Whichever operation of a step fails: the run goes on after loading, with the numbers of one that never failed."""
    twin = Plain(model())
    expected = [state_after(twin, number) for number in range(7)]
    counted = recovered = 0
    for countdown in [0, 1, 2, 3, 4] if kind == "sync" else [0, 1, 2, 5, 13, 34, 55]:
        folder = tmp_path / str(countdown)
        folder.mkdir()
        with engine(model(), place, folder) as run:
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
    assert counted >= 2
    if kind == "read" and place != "AFTER":
        assert recovered, "the committed step was there to go back to"


def state_after(twin: Plain, number: int):  # type: ignore[no-untyped-def]
    train(twin, [number])
    return twin.state()
