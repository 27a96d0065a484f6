"""Loops that fail between a step and what follows it: that step is taken again, with the scheduler that it had.

step 1, schedule 1 | step 2, schedule 2 | step 3, fails      commits: 1, 2
                                        | step 3, schedule 3 | step 4 ...
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from offload_rt.closing import Unfinished
from planners.plans.plan import StatePlacement, Tier
from tests.conftest import build_base, build_lora, language_batch

KINDS = {
    "adapters": (lambda: build_lora(num_layers=1), None),
    "adapters, state on NVMe": (
        lambda: build_lora(num_layers=1), {"state": StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=2)}
    ),
    "all parameters": (lambda: build_base("llama", torch.bfloat16, 1), {"rest": Tier.NVME, "piece_elements": 4096}),
}  # fmt: skip


class LoopFailed(Exception):
    pass


def started(make_engine, kind, folder):
    build, options = KINDS[kind]
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    engine = make_engine(build(), options, nvme=folder, device="cpu", commit_every=1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(engine.optimizer, 0.5)
    engine.track("schedule", schedule)
    return engine, schedule


def steps(engine, schedule, numbers, *, fails_in=None):
    losses = []
    for number in numbers:
        torch.manual_seed(number)
        loss = engine(**language_batch(number)).loss
        engine.backward(loss)
        engine.step()
        if number == fails_in:
            raise LoopFailed
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["adapters", "adapters, state on NVMe"])
def test_weights_that_are_there_for_an_evaluation_are_not_committed(kind, make_engine, tmp_path):
    """As those of an average are, right behind a step, and are put back."""
    engine, schedule = started(make_engine, kind, tmp_path / "run")
    steps(engine, schedule, range(1))
    trained = {name: parameter.detach().clone() for name, parameter in engine.trainable.items()}
    with torch.no_grad():
        for parameter in engine.trainable.values():
            parameter.add_(1)
        engine(**language_batch(9))
        for name, parameter in engine.trainable.items():
            parameter.copy_(trained[name])
    engine(**language_batch(1))  # of the next step, which ends here
    engine.close()
    again, _ = started(make_engine, kind, tmp_path / "run")
    again.load_checkpoint(again.commit_folder)
    assert again.step_number == 1
    assert all(torch.equal(parameter, trained[name]) for name, parameter in again.trainable.items())


@pytest.mark.parametrize(
    ("kind", "closed_by"), [("adapters", "finally"), ("adapters, state on NVMe", "with"), ("all parameters", "with")]
)
def test_a_step_whose_schedule_has_not_followed_is_taken_again(kind, closed_by, make_engine, tmp_path, caplog):
    whole, schedule = started(make_engine, kind, tmp_path / "whole")
    expected = steps(whole, schedule, range(4))
    whole.close()
    failing, schedule = started(make_engine, kind, tmp_path / "cut")
    with pytest.raises(LoopFailed), failing if closed_by == "with" else contextlib.nullcontext():
        try:
            steps(failing, schedule, range(4), fails_in=2)
        finally:
            if closed_by == "finally":
                failing.close()
    assert "step 3 is not committed: LoopFailed was raised" in caplog.text
    again, schedule = started(make_engine, kind, tmp_path / "cut")
    again.load_checkpoint(again.commit_folder)
    assert again.step_number == 2
    assert steps(again, schedule, range(2, 4)) == expected[2:]
    again.close()
    after, schedule = started(make_engine, kind, tmp_path / "cut")
    after.load_checkpoint(after.commit_folder)
    assert after.step_number == 4, "a loop that ends has its last step committed"


def test_an_error_that_was_handled_before_the_step_is_none_of_the_loops():
    taken = Unfinished()
    try:
        raise LoopFailed
    except LoopFailed:
        taken.step_taken()
        assert not taken.has_failed(1)
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert taken.has_failed(1)
            taken.next_begins()
            assert not taken.has_failed(1)
    assert not taken.has_failed(1)


class Average:
    """Of what trains, brought up to date behind each step: tracked, and no scheduler."""

    def __init__(self, parameters):
        self._parameters = parameters
        self._values = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        self.num_updates = 0

    def update(self):
        self.num_updates += 1
        for name, parameter in self._parameters.items():
            self._values[name].lerp_(parameter.detach().float(), 0.5)

    def state_dict(self):
        return {"num_updates": self.num_updates, **self._values}

    def load_state_dict(self, state):
        self.num_updates = state["num_updates"]
        self._values = {name: state[name].clone() for name in self._values}


@pytest.mark.parametrize("kind", ["adapters", "adapters, state on NVMe"])
def test_what_was_tracked_and_changed_behind_a_step_is_made_up_for_by_its_count(kind, make_engine, tmp_path):
    """As the guide says: a commit has it as it was when the step returned, and the weights of that step."""

    def averaged(folder, numbers, *, cut_off=False, resumes=False):
        engine, schedule = started(make_engine, kind, folder)
        average = Average(engine.trainable)
        engine.track("average", average)
        if resumes:
            engine.load_checkpoint(engine.commit_folder)
            assert (engine.step_number, average.num_updates) == (3, 2)
            while average.num_updates < engine.step_number:
                average.update()
        for number in numbers:
            steps(engine, schedule, [number])
            average.update()
        if cut_off:
            engine(**language_batch(9))  # commits the last step
        engine.close()
        return average.state_dict()

    whole = averaged(tmp_path / "whole", range(5))
    averaged(tmp_path / "cut", range(3), cut_off=True)
    again = averaged(tmp_path / "cut", range(3, 5), resumes=True)
    assert [name for name in whole if not torch.equal(torch.as_tensor(whole[name]), torch.as_tensor(again[name]))] == []
