"""Engines whose memory the fixed rule fills: the numbers of those that stream, fewer bytes, and never over a budget."""

from dataclasses import replace

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.running import rehearsal
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.activations import Action
from planners.plans.plan import Tier
from planners.rule.streaming import plan_streaming
from tests import tiny_training
from tests.conftest import build_lora, language_batch
from tests.test_filling import rests

NUM_LAYERS, KIB, PLENTY = 8, 1 << 10, "64MiB"


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))


def engine_of(folder, device, host, *, fill=True, **options):
    return Engine(
        build_lora(num_layers=NUM_LAYERS), bits=4, batch_size=2, seq_len=16, lr=1e-2, device="cpu", nvme=folder,
        device_memory=device, host_memory=host, options=RuntimeOptions(fill=fill, **options),
    )  # fmt: skip


def train(engine):
    """Losses and parameters of three steps, and what each of them read from the drive and copied."""
    losses, moved = [], []
    for number in range(3):
        before = engine.report()
        loss = engine(**language_batch(number)).loss
        engine.backward(loss)
        engine.step()
        after = engine.report()
        losses.append(float(loss.detach()))
        moved.append(tuple(after[name] - before[name] for name in ("bytes_read", "bytes_copied")))
        for tier in (Tier.DEVICE, Tier.HOST):
            account = engine._runtime.tiers.account(tier)
            assert account.capacity_bytes is None or account.used_bytes <= account.capacity_bytes
    return losses, {name: p.detach().clone() for name, p in engine.trainable.items()}, moved


def same(one, other):
    return one[0] == other[0] and all(torch.equal(p, other[1][name]) for name, p in one[1].items())


