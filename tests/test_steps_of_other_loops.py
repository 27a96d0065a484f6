"""A loop that calls `loss.backward()` and `engine.optimizer.step()`, as torch's loops and Trainer do: its steps are
checked, counted and committed as those of `engine.step` are.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.optimizer import _global_optimizer_pre_hooks

from offload_rt.arguments import make_optimizer
from offload_rt.errors import ConfigError, IntegrityError, UnsupportedModule
from offload_rt.running.steps import WARM_STEPS
from tests.adapter_tiers import IN_HOST
from tests.conftest import build_lora, language_batch
from tests.saved_state import is_complete


class CallsItsBase(AdamW):
    """Its `step` calls that of its base, which carries hooks too once there was a plain one."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.fixture
def made(make_engine, disk_folder):
    def make(**arguments):
        return make_engine(build_lora(dropout=0.0, num_layers=1), nvme=disk_folder, **arguments)

    return make


def backward(engine, number=0):
    loss = engine.model(**language_batch(number)).loss
    loss.backward()
    return loss.item()


def step(engine, number=0):
    backward(engine, number)
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def values(engine):
    return {name: p.detach().clone() for name, p in engine.trainable.items()}


def test_its_steps_are_committed_when_the_next_forward_begins_and_a_run_goes_on_from_them(made):
    engine = made(commit_every=2)
    for number in range(3):
        assert not is_complete(engine.commit_folder)
        step(engine, number)
        assert engine.step_number == number + 1
    assert is_complete(engine.commit_folder)
    last, folder = values(engine), engine.commit_folder
    engine.close()
    engine = made(commit_every=2)
    engine.load_checkpoint(folder)
    assert engine.step_number == 2
    step(engine, 2)
    assert engine.step_number == 3 and all(torch.equal(last[name], value) for name, value in values(engine).items())


def test_the_last_step_is_committed_by_the_end(made):
    with made(commit_every=1) as engine:
        step(engine)
        assert not is_complete(engine.commit_folder)
    assert is_complete(engine.commit_folder)


def test_a_step_is_counted_once_whoever_takes_it(made):
    AdamW([torch.nn.Parameter(torch.zeros(1))])  # from here on a base's step carries hooks
    engine = made(optimizer=lambda parameters: CallsItsBase(parameters, lr=1e-2), max_grad_norm=1.0)
    step(engine)
    assert engine.step_number == 1
    backward(engine)
    engine.step()
    assert engine.step_number == 2
    with pytest.raises(RuntimeError, match="no"):  # a step that fails is none
        engine.optimizer.step(lambda: (_ for _ in ()).throw(RuntimeError("no")))
    assert engine.step_number == 2
    step(engine)
    assert engine.step_number == 3


@pytest.mark.parametrize("options", [None, {"state": IN_HOST}], ids=["in memory", "in tiers"])
def test_what_its_steps_take_is_reported(made, options):
    engine = made(options=options, host_memory="64MiB")
    for number in range(WARM_STEPS):
        step(engine, number)
    assert engine.report()["steady_step"] is None
    step(engine)
    backward(engine)
    engine.step()
    assert engine.report()["steady_step"]["num_steps"] == 2
    assert engine.step_meter.num_steps == engine.step_number == WARM_STEPS + 2, "each once"


def test_a_closure_takes_the_gradients_itself(made):
    engine = made(optimizer=lambda parameters: SGD(parameters, lr=1e-2), commit_every=1)
    for number in range(2):

        def closure(number=number):
            engine.optimizer.zero_grad()
            backward(engine, number)

        engine.optimizer.step(closure)
        assert engine.step_number == number + 1


@pytest.mark.parametrize("options", [None, {"state": IN_HOST}], ids=["in memory", "in tiers"])
def test_the_first_steps_are_checked_before_anything_is_updated(made, options):
    engine = made(options=options, host_memory="64MiB")
    before = values(engine)
    with pytest.raises(IntegrityError, match="received no gradient in step 1"):
        engine.optimizer.step()
    backward(engine)
    name, parameter = next(iter(engine.trainable.items()))
    parameter.grad.fill_(torch.inf)
    with pytest.raises(IntegrityError, match=f"step 1: the gradient of {name} is not finite"):
        engine.optimizer.step()
    assert engine.step_number == 0 and all(torch.equal(before[name], value) for name, value in values(engine).items())
    engine.optimizer.zero_grad()
    step(engine)
    assert engine.step_number == 1


def test_a_first_step_that_changes_nothing_is_told(made):
    engine = made(optimizer=lambda parameters: SGD(parameters, lr=1e-30))
    backward(engine)
    with pytest.raises(IntegrityError, match="changed no parameter"):
        engine.optimizer.step()
    assert engine.step_number == 0


def test_a_closed_engine_sees_no_steps_any_more(made):
    engine = made(commit_every=1)
    optimizer = engine.optimizer
    assert optimizer._optimizer_step_pre_hooks and optimizer._optimizer_step_post_hooks
    engine.close()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_an_optimizer_whose_steps_nobody_can_see_is_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner, self.param_groups = inner, inner.param_groups

    with pytest.raises(ConfigError, match=r"Wrapper\.__init__ does not call"):
        make_optimizer(lambda parameters: Wrapper(SGD(parameters)), None, [torch.nn.Parameter(torch.zeros(1))])


def own_optimizer(engine, **groups):
    """As a trainer makes it where none is given."""
    return AdamW([p for p in engine.model.parameters() if p.requires_grad], lr=1e-2, **groups)


