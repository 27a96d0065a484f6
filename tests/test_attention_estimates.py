"""What attention takes on the CPU beside what goes by tokens, as formulas say it and as PyTorch's allocator gave it
out: tiles of each thread; where it is not fused, probabilities of all pairs of tokens.
"""

from argparse import ArgumentParser
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from offload_rt.layers.discover import find_blocks
from offload_rt.memory.allocations import AllocationMeter
from offload_rt.profiling.measured_sizes import sizes_key
from offload_rt.profiling.profile import attention_bytes, chunked_size, estimate_activation_bytes
from planners.command import add_arguments, problem_of
from planners.optimiser.policies import plan_by_policy
from planners.plans.schedule import Phase
from planners.rule.streaming_problem import ChunkedSize, StreamingProblem
from planners.shapes.cpu_attention import tiles_bytes
from planners.simulator.arenas import chunk_buffers

HEADS, WIDTH = 4, 16


def backward_peak_bytes(num_tokens, dtype, *, width=WIDTH, kv_heads=HEADS, causal=True, masked=False):
    """What attention's backward has at most, beside the gradients that it leaves."""
    query, key, value, of_result = (
        torch.randn(1, num_tokens, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads, HEADS)
    )
    mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril() if masked else None

    result = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and not masked, enable_gqa=kv_heads < HEADS
    )
    with AllocationMeter() as meter:
        torch.autograd.grad(result, (query, key, value), of_result)
    return meter.peak_bytes - sum(one.nbytes for one in (query, key, value))


@pytest.mark.parametrize("num_tokens", [12, 191, 192, 767, 768])
def test_tiles_in_fp32_are_what_each_thread_takes(threads, num_tokens):
    for num_threads in (1, 3):
        threads(num_threads)
        said = tiles_bytes(num_threads=num_threads, seq_len=num_tokens, item_bytes=4)
        assert backward_peak_bytes(num_tokens, torch.float32) == said


@pytest.mark.parametrize(
    "how", [{"width": 64}, {"kv_heads": 1}, {"causal": False}, {"masked": True}], ids=lambda how: next(iter(how))
)
def test_tiles_are_the_same_whatever_attention_is_like(threads, how):
    threads(2)
    said = tiles_bytes(num_threads=2, seq_len=256, item_bytes=4)
    repeated = 2 * 256 * WIDTH * 4 * (HEADS - how.get("kv_heads", HEADS))  # keys and values, for each query head
    assert backward_peak_bytes(256, torch.float32, **how) in (said, said + repeated)


@pytest.mark.parametrize("num_tokens", [12, 191, 512, 768])
def test_tiles_in_16_bits_have_room_for_products(threads, num_tokens):
    """What oneDNN packs depends on the processor: at most so much."""
    for num_threads in (1, 3):
        threads(num_threads)
        said = tiles_bytes(num_threads=num_threads, seq_len=num_tokens, item_bytes=2)
        in_fp32 = tiles_bytes(num_threads=num_threads, seq_len=num_tokens, item_bytes=4)
        for dtype in (torch.bfloat16, torch.float16):
            assert in_fp32 < backward_peak_bytes(num_tokens, dtype, width=64) <= said
        assert said < 3.5 * in_fp32 + num_threads * 10_000


def llama(dtype=torch.float32, *, hidden=64, **config):
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": HEADS, "vocab_size": 64}
    built = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_key_value_heads=HEADS, **sizes, **config))
    return built.to(dtype).requires_grad_(False)


def layer_peak_bytes(model, num_tokens):
    """Of one layer's forward and backward, whose weights are frozen."""
    base = model.base_model
    layer = getattr(base, "layers", None) or base.h
    dtype, hidden = next(model.parameters()).dtype, model.config.hidden_size
    given = torch.randn(1, num_tokens, hidden, dtype=dtype, requires_grad=True)
    place = {}
    if hasattr(base, "rotary_emb"):
        place["position_embeddings"] = base.rotary_emb(given, torch.arange(num_tokens)[None])

    def run():
        torch.autograd.grad(layer[0].train()(given, **place).sum(), given)

    run()
    with AllocationMeter() as meter:
        run()
    return meter.peak_bytes


