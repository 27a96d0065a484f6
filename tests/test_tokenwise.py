"""Layers by chunks of tokens: the numbers of plain autograd, with the work and the memory that the policy says."""

import copy
import functools
import logging
import re
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from offload_rt.errors import UnsupportedModule
from offload_rt.memory.allocations import AllocationMeter
from offload_rt.tokenwise.attention import intercepted
from offload_rt.tokenwise.graphs import Sums, edge
from offload_rt.tokenwise.tiles import Places
from planners.plans.activations import MAX_CHUNKS, Action, ActivationPolicy, Chunk, Span
from planners.plans.placement import Tier
from tests.conftest import PlainLayer, PlainModel
from tests.parity import in_pairs, in_turns
from tests.tokenwise import (
    ARCHITECTURES,
    REFUSED,
    ROWS,
    TOKENS,
    batch,
    build,
    chunk,
    cut,
    decoder_layers,
    errors,
    in_fp64,
    num_tensors,
    policy,
    step,
)

STASH_BYTES = 16 << 20
A_FEW = ["llama", "cohere", "gpt_oss", "deepseek_v3", "falcon", "qwen3_moe"]
SHARES = [0.0, 0.3, 0.5, 1.0]
CHUNKS = [1, 2, 5]

aten = torch.ops.aten


def run(model, chosen, inputs, **arguments):
    """The step of a model that is run by chunks, and what its layers did."""
    twin = copy.deepcopy(model)
    tokenwise = cut(twin, chosen, **arguments)
    return step(twin, inputs), tokenwise


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# agreement with plain autograd


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in A_FEW else pytest.mark.full) for name in ARCHITECTURES],
)
def test_an_architecture_by_chunks_agrees_with_plain_autograd(architecture):
    model, inputs = build(architecture), batch(padded=True)
    plain = step(copy.deepcopy(model), inputs)
    for share in (0.0, 1.0):
        found, tokenwise = run(model, policy(share, 1), inputs, stash_bytes=STASH_BYTES)
        same_bits(found, plain)
    found, tokenwise = run(model, policy(0.3, 3), inputs, stash_bytes=STASH_BYTES)
    assert max(errors(found, plain).values()) < 2e-6
    assert (tokenwise.num_whole, tokenwise.refused) == (0, {})
    assert tokenwise.counters.num_attentions == len(decoder_layers(model))


@pytest.mark.parametrize("share, chunks, dtype", in_turns(SHARES, CHUNKS, (torch.float32, torch.bfloat16)))
def test_every_share_and_number_of_chunks(share, chunks, dtype):
    model, inputs = build(dtype=dtype), batch()
    plain = step(copy.deepcopy(model), inputs)
    found, tokenwise = run(model, policy(share, chunks), inputs, stash_bytes=STASH_BYTES)
    assert tokenwise.num_whole == 0
    if chunks == 1:
        same_bits(found, plain)
    else:
        assert tokenwise.counters.num_chunks >= 2 * chunks
        assert max(errors(found, plain).values()) < (2e-6 if dtype is torch.float32 else 3e-2)


