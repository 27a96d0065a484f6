"""Evaluation and generation with streamed weights equal the plain model's with the decoded ones."""

import pytest
import torch

from tests.conftest import build_lora, build_plain, decode_in_place, language_batch

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(params=["llama", "gpt2", "moe"])
def pair(request, make_engine, disk_folder):
    twin = decode_in_place(build_lora(request.param)).eval()
    options = {"poison": True, "num_slots": 2, "delay_seconds": 0.001, "stream_edges": True}
    engine = make_engine(build_lora(request.param), options, bits=4, nvme=disk_folder, seq_len=32)
    engine.model.eval()
    return engine, twin


def prompt(seed=0):
    torch.manual_seed(seed)
    return {"input_ids": torch.randint(3, 64, (1, 5)), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_equals_the_plain_model(pair, use_cache):
    engine, twin = pair
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
    assert torch.equal(engine.model.generate(**prompt(), **settings), twin.generate(**prompt(), **settings))
    report = engine.report()
    assert report["fetches"] > 4 and report["recomputes"] == 0


def test_evaluation_equals_the_plain_model_and_foresees_its_blocks(pair):
    engine, twin = pair
    with torch.no_grad():
        for seed in range(3):
            batch = language_batch(seed)
            expected, found = twin(**batch), engine(**batch)
            assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert engine.report()["prefetch_misses"] == 0


def test_training_goes_on_as_if_nothing_had_been_generated(pair):
    engine, twin = pair
    engine.model.generate(**prompt(), max_new_tokens=3, do_sample=False)
    for one in (twin, engine.model):
        one.train()
        torch.manual_seed(7)
        one(**language_batch(1)).loss.backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad and p.grad is not None}
    found = dict(engine.gradients())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_evaluation_in_the_middle_of_a_training_step_leaves_it_right(pair):
    """Forward, an evaluation, then the backward of the first."""
    engine, twin = pair
    for one in (twin, engine.model):
        one.train()
    torch.manual_seed(7)
    expected = twin(**language_batch(1)).loss
    torch.manual_seed(7)
    loss = engine(**language_batch(1)).loss
    with torch.no_grad():
        engine(**language_batch(2))
    expected.backward()
    loss.backward()
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert torch.equal(parameter.grad, engine.trainable[name].grad), name


def plain_pass(model, x, order):
    hidden = model.enter(x)
    for index in order:
        hidden = model.layers[index](hidden)
    return model.leave(hidden).square().mean()


@pytest.mark.parametrize("order", [[0, 1, 3], [2], [0, 1, 1, 2, 3, 3], [3, 2, 1, 0], [0, 0, 0, 0, 3]])
def test_layers_that_are_skipped_repeated_or_out_of_order(make_engine, disk_folder, order):
    twin = build_plain(dropout=0.2)
    engine = make_engine(build_plain(dropout=0.2), {"num_slots": 2, "poison": True}, nvme=disk_folder)
    for step in range(3):
        x = torch.randn(2, 6, 8)
        losses = []
        for one in (twin, engine.model):
            torch.manual_seed(step)
            losses.append(plain_pass(one, x, order if step != 1 else [0, 1, 2, 3]))
            losses[-1].backward()
        assert torch.equal(*losses)
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            other = engine.trainable[name].grad
            assert torch.equal(parameter.grad, other) if parameter.grad is not None else other is None


def test_longer_than_planned_is_refused_in_evaluation_too(pair):
    from offload_rt.errors import ConfigError

    engine, _ = pair
    with torch.no_grad(), pytest.raises(ConfigError, match="seq_len"):
        engine(**language_batch(0, rows=1, tokens=33))
    with torch.no_grad():
        engine(**language_batch(0, rows=1, tokens=32))


def test_a_state_dict_holds_no_placeholder_and_every_adapter(make_engine, disk_folder):
    engine = make_engine(build_lora(), bits=4, nvme=disk_folder)
    state = engine.model.state_dict()
    assert not any(t.isnan().any() for t in state.values() if t.is_floating_point())
    assert set(engine.trainable) <= set(state)
    assert not any(name.endswith("base_layer.weight") for name in state)


def test_the_head_is_given_whole_rows_so_that_torch_does_not_copy_its_weight(make_engine):
    engine = make_engine(build_lora("llama"), seq_len=32)
    seen = []
    head = engine.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    batch = {name: tensor.repeat(3, 1) for name, tensor in prompt().items()}
    engine.model.eval().generate(**batch, max_new_tokens=2, do_sample=False)
    assert seen and all(seen)
    engine.close()
    handle.remove()
    assert not head._forward_pre_hooks
