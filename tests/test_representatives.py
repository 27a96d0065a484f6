"""One layer of a kind for all of them: the bytes of the whole step, from few of its layers."""

from dataclasses import replace

import pytest
import torch

from offload_rt.memory.allocations import AllocationMeter, together
from offload_rt.running import longest_step, rehearsal
from offload_rt.running.longest_step import unchanged
from offload_rt.running.representatives import Unlike, representatives, run_alone, whole_step
from planners.plans.activations import Action
from planners.plans.plan import Tier
from tests.conftest import VOCABULARY, build_base, build_lora
from tests.tokenwise import policy, waiting_in

ROWS, TOKENS = 2, 64


def count(engine, run_for=None):
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    layers = engine._runtime.layers
    wanted = list(engine.trainable.values())
    with unchanged(engine._runtime, engine.model), AllocationMeter() as meter:
        if run_for is None:
            loss = engine.model(input_ids=ids, labels=ids).loss
        else:
            with run_alone(layers, run_for):
                loss = engine.model(input_ids=ids, labels=ids).loss
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        del gradients, loss
    return meter


def made(make_engine, tmp_path, family="llama", num_layers=8, options=None, bits=4, model=None, **arguments):
    folder = tmp_path / "nvme"
    folder.mkdir(exist_ok=True)
    model = build_lora(family, num_layers=num_layers) if model is None else model
    return make_engine(
        model, options, nvme=folder, bits=bits, batch_size=ROWS, seq_len=TOKENS, device="cpu", **arguments
    )


PLANS = {
    "recomputed whole": {},
    "inputs in HOST": {"layer_inputs": Tier.HOST},
    "inputs on NVMe": {"layer_inputs": Tier.NVME},
    "kept": {"activations": policy(1.0, 1, num_tokens=TOKENS, action=Action.KEEP)},
    "chunks, some kept": {"activations": policy(0.5, 4, num_tokens=TOKENS, action=Action.KEEP)},
    "chunks, some swapped": {"activations": waiting_in(policy(0.5, 2, num_tokens=TOKENS), Tier.NVME)},
    "chunks, all computed again": {"activations": policy(0.0, 4, num_tokens=TOKENS)},
}


@pytest.mark.parametrize(
    "plan", [pytest.param(name, marks=pytest.mark.full) if index % 2 else name for index, name in enumerate(PLANS)]
)
@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gpt2", marks=pytest.mark.full), pytest.param("moe", marks=pytest.mark.full)]
)
def test_few_layers_tell_the_bytes_of_all(make_engine, tmp_path, plan, family):
    with made(make_engine, tmp_path, family, options=PLANS[plan], host_memory="64MiB") as engine:
        run_for = representatives(engine._runtime.layers)
        assert run_for == [0, *[1] * 7]
        count(engine)  # the first call of all makes a little more
        whole, few = count(engine), count(engine, run_for)
        assert together(whole_step(few.stretches, run_for))[1] == whole.peak_bytes > few.peak_bytes // 2 > 0


def test_layers_that_others_are_run_for_do_not_run(make_engine, tmp_path):
    ran = []
    with made(make_engine, tmp_path) as engine:
        layers = engine._runtime.layers
        for index, layer in enumerate(layers):
            layer.layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
        before = [layer.layer.forward for layer in layers]
        count(engine, [0, 1, 1, 1, 4, 4, 4, 7])
        assert sorted(ran) == [0, 0, 1, 1, 4, 4, 7, 7], "forward, and again in backward"
        assert [layer.layer.forward for layer in layers] == before


def test_layers_are_alike_by_what_they_are(make_engine, tmp_path):
    with made(make_engine, tmp_path, num_layers=12) as engine:
        layers = engine._runtime.layers
        assert representatives(layers) == [0, *[1] * 11]
        layers[3].layer.self_attn.sliding_window = 7
        layers[5].layer.mlp.gate_proj.lora_dropout["default"].p = 0.25
        layers[7].layer.mlp.down_proj.lora_A["default"].weight.requires_grad_(False)
        layers[9].around = replace(layers[9].around, hold_decoded=not layers[9].around.hold_decoded)
        assert representatives(layers) == [0, 1, 1, 3, 1, 5, 1, 7, 1, 9, 1, 1]
        layers[11].layer.mlp.extra = True
        layers[10].around = replace(layers[10].around, stash=object())
        assert representatives(layers) is None, "more than half of them would run"


def test_layers_below_the_first_that_trains_are_of_another_kind(make_engine, tmp_path):
    model = build_lora("llama", num_layers=12)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".layers.4." in name)
    with made(make_engine, tmp_path, model=model) as engine:
        run_for = representatives(engine._runtime.layers)
        assert run_for == [0, 1, 1, 1, 4, *[5] * 7]
        count(engine)
        whole, few = count(engine), count(engine, run_for)
        assert together(whole_step(few.stretches, run_for))[1] == whole.peak_bytes


def test_what_cannot_be_left_out_is_said(make_engine, tmp_path):
    with made(make_engine, tmp_path) as engine:
        layers, run_for = engine._runtime.layers, [0, *[1] * 7]
        few = count(engine, run_for).stretches
        with pytest.raises(Unlike, match="another order"):
            whole_step(few[:2] + few[3:], run_for)
        forward = layers[1].layer.forward
        layers[1].layer.forward = lambda *args, **kwargs: (forward(*args, **kwargs), args[0])
        with pytest.raises(Unlike, match="2 tensors"):
            count(engine, run_for)
        layers[1].layer.forward = forward
        layers[3].layer.register_forward_pre_hook(lambda _, args: (args[0][:1], *args[1:]))
        with pytest.raises(Unlike, match="given nothing"):
            count(engine, run_for)
        layers[3].block.name = "another.3"
        assert representatives(layers) is None, "two stacks"


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "all parameters"])
def test_a_rehearsal_runs_few_layers_and_finds_what_all_of_them_take(make_engine, tmp_path, monkeypatch, adapters):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rehearsal, "ROOM", 10**9)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    found, losses = [], []
    for few in (True, False):
        if not few:
            monkeypatch.setattr(longest_step, "representatives", lambda layers: None)
            monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "another"))
        torch.manual_seed(7)
        model = (
            build_lora("llama", num_layers=8) if adapters else build_base("llama", torch.bfloat16, num_layers=8).train()
        )
        arguments = {"bits": 4} if adapters else {"bits": None, "device_memory": "64MiB"}
        with made(make_engine, tmp_path, model=model, **{"device_memory": "64MiB", **arguments}) as engine:
            torch.manual_seed(0)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(engine(input_ids=ids, labels=ids).loss))
            outcome = engine.report()["rehearsal"]
            found.append(outcome["measured_bytes"])
            assert outcome["num_layers"] == (2 if few else None), outcome
    assert losses[0] == losses[1]
    assert found[0] == found[1]
