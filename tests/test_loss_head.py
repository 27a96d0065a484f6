"""The loss head by tiles: the model's own loss and gradients, no logits, a clear refusal where tiles cannot serve."""

import gc
import inspect
import weakref

import pytest
import torch
from torch import nn

from offload_rt.errors import ConfigError, NonFiniteLoss
from offload_rt.vocabulary.backbone import find_causal_model
from offload_rt.vocabulary.loss_head import LossHead
from tests.conftest import VOCABULARY, build_base, build_lora, language_batch

CHUNK = 7
ROWS, TOKENS = 2, 20

FAMILIES = {
    "llama": {},
    "qwen": {},
    "gpt2": {},
    "moe": {},
    "gemma2": {"query_pre_attn_scalar": 16},  # a softcap on its logits
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},  # calls the decoder in its backbone
}
OTHERS = [
    "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "cohere2", "phi", "phi3", "olmo2", "starcoder2",
    "stablelm", "glm", "glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "exaone4", "nemotron",
    "gpt_neox", "smollm3", "gpt_oss", "bloom", "mpt", "gpt_bigcode", "xglm", "minimax", "lfm2", "mamba", "olmoe",
]  # fmt: skip
FAMILIES_IN_FULL: dict[str, dict] = {
    **{family: {} for family in OTHERS},
    "deepseek_v3": {
        "head_dim": 8, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1,
    },
}  # fmt: skip
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1,
}  # fmt: skip


