"""Sequences whose activations are many times the memory: layers by chunks of tokens, chosen where nothing else fits."""

import pytest
import torch

from offload_rt.memory.allocations import AllocationMeter
from planners.errors import PlanInfeasible
from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.plan import Tier
from planners.rule.attempts import WHAT_TRAINS
from tests.tokenwise import build_with_adapters

TOKENS, LAYERS, HIDDEN = 2048, 24, 64
BUDGET = 12 << 20


def model(num_layers=LAYERS):
    return build_with_adapters(num_layers=num_layers, hidden=HIDDEN, most_tokens=TOKENS)


def batch(num_tokens=TOKENS):
    ids = torch.randint(0, 64, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def gradients(run, trained, num_tokens=TOKENS):
    loss = run(**batch(num_tokens)).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in trained.named_parameters() if parameter.requires_grad}
    trained.zero_grad()
    return {"loss": loss.detach(), **found}


def saved_bytes(plain):
    """What autograd keeps between forward and backward, each storage once, without parameters."""
    seen = {p.untyped_storage().data_ptr() for p in plain.parameters()}
    total = 0
    alive = []

    def pack(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
            alive.append(storage)  # so that no address comes again
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        plain(**batch())
    return total


def peak_bytes(action):
    """The most of what PyTorch's allocator hands out meanwhile that is held at once, to the byte.

    What was there before does not count where it is given back, whenever that is.
    """
    with AllocationMeter() as meter:
        action()
    return meter.peak_bytes


def test_activations_of_more_than_ten_times_the_memory_train_in_it(make_engine, disk_folder):
    """The chunks that the rule takes; and an unlimited run that keeps all of the same ones has the same bits."""
    plain = model()
    assert saved_bytes(plain) > 10 * BUDGET
    engine = make_engine(model(), batch_size=1, seq_len=TOKENS, nvme=disk_folder, device_memory=BUDGET)
    (num_tokens,) = {chunk.num_tokens for policy in engine.plan.activations.values() for chunk in policy.chunks}
    assert num_tokens < TOKENS
    assert engine.plan.layer_inputs is Tier.NVME
    assert engine.plan.predicted_bytes(Tier.DEVICE) <= BUDGET
    limited = gradients(engine, engine.model)
    counters = engine.report()["tokenwise"]
    assert counters["num_whole"] == counters["no_room_bytes"] == 0
    assert counters["num_second_replays"] == counters["num_chunks"] > counters["num_passes"] == LAYERS
    engine.close()
    kept = ActivationPolicy(chunks=(Chunk(num_tokens=num_tokens, action=Action.KEEP),))
    options = {"activations": kept, "head_chunk_tokens": engine.plan.head_chunk_tokens}
    unlimited = make_engine(model(), batch_size=1, seq_len=TOKENS, device_memory="4GiB", options=options)
    found = gradients(unlimited, unlimited.model)
    assert [name for name in found if not torch.equal(found[name], limited[name])] == []
    assert unlimited.report()["tokenwise"]["num_second_replays"] == 0


@pytest.mark.parametrize(
    ("num_tokens", "num_threads"), [pytest.param(TOKENS, 1, marks=pytest.mark.full), (1024, 1), (1024, 3)]
)
def test_what_is_held_at_once_is_within_the_plan(make_engine, disk_folder, threads, num_tokens, num_threads):
    """Of few tokens, what attention takes for each thread is most of it."""
    threads(num_threads)
    policy = ActivationPolicy(chunks=(Chunk(num_tokens=256, action=Action.RECOMPUTE),))
    options = {"activations": policy, "layer_inputs": Tier.NVME, "head_chunk_tokens": 256}
    engine = make_engine(
        model(3), options, batch_size=1, seq_len=num_tokens, nvme=disk_folder, device_memory="64MiB", host_memory="8MiB"
    )
    gradients(engine, engine.model, num_tokens)
    most = peak_bytes(lambda: engine.backward(engine(**batch(num_tokens)).loss))
    planned = engine.report()["holdings"]["device"]
    assert most < planned["activations"] + planned[WHAT_TRAINS] + planned["layer input in use"]


def test_layers_that_fit_whole_are_not_cut(make_engine, disk_folder):
    engine = make_engine(model(), batch_size=1, seq_len=TOKENS, nvme=disk_folder, device_memory="64MiB")
    assert engine.plan.activations is None


def test_what_cannot_fit_by_chunks_either_says_what_would(make_engine, disk_folder):
    with pytest.raises(PlanInfeasible) as caught:
        make_engine(model(), batch_size=1, seq_len=TOKENS, nvme=disk_folder, device_memory="2MiB")
    assert caught.value.need_bytes <= BUDGET, "what it would take by chunks"