@pytest.mark.parametrize("num_layers", [4, pytest.param(24, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(policy(0.0, 2), id="2"),
        pytest.param(policy(0.5, 5), id="5", marks=pytest.mark.full),
        pytest.param(policy(0.5, TOKENS), id="each"),
    ],
)
def test_with_cuts_the_error_against_fp64_is_that_of_plain(num_layers, chosen):
    """In bf16. Rounding is chance, more in one tensor and less in another: so all count together, over seeds."""
    ours, theirs = 0.0, 0.0
    model = build(dtype=torch.bfloat16, num_hidden_layers=num_layers)
    for seed in range(4):
        inputs = batch(seed)
        truth = in_fp64(model, inputs)
        found, tokenwise = run(model, chosen, inputs)
        ours += sum(e**2 for e in errors(found, truth).values())
        theirs += sum(e**2 for e in errors(step(copy.deepcopy(model), inputs), truth).values())
        assert tokenwise.num_whole == 0
    assert (ours / theirs) ** 0.5 < 1.05


def test_gradients_of_parameters_are_summed_over_chunks_in_fp32():
    """1 and 256 times 2**-9 are 1.5; in bf16 each of the small ones would be lost."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    for in_fp32, expected in ((True, 1.5), (False, 1.0)):
        sums = Sums([parameter], in_fp32=in_fp32)
        for scale in [1.0] + [2.0**-9] * 256:
            sums.backward([edge(parameter * scale)], [torch.ones(1, dtype=torch.bfloat16)], [], keep_graph=False)
        (total,) = sums.gradients()
        assert total.dtype is torch.bfloat16 and total.item() == expected


@pytest.mark.parametrize("action", [Action.KEEP, Action.SWAP])
@pytest.mark.parametrize("store_qkv", [True, False])
def test_policies_with_the_same_cuts_give_the_same_bits(action, store_qkv):
    model, inputs = build(dtype=torch.bfloat16, attention_dropout=0.1), batch()
    expected, _ = run(model, policy(0.0, 5), inputs)
    everything = ActivationPolicy(
        chunks=tuple(chunk(4, a) for a in (action, Action.RECOMPUTE, action, action, Action.SWAP)),
        store_qkv=store_qkv,
    )
    found, tokenwise = run(model, everything, inputs, stash_bytes=STASH_BYTES)
    same_bits(found, expected)
    assert tokenwise.counters.swapped_bytes == tokenwise.counters.loaded_bytes > 0
    assert tokenwise.counters.no_room_bytes == 0


def test_a_stash_without_room_keeps_the_rest_and_counts_it():
    model, inputs = build(), batch()
    expected, _ = run(model, policy(1.0, 2), inputs)
    found, tokenwise = run(model, policy(1.0, 2), inputs, stash_bytes=64 << 10)
    same_bits(found, expected)
    assert tokenwise.counters.no_room_bytes > 0


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_dropout_draws_the_same_numbers_again(architecture, share):
    """One chunk equals plain to the bit; several draw other numbers than plain, but the same at every share."""
    rate = {"resid_pdrop": 0.2, "attn_pdrop": 0.2} if architecture == "gpt2" else {"attention_dropout": 0.2}
    model, inputs = build(architecture, **rate), batch()
    whole, _ = run(model, policy(share, 1), inputs)
    same_bits(whole, step(copy.deepcopy(model), inputs))
    kept = ActivationPolicy(chunks=(Chunk(num_tokens=10, action=Action.KEEP),))
    expected, _ = run(model, kept, inputs)
    found, _ = run(model, policy(share, 2), inputs)
    same_bits(found, expected)


def test_dropout_is_drawn_anew_in_the_next_step_and_the_state_goes_on_as_if_nothing_were_recomputed():
    model, inputs = build("gpt2", resid_pdrop=0.2), batch()
    states = []
    for chosen in (
        policy(0.0, 2),
        policy(1.0, 2),
        ActivationPolicy(chunks=(Chunk(num_tokens=10, action=Action.KEEP),)),
    ):
        run(model, chosen, inputs)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_autocast(share):
    model, inputs = build(), batch()

    def autocast_step(one):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one.zero_grad()
            loss = one(**inputs).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in one.named_parameters()}

    expected = autocast_step(copy.deepcopy(model))
    for chunks in (1, 3):
        twin = copy.deepcopy(model)
        tokenwise = cut(twin, policy(share, chunks))
        found = autocast_step(twin)
        assert tokenwise.num_whole == 0
        if chunks == 1:
            same_bits(found, expected)
        assert max(errors(found, expected).values()) < 3e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"sliding_window": 3}], ids=str)
def test_masks_windows_and_grouped_heads(implementation, changes):
    model = build("mistral", sizes={}, attn_implementation=implementation, **changes)
    inputs = batch(padded=True)
    plain = step(copy.deepcopy(model), inputs)
    found, tokenwise = run(model, policy(0.3, 5), inputs, stash_bytes=STASH_BYTES)
    assert max(errors(found, plain).values()) < 2e-6
    assert tokenwise.num_whole == 0


def test_frozen_weights_with_adapters_and_an_input_without_gradient():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    inputs = batch()
    plain = step(copy.deepcopy(model), inputs)
    for share in (0.0, 0.5, 1.0):
        same_bits(run(model, policy(share, 1), inputs)[0], plain)
        found, tokenwise = run(model, policy(share, 3), inputs)
        assert max(errors(found, plain).values()) < 2e-6
        assert tokenwise.num_whole == 0


def test_a_batch_of_another_length_and_one_token():
    model = build()
    twin = copy.deepcopy(model)
    tokenwise = cut(twin, policy(0.5, 2))
    for length in (TOKENS, 7, 33, 1, TOKENS):
        inputs = {k: v for k, v in batch(num_tokens=length).items() if k != "labels"}
        results = []
        for one in (model, twin):
            one.zero_grad()
            one(**inputs).logits.square().mean().backward()
            results.append({n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None})
        assert max(errors(results[1], results[0]).values()) < 2e-6, length
    assert tokenwise.num_whole == 0


# the work that is done


def counted(model, chosen, inputs):
    """FLOPs of one step by kind of operation, after a first step has tried the layers."""
    twin = copy.deepcopy(model)
    tokenwise = cut(twin, chosen) if chosen is not None else None
    step(twin, inputs)
    before = copy.deepcopy(tokenwise.counters) if tokenwise else None
    calls = Counter()

    def dense(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
        calls["attention"] += 1
        batch_size, heads, rows, width = q_shape
        return 4 * batch_size * heads * rows * k_shape[2] * width

    def dense_backward(grad_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
        calls["attention backward"] += 1
        batch_size, heads, rows, width = q_shape
        return 10 * batch_size * heads * rows * k_shape[2] * width

    kernels = {
        aten._scaled_dot_product_flash_attention_for_cpu: dense,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: dense_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        step(twin, inputs)
    flops = counter.get_flop_counts()["Global"]
    products = sum(flops.get(op, 0) for op in (aten.mm, aten.addmm, aten.bmm))
    done = {} if tokenwise is None else {k: v - vars(before)[k] for k, v in vars(tokenwise.counters).items()}
    return products, calls, done


@functools.cache
def plain_products():
    return counted(build(), None, batch())[0]


@pytest.mark.parametrize("share, chunks, store_qkv", in_pairs(SHARES, CHUNKS, (True, False)))
def test_recomputing_does_exactly_what_the_policy_says_and_attention_runs_once(share, chunks, store_qkv):
    layers, heads, kv_heads, width, hidden, inter = 2, 4, 2, 16, 64, 96
    model, inputs = build(), batch()
    chosen = policy(share, chunks, store_qkv=store_qkv)
    products, calls, done = counted(model, chosen, inputs)
    first = 2 * ROWS * hidden * width * (heads + 2 * kv_heads)  # up to attention, per token
    second = 2 * ROWS * (hidden * width * heads + 3 * hidden * inter)
    swapped = chosen.num_swapped(TOKENS)
    again = TOKENS - swapped
    if chunks == 1:
        expected = again * (first + second)
    else:
        expected = again * (2 * first + second) + (0 if store_qkv else swapped * first)
    assert products - plain_products() == layers * expected
    assert calls == {"attention": layers, "attention backward": layers}
    spans = chosen.spans(TOKENS)
    num_again = sum(span.action is Action.RECOMPUTE for span in spans)
    assert done["num_second_replays"] == layers * num_again
    assert done["num_chunks"] == layers * len(spans)


def test_swapping_moves_what_the_chunk_saves_and_nothing_else():
    """Twice the tokens in swapped chunks, twice the bytes; the rest is the layer's input and attention's result."""
    model, inputs = build(), batch()
    moved = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        twin = copy.deepcopy(model)
        tokenwise = cut(twin, policy(share, 4), stash_bytes=STASH_BYTES)
        step(twin, inputs)
        moved[share] = tokenwise.counters.swapped_bytes
        assert tokenwise.counters.loaded_bytes == moved[share]
    always, layers, hidden = moved[0.0], 2, 64
    assert always == layers * ROWS * TOKENS * 4 * (hidden + hidden), "the log-sum-exp is too small to be moved"
    per_quarter = moved[0.25] - always
    assert [moved[s] - always for s in (0.5, 0.75, 1.0)] == [2 * per_quarter, 3 * per_quarter, 4 * per_quarter]
    assert per_quarter > 0


class CountingStash:
    """Takes note of what is put into it, and has no room."""

    def __init__(self):
        self.num_bytes = 0

    def put(self, tensor):
        self.num_bytes += tensor.nbytes


def test_each_swapped_chunk_goes_to_its_own_tier():
    """Two chunks of 5 tokens to NVME, one of 10 to HOST: as many bytes; the layers' inputs to neither."""
    model, inputs = build(), batch()
    tiers = {Tier.HOST: CountingStash(), Tier.NVME: CountingStash()}
    chunks = (chunk(5, Action.SWAP, Tier.NVME), chunk(10, Action.SWAP), chunk(5, Action.SWAP, Tier.NVME))
    cut(model, ActivationPolicy(chunks=chunks)).places = Places(swapped=tiers)
    step(model, inputs)
    assert tiers[Tier.HOST].num_bytes == tiers[Tier.NVME].num_bytes > 0


def test_a_kept_chunk_swaps_nothing_of_its_own():
    model, inputs = build(), batch()
    _, recomputed = run(model, policy(0.0, 2), inputs, stash_bytes=STASH_BYTES)
    _, kept = run(model, policy(1.0, 2, action=Action.KEEP), inputs, stash_bytes=STASH_BYTES)
    assert kept.counters.swapped_bytes == recomputed.counters.swapped_bytes
    assert kept.counters.kept_bytes > recomputed.counters.kept_bytes


def peaks(model, chosen, inputs):
    """The most that PyTorch's allocator holds above the model, in forward and in backward of one layer."""
    twin = copy.deepcopy(model)
    if chosen is not None:
        cut(twin, chosen)
    (layer,) = decoder_layers(twin)
    step(twin, inputs)  # has tried the layer
    hidden = torch.randn(*inputs["input_ids"].shape, 64, requires_grad=True)
    rotary = twin.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    twin.zero_grad()
    with AllocationMeter() as meter:
        output = layer(hidden, position_embeddings=rotary, attention_mask=None)
        output = output[0] if isinstance(output, tuple) else output
        AllocationMeter.mark("backward")
        output.sum().backward()
    forward, backward = meter.stretches
    return forward.peak_bytes, forward.more_bytes + backward.peak_bytes


def test_what_a_layer_needs_at_once_is_that_of_a_chunk():
    """Not so the input, output, q, k, v, attention's result and their gradients; the MLP and norms, which are more."""
    model = build(num_hidden_layers=1, intermediate_size=512)
    inputs = batch(num_tokens=512)
    plain = peaks(model, None, inputs)
    whole = peaks(model, policy(0.0, 1, num_tokens=512), inputs)
    tiled = peaks(model, policy(0.0, 8, num_tokens=512), inputs)
    assert tiled[0] < 0.5 * plain[0]
    assert tiled[1] < 0.5 * min(plain[1], whole[1])


def test_attention_that_saves_all_pairs_of_tokens_is_warned_of(caplog):
    inputs = batch(num_tokens=64)
    for implementation, warnings in (("sdpa", 0), ("eager", 1)):
        model = build(sizes={}, attn_implementation=implementation)
        with caplog.at_level(logging.WARNING, logger="offload_rt"):
            caplog.clear()
            run(model, policy(0.5, 2, num_tokens=64), inputs)
        assert sum("all pairs of tokens" in r.message for r in caplog.records) == warnings


def test_the_models_own_checkpointing_is_not_wrapped_around_chunks():
    model, inputs = build(), batch()
    expected, _ = run(model, policy(0.5, 2), inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found, tokenwise = run(model, policy(0.5, 2), inputs)
    same_bits(found, expected)
    assert tokenwise.counters.num_attentions == 2


def test_many_chunks_go_deeper_than_pythons_recursion_limit_and_leave_it_as_it_was():
    import sys

    model = build()
    limit = sys.getrecursionlimit()
    length = 128
    inputs = batch(num_tokens=length)
    plain = step(copy.deepcopy(model), inputs)
    found, tokenwise = run(model, ActivationPolicy(chunks=(Chunk(num_tokens=1, action=Action.RECOMPUTE),)), inputs)
    assert tokenwise.num_whole == 0
    assert max(errors(found, plain).values()) < 1e-5
    assert sys.getrecursionlimit() == limit


def test_the_attention_functions_are_put_back():
    from transformers.modeling_utils import AttentionInterface

    model, inputs = build(), batch()
    before = (nn.functional.scaled_dot_product_attention, AttentionInterface.get_interface)
    run(model, policy(0.5, 2), inputs)
    assert (nn.functional.scaled_dot_product_attention, AttentionInterface.get_interface) == before


def test_a_users_own_attention_is_let_go_of_when_it_is_taken_back(monkeypatch):
    original = nn.functional.scaled_dot_product_attention
    calls = []

    def attend(*args, **kwargs):
        return original(*args, **kwargs)

    def handler(call):
        calls.append(call.qkv[0])
        return call.run(*call.qkv, *call.arguments)

    qkv = torch.randn(3, 1, 2, 4, 8)
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", attend)
        with intercepted(handler):
            found = nn.functional.scaled_dot_product_attention(*qkv)
        assert nn.functional.scaled_dot_product_attention is attend
    seen = weakref.ref(attend)
    del attend
    assert seen() is None
    assert len(calls) == 1 and torch.equal(found, original(*qkv))


# what cannot be cut


class Shifted(nn.Module):
    """Wraps a layer's MLP so that each token sees a little of the one before it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_BTD):
        shifted = torch.cat([torch.zeros_like(hidden_BTD[:, :1]), hidden_BTD[:, :-1]], dim=1)
        return self.inner(hidden_BTD + 0.3 * shifted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_token_shift_is_found_on_real_tokens_and_the_layer_runs_whole(dtype, caplog):
    model, inputs = build(dtype=dtype, num_hidden_layers=3), batch()
    decoder_layers(model)[1].mlp = Shifted(decoder_layers(model)[1].mlp)
    plain = step(copy.deepcopy(model), inputs)
    with caplog.at_level(logging.WARNING, logger="offload_rt"):
        found, tokenwise = run(model, policy(0.5, 1), inputs)
        same_bits(found, plain)  # one chunk needs no trial
        found, tokenwise = run(model, policy(0.5, 2), inputs)
    tolerance = 2e-6 if dtype is torch.float32 else 3e-2
    assert max(errors(found, plain).values()) < tolerance
    assert tokenwise.num_whole == 1
    (reason,) = tokenwise.refused.values()
    assert "differs by" in reason
    assert len([r for r in caplog.records if "recomputed whole" in r.message]) == 1


@pytest.mark.parametrize("architecture", REFUSED)
def test_layers_that_are_not_cut_at_one_attention_call_run_whole(architecture):
    model, inputs = build(architecture, sizes=REFUSED[architecture]), batch()
    plain = step(copy.deepcopy(model), inputs)
    found, tokenwise = run(model, policy(0.5, 2), inputs)
    same_bits(found, plain)
    assert tokenwise.num_whole == 2
    assert len(tokenwise.refused) == 1


def test_a_hybrid_runs_each_kind_of_layer_as_it_can_be_run():
    """Layers of linear attention whole, those of full attention by chunks. The former's decays are behind an exp."""
    sizes = {**ARCHITECTURES["qwen3_next"], "layer_types": ["linear_attention", "full_attention"]}
    model, inputs = build("qwen3_next", sizes=sizes), batch()
    plain = step(copy.deepcopy(model), inputs)
    found, tokenwise = run(model, policy(0.5, 2), inputs)
    assert max(errors(found, plain).values()) < 2e-5
    assert tokenwise.num_whole == len(tokenwise.refused) == 1
    assert tokenwise.counters.num_second_replays == 1


class InPlace(nn.Module):
    """Wraps a layer so that it adds to its input before it computes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, **kwargs):
        return self.inner(hidden_states.mul_(1.0), **kwargs)


class Scaled(nn.Module):
    """Wraps a model's rotary embedding so that it trains: a gradient beside that of the hidden states."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, *args, **kwargs):
        return tuple(part * self.scale for part in self.inner(*args, **kwargs))


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_layer_whose_other_arguments_require_gradients_runs_whole(chunks):
    model, inputs = build(), batch()
    model.model.rotary_emb = Scaled(model.model.rotary_emb)
    plain = step(copy.deepcopy(model), inputs)
    found, tokenwise = run(model, policy(0.5, chunks), inputs)
    same_bits(found, plain)
    assert found["model.rotary_emb.scale"].abs() > 0
    assert tokenwise.num_whole == 2
    assert "requires a gradient beside" in next(iter(tokenwise.refused.values()))


def test_a_layer_that_changes_its_input_in_place_is_found():
    """It cannot be run again from its input, neither by chunks nor whole."""
    model, inputs = build(), batch()
    layers = model.model.layers
    layers[1] = InPlace(layers[1])
    tokenwise = cut(model, policy(0.0, 1))
    with pytest.raises(UnsupportedModule, match="changed its input in place"):
        step(model, inputs)
    assert "in place" in next(iter(tokenwise.refused.values()))


def test_a_layer_without_attention_is_kept_or_swapped_as_one_chunk_and_otherwise_runs_whole():
    torch.manual_seed(0)
    model = PlainModel([PlainLayer(dropout=0.5) for _ in range(2)])
    model.config = type("Config", (), {"num_hidden_layers": 2})()
    x = torch.randn(2, TOKENS, 8)

    def gradients(one):
        torch.manual_seed(3)
        one.zero_grad()
        one(x).square().mean().backward()
        return {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}

    expected = gradients(copy.deepcopy(model))
    for share, chunks, num_whole in ((1.0, 1, 0), (0.0, 1, 2), (0.5, 2, 2)):
        twin = copy.deepcopy(model)
        tokenwise = cut(twin, policy(share, chunks), stash_bytes=STASH_BYTES)
        same_bits(gradients(twin), expected)
        assert tokenwise.num_whole == num_whole


# graphs


def test_backward_twice_needs_retain_graph_and_then_doubles():
    model, inputs = build(), batch()
    for chosen in (policy(0.5, 1), policy(0.0, 1), policy(0.5, 3), policy(0.5, 3, store_qkv=False)):
        twin = copy.deepcopy(model)
        cut(twin, chosen, stash_bytes=STASH_BYTES)
        loss = twin(**inputs).loss
        loss.backward(retain_graph=True)
        once = {n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None}
        loss.backward()
        assert all(torch.equal(p.grad, 2 * once[n]) for n, p in twin.named_parameters() if n in once)
        with pytest.raises(RuntimeError):
            loss.backward()


def test_a_dropped_graph_gives_its_places_back():
    model, inputs = build(), batch()
    tokenwise = cut(model, policy(0.5, 2), stash_bytes=1 << 20)
    arena = tokenwise.places.swapped[Tier.HOST]._arena
    loss = model(**inputs).loss
    assert arena.held_bytes() > 0
    del loss
    assert arena.held_bytes() == 0
    step(model, inputs)
    assert arena.held_bytes() == 0


@pytest.mark.parametrize("store_qkv", [True, False])
def test_a_step_leaves_no_tensor_behind(store_qkv):
    """A replay's way up to attention has a graph of which only a part is gone through."""
    model, inputs = build(), batch()
    cut(model, policy(0.5, 4, store_qkv=store_qkv))

    num_tensors(model, inputs)  # has tried the layers
    assert num_tensors(model, inputs) == num_tensors(model, inputs)


def test_hooks_of_parameters_fire_once():
    model, inputs, fired = build(), batch(), Counter()
    cut(model, policy(0.5, 5))
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.update([name]))
    step(model, inputs)
    assert set(fired.values()) == {1}


# policies


def test_spans_of_longer_and_shorter_sequences():
    chosen = ActivationPolicy(
        chunks=(
            Chunk(num_tokens=6, action=Action.SWAP, tier=Tier.NVME),
            Chunk(num_tokens=4, action=Action.RECOMPUTE),
        )
    )
    swapped, again = (Action.SWAP, Tier.NVME), (Action.RECOMPUTE, None)
    assert chosen.spans(5) == (Span(0, 5, *swapped),)
    assert chosen.spans(6) == (Span(0, 6, *swapped),)
    assert chosen.spans(7) == (Span(0, 6, *swapped), Span(6, 7, *again))
    assert chosen.spans(15) == (
        Span(0, 6, *swapped), Span(6, 10, *again), Span(10, 14, *again), Span(14, 15, *again)
    )  # fmt: skip
    assert (chosen.num_swapped(15), chosen.num_swapped(15, Tier.NVME), chosen.num_swapped(15, Tier.HOST)) == (6, 6, 0)


def test_a_bad_policy_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        ActivationPolicy(chunks=())
    with pytest.raises(ValueError, match="at least 1"):
        Chunk(num_tokens=0, action=Action.KEEP)
    with pytest.raises(ValueError, match="swapped nowhere"):
        Chunk(num_tokens=1, action=Action.SWAP)
    with pytest.raises(ValueError, match="device, where it is"):
        Chunk(num_tokens=1, action=Action.SWAP, tier=Tier.DEVICE)
    with pytest.raises(ValueError, match="must be null"):
        Chunk(num_tokens=1, action=Action.KEEP, tier=Tier.HOST)
    with pytest.raises(ValueError, match="larger"):
        ActivationPolicy(chunks=(Chunk(num_tokens=1, action=Action.KEEP),)).spans(MAX_CHUNKS + 1)


# attention by groups of heads


class CountingAttention:
    """Takes note of the heads of keys that each attention call of the model's layers is given."""

    def __init__(self, monkeypatch):
        self.heads = []
        original = nn.functional.scaled_dot_product_attention

        def attend(query, key, value, *args, **kwargs):
            self.heads.append(key.shape[1])
            return original(query, key, value, *args, **kwargs)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)


