"""Groups of what a chunk saves, each treated in its own way: the same bits, the work and the bytes that it says."""

import copy
import itertools
import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from torch import nn

from offload_rt.memory.arena import Arena
from offload_rt.storage.scratch import Scratch
from offload_rt.tiering.stash import HostStash, NvmeStash
from offload_rt.tokenwise import first_products
from offload_rt.tokenwise.saved import MIN_SWAPPED_BYTES
from offload_rt.tokenwise.tiles import Places
from offload_rt.transfers.links import Links
from planners.plans.activations import Action, ActivationPolicy, Chunk, Group, Span, Treatment
from planners.plans.placement import Tier
from tests.parity import covering
from tests.test_tokenwise import counted, run, same_bits
from tests.tokenwise import ARCHITECTURES, ROWS, TOKENS, batch, build, cut, decoder_layers, errors, num_tensors, step

KEEP, RECOMPUTE = Treatment(action=Action.KEEP), Treatment(action=Action.RECOMPUTE)
HOST, NVME = (Treatment(action=Action.SWAP, tier=tier) for tier in (Tier.HOST, Tier.NVME))
SAVED = (KEEP, HOST, NVME)
PLACED = (None, *SAVED)
WAYS = (*SAVED, RECOMPUTE)
CELLS = [
    *map(tuple, covering((SAVED, WAYS, PLACED, WAYS, (1, 3)), 2)),
    *(
        (RECOMPUTE, qkv, result, RECOMPUTE, chunks)
        for qkv, result, chunks in zip(WAYS, PLACED, (3, 1, 3, 1), strict=True)
    ),
]
"""(before, qkv, result, after, chunks): every pair that is allowed."""


def grouped(before, qkv, result, after, chunks, num_tokens=TOKENS):
    one = Chunk(
        num_tokens=-(-num_tokens // chunks), action=Action.KEEP, before=before, qkv=qkv, result=result, after=after
    )
    return ActivationPolicy(chunks=(one,))


@pytest.fixture
def places(disk_folder):
    links = Links()
    scratch = Scratch(disk_folder, 64 << 20, links)
    on_drive = NvmeStash(scratch, Arena("staging", 64 << 10), links)
    yield Places(layer_inputs=on_drive, layer_inputs_tier=Tier.NVME,
                 swapped={Tier.HOST: HostStash(Arena("host", 32 << 20), links), Tier.NVME: on_drive})  # fmt: skip
    links.close()
    scratch.close()


def run_in(places, model, chosen, inputs):
    twin = copy.deepcopy(model)
    tokenwise = cut(twin, chosen)
    tokenwise.places = places
    return step(twin, inputs), tokenwise


# the same numbers


OTHERS = [
    ("llama", {"attention_dropout": 0.2}), ("cohere", {}), ("qwen3_next", {}), ("gpt_oss", {}),
    ("gpt2", {"resid_pdrop": 0.1, "attn_pdrop": 0.1}), ("deepseek_v3", {}),
]  # fmt: skip


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "architecture, changes",
    OTHERS,
    ids=["llama", "one norm for both", "gate beside the queries", "sinks", "dropout", "latent"],
)
def test_every_pair_of_treatments_gives_the_same_bits(architecture, changes, stride, places):
    """By default each cell on two of the architectures.

    One chunk: those of plain PyTorch. Three: as close as sums in another order are, and alike wherever they wait."""
    model, inputs = build(architecture, **changes), batch(padded=True)
    plain = step(copy.deepcopy(model), inputs)
    expected = {1: plain}
    for cell in CELLS[OTHERS.index((architecture, changes)) % stride :: stride]:
        found, tokenwise = run_in(places, model, grouped(*cell), inputs)
        same_bits(found, expected.setdefault(cell[-1], found))
        assert (tokenwise.refused, tokenwise.counters.no_room_bytes) == ({}, 0), cell
    if not changes:  # chunks draw other numbers than the whole
        assert max(errors(expected[3], plain).values()) < 2e-6


