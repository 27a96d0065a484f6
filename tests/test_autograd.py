"""A streamed layer is an operation like any other: same losses, gradients and hooks as plain autograd, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from offload_rt.errors import OffloadError, UnsupportedModule
from offload_rt.memory.arena import Slot
from planners.plans.plan import Tier
from tests.conftest import PlainLayer, PlainModel, build_plain

STRESS = {"poison": True, "delay_seconds": 0.001, "record": True, "num_slots": 1, "stream_edges": True}


@pytest.fixture(params=["in place", "ring", "host", "nvme inputs"])
def wrap(request, make_engine, disk_folder):
    """Makes an engine: everything resident, a ring under stress, layer inputs in HOST, layer inputs on NVME."""

    def make(model, **arguments):
        if request.param == "in place":
            return make_engine(model, **arguments)
        if request.param == "ring":
            return make_engine(model, STRESS, nvme=disk_folder, **arguments)
        if request.param == "host":
            return make_engine(model, {**STRESS, "layer_inputs": Tier.HOST}, host_memory="20MiB", **arguments)
        return make_engine(model, {**STRESS, "layer_inputs": Tier.NVME}, nvme=disk_folder, **arguments)

    return make


def batch(seed=0, rows=2, tokens=6):
    torch.manual_seed(1000 + seed)
    return torch.randn(rows, tokens, 8)


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        if first[name] is None or second[name] is None:
            assert first[name] is second[name], name
        else:
            assert torch.equal(first[name], second[name]), name


def compare(wrap, model, loss_of=None, steps=2):
    """Runs the same steps on `model` in an engine and on its plain twin."""
    loss_of = loss_of or (lambda model, x: model(x).square().mean())
    twin = copy.deepcopy(model)
    engine = wrap(model)
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        x = batch(step)
        torch.manual_seed(step)
        expected = loss_of(twin, x)
        expected.backward()
        torch.manual_seed(step)
        loss = loss_of(engine.model, x)
        engine.backward(loss)
        assert torch.equal(loss, expected)
        same(gradients(engine.model), gradients(twin))
        optimizer.step()
        optimizer.zero_grad()
        engine.step()
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, engine.trainable[name]), name
    assert engine.report()["recomputes"] > 0
    recorder = engine._runtime.recorder
    assert recorder is None or recorder.check() == []
    return engine


def test_plain_layers_agree_with_plain_autograd(wrap):
    compare(wrap, build_plain(), steps=3)


def test_dropout_draws_the_same_numbers_again(wrap):
    compare(wrap, build_plain(dropout=0.5), steps=3)


def test_one_layer_alone(wrap):
    compare(wrap, build_plain(num_layers=1))


def test_a_trainable_parameter_that_layers_share(wrap):
    model = build_plain()
    for layer in model.layers[1:]:
        layer.scale = model.layers[0].scale
    compare(wrap, model)


def test_a_frozen_parameter_that_layers_share(wrap):
    model = build_plain()
    model.layers[2].norm.weight = model.layers[0].norm.weight
    compare(wrap, model)


def test_layers_below_the_first_that_trains(wrap):
    model = build_plain()
    for layer in model.layers[:2]:
        layer.scale.requires_grad_(False)
    compare(wrap, model)


class UnusedLayer(PlainLayer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.idle_scale = nn.Parameter(torch.ones(3))


def test_a_layer_with_a_parameter_that_it_does_not_use(wrap):
    model = build_plain(UnusedLayer)
    twin = copy.deepcopy(model)
    engine = wrap(model)
    for one in (twin, engine.model):
        one(batch()).sum().backward()
    same(gradients(engine.model), gradients(twin))
    assert gradients(engine.model)["layers.0.idle_scale"] is None


class NestedLayer(PlainLayer):
    """Arguments by name, nested; outputs in a dict with tensors, constants and integers among them."""

    def forward(self, hidden_BTD, *, extra=None, flag=False):
        out = super().forward(hidden_BTD)
        if extra is not None and flag:
            out = out * extra["gain"] + extra["pair"][1]
        return {"hidden": out, "more": (out.sum(), 7, None, torch.arange(3)), "name": "x"}


def test_nested_arguments_and_outputs(wrap):
    model = build_plain(NestedLayer)

    def loss_of(model, x):
        hidden = model.enter(x)
        gain = torch.full((1,), 1.5, requires_grad=True)
        total = 0.0
        for layer in model.layers:
            out = layer(hidden, extra={"gain": gain, "pair": [0, torch.tensor(0.25)]}, flag=True)
            assert out["more"][1:3] == (7, None) and out["more"][3].tolist() == [0, 1, 2] and out["name"] == "x"
            hidden = out["hidden"]
            total = total + out["more"][0] * 1e-3
        return model.leave(hidden).square().mean() + total

    compare(wrap, model, loss_of)


class TransposingLayer(PlainLayer):
    def forward(self, hidden_TBD):
        return super().forward(hidden_TBD.transpose(0, 1)).transpose(0, 1)


def test_views_and_transposed_inputs(wrap):
    def loss_of(model, x):
        hidden = model.enter(x)
        for layer in model.layers:
            hidden = layer(hidden.transpose(0, 1)).transpose(0, 1)
            hidden = torch.cat([hidden[:, :2], layer(hidden[:, 2:])], dim=1)
        return model.leave(hidden).square().mean()

    compare(wrap, build_plain(TransposingLayer), loss_of)


class IdentityLayer(PlainLayer):
    def forward(self, hidden_BTD):
        return hidden_BTD


def test_a_layer_that_returns_its_input(wrap):
    torch.manual_seed(0)
    model = PlainModel([PlainLayer(), IdentityLayer(), PlainLayer()])
    model.layers[1].scale.requires_grad_(False)
    compare(wrap, model)


class CountingLayer(PlainLayer):
    calls = 0

    def forward(self, hidden_BTD):
        self.calls += 1
        return super().forward(hidden_BTD) + self.calls * 1e-3


class RoundingLayer(PlainLayer):
    def forward(self, hidden_BTD):
        return super().forward(hidden_BTD) * (1 + 1e-6 * torch.is_grad_enabled())


def test_a_layer_that_rounds_otherwise_when_it_runs_again_is_warned_of(wrap, caplog):
    """As torch's own encoder layers and LSTMs do, which have other kernels where there is no graph."""
    wrap(build_plain(RoundingLayer))(batch()).sum().backward()
    assert "adds up in no fixed order" in caplog.text


