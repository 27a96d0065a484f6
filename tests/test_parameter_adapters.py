"""LoRA on parameters (peft's `target_parameters`), as stacks of experts have it: the module that owns the parameter
computes with a sum in its place for the time of a call. Its bits: `tests/test_adapter_kinds.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.errors import ConfigError
from tests.conftest import build_base, decode_in_place, language_batch
from tests.test_packed_linear import FEW, Decoded, step, table
from tests.test_tokenwise_engine import chunked

peft = pytest.importorskip("peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEARS = ["q_proj.weight", "down_proj.weight"]
NAME = "base_model.model.model.layers.1.mlp.experts.base_layer.base_layer.down_proj"


def config(names: list[str]) -> Any:
    return peft.LoraConfig(r=4, target_modules=[], target_parameters=names, init_lora_weights=False)


def built(names: list[str], family: str = "moe") -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(build_base(family, torch.bfloat16, 2), config(names)).train()


def same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    assert torch.equal(found[0], expected[0]) and found[1].keys() == expected[1].keys()
    assert [name for name, each in expected[1].items() if not torch.equal(found[1][name], each)] == []


@pytest.mark.parametrize("most_tokens", [FEW, FEW - 1])
def test_a_linear_whose_weight_is_a_sum_is_not_multiplied_packed(most_tokens: int, make_engine: Any) -> None:
    way = Decoded()
    options = {"product_ways": {way.name: way}, "packed_products": table(most_tokens)}
    engine = make_engine(built(LINEARS, "llama"), options, bits=4, seq_len=32)
    same(step(engine.model), step(decode_in_place(built(LINEARS, "llama"))))
    assert bool(way.tokens) is (most_tokens == FEW), "the other linears are"


def test_weights_that_stay_in_memory_are_not_said_to_be_written_to(
    make_engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(built(EXPERTS), {"fill": True})
    twin = built(EXPERTS)
    for seed in range(2):
        same(step(engine.model, seed), step(twin, seed))
    assert "were written to" not in caplog.text and engine._runtime.frozen.written == []
    with torch.no_grad():
        engine.model.get_parameter(NAME).mul_(0.5)
        twin.get_parameter(NAME).mul_(0.5)
    same(step(engine.model, 2), step(twin, 2))
    assert f"1 frozen weights were written to (first: {NAME})" in caplog.text


def test_what_is_written_to_such_a_weight_at_rest_is_refused_as_ever(make_engine: Any) -> None:
    engine = make_engine(built(EXPERTS), bits=4)
    step(engine.model)
    with torch.no_grad():
        engine.model.get_parameter(NAME).fill_(1.0)
    with pytest.raises(ConfigError, match=rf"1 frozen weights were written to \(first: {NAME}\)"):
        engine(**language_batch(1))
    twin = decode_in_place(built(EXPERTS))
    same(step(engine.model), step(twin))


def test_a_call_that_fails_leaves_the_weights_as_they_were(make_engine: Any) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("on its way")

    engine = make_engine(built(EXPERTS), bits=4)
    experts = engine.model.get_submodule(NAME.rpartition(".")[0])
    handle = experts.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        step(engine.model)
    handle.remove()
    same(step(engine.model), step(decode_in_place(built(EXPERTS))))


def test_one_that_is_added_to_a_running_engine_is_computed_with(make_engine: Any) -> None:
    engine, twin = make_engine(built(EXPERTS), bits=4), decode_in_place(built(EXPERTS))
    for model in (engine.model, twin):
        model.eval()
        torch.manual_seed(5)
        model.add_adapter("late", config(EXPERTS))
        model.set_adapter("late")
    with torch.no_grad():
        first = twin(**language_batch(1)).logits
        for _ in range(2):
            inputs = {"input_ids": language_batch(1)["input_ids"]}
            assert torch.equal(engine(**inputs).logits, first)
            model.set_adapter("late")


@pytest.mark.parametrize("chunks", [1, 2])
def test_by_chunks_of_tokens_a_layer_has_the_same_sum(chunks: int, make_engine: Any, tmp_path: Path) -> None:
    activations = {f"base_model.model.model.layers.{i}": chunked(1, chunks) for i in range(2)}
    engine = make_engine(
        built(LINEARS, "llama"), {"activations": activations}, bits=4, host_memory="64MiB", nvme=tmp_path
    )
    found, expected = step(engine.model), step(decode_in_place(built(LINEARS, "llama")))
    if chunks == 1:
        same(found, expected)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0.05, atol=1e-4)