GROUPED = {
    "GQA": ("llama", {}),
    "four heads": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "eager": ("mistral", {"sliding_window": 5, "attn_implementation": "eager"}),
    "latent": ("deepseek_v3", {}),
}


@pytest.mark.parametrize(
    "architecture, changes, dtype",
    [
        pytest.param(*GROUPED[name], dtype, id=f"{name}-{dtype}", marks=() if is_quick else pytest.mark.full)
        for name in GROUPED
        for dtype in (torch.float32, torch.bfloat16)
        for is_quick in [(dtype is torch.bfloat16) == (name == "four heads")]
    ],
)
def test_attention_by_groups_of_heads_gives_the_same_bits(architecture, changes, dtype):
    """Forward and backward of a head do not depend on the others, neither sdpa's nor eager products."""
    sizes = {**ARCHITECTURES[architecture], **changes}
    model, inputs = build(architecture, dtype, sizes), batch(padded=True)
    for chosen in (policy(0.5, 2), policy(0.0, 1), policy(0.5, 3, store_qkv=False)):
        expected, _ = run(model, chosen, inputs, stash_bytes=STASH_BYTES)
        for groups in (2, 4, 64):
            grouped = replace(chosen, attention_groups=groups)
            found, tokenwise = run(model, grouped, inputs, stash_bytes=STASH_BYTES)
            same_bits(found, expected)
            assert (tokenwise.num_whole, tokenwise.counters.no_room_bytes) == (0, 0)