def test_a_gate_that_shares_a_product_with_the_queries_is_found_and_run_again(places):
    model, inputs = build("qwen3_next"), batch()
    _, tokenwise = run_in(places, model, grouped(KEEP, HOST, None, RECOMPUTE, 4), inputs)
    counters = tokenwise.counters
    assert counters.num_second_replays == counters.num_chunks
    assert counters.num_first_replays == counters.num_second_replays


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in ("llama4_text", "gpt2") else pytest.mark.full) for name in ARCHITECTURES],
)
def test_selective_recompute_leaves_out_the_way_to_attention_in_all_architectures_but_one(architecture):
    """Also where queries and keys are rotated as complex numbers (llama4_text)."""
    model, inputs = build(architecture), batch(padded=True)
    expected, _ = run(model, grouped(RECOMPUTE, RECOMPUTE, None, RECOMPUTE, 3), inputs)
    found, tokenwise = run(model, grouped(KEEP, KEEP, None, RECOMPUTE, 3), inputs)
    same_bits(found, expected)
    counters = tokenwise.counters
    assert (tokenwise.num_whole, counters.num_second_replays) == (0, counters.num_chunks)
    assert counters.num_first_replays == (counters.num_chunks if architecture == "qwen3_next" else 0)


def test_a_product_that_is_wanted_and_not_watched_gives_nan(monkeypatch):
    """What the watch is for: without it, a gate would be made of a product that was left out."""
    monkeypatch.setattr(first_products._Watch, "let_go", lambda self: setattr(self, "_leaves_out", False))
    original = first_products._Watch.__torch_dispatch__

    def unwatched(self, func, types, args=(), kwargs=None):
        if self._leaves_out:
            return original(self, func, types, args, kwargs)
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(first_products._Watch, "__torch_dispatch__", unwatched)
    model, inputs = build("qwen3_next"), batch()
    found, _ = run(model, grouped(KEEP, KEEP, None, RECOMPUTE, 4), inputs)
    assert any(bool(tensor.isnan().any()) for tensor in found.values())


def test_backward_twice_through_groups(places):
    model, inputs = build(), batch()
    for cell in CELLS[::3]:
        twin = copy.deepcopy(model)
        cut(twin, grouped(*cell)).places = places
        loss = twin(**inputs).loss
        loss.backward(retain_graph=True)
        once = {n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None}
        loss.backward()
        assert all(torch.equal(p.grad, 2 * once[n]) for n, p in twin.named_parameters() if n in once), cell


@pytest.mark.parametrize("cell", [(KEEP, HOST, KEEP, RECOMPUTE, 4), (RECOMPUTE, KEEP, None, RECOMPUTE, 4)], ids=str)
def test_a_step_by_groups_leaves_no_tensor_behind(cell, places):
    model, inputs = build(), batch()
    cut(model, grouped(*cell)).places = places

    num_tensors(model, inputs)  # has tried the layers
    assert num_tensors(model, inputs) == num_tensors(model, inputs)


# the work


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("before, qkv, after", itertools.product((KEEP, RECOMPUTE), repeat=3))
def test_each_group_costs_what_it_says(architecture, before, qkv, after):
    """See [Note: what each group costs to compute again] in `planners.plans.activations`; attention runs once."""
    if before is RECOMPUTE and after is not RECOMPUTE:
        pytest.skip("refused")
    model, inputs = build(architecture), batch()
    layers, hidden = 2, 64
    to_attention, on = (hidden * 128, hidden * 64 + 3 * hidden * 96)
    if architecture == "gpt2":
        to_attention, on = 3 * hidden * hidden, 9 * hidden * hidden
    plain, _, _ = counted(model, None, inputs)
    products, calls, done = counted(model, grouped(before, qkv, None, after, 4), inputs)
    times = (before is RECOMPUTE) + (qkv is RECOMPUTE)
    expected = times * to_attention + (after is RECOMPUTE) * on
    assert products - plain == 2 * ROWS * TOKENS * layers * expected
    assert calls == {"attention": layers, "attention backward": layers}
    assert done["num_first_replays"] == 4 * layers * times
    assert done["num_second_replays"] == 4 * layers * (after is RECOMPUTE)