def build(family="llama", dtype=torch.float32, **changes):
    """A tiny model whose logits are not all alike, without dropout."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family in ("llama", "qwen", "gpt2", "moe"):
        model = build_base(family, dtype, 2, **changes)
    else:
        sizes = {
            "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "dropout": 0.0, "pad_token_id": 0,
        }  # fmt: skip
        own = {**EXPERTS, **FAMILIES_IN_FULL[family]} if family in FAMILIES_IN_FULL else FAMILIES[family]
        config = transformers.AutoConfig.for_model(family, **{**sizes, **own, **changes})
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model.eval()  # no dropout: with it, tiles draw other numbers


def batch(seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS))
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, 14:] = -100
    return {"input_ids": ids, "labels": labels}


def num_learned(labels):
    return int((labels[:, 1:] != -100).sum())


def tiled(model, chunk_tokens=CHUNK, **arguments):
    head = LossHead(find_causal_model(model), chunk_tokens, **arguments)
    head.attach()
    return head


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, tolerance=2e-6):
    assert ours.keys() == theirs.keys()
    for name, theirs_one in theirs.items():
        error = (ours[name] - theirs_one).norm() / theirs_one.norm().clamp_min(1e-6)
        assert error < tolerance, (name, float(error))


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.full) for family in FAMILIES_IN_FULL)]
)
def test_tiles_give_the_models_loss_and_every_gradient(family):
    model, inputs = build(family), batch()
    plain = model(**inputs).loss
    expected = gradients(model, plain)
    head = tiled(model)
    output = model(**inputs)
    assert torch.allclose(output.loss, plain, rtol=1e-6)
    assert_close(gradients(model, output.loss), expected)
    assert output.logits is None
    learned = num_learned(inputs["labels"])
    assert (head.counters.num_tokens, head.counters.num_tiles) == (learned, -(-learned // CHUNK))
    assert head.counters.num_whole == 0


def test_no_product_of_the_head_is_longer_than_a_tile_and_none_is_done_twice():
    model, inputs = build(), batch()
    head = tiled(model)
    model(**inputs)  # the first call also checks a few tokens
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    normed = []
    model.model.norm.register_forward_hook(lambda module, args, output: normed.append(output.shape[:-1].numel()))
    model(**inputs).loss.backward()
    learned = num_learned(inputs["labels"])
    assert max(rows) <= CHUNK
    assert sum(rows) == learned
    assert normed[1:] == rows, "the final norm runs by tiles too (its first call, over all tokens, is left out)"
    assert head.counters.num_tokens == 2 * learned


def test_a_batch_of_one_chunk_runs_whole_and_bit_for_bit():
    model, inputs = build(dtype=torch.bfloat16), batch()
    plain = model(**inputs).loss
    expected = gradients(model, plain)
    head = tiled(model, ROWS * TOKENS)
    output = model(**inputs)
    assert torch.equal(output.loss, plain)
    ours = gradients(model, output.loss)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert output.logits is None
    assert (head.counters.num_whole, head.counters.num_tiles) == (1, 0)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 39])
def test_the_size_of_a_tile_does_not_matter(chunk_tokens):
    model, inputs = build("gemma2"), batch()
    plain = model(**inputs).loss
    expected = gradients(model, plain)
    tiled(model, chunk_tokens)
    assert_close(gradients(model, model(**inputs).loss), expected)


def test_in_bf16_tiles_are_as_far_from_the_truth_as_the_whole():
    """Design, section 7: the error against fp64 is at most 1.05 times that of plain PyTorch."""
    model = build_lora("llama", torch.bfloat16, num_layers=4, dropout=0.0, hidden_size=128, vocab_size=512).eval()
    torch.manual_seed(5)
    inputs = language_batch(3, rows=4, tokens=128)
    exact = build_lora("llama", torch.float64, num_layers=4, dropout=0.0, hidden_size=128, vocab_size=512).eval()
    exact.load_state_dict(model.state_dict())
    truth = gradients(exact, exact(**inputs).loss)
    plain = gradients(model, model(**inputs).loss)
    head = tiled(model, 96)
    tiles = gradients(model, model(**inputs).loss)
    assert head.counters.num_tiles == 6

    def error(found):
        return torch.stack([(found[name].double() - truth[name]).norm() / truth[name].norm() for name in truth])

    assert error(tiles).mean() <= 1.05 * error(plain).mean()
    assert (error(tiles) <= 1.05 * error(plain)).all()


@pytest.mark.parametrize("scale", [0.25, 1 / 3, 7.0])
def test_a_scaled_loss_scales_the_gradients(scale):
    model, inputs = build(), batch()
    expected = gradients(model, model(**inputs).loss * scale)
    tiled(model)
    assert_close(gradients(model, model(**inputs).loss * scale), expected)


def test_a_graph_that_is_kept_can_be_walked_twice():
    model, inputs = build(), batch()
    tiled(model)
    loss = model(**inputs).loss
    once = torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight, retain_graph=True)[0]
    twice = torch.autograd.grad(loss * 2, model.model.layers[0].mlp.up_proj.weight)[0]
    assert torch.allclose(2 * once, twice)


def test_without_gradients_the_loss_is_the_same_and_leaves_no_graph():
    model, inputs = build(), batch()
    plain = model(**inputs).loss
    head = tiled(model)
    with torch.no_grad():
        loss = model(**inputs).loss
    assert torch.allclose(loss, plain, rtol=1e-6)
    assert not loss.requires_grad
    assert head.counters.num_tiles > 1


def test_labels_that_the_caller_shifted_and_the_callers_count_are_used():
    model, inputs = build(), batch()
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    wanted = {"shift_labels": shifted, "num_items_in_batch": torch.tensor(50)}
    plain = model(**inputs, **wanted).loss
    head = tiled(model)
    assert torch.allclose(model(**inputs, **wanted).loss, plain, rtol=1e-6)
    assert torch.allclose(plain, model(**inputs).loss * num_learned(inputs["labels"]) / 50, rtol=1e-5)
    assert head.counters.num_whole == 0


def test_a_batch_without_labels_to_learn_gives_what_the_model_gives():
    model, inputs = build(), batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert model(**inputs).loss.isnan()
    tiled(model)
    assert model(**inputs).loss.isnan()
    assert model(**inputs, num_items_in_batch=torch.tensor(9)).loss == 0


def test_hooks_of_a_trained_head_fire_once():
    model, inputs = build(), batch()
    tiled(model)
    fired = []
    model.lm_head.weight.register_hook(lambda gradient: fired.append(gradient.shape))
    model(**inputs).loss.backward()
    assert len(fired) == 1


class MixesTokens(nn.Module):
    """A head that looks at the token before."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden):
        return self.linear(hidden + torch.roll(hidden, 1, dims=-2))


def test_a_head_that_mixes_tokens_is_found_and_runs_whole(caplog):
    model, inputs = build(), batch()
    model.lm_head = MixesTokens(model.lm_head)
    plain = model(**inputs).loss
    expected = gradients(model, plain)
    head = tiled(model)
    for _ in range(2):
        output = model(**inputs)
        assert torch.equal(output.loss, plain)
        assert_close(gradients(model, output.loss), expected)
    assert "depend on other tokens" in caplog.text
    assert "depend on other tokens" in head.report()["runs_whole_because"]
    assert head.counters.num_tiles == 0


def test_a_loss_with_a_term_of_its_own_is_found_and_runs_whole(caplog):
    model, inputs = build(), batch()
    forward = model.forward

    def with_penalty(input_ids=None, labels=None, **kwargs):
        output = forward(input_ids=input_ids, labels=labels, **kwargs)
        output.loss = output.loss + output.logits.square().mean()
        return output

    model.forward = with_penalty
    plain = model(**inputs).loss
    head = tiled(model)
    assert torch.allclose(model(**inputs).loss, plain)
    assert "more than the cross-entropy" in caplog.text
    assert head.counters.num_tiles == 0
    head.detach()
    assert model.forward is with_penalty