def sizes_of(model, num_tokens, *, on_cpu=True):
    """By tokens, and while attention's backward runs."""
    given = model, find_blocks(model, bits=None)
    sizes = {"batch_size": 1, "seq_len": num_tokens, "on_cpu": on_cpu}
    return estimate_activation_bytes(*given, **sizes), attention_bytes(*given, **sizes), chunked_size(*given, **sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_layer_by_many_threads_is_within_its_estimate(threads, dtype):
    """By one thread what follows attention is the most of it, and tiles are no more: they are not added."""
    model = llama(dtype)
    threads(1)
    alone = layer_peak_bytes(model, 768)
    by_tokens, of_attention, _ = sizes_of(model, 768)
    assert alone <= by_tokens and of_attention < by_tokens
    threads(8)
    many = layer_peak_bytes(model, 768)
    again, of_attention, chunked = sizes_of(model, 768)
    assert again == by_tokens < many <= of_attention < 1.3 * many
    assert of_attention - chunked.sequence_bytes == tiles_bytes(num_threads=8, seq_len=768, item_bytes=dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_probabilities_of_all_pairs_are_within_the_estimate(dtype, implementation, dropout):
    model = llama(dtype, hidden=16, attn_implementation=implementation, attention_dropout=dropout)
    by_tokens, of_attention, chunked = sizes_of(model, 512)
    most = layer_peak_bytes(model, 512)
    if implementation == "sdpa" and not dropout:
        assert chunked.pairs_bytes == 0 and most < 0.2 * HEADS * 512**2 * 12
        return
    assert most <= by_tokens < 1.8 * most and chunked.pairs_bytes >= HEADS * 512**2 * (16 if dropout else 12)
    assert of_attention == chunked.sequence_bytes > chunked.pairs_bytes, "there are no tiles"


def test_a_layer_of_gpt2_has_dropout_in_attention_unless_it_is_told_otherwise():
    config = GPT2Config(n_embd=64, n_head=HEADS, n_layer=1, n_positions=512, vocab_size=64)
    gpt2 = GPT2LMHeadModel(config).requires_grad_(False)
    most = layer_peak_bytes(gpt2, 512)
    assert HEADS * 512**2 * 12 < most <= sizes_of(gpt2, 512)[0] < 1.5 * most


def test_on_a_gpu_kernels_drop_and_have_no_tiles():
    plain, drops = (sizes_of(llama(attention_dropout=dropout), 256, on_cpu=False) for dropout in (0.0, 0.1))
    assert plain == drops and plain[1] == plain[2].sequence_bytes


def test_values_of_another_width_than_keys_have_probabilities_of_all_pairs():
    """As in latent attention: the fused kernel does not take them."""

    def pairs(**config):
        config = {"_attn_implementation": "sdpa", "num_attention_heads": HEADS, "hidden_size": 64, **config}
        tensor = SimpleNamespace(shape=(1, 1), num_elements=1, compute_bytes=4)
        draft = SimpleNamespace(is_layer=True, spec=SimpleNamespace(tensors=(tensor,)))
        model = SimpleNamespace(config=SimpleNamespace(**config))
        return estimate_activation_bytes(model, [draft], batch_size=1, seq_len=256, on_cpu=True) > HEADS * 256**2 * 12

    latent = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    assert pairs(**latent, v_head_dim=12) and not pairs(**latent, v_head_dim=16) and not pairs()


def test_tiles_are_in_place_of_what_follows_attention_not_beside_it():
    """Of a whole layer and of one by chunks; pairs of tokens are no chunk's."""
    problem = StreamingProblem(
        fingerprint="", layers=(), edges=(), trainable_bytes=0, layer_input_bytes=0, activation_bytes=64_000,
        device_capacity_bytes=None, host_capacity_bytes=None, nvme_capacity_bytes=None, unified=True,
        chunked=ChunkedSize(num_tokens=512, sequence_bytes=30_000, pairs_bytes=16_000), attention_bytes=50_000,
    )  # fmt: skip
    assert (problem.layer_bytes(None), problem.layer_bytes(256)) == (64_000, 30_000 + 24_000 * 3 // 2)
    assert problem.layer_bytes(128) == 50_000 > 30_000 + 12_000 * 3 // 2


def test_what_was_measured_by_fewer_threads_is_not_what_more_take(threads):
    keys = []
    for num_threads in (1, 2, 1):
        threads(num_threads)
        keys.append((sizes_key(torch.nn.Linear(1, 1), "f"), sizes_key(torch.nn.Linear(1, 1), "f", of_device=True)))
    (one, device), (two, device_of_two), again = keys
    assert one == again[0] != two and device == device_of_two


def test_a_dry_run_has_tiles_where_the_hardware_is_a_cpu():
    """In backward alone, at attention: of as many threads as the profile says, or a calibration."""
    parser, found = ArgumentParser(), {}
    add_arguments(parser)
    for name in ("cpu", "rtx4090"):
        asked = problem_of(parser.parse_args(["--model", "llama3.2-1b", "--seq-len", "1024", "--gpu", name]))
        layer = next(entry for entry in asked.workload.classes if entry.is_layer)
        plan = plan_by_policy(asked, "greedy")
        for phase in Phase:
            sizes = {one.name: one.num_bytes for one in chunk_buffers(asked, plan, layer, phase)}
            found[name, phase] = sizes.get("attention's tiles", 0)
    assert found.pop(("cpu", Phase.BACKWARD)) == tiles_bytes(num_threads=16, seq_len=1024, item_bytes=2)
    assert set(found.values()) == {0}