# the bytes


def saved_of_plain(model, inputs, monkeypatch):
    """The plain twin: bytes that autograd saves in the model's layers, by group, each storage once in its group.

    Of one row: of several, a chunk's part of the attention's result is no view of one range, and layers copy it.

    Returns two counts: of storages that are worth a transfer when a quarter of the tokens is in a chunk, and of others.
    """
    phase, seen, counts = ["before"], {}, (Counter(), Counter())
    original = nn.functional.scaled_dot_product_attention
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    alive = []

    def count(tensor, group):
        storage = tensor.untyped_storage()
        key = (group, storage.data_ptr())
        if storage.data_ptr() not in owned and key not in seen:
            seen[key] = alive.append(storage)  # so that no address comes again
            counts[storage.nbytes() // 4 < MIN_SWAPPED_BYTES][group] += storage.nbytes()

    def attend(query, key, value, *args, **kwargs):
        phase[0] = "attention"
        for tensor in (query, key, value):
            counts[0]["qkv"] += tensor.nbytes
        result = original(query, key, value, *args, **kwargs)
        owned.add(result.untyped_storage().data_ptr())
        alive.append(result)
        counts[0]["result"] += result.nbytes
        phase[0] = "after"
        return result

    def wrapped(layer, forward):
        def run(hidden, *args, **kwargs):
            phase[0] = "before"
            owned.add(hidden.untyped_storage().data_ptr())
            owned.update(t.untyped_storage().data_ptr() for t in kwargs["position_embeddings"])

            def pack(tensor):
                if phase[0] != "attention":
                    count(tensor, phase[0])
                return tensor.detach()

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward(hidden, *args, **kwargs)

        layer.forward = run

    for layer in decoder_layers(model):
        wrapped(layer, layer.forward)
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", attend)
        model(**inputs)
    return counts


@pytest.mark.parametrize(
    "cell",
    [
        (KEEP, HOST, NVME, NVME), (NVME, KEEP, HOST, KEEP), (HOST, NVME, KEEP, RECOMPUTE), (HOST, HOST, NVME, HOST),
        (RECOMPUTE, HOST, NVME, RECOMPUTE), (NVME, RECOMPUTE, HOST, NVME),
    ],
    ids=str,
)  # fmt: skip
def test_every_group_has_the_bytes_of_plain_autograd_in_its_own_tier(cell, places, monkeypatch):
    model, inputs = build(), {name: rows[:1] for name, rows in batch(num_tokens=64).items()}
    large, small = saved_of_plain(copy.deepcopy(model), inputs, monkeypatch)
    chosen = grouped(*cell, 4, num_tokens=64)
    _, tokenwise = run_in(places, model, chosen, inputs)
    expected = Counter()
    for group, treatment in zip(("before", "qkv", "result", "after"), cell, strict=True):
        if treatment is not RECOMPUTE:
            expected[f"{group} in {(treatment.tier or Tier.DEVICE).value}"] += large[group]
            expected[f"{group} in device"] += small[group]
    found = {name: size for name, size in tokenwise.counters.bytes_by_group.items() if name.split()[0] in large}
    assert found == {name: size for name, size in expected.items() if size}
    assert large["after"] > large["qkv"] > 0 and large["before"] > 0
    num_layers, row = 2, 64 * 4
    assert tokenwise.counters.bytes_by_group["input in nvme"] == num_layers * 64 * row
    assert tokenwise.counters.swapped_bytes == tokenwise.counters.loaded_bytes


def test_one_chunk_has_each_group_in_its_tier_as_well(places):
    model, inputs = build(), batch(num_tokens=64)
    _, tokenwise = run_in(places, model, grouped(KEEP, HOST, NVME, HOST, 1, num_tokens=64), inputs)
    found = tokenwise.counters.bytes_by_group
    layers, tokens = 2, ROWS * 64
    assert found["qkv in host"] == layers * tokens * 4 * 128
    assert found["result in nvme"] == layers * tokens * 4 * 64
    assert found["after in host"] > found["before in device"] > 0
    assert found["attention in nvme"] == layers * ROWS * 4 * 64 * 4, "a log-sum-exp for each head"
    assert {name for name in found if not name.endswith("device")} == {
        "qkv in host", "result in nvme", "after in host", "input in nvme", "attention in nvme"
    }  # fmt: skip


@pytest.mark.parametrize("store_qkv", [True, False])
def test_one_chunk_that_is_treated_alike_waits_in_one_place(store_qkv, places):
    """One graph has queries, keys and values anyway: they wait with the rest, stored or not."""
    model, inputs = build(), batch(num_tokens=64)
    one = Chunk(num_tokens=64, action=Action.SWAP, tier=Tier.HOST)
    _, tokenwise = run_in(places, model, ActivationPolicy(chunks=(one,), store_qkv=store_qkv), inputs)
    found = tokenwise.counters.bytes_by_group
    in_host = sum(size for name, size in found.items() if name.endswith("host"))
    assert in_host > 2 * ROWS * 64 * 4 * (128 + 3 * 96)
    assert found["qkv in device"] == found["chunk in nvme"] == 0


# policies


def test_the_json_form_is_read_back_and_that_of_version_1_as_well():
    chosen = ActivationPolicy(
        chunks=(
            Chunk(num_tokens=6, action=Action.SWAP, tier=Tier.NVME, qkv=HOST, after=RECOMPUTE),
            Chunk(num_tokens=4, action=Action.RECOMPUTE, result=KEEP),
        ),
        attention_groups=2,
    )
    assert ActivationPolicy.from_json(json.loads(json.dumps(asdict(chosen)))) == chosen
    before_groups = {
        "chunks": [{"num_tokens": 5, "action": "swap", "tier": "host"}], "store_qkv": False, "attention_groups": 1
    }  # fmt: skip
    simple = ActivationPolicy(chunks=(Chunk(num_tokens=5, action=Action.SWAP, tier=Tier.HOST),), store_qkv=False)
    assert ActivationPolicy.from_json(before_groups) == simple
    with pytest.raises(ValueError, match="version 3"):
        ActivationPolicy.from_json({**asdict(chosen), "version": 3})
    with pytest.raises(TypeError, match="behind"):
        ActivationPolicy.from_json({"chunks": [{"num_tokens": 5, "action": "keep", "behind": {"action": "keep"}}]})


def test_a_span_says_what_becomes_of_each_group():
    chosen = ActivationPolicy(
        chunks=(Chunk(num_tokens=6, action=Action.SWAP, tier=Tier.HOST, after=NVME),), store_qkv=False
    )
    (span,) = chosen.spans(3)
    assert span == Span(0, 3, Action.SWAP, Tier.HOST, ((Group.QKV, RECOMPUTE), (Group.AFTER, NVME)))
    assert [span.of(group) for group in Group] == [HOST, RECOMPUTE, None, NVME]
    assert chosen.tiers == {Tier.HOST, Tier.NVME}
    assert [chosen.num_swapped(15, tier) for tier in (None, Tier.HOST, Tier.NVME)] == [15, 15, 15]


def test_groups_that_cannot_be_treated_so_are_refused():
    with pytest.raises(ValueError, match="attention never runs twice"):
        Chunk(num_tokens=1, action=Action.KEEP, result=RECOMPUTE)
    with pytest.raises(ValueError, match="Recompute both"):
        Chunk(num_tokens=1, action=Action.KEEP, before=RECOMPUTE)
    with pytest.raises(ValueError, match="Recompute both"):
        Chunk(num_tokens=1, action=Action.RECOMPUTE, after=NVME)
    with pytest.raises(ValueError, match="a group is swapped nowhere"):
        Treatment(action=Action.SWAP)