def budgets_for_all_tiers(problem, streams):
    """Capacities with which the rule has layers in each tier, of them two in DEVICE: just above what `streams`, a plan
    that fills nothing, needs.
    """
    layer, slack = problem.layers[0].stored_bytes, streams.peak_bytes["device"][rehearsal.SLACK]
    least = streams.predicted_bytes(Tier.DEVICE) - slack * 3 // 4
    for device in range(least, least + 8 * layer, layer // 2):
        for host in range(3 * layer, 8 * layer, layer):
            asked = replace(problem, device_capacity_bytes=device, host_capacity_bytes=host, fills=True)
            where = rests(asked, plan_streaming(asked))
            if set(where) == set("DHN") and where.count("D") > 1:
                return device, host
    raise ValueError("none found")


def test_layers_in_all_three_tiers_give_the_numbers_of_layers_that_stream(tmp_path):
    with engine_of(tmp_path, PLENTY, PLENTY, fill=False) as streams:
        problem, expected = streams._runtime.made_of.problem, train(streams)
        assert rests(problem, streams.plan) == "N" * NUM_LAYERS
    device, host = budgets_for_all_tiers(problem, streams.plan)
    with engine_of(tmp_path, device, host, record=True) as engine:
        found = train(engine)
        assert set(rests(problem, engine.plan)) == set("DHN")
        assert engine.report()["memory"]["device"] <= device and engine.report()["memory"]["host"] <= host
        assert "in host" in engine.summary()
    assert same(found, expected)
    assert 0 < found[2][-1][0] < expected[2][-1][0], "less is read from the drive"
    assert 0 < found[2][-1][1] < expected[2][-1][1], "less is copied"


def test_where_all_fits_no_step_reads_or_copies_or_computes_again(tmp_path):
    with engine_of(tmp_path, PLENTY, PLENTY, fill=False) as streams:
        expected = train(streams)
        assert streams.report()["recomputes"] == 3 * NUM_LAYERS
    with engine_of(tmp_path, PLENTY, PLENTY) as engine:
        found = train(engine)
        assert engine.plan.rings == () and engine.report()["recomputes"] == 0
    assert same(found, expected) and found[2] == [(0, 0)] * 3


def test_what_the_last_layers_save_is_kept_as_far_as_there_is_room(tmp_path):
    with engine_of(tmp_path, PLENTY, PLENTY, fill=False) as streams:
        problem, expected = streams._runtime.made_of.problem, train(streams)
    whole = plan_streaming(problem)
    device = whole.predicted_bytes(Tier.DEVICE) + whole.peak_bytes["device"]["activations"]
    device -= whole.peak_bytes["device"]["kept activations"] // 2
    with engine_of(tmp_path, device, PLENTY) as engine:
        kept = engine.plan.activations
        names = [draft.name for draft in engine._runtime.made_of.workload.layers]
        assert list(kept) == names[NUM_LAYERS - len(kept) :] and 0 < len(kept) < NUM_LAYERS
        assert all(policy.chunks[0].action is Action.KEEP for policy in kept.values())
        assert engine.plan.rings == (), "weights come first"
        found = train(engine)
        assert engine.report()["recomputes"] == 3 * (NUM_LAYERS - len(kept))
    assert same(found, expected)


def test_a_filled_plan_of_which_tensors_take_more_is_made_again(tmp_path, monkeypatch):
    with engine_of(tmp_path, PLENTY, PLENTY, fill=False) as streams:
        problem, expected = streams._runtime.made_of.problem, train(streams)
    monkeypatch.setattr(rehearsal, "ROOM", 1000)
    device = plan_streaming(problem).predicted_bytes(Tier.DEVICE) - 2 * problem.layers[0].stored_bytes
    with engine_of(tmp_path, device, PLENTY) as engine:
        before = engine.plan
        account = engine._runtime.tiers.account(Tier.DEVICE)
        more = account.capacity_bytes - account.used_bytes + account.holdings[rehearsal.SLACK]
        measured = rehearsal.planned_bytes(engine._runtime) + more
        monkeypatch.setattr(rehearsal, "measure", lambda *_: (measured, None))
        found = train(engine)
        assert engine.report()["rehearsal"]["result"] == "planned again" and engine.plan != before
        assert len(engine.plan.activations or ()) < len(before.activations)
    assert same(found, expected)


@pytest.mark.parametrize("two_tiers", [True, False])
def test_layers_that_train_stay_and_keep_what_they_save_where_there_is_room(two_tiers, tmp_path):
    memory = {"device_memory": "64MiB", "max_grad_norm": 1.0, "nvme": tmp_path}
    memory |= {"host_memory": "64MiB"} if two_tiers else {}
    plain = tiny_training.Plain(tiny_training.model(), max_grad_norm=1.0)
    expected = tiny_training.train(plain, range(3))
    with tiny_training.engine(tiny_training.model(), "", tmp_path, options={"fill": True}, **memory) as run:
        assert run.plan.activations
        assert tiny_training.train(run, range(3)) == expected
        assert run.plan.rings == () and tiny_training.differences(plain.state(), run.state()) == []


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_run_that_goes_on_in_more_memory_has_the_numbers_of_one_that_streams(accumulation, tmp_path):
    """Before, its layers lie in all three tiers; after, all are in DEVICE, and what they save is kept there. Losses are
    evaluated between the steps.
    """

    def engine(device, host, **options):
        return Engine(
            build_lora(num_layers=NUM_LAYERS, dropout=0.0 if accumulation > 1 else 0.1), bits=4, batch_size=2,
            seq_len=16, lr=1e-2, device="cpu", nvme=tmp_path, device_memory=device, host_memory=host,
            accumulation_steps=accumulation, options=RuntimeOptions(**options),
        )  # fmt: skip

    def step(engine, number):
        torch.manual_seed(number)
        loss = engine.train_batch([language_batch(10 * number + part) for part in range(accumulation)])
        engine.model.eval()
        with torch.no_grad():
            evaluated = engine(**language_batch(99)).loss
        engine.model.train()
        return float(loss), float(evaluated)

    with engine(PLENTY, PLENTY, fill=False) as streams:
        problem = streams._runtime.made_of.problem
        expected = [step(streams, number) for number in range(3)]
        weights = {name: p.detach().clone() for name, p in streams.trainable.items()}
    with engine(*budgets_for_all_tiers(problem, streams.plan)) as run:
        found = [step(run, 0)]
        run.save_checkpoint(tmp_path / "saved")
    with engine(PLENTY, PLENTY) as run:
        run.load_checkpoint(tmp_path / "saved")
        found += [step(run, number) for number in (1, 2)]
        assert run.plan.rings == () and len(run.plan.activations) == NUM_LAYERS
        assert found == expected
        assert all(torch.equal(p, weights[name]) for name, p in run.trainable.items())
