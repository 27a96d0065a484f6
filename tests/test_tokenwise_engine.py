"""Layers by chunks of tokens in an engine: frozen blocks that stream, activations that wait in every tier."""

import copy
import functools
import itertools
import json
from dataclasses import replace

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError, UnsupportedModule
from offload_rt.tiering.stash import NvmeStash
from planners.plans.activations import Action, ActivationPolicy, Chunk, Treatment
from planners.plans.plan import DecodeScope, Plan, Tier
from tests.conftest import build_lora, decode_in_place, language_batch
from tests.parity import in_turns
from tests.tokenwise import errors, policy, waiting_in

SEQ_LEN = 16
NUM_LAYERS = 3
LINEAR = {"decode_scope": DecodeScope.LINEAR}
STRESS = {**LINEAR, "poison": True, "record": True, "delay_seconds": 0.002, "num_slots": 1, "stream_edges": True}

PLACES = {
    "in place": (LINEAR, {}, [Tier.NVME]),
    "HOST": ({**STRESS, "layer_inputs": Tier.HOST}, {"host_memory": "64MiB"}, [Tier.HOST]),
    "NVME": ({**STRESS, "layer_inputs": Tier.NVME}, {}, [Tier.NVME]),
    "HOST and NVME": ({**STRESS, "layer_inputs": Tier.NVME}, {"host_memory": "64MiB"}, [Tier.HOST, Tier.NVME]),
    "layers decoded whole": ({**STRESS, "decode_scope": DecodeScope.LAYER}, {}, [Tier.NVME]),
}
"""Options, arguments of the engine beside a drive, and the tiers in which swapped chunks wait by turns."""


def chunked(share, chunks, **rest):
    return policy(share, chunks, num_tokens=SEQ_LEN, **rest)


