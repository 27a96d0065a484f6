"""A plan's packed products in training, evaluation and generation: where they go, how exact they are, what keeps them.

The ways are stand-ins that count their calls; with a scale of their own, whoever takes one is seen by its bits.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.plans.cuts import cuts_from_json, cuts_to_json
from offload_rt.profiling.measured_sizes import tensors_digest
from offload_rt.quantized import codec
from planners.plans.activations import Action, whole_batch
from planners.plans.placement import Tier
from planners.plans.plan import DecodeScope, Plan
from planners.rule.streaming_problem import Cuts
from tests.conftest import build_lora, decode_in_place, language_batch
from tests.interpreter import interpreted

pytest.importorskip("transformers")
pytest.importorskip("peft")

SHAPES = ("64x64", "32x64", "128x64", "64x128")
"""Of the tiny Llama's linears: queries and outputs, keys and values, gate and up, down."""
FEW = 24
"""Tokens of a batch of `language_batch`."""


NONE = Cuts(head_chunk_tokens=None, chunk_tokens=None, layer_major=None)


@dataclass
class Halves:
    """Sums the columns in two halves, the second one first, each in fp32; rounded, that may be plain's bits."""

    name: str = "halves"
    tokens: list[int] = field(default_factory=list)
    scale: float = 1.0
    """Of the sums. With another than 1, whoever takes the product is seen by its bits on every processor."""

    def why_not(self, *of: Any) -> str:
        return ""

    def product(self, x: torch.Tensor, blob: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
        columns = x.shape[-1]
        self.tokens.append(x.numel() // columns)
        weight = codec.decode(blob, (rows, columns), x.dtype).float()
        late = x[..., columns // 2 :].float() @ weight[:, columns // 2 :].t()
        out = late + x[..., : columns // 2].float() @ weight[:, : columns // 2].t()
        return self.scale * (out if bias is None else out + bias.float()).to(x.dtype)


def table(most_tokens: int = FEW, name: str = "halves", shapes: tuple[str, ...] = SHAPES) -> dict[str, Any]:
    return {shape: ((most_tokens, name),) for shape in shapes}


def step(model: Any, seed: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**language_batch(seed)).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def engine_with(make_engine: Any, disk_folder: Path, way: Any, packed: Any, **options: Any) -> Any:
    options = {"poison": True, "num_slots": 2, "product_ways": {way.name: way}, "packed_products": packed, **options}
    return make_engine(build_lora(dropout=0.0), options, bits=4, nvme=disk_folder, seq_len=32)


def test_training_is_as_exact_as_plain_and_backward_decodes(make_engine, disk_folder) -> None:
    way = Halves()
    engine = engine_with(make_engine, disk_folder, way, table())
    twin = decode_in_place(build_lora(dropout=0.0))
    ours = theirs = 0.0
    for seed in range(4):
        way.tokens.clear()
        exact_loss, exact = step(copy.deepcopy(twin).double(), seed)
        plain_loss, plain = step(twin, seed)
        loss, found = step(engine.model, seed)
        assert found.keys() == plain.keys() == exact.keys()
        ours += sum(float(((found[n].double() - exact[n]).norm() / exact[n].norm()) ** 2) for n in exact)
        theirs += sum(float(((plain[n].double() - exact[n]).norm() / exact[n].norm()) ** 2) for n in exact)
        # Seven linears of four layers, in forward and again; the recompute may not leave any of them out.
        assert way.tokens == [FEW] * 56
    assert (ours / theirs) ** 0.5 < 1.05
    report = engine.report()
    assert report["packed_products"] == 4 * 56 and report["products_left_out"] == 0
    assert report["decodes"] == 4 * (28 - 3), "for the gradient of each linear's input; the first three's wants none"
    way.scale = 1.25
    assert not torch.equal(step(engine.model, seed)[0], loss), "the product that is called is the one that is used"


@dataclass
class Decoded(Halves):
    """Plain's product, to the bit."""

    def product(self, x: torch.Tensor, blob: torch.Tensor, rows: int, bias: torch.Tensor | None) -> torch.Tensor:
        self.tokens.append(x.numel() // x.shape[-1])
        return torch.nn.functional.linear(x, codec.decode(blob, (rows, x.shape[-1]), x.dtype), bias)


@pytest.mark.parametrize("most_tokens", [FEW, FEW - 1])
def test_dora_reads_weights_whose_products_are_taken_packed(most_tokens, make_engine, disk_folder) -> None:
    """Its own calls of the module end before it has read them."""
    peft = pytest.importorskip("peft")

    def built() -> Any:
        base = build_lora(num_layers=2, dropout=0.0).unload()
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False)
        return peft.get_peft_model(base, config)

    way = Decoded()
    options = {"product_ways": {way.name: way}, "packed_products": table(most_tokens)}
    engine = make_engine(built(), options, bits=4, nvme=disk_folder, seq_len=32)
    loss, found = step(engine.model)
    expected_loss, expected = step(decode_in_place(built()))
    assert torch.equal(loss, expected_loss) and found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert bool(way.tokens) is (most_tokens == FEW)


def test_forward_and_recompute_go_the_same_way(make_engine, disk_folder) -> None:
    """The bits are those of the same model, all of it in memory, whose linears take the same way."""
    way, theirs = Halves(scale=1.25), Halves(scale=1.25)
    engine = engine_with(make_engine, disk_folder, way, table(), layer_inputs=Tier.HOST, decode_scope=DecodeScope.LAYER)
    twin = build_lora(dropout=0.0)
    blobs = {}
    for name, module in twin.named_modules():
        if name.endswith("base_layer"):
            blobs[module] = codec.encode(module.weight.data)
    decode_in_place(twin)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, module: Any) -> torch.Tensor:
            ctx.module = module
            return theirs.product(x, blobs[module], module.out_features, None)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            return gradient @ ctx.module.weight, None

    for module in blobs:
        module.forward = lambda x, module=module: Product.apply(x, module)
    for seed in range(2):
        (expected_loss, expected), (loss, found) = step(twin, seed), step(engine.model, seed)
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert way.tokens == [FEW] * 112 and theirs.tokens == [FEW] * 56


def test_what_the_plan_does_not_name_is_plain_to_the_bit(make_engine, disk_folder) -> None:
    """Off by default, off for more tokens than it says, off under autocast; and on for one shape alone."""
    way, twin = Halves(), decode_in_place(build_lora(dropout=0.0))
    expected_loss, expected = step(twin)
    for packed in (None, {}, table(FEW - 1), {"64x64": ((4, "halves"), (FEW, "decoded"), (99, "halves"))}):
        engine = engine_with(make_engine, disk_folder, way, packed)
        loss, found = step(engine.model)
        assert torch.equal(loss, expected_loss) and all(torch.equal(found[n], expected[n]) for n in expected)
        step(engine.model)
        assert engine.report()["packed_products"] == 0 and engine.report()["products_left_out"] == 4
        engine.close()
    engine = engine_with(make_engine, disk_folder, way, table(shapes=("32x64",)))
    step(engine.model)
    assert way.tokens == [FEW] * 16
    way.tokens.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(engine.model)
    assert way.tokens == []


@pytest.mark.parametrize("kind", ["stand-in", pytest.param("triton", marks=pytest.mark.full)])
def test_generation_takes_the_prompt_one_way_and_tokens_the_other(make_engine, disk_folder, monkeypatch, kind) -> None:
    way: Any = Halves()
    if kind == "triton":
        from offload_rt.quantized.nf4_products import Fused

        way = Fused(interpreted("offload_rt.quantized.nf4_product_triton", monkeypatch), name="halves")
    engine = engine_with(make_engine, disk_folder, way, table(4))
    engine.model.eval()
    prompt = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    found = engine.model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    twin = decode_in_place(build_lora(dropout=0.0)).eval()
    expected = twin.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(found, expected), "of a model whose best token is not a matter of its last bits"
    assert engine.report()["packed_products"] == 3 * 28, "nine tokens are decoded for, then three times one is not"
    if kind == "stand-in":
        assert way.tokens == [1] * 84


def test_a_closed_engine_leaves_the_linears_as_they_were(make_engine, disk_folder) -> None:
    engine = engine_with(make_engine, disk_folder, Halves(), table())
    linears = [m for name, m in engine.model.named_modules() if name.endswith("base_layer")]
    assert len(linears) == 28 and all("forward" in vars(module) for module in linears)
    engine.close()
    assert not any("forward" in vars(module) for module in linears)


def test_a_linear_that_is_more_than_a_product_is_left_alone(make_engine, disk_folder) -> None:
    model, way = build_lora(dropout=0.0), Halves()
    odd = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    plain = type(odd).forward
    odd.forward = lambda x: plain(odd, x) * 2
    options = {"product_ways": {"halves": way}, "packed_products": table()}
    engine = make_engine(model, options, bits=4, nvme=disk_folder, seq_len=32)
    step(engine.model)
    assert len(way.tokens) == 54


def test_the_table_is_part_of_the_plan_and_of_its_cuts(make_engine, disk_folder) -> None:
    way = Halves()
    engine = engine_with(make_engine, disk_folder, way, table(9))
    assert engine.plan.packed_products == table(9) and Plan.from_json(engine.plan.to_json()) == engine.plan
    noted = json.loads(json.dumps(engine.report()["cuts"]))
    assert noted == engine.report()["cuts"], "what a run notes is what it reads"
    cuts = cuts_from_json(noted, of="run")
    assert cuts.packed_products == table(9) and "packed weights" in cuts.describe()
    given = engine.plan
    assert tensors_digest(given) != tensors_digest(replace(given, packed_products={})), "other tensors are measured"
    engine.close()

    ways = {"product_ways": {"halves": way}}
    again = make_engine(build_lora(), {"cuts": cuts, **ways}, bits=4, nvme=disk_folder, seq_len=32)
    assert again.plan.packed_products == table(9), "a run that goes on keeps it"
    again.close()
    with pytest.raises(ConfigError, match="has other cuts .* than the run that goes on .*by packed weights"):
        make_engine(
            build_lora(), {"cuts": cuts, **ways}, bits=4, nvme=disk_folder, seq_len=32,
            plan=replace(given, packed_products={}),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="'halves' cannot be had on cpu: is not installed here.*--other-cuts"):
        make_engine(build_lora(), {"cuts": cuts}, bits=4, nvme=disk_folder, seq_len=32)


def test_cuts_from_before_there_were_any_are_read() -> None:
    before = {"head_chunk_tokens": None, "chunk_tokens": 256, "layer_major": None}
    assert cuts_from_json(before, of="run") == Cuts(**before)
    assert cuts_to_json(Cuts(**before)) == {**before, "packed_products": {}, "head_tile_rows": None}
    with pytest.raises(CheckpointError, match="run: plan: packed_products: 'x' is no shape"):
        cuts_from_json({**before, "packed_products": {"x": []}}, of="run")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"packed_products": {"64x63": ((1, "halves"),)}}, "no layer has a linear in 4 bits of 64x63"),
        ({"packed_products": table(), "activations": whole_batch(Action.KEEP)}, "layers that run whole"),
        ({"packed_products": table(name="thirds")}, "'thirds' cannot be had on cpu"),
        ({"packed_products": "measured"}, "on the CPU weights are decoded first"),
        ({"packed_products": "measured", "cuts": NONE}, "begun without, and keeps its cuts"),
    ],
)
def test_a_table_that_cannot_be_had_is_refused(make_engine, disk_folder, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_with(make_engine, disk_folder, Halves(), None, **options)