def test_a_loops_own_optimizer_is_followed_from_its_first_step(made):
    engine = made(commit_every=1)
    given, optimizer = engine.optimizer, own_optimizer(engine)
    for number in range(2):
        backward(engine, number)
        optimizer.step()
        optimizer.zero_grad()
        assert engine.step_number == number + 1
    assert engine.optimizer is optimizer
    assert engine.step_meter.num_steps == 2
    backward(engine, 2)
    with pytest.raises(ConfigError, match=r"AdamW\.step: .*AdamW, which is, has state of this run.*optimizers=\("):
        given.step()
    engine.step()
    last, folder = values(engine), engine.commit_folder
    engine.close()
    assert is_complete(folder)
    engine = made(commit_every=1)  # whose optimizer has what the loop's had
    engine.load_checkpoint(folder)
    assert engine.step_number == 3 and all(torch.equal(last[name], value) for name, value in values(engine).items())
    state = next(iter(engine.optimizer.state.values()))
    assert state["step"] == 3 and state["exp_avg"].any()


@pytest.mark.parametrize("whose", ["the engine's", "the loop's"])
def test_a_loop_that_loads_what_it_has_saved_itself_counts_on_where_it_was(whose, made):
    def begun():
        engine = made(commit_every=1)
        return engine, engine.optimizer if whose == "the engine's" else own_optimizer(engine)

    engine, optimizer = begun()
    losses, saved = [], None
    for number in range(4):
        losses.append(backward(engine, number))
        optimizer.step()
        optimizer.zero_grad()
        if number == 1:
            saved = values(engine), copy.deepcopy(optimizer.state_dict())
    last, folder = values(engine), engine.commit_folder
    engine.close()
    engine, optimizer = begun()
    engine.model.load_state_dict(saved[0], strict=False)
    optimizer.load_state_dict(saved[1])
    for number in range(2, 4):
        assert backward(engine, number) == losses[number]
        optimizer.step()
        optimizer.zero_grad()
        assert engine.step_number == number + 1
    assert all(torch.equal(last[name], value) for name, value in values(engine).items())
    engine.close()
    engine = made()
    engine.load_checkpoint(folder)
    assert engine.step_number == 4, "the commit is of the step that it was"


def test_an_optimizer_of_state_in_tiers_has_a_state_dict_that_says_where_it_is(made, tmp_path, caplog):
    """For loops that ask for one and save it: it is loaded only by whoever has the state."""
    engine = made(options={"state": IN_HOST}, host_memory="64MiB")
    optimizer = engine.optimizer
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
    assert "state_dict" not in caplog.text
    backward(engine)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 0.25
    engine.save_checkpoint(tmp_path / "saved")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    optimizer.state_dict()
    engine.close()
    assert caplog.text.count("param groups alone; the state of step 1 rests in the tiers") == 1
    again = made(options={"state": IN_HOST}, host_memory="64MiB")
    groups, saved = again.optimizer.param_groups[0], torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert saved["state"] == {}
    with pytest.raises(
        ConfigError, match=r"saved at step 1, without the state.*is of step 0. First engine\.load_check"
    ):
        again.optimizer.load_state_dict(saved)
    again.load_checkpoint(tmp_path / "saved")
    groups["lr"] = 0.5
    again.optimizer.load_state_dict(saved)
    assert groups is again.optimizer.param_groups[0] and groups["lr"] == 0.25
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(ConfigError, match="groups are not those of this optimizer"):
        again.optimizer.load_state_dict(saved)
    with pytest.raises(UnsupportedModule, match="engine.load_checkpoint"):
        again.optimizer.load_state_dict(own_optimizer(again).state_dict())


def test_a_loops_own_optimizer_that_the_engine_cannot_follow_is_refused_before_it_changes_anything(made):
    engine = made()
    before = values(engine)
    first, *rest = engine.trainable.values()
    backward(engine)
    for parameters, text in (
        ([first], rf"it holds 1 of the {len(rest) + 1} tensors that train, and"),
        ([first, *rest, torch.nn.Parameter(torch.zeros(1))], rf"it holds {len(rest) + 1} of the .* and 1 others"),
    ):
        with pytest.raises(ConfigError, match=text):
            SGD(parameters, lr=1.0).step()
    assert all(torch.equal(before[name], value) for name, value in values(engine).items())
    engine.step()
    backward(engine)
    with pytest.raises(ConfigError, match="has state of this run"):
        own_optimizer(engine).step()
    other = torch.nn.Parameter(torch.zeros(1))
    other.grad = torch.ones(1)
    SGD([other], lr=1.0).step()
    assert other.item() == -1 and engine.step_number == 1


def test_what_wraps_the_engines_optimizer_is_no_other_one(made):
    class Wrapper(SGD):
        def __init__(self, inner):
            super().__init__(inner.param_groups[0]["params"], lr=1e-2)
            self.inner = inner

        def step(self, closure=None):
            return self.inner.step(closure)

    engine = made()
    optimizer = engine.optimizer
    for number in range(2):
        backward(engine, number)
        Wrapper(optimizer).step()
        assert engine.optimizer is optimizer and engine.step_number == number + 1


def test_state_that_rests_in_tiers_is_stepped_by_nobody_else(made):
    engine = made(options={"state": IN_HOST}, host_memory="64MiB")
    before = values(engine)
    backward(engine)
    with pytest.raises(ConfigError, match="optimizer state of adapters rest in tiers"):
        own_optimizer(engine).step()
    assert all(torch.equal(before[name], value) for name, value in values(engine).items())
    engine.step()


def test_a_closed_engine_looks_at_no_optimizer(made):
    before = len(_global_optimizer_pre_hooks)
    engine = made()
    assert len(_global_optimizer_pre_hooks) == before + 1
    engine.close()
    assert len(_global_optimizer_pre_hooks) == before
    own_optimizer(engine).step()