def steps(engine, optimizer_step, num_steps=2):
    """Losses, gradients and parameters of a few steps. `engine` is one, or a plain model."""
    model = engine.model if isinstance(engine, Engine) else engine
    found = {}
    for number in range(num_steps):
        inputs = language_batch(number, tokens=SEQ_LEN)
        torch.manual_seed(number)
        loss = engine(**inputs).loss
        loss.backward()
        found[f"loss {number}"] = loss.detach()
        found |= {f"{n} {number}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer_step()
    return found


@functools.cache
def plain_steps(family, bits, dropout):
    model = build_lora(family, torch.bfloat16, num_layers=NUM_LAYERS, dropout=dropout)
    if bits == 4:
        decode_in_place(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    return steps(model.train(), step)


@pytest.fixture
def run(make_engine, disk_folder):
    """Makes an engine with a policy in a place, runs it, checks that nothing raced; (results, engine)."""
    engines = []

    def make(chosen, place="in place", family="llama", bits=4, dropout=0.1):
        options, arguments, tiers = PLACES[place]
        options = {**options, "activations": waiting_in(chosen, *tiers)}
        model = build_lora(family, torch.bfloat16, num_layers=NUM_LAYERS, dropout=dropout).train()
        while engines:
            engines.pop().close()  # the store is one's at a time
        engine = make_engine(model, options, bits=bits, seq_len=SEQ_LEN, nvme=disk_folder, **arguments)
        engines.append(engine)
        found = steps(engine, engine.step)
        recorder = engine._runtime.recorder
        assert recorder is None or [str(race) for race in recorder.check()] == []
        return found, engine

    return make


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    "family, bits",
    [
        ("llama", 4),
        pytest.param("llama", None, marks=pytest.mark.full),
        pytest.param("gpt2", 4, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("place, share", in_turns(PLACES, (0.0, 1.0)))
def test_one_chunk_is_bit_equal_to_plain(run, place, family, bits, share):
    found, engine = run(chunked(share, 1), place, family, bits)
    same_bits(found, plain_steps(family, bits, 0.1))
    report = engine.report()
    assert report["tokenwise"]["num_passes"] == 2 * NUM_LAYERS
    assert report["tokenwise"]["num_whole"] == report["recomputes"] == 0
    assert (report["tokenwise"]["swapped_bytes"] > 0) is (share > 0 or engine.plan.layer_inputs is not Tier.DEVICE)


SHARES = (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    "family, bits, chunks, cells",
    [
        ("llama", 4, 2, list(zip(PLACES, itertools.cycle(SHARES), strict=False))),
        pytest.param("llama", 4, 2, list(itertools.product(PLACES, SHARES)), marks=pytest.mark.full),
        pytest.param("moe", 4, 3, list(itertools.product(PLACES, (0.0, 1.0))), marks=pytest.mark.full),
        pytest.param("qwen", None, 5, list(itertools.product(PLACES, (0.0, 1.0))), marks=pytest.mark.full),
    ],
    ids=["llama", "llama, every cell", "moe", "qwen"],
)
def test_several_chunks_agree_with_plain_and_to_the_bit_wherever_they_wait(run, family, bits, chunks, cells):
    """Half of an odd number of chunks would be a cut more."""
    plain = plain_steps(family, bits, 0.0)
    results = []
    for place, share in cells:
        found, engine = run(chunked(share, chunks), place, family, bits, dropout=0.0)
        assert engine.report()["tokenwise"]["refused"] == {}
        assert engine.report()["tokenwise"]["no_room_bytes"] == 0
        assert engine.report()["prefetch_misses"] == 0
        results.append(found)
    assert len(results) >= len(PLACES)
    for found in results[1:]:
        same_bits(found, results[0])
    first = {n: t for n, t in results[0].items() if n.endswith(" 0")}
    assert max(errors(first, {n: plain[n] for n in first}).values()) < 4e-2


@pytest.mark.parametrize("chunks", [1, 2])
def test_groups_of_a_chunk_wait_in_tiers_of_their_own(run, chunks):
    """What precedes attention stays, its operands go to HOST, and the rest to NVME, or is computed again."""
    in_host, on_nvme = (Treatment(action=Action.SWAP, tier=tier) for tier in (Tier.HOST, Tier.NVME))
    again = Treatment(action=Action.RECOMPUTE)
    expected, _ = run(chunked(1.0, chunks), "HOST and NVME")
    for after in (on_nvme, again):
        one = Chunk(num_tokens=SEQ_LEN // chunks, action=Action.KEEP, qkv=in_host, result=on_nvme, after=after)
        found, engine = run(ActivationPolicy(chunks=(one,)), "HOST and NVME")
        same_bits(found, expected)
        counters = engine.report()["tokenwise"]
        assert (counters["num_whole"], counters["no_room_bytes"]) == (0, 0)
        assert counters["num_second_replays"] == (2 * NUM_LAYERS * chunks if after is again else 0)
        whole_again = chunks == 1 and after is again
        waited = {name for name, size in counters["bytes_by_group"].items() if size and not name.endswith("device")}
        assert {name for name in waited if name.split()[0] in ("qkv", "after")} == (
            set() if whole_again else {"qkv in host"} | ({"after in nvme"} if after is on_nvme else set())
        )


def test_adapter_dropout_in_chunks_is_the_same_at_every_share(run):
    expected, _ = run(chunked(0.0, 2), "HOST")
    for share in (0.5, 1.0):
        found, _ = run(chunked(share, 2), "HOST")
        same_bits(found, expected)


def quantized(engine):
    return sum(b.spec.is_quantized for layer in engine._runtime.layers for b in layer.block.bindings)


def decodes_of_a_step(engine, seed=7):
    before = engine.report()["decodes"]
    engine(**language_batch(seed, tokens=SEQ_LEN)).loss.backward()
    return engine.report()["decodes"] - before


@pytest.mark.parametrize("share, chunks", in_turns(SHARES, (1, 2, 4)))
def test_a_layer_that_is_held_decoded_is_decoded_once_a_pass(run, chunks, share):
    """Once in forward and once in backward, whatever the number of chunks: never more than plain recomputing does."""
    _, engine = run(chunked(share, chunks), "layers decoded whole", dropout=0.0)
    unused = 3 if share == 1.0 or chunks == 1 and share == 0.5 else 0  # q, k, v of the first layer lead to no gradient
    assert decodes_of_a_step(engine) == 2 * quantized(engine) - unused
    assert engine.report()["decode_overflow_bytes"] == 0


def test_linear_by_linear_each_chunk_decodes_for_itself(run):
    """Forward; again for each product's backward; recomputed: seg1 twice, and the rest once, before that."""
    _, engine = run(chunked(1.0, 4), dropout=0.0)
    swapped = decodes_of_a_step(engine)
    _, engine = run(chunked(0.0, 4), dropout=0.0)
    recomputed = decodes_of_a_step(engine)
    to_attention = 3
    assert recomputed - swapped == 4 * (quantized(engine) + to_attention * NUM_LAYERS)
    assert swapped <= 4 * 2 * quantized(engine)


def test_what_waits_for_backward_holds_no_slot_and_no_decoded_weight(run):
    """Between forward and backward of kept chunks there are references, not weights: one slot serves all layers."""
    swapped, _ = run(chunked(1.0, 2), "NVME", dropout=0.0)
    kept = ActivationPolicy(chunks=(Chunk(num_tokens=8, action=Action.KEEP),))
    found, engine = run(kept, "NVME", dropout=0.0)
    same_bits(found, swapped)
    loss = engine(**language_batch(3, tokens=SEQ_LEN)).loss
    assert engine._runtime.decoder.arena.held_bytes() == 0
    ring = engine._runtime.executors[0]
    assert ring.ring.num_slots == 1 and ring.arena.held_bytes() <= ring.ring.slot_bytes
    loss.backward()
    assert engine.report()["decode_overflow_bytes"] == 0


def test_evaluation_and_generation_run_whole(run):
    _, engine = run(chunked(0.5, 2), dropout=0.0)
    passes = engine.report()["tokenwise"]["num_passes"]
    with torch.no_grad():
        engine.model.eval()
        engine(**language_batch(0, tokens=SEQ_LEN))
        engine.model.generate(torch.full((1, 4), 5), max_new_tokens=3, do_sample=False)
    assert engine.report()["tokenwise"]["num_passes"] == passes


def test_an_exception_in_a_chunk_and_then_a_correct_step(run):
    _, engine = run(chunked(0.5, 4), "NVME", dropout=0.0)
    twin = copy.deepcopy({n: p.detach().clone() for n, p in engine.trainable.items()})
    inputs = language_batch(5, tokens=SEQ_LEN)
    engine(**inputs).loss.backward()
    expected = {n: p.grad.clone() for n, p in engine.trainable.items()}
    engine.model.zero_grad()
    calls = []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) in (3, 7):
            raise KeyError("broken on purpose")

    handle = engine._runtime.layers[1].layer.mlp.register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(KeyError):
            engine(**inputs).loss.backward()
    handle.remove()
    engine.model.zero_grad()
    engine(**inputs).loss.backward()
    same_bits({n: p.grad for n, p in engine.trainable.items()}, expected)
    same_bits({n: p.detach() for n, p in engine.trainable.items()}, twin)


def test_a_layer_that_cannot_be_cut_is_reported_and_runs_whole(make_engine, disk_folder):
    from tests.test_tokenwise import Shifted

    def model():
        made = build_lora(num_layers=NUM_LAYERS, dropout=0.0).train()
        for layer in made.base_model.model.model.layers:
            layer.mlp = Shifted(layer.mlp)
        return made

    options = {"activations": waiting_in(chunked(0.5, 2), Tier.NVME)}
    engine = make_engine(model(), options, seq_len=SEQ_LEN, nvme=disk_folder, bits=4)
    found = steps(engine, engine.step)
    report = engine.report()["tokenwise"]
    assert report["num_whole"] == 2 * NUM_LAYERS == engine.report()["recomputes"]
    assert len(report["refused"]) == 1 and "differs by" in next(iter(report["refused"].values()))
    plain = decode_in_place(model())
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    same_bits(found, steps(plain, lambda: (optimizer.step(), optimizer.zero_grad())))


# plans


def base_plan(make_engine, disk_folder, **arguments):
    with make_engine(build_lora(num_layers=2), seq_len=SEQ_LEN, nvme=disk_folder, bits=4, **arguments) as engine:
        return engine.plan


def test_a_plan_with_activations_is_read_back_and_runs(make_engine, disk_folder):
    plan = base_plan(make_engine, disk_folder)
    assert plan.activations is None
    policy = waiting_in(chunked(0.5, 2), Tier.NVME)
    chosen = replace(plan, activations={"LlamaDecoderLayer": policy})
    assert Plan.from_json(chosen.to_json()) == chosen
    engine = make_engine(build_lora(num_layers=2), plan=chosen, seq_len=SEQ_LEN, nvme=disk_folder, bits=4)
    steps(engine, engine.step)
    assert engine.report()["tokenwise"]["swapped_bytes"] > 0
    assert "chunks of tokens; swapped ones wait in nvme\n" in engine.summary()


def test_each_backward_begins_by_starting_what_was_put_away_last(make_engine, disk_folder, monkeypatch):
    seen = []

    def noting(name, original):
        def noted(self, *given):
            seen.append(name)
            return original(self, *given)

        return noted

    monkeypatch.setattr(NvmeStash, "start_from", noting("start", NvmeStash.start_from))
    monkeypatch.setattr(NvmeStash, "put", noting("put", NvmeStash.put))
    monkeypatch.setattr(NvmeStash, "start_previous", noting("loaded", NvmeStash.start_previous))
    policy = waiting_in(chunked(0.5, 2), Tier.NVME)
    options = {"activations": {"base_model.model.model.layers.0": policy}}
    engine = make_engine(build_lora(num_layers=2), options, seq_len=SEQ_LEN, nvme=disk_folder, bits=4)
    steps(engine, engine.step, num_steps=1)
    assert [name for name, _ in itertools.groupby(seen)] == ["put", "start", "loaded"]
    assert seen.count("start") == 2, "of the layer that nothing was put away of, and of the one before"
    monkeypatch.undo()
    away, started, put, start = [], [], NvmeStash.put, NvmeStash.start_from
    monkeypatch.setattr(NvmeStash, "put", lambda stash, tensor: away.append(put(stash, tensor)) or away[-1])
    monkeypatch.setattr(NvmeStash, "start_from", lambda _, latest: started.append(latest()) or start(_, latest))
    first = engine(**language_batch(0, 1, SEQ_LEN)).loss
    own = list(away)
    second = engine(**language_batch(1, 1, SEQ_LEN)).loss
    assert away[-1] not in (None, *own), "there is room for both"
    engine.backward(first)
    assert own[-1] is not None and started == [own[-1]] * 2, "not what the other forward put away"
    engine.backward(second)


def test_a_plan_of_before_activations_is_read(make_engine, disk_folder):
    plan = base_plan(make_engine, disk_folder)
    data = json.loads(plan.to_json())
    del data["activations"]
    assert Plan.from_json(json.dumps(data)) == plan


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"activations": {"NoSuchLayer": chunked(0.5, 2)}}, "NoSuchLayer"),
        ({"activations": {"LlamaDecoderLayer": chunked(0.5, 2)}}, "DEVICE and HOST are one"),
    ],
)
def test_a_plan_whose_activations_have_no_effect_is_refused(make_engine, disk_folder, changes, match):
    plan = replace(base_plan(make_engine, disk_folder), **changes)
    with pytest.raises(ConfigError, match=match):
        make_engine(build_lora(num_layers=2), plan=plan, seq_len=SEQ_LEN, nvme=disk_folder, bits=4)


def test_attention_weights_are_refused(run):
    _, engine = run(chunked(0.5, 2), dropout=0.0)
    with pytest.raises(UnsupportedModule, match="output_attentions"):
        engine(**language_batch(0, tokens=SEQ_LEN), output_attentions=True)