def test_a_layer_that_gives_something_else_when_it_runs_again_is_refused(wrap):
    engine = wrap(build_plain(CountingLayer))
    loss = engine(batch()).sum()
    with pytest.raises(UnsupportedModule, match=r"layers\.3: run again in backward, .* another output than in forward"):
        loss.backward()


class InPlaceLayer(PlainLayer):
    def forward(self, hidden_BTD):
        hidden_BTD += 1.0
        return super().forward(hidden_BTD)


def test_a_layer_that_changes_its_input_is_refused(wrap):
    engine = wrap(build_plain(InPlaceLayer))
    with pytest.raises(UnsupportedModule, match="in place"):
        engine(batch())


def test_hooks_of_parameters_fire_once_and_may_change_the_gradient(wrap):
    model, calls = build_plain(), []
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one.layers[1].scale.register_hook(lambda grad, one=one: (calls.append(one is model), grad * 3)[1])
    counts = []
    for one in (model, twin):
        one.layers[2].scale.register_post_accumulate_grad_hook(lambda p, one=one: counts.append(one is model))
    engine = wrap(model)
    for one in (twin, engine.model):
        one(batch()).square().mean().backward()
    same(gradients(engine.model), gradients(twin))
    assert (calls, counts) == ([False, True], [False, True])


def test_hooks_of_modules_fire_as_they_would(wrap):
    model, calls = build_plain(), []
    model.layers[1].register_forward_hook(lambda module, args, out: calls.append("forward"))
    model.layers[1].register_full_backward_hook(lambda module, gin, gout: calls.append("backward"))
    engine = wrap(model)
    engine(batch()).sum().backward()
    assert calls == ["forward", "backward"]


def test_backward_twice_needs_retain_graph_and_then_doubles(wrap):
    model = build_plain()
    twin = copy.deepcopy(model)
    engine = wrap(model)
    for one in (twin, engine.model):
        loss = one(batch()).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError):
            loss.backward()
    same(gradients(engine.model), gradients(twin))


def test_two_losses_and_interleaved_graphs(wrap):
    model = build_plain(dropout=0.3)
    twin = copy.deepcopy(model)
    engine = wrap(model)
    for one in (twin, engine.model):
        torch.manual_seed(5)
        first = one(batch(1)).square().mean()
        second = one(batch(2)).square().mean()
        first.backward()
        second.backward()
    same(gradients(engine.model), gradients(twin))