def test_a_model_with_a_loss_of_its_own_is_not_taken():
    model = build()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.mean()
    assert find_causal_model(model) is None


def test_an_error_inside_leaves_the_model_whole():
    model, inputs = build(), batch()
    expected = model(**inputs).loss
    backbone = model.model
    head = tiled(model)

    def fail(module, args):
        raise RuntimeError("no such luck")

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        model(**inputs)
    handle.remove()
    assert model.model is backbone
    assert "_loss_function" not in model.__dict__
    assert torch.allclose(model(**inputs).loss, expected, rtol=1e-6)
    handle = backbone.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        model(**inputs)
    handle.remove()
    assert model.model is backbone
    head.detach()
    assert "forward" not in model.__dict__
    assert model(**inputs).logits is not None


def test_the_models_forward_still_shows_its_parameters():
    model = build()
    parameters = list(inspect.signature(model.forward).parameters)
    tiled(model)
    assert list(inspect.signature(model.forward).parameters) == parameters
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)


def run_engine(make_engine, steps=2, **arguments):
    model = build_lora("qwen", torch.bfloat16, dropout=0.0)
    engine = make_engine(model, batch_size=ROWS, seq_len=TOKENS, **arguments)
    for step in range(steps):
        engine.backward(engine(**batch(step)).loss)
        engine.step()
    return engine, {name: p.detach().clone() for name, p in engine.trainable.items()}


def test_plans_with_the_same_tiles_give_the_same_bits_wherever_things_lie(make_engine, disk_folder):
    _, expected = run_engine(make_engine, options={"head_chunk_tokens": CHUNK}, bits=4)
    options = {"head_chunk_tokens": CHUNK, "stream_edges": True, "num_slots": 2, "poison": True, "record": True}
    engine, found = run_engine(make_engine, options=options, bits=4, nvme=disk_folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    report = engine.report()
    assert report["loss_head"]["num_tiles"] == sum(-(-num_learned(batch(step)["labels"]) // CHUNK) for step in range(2))
    # embedding and head are tied here, one block: in its slot from the first use on
    edges = next(ring for ring in engine.plan.rings if ring.name == "edges")
    assert edges.num_slots == len(edges.blocks) == 1
    executor = next(e for e in engine._runtime.executors if e.ring.name == "edges")
    assert executor.counters.num_fetches == 1


def test_a_streamed_head_is_fetched_once_a_batch_and_not_once_a_tile(make_engine, disk_folder):
    model = build_lora("llama", torch.bfloat16, dropout=0.0)  # untied: embedding and head take turns in one slot
    options = {"head_chunk_tokens": CHUNK, "stream_edges": True, "look_up_rows": False}
    engine = make_engine(model, batch_size=ROWS, seq_len=TOKENS, options=options, nvme=disk_folder)
    for step in range(3):
        engine.backward(engine(**batch(step)).loss)
        engine.step()
    executor = next(e for e in engine._runtime.executors if e.ring.name == "edges")
    assert executor.counters.num_fetches == executor.counters.scheduled_fetches == 2 * 3
    assert executor.counters.num_misses == 0


def test_a_batch_with_nothing_to_learn_is_refused_by_the_engine(make_engine):
    engine = make_engine(build_lora(dropout=0.0), batch_size=ROWS, seq_len=TOKENS, options={"head_chunk_tokens": CHUNK})
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with pytest.raises(NonFiniteLoss):
        engine.backward(engine(**inputs).loss)


def test_tiles_for_a_model_without_a_head_are_refused(make_engine):
    from tests.conftest import build_plain

    with pytest.raises(ConfigError, match="head_chunk_tokens"):
        make_engine(build_plain(), options={"head_chunk_tokens": CHUNK})


def test_hooks_that_somebody_keeps_hold_no_hidden_states_behind_the_first_call() -> None:
    """As layers keep them, which run again in backward with the hooks that they had in forward."""
    causal = build()
    head = LossHead(find_causal_model(causal), CHUNK)
    seen, kept = [], []

    def see(norm, args, output):
        seen.extend(map(weakref.ref, (args[0], output)))
        kept.append(dict(norm._forward_hooks))

    causal.model.norm.register_forward_hook(see)
    reached = head._run_backbone(batch())
    assert head.backbone.norm is causal.model.norm and len(kept[0]) == 2
    gc.collect()
    hidden, output = (one() for one in seen)
    assert output is None and hidden is not None, "the norm runs again, of what went into it"
    del reached, hidden
    gc.collect()
    assert seen[0]() is None