def test_each_group_has_its_heads_and_no_head_has_two(monkeypatch):
    model, inputs = build(num_attention_heads=8, num_key_value_heads=4), batch()
    cut(model, replace(policy(0.5, 2), attention_groups=3))
    step(model, inputs)
    counting = CountingAttention(monkeypatch)
    step(model, inputs)
    assert counting.heads == [1, 1, 2] * len(decoder_layers(model))


def test_groups_of_heads_bound_what_attention_needs_at_once():
    """In eager attention, probabilities of all pairs of tokens; in sdpa, gradients take their operands' place."""
    inputs = batch(num_tokens=512)
    for implementation, share in (("eager", 0.5), ("sdpa", 0.95)):
        model = build(
            sizes={}, num_hidden_layers=1, attn_implementation=implementation, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=512,
        )  # fmt: skip
        chosen = policy(0.0, 16, num_tokens=512)
        whole = peaks(model, chosen, inputs)
        grouped = peaks(model, replace(chosen, attention_groups=8), inputs)
        assert grouped[1] < share * whole[1], implementation


def test_attention_whose_parameters_go_by_heads_is_not_made_by_groups():
    """gpt-oss has a sink for each head, of which a group's call would be given all."""
    model, inputs = build("gpt_oss"), batch()
    plain = step(copy.deepcopy(model), inputs)
    for chunks in (1, 2):
        found, tokenwise = run(model, replace(policy(0.0, chunks), attention_groups=2), inputs)
        same_bits(found, plain)
        assert tokenwise.num_whole == 2
        assert "group of heads" in next(iter(tokenwise.refused.values()))


def test_a_graph_whose_attention_was_made_by_groups_is_gone_through_twice():
    model, inputs = build(), batch()
    cut(model, replace(policy(0.5, 3), attention_groups=2), stash_bytes=STASH_BYTES)
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    assert all(torch.equal(p.grad, 2 * once[n]) for n, p in model.named_parameters() if n in once)


# what the documentation says


def test_the_documented_architectures_are_those_that_are_run():
    """And those that run whole are the ones that are tested to do so."""
    page = (Path(__file__).parent.parent / "docs" / "tokenwise.md").read_text(encoding="utf-8")
    by_chunks, whole = page.split("## Architectures")[1].split("Found out and run whole")
    named = {word for row in by_chunks.splitlines() if row.startswith("| ") for word in re.split(r"[ ,|()]+", row)}
    missing = {name for name in ARCHITECTURES if name not in named}
    assert not missing and len(ARCHITECTURES) == 33
    refused = {row.split()[1] for row in whole.splitlines() if row.startswith("| ")} - {"architecture", "---"}
    assert refused == set(REFUSED)