def test_autograd_grad_goes_through(wrap):
    model = build_plain()
    twin = copy.deepcopy(model)
    engine = wrap(model)
    results = []
    for one in (twin, engine.model):
        x = batch().requires_grad_()
        loss = one(x).square().mean()
        results.append(torch.autograd.grad(loss, [x, one.layers[0].scale, one.layers[3].scale]))
        assert all(p.grad is None for p in one.parameters())
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


def test_a_second_derivative_is_refused_and_not_wrong(wrap):
    engine = wrap(build_plain())
    x = batch().requires_grad_()
    (grad,) = torch.autograd.grad(engine(x).square().mean(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_without_grad_nothing_is_kept_and_nothing_runs_again(wrap):
    model = build_plain()
    twin = copy.deepcopy(model)
    engine = wrap(model)
    with torch.no_grad():
        assert torch.equal(engine(batch()), twin(batch()))
        assert not engine(batch()).requires_grad
    assert engine.report()["recomputes"] == 0


def test_inference_mode_and_training_after_it(wrap):
    model = build_plain()
    twin = copy.deepcopy(model)
    engine = wrap(model)
    with torch.inference_mode():
        assert torch.equal(engine(batch()), twin(batch()))
    for one in (twin, engine.model):
        one(batch()).square().mean().backward()
    same(gradients(engine.model), gradients(twin))


def test_autocast_is_the_same_in_the_recompute(wrap):
    model = build_plain()

    def loss_of(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        return out.float().square().mean()

    compare(wrap, model, loss_of)


class BreakingLayer(PlainLayer):
    broken = None

    def forward(self, hidden_BTD):
        out = super().forward(hidden_BTD)
        if BreakingLayer.broken is self:
            raise KeyError("broken on purpose")
        return out


@pytest.mark.parametrize("index", [0, 2, 3])
@pytest.mark.parametrize("keep", [False, True])
def test_an_exception_in_the_middle_of_a_forward_and_then_a_correct_step(wrap, index, keep):
    model = build_plain(BreakingLayer)
    twin = copy.deepcopy(model)
    engine = wrap(model)
    BreakingLayer.broken = model.layers[index]
    kept = None
    try:
        engine(batch(3))
    except KeyError as error:
        kept = error if keep else None
    finally:
        BreakingLayer.broken = None
    for one in (twin, engine.model):
        one(batch()).square().mean().backward()
    same(gradients(engine.model), gradients(twin))
    assert (kept is not None) is keep


def test_an_exception_in_the_middle_of_a_backward_and_then_a_correct_step(wrap):
    model = build_plain(BreakingLayer)
    twin = copy.deepcopy(model)
    engine = wrap(model)
    loss = engine(batch(3)).sum()
    BreakingLayer.broken = model.layers[1]
    try:
        with pytest.raises(KeyError):
            loss.backward()
    finally:
        BreakingLayer.broken = None
    del loss
    engine.model.zero_grad()
    for one in (twin, engine.model):
        one(batch()).square().mean().backward()
    same(gradients(engine.model), gradients(twin))


def test_an_exception_while_a_layer_is_opened_leaves_it_closed(make_engine, disk_folder, monkeypatch):
    engine = make_engine(build_plain(), STRESS, nvme=disk_folder)
    block = engine._runtime.layers[1].block
    tensor = Slot.tensor

    def interrupted(slot, dtype, shape, offset_bytes=0):
        if slot is block.slot and offset_bytes == block.spec.tensors[-1].offset_bytes:
            raise KeyboardInterrupt
        return tensor(slot, dtype, shape, offset_bytes)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Slot, "tensor", interrupted)
        engine(batch())
    assert not block.is_open and all(binding.parameter.isnan().all() for binding in block.bindings)
    assert engine(batch()).isfinite().all()


def test_an_exception_while_a_weight_is_decoded_does_not_count_it_as_shown(make_engine, monkeypatch):
    torch.manual_seed(0)
    model = PlainModel([RecursiveLayer() for _ in range(2)], width=64)
    block, inner = make_engine(model, bits=4)._runtime.layers[0].block, model.layers[0].inner

    def short(weight):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(block.decoder, "decode", short)
        with block.shown(inner):
            pass
    with block.shown(inner):
        assert inner.weight.isfinite().all()


def test_a_parameter_that_is_frozen_after_the_engine_was_made(wrap):
    model = build_plain()
    twin = copy.deepcopy(model)
    engine = wrap(model)
    for one in (twin, engine.model):
        one.layers[1].scale.requires_grad_(False)
        one(batch()).square().mean().backward()
    same(gradients(engine.model), gradients(twin))


def test_a_parameter_that_begins_to_train_after_the_engine_was_made_gets_its_gradient(wrap):
    """An adapter that is switched on later. Silence here is training that does not train."""
    model = build_plain()
    model.layers[1].scale.requires_grad_(False)
    model.layers[1].extra_scale = nn.Parameter(torch.ones(1), requires_grad=False)
    twin = copy.deepcopy(model)
    engine = wrap(model)
    for one in (twin, engine.model):
        one.layers[1].scale.requires_grad_(True)
    try:
        for one in (twin, engine.model):
            one(batch()).square().mean().backward()
    except OffloadError:
        return  # said aloud: as good
    same(gradients(engine.model), gradients(twin))


class RecursiveLinear(nn.Linear):
    """Calls itself before it uses its weight."""

    def forward(self, x, depth=1):
        if depth:
            x = self(x, depth - 1)
        return super().forward(x)


class RecursiveLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = RecursiveLinear(64, 64, bias=False)
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, hidden_BTD):
        return hidden_BTD + self.inner(hidden_BTD) * self.scale


def test_a_module_that_is_called_inside_its_own_call_keeps_its_decoded_weight(make_engine):
    torch.manual_seed(0)
    model = PlainModel([RecursiveLayer() for _ in range(2)], width=64)
    out = make_engine(model, bits=4)(batch())
    assert out.isfinite().all()


def test_a_weight_that_is_read_past_its_module_is_said_aloud_and_never_wrong(make_engine):
    """nn.MultiheadAttention reads `out_proj.weight` without calling `out_proj`."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(64, 4, dim_feedforward=4096, batch_first=True) for _ in range(2)]
    for layer in layers:
        layer.scale = nn.Parameter(torch.ones(1))
    model = PlainModel(layers, width=64)
    for layer in layers:
        layer.norm2.weight.requires_grad_(True)
        layer.scale.requires_grad_(False)
    try:
        out = make_engine(model, bits=4)(batch())
    except UnsupportedModule:
        return
    assert out.isfinite().all()


class CheckpointedCall(PlainLayer):
    """As transformers' layers were before 5.23: checkpointing lies around `__call__`, where no hook reaches."""

    gradient_checkpointing = False

    def __call__(self, hidden_BTD):
        if self.gradient_checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(super().__call__, hidden_BTD, use_reentrant=False)
        return super().__call__(hidden_BTD)


@pytest.mark.parametrize("early", [True, False])
def test_a_layer_that_checkpoints_around_its_call_does_not_run_a_third_time(wrap, early):
    model = build_plain(CheckpointedCall, dropout=0.1)

    def turn_on():
        for layer in model.layers:
            layer.gradient_checkpointing = True

    if early:
        turn_on()
    engine = wrap(model)
    if not early:
        turn_on()  # as a trainer does, when it begins
    loss = engine(batch()).square().mean()
    loss.backward()
    assert engine._runtime.layer_counters.num_forwards == len(model.layers)
    assert engine.report()["prefetch_misses"] == 0
    engine.close()
    assert all(layer.gradient_checkpointing for layer in model.layers)


def test_closing_gives_the_layers_back_as_they_were(wrap):
    model = build_plain()
    own = {name: module.__dict__.get("forward") for name, module in model.layers.named_modules()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    engine = wrap(model)
    engine(batch()).sum().backward()
    engine.close()
    engine.close()
    assert {name: module.__dict__.get("forward") for name, module in model.layers.named_modules()} == own
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert {name: id(p) for name, p in model.named_parameters()} == identities


def test_a_wrapped_forward_of_the_users_own_is_put_back(wrap):
    model = build_plain()
    calls = []

    def wrapped(module):
        original = module.forward
        module.forward = lambda *args: (calls.append(1), original(*args))[1]
        return module.forward

    own = [wrapped(model.layers[0]), wrapped(model.enter)]
    engine = wrap(model)
    engine(batch())
    assert len(calls) == 2
    engine.close()
    assert [model.layers[0].forward, model.enter.forward] == own


def test_a_closed_engine_does_not_answer_with_nan(wrap):
    engine = wrap(build_plain())
    engine.close()
    with pytest.raises(OffloadError):
        engine(batch())


def test_absent_parameters_keep_shape_dtype_and_identity(make_engine, disk_folder):
    model = build_plain()
    before = {name: (id(p), p.shape, p.dtype) for name, p in model.named_parameters()}
    make_engine(model, nvme=disk_folder)
    assert {name: (id(p), p.shape, p.dtype) for name, p in model.named_parameters()} == before
    hidden = model.layers[0].up.weight
    assert hidden.isnan().all() and hidden.untyped_storage().nbytes() == hidden.element_size()
