"""A recompute without the layer's last product gives the same gradients, bit for bit; or it is not done without."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from offload_rt.layers.last_product import ResultWanted, is_product, left_out
from tests import full_parity
from tests.conftest import PlainLayer, build_lora, build_plain, language_batch


class ProductCount(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


# One call: what comes behind the product, and whether it lets the product go.


def plain(down, hidden, x):
    return x + down(hidden)


def scaled_and_cast(down, hidden, x):
    return (x.float() + down(hidden).float() * 0.5 - 1.0).to(x.dtype)


def dropped_out(down, hidden, x):
    return x + nn.functional.dropout(down(hidden), 0.5, training=True)


def in_place(down, hidden, x):
    return x.clone().add_(down(hidden))


def through_views(down, hidden, x):
    return x + down(hidden).transpose(0, 1).unsqueeze(0).permute(0, 2, 1).squeeze(0)


def beside_a_norm_of_the_rest(down, hidden, x):
    return nn.functional.layer_norm(x, (8,)) * x + down(hidden)


LETS_GO = [plain, scaled_and_cast, dropped_out, in_place, through_views, beside_a_norm_of_the_rest]


def norm_behind(down, hidden, x):
    return nn.functional.layer_norm(x + down(hidden), (8,))


def comparison_of_a_copy(down, hidden, x):
    result = down(hidden)
    return x * (result.detach() > 0) + result


def clamped(down, hidden, x):
    return (x + down(hidden)).clamp(-1, 1)


def times_what_trains(down, hidden, x):
    return x + down(hidden) * x


def squared(down, hidden, x):
    result = down(hidden)
    return x + result * result


def looked_at(down, hidden, x):
    result = x + down(hidden)
    return result * float(result.detach().sum() > 0)


WANTS = [norm_behind, comparison_of_a_copy, clamped, times_what_trains, squared, looked_at]


def gradients_of(function, *, leave_out, bias=False):
    torch.manual_seed(0)
    down = nn.Linear(16, 8, bias=bias)
    hidden, x = torch.randn(4, 16, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    if leave_out:
        with left_out(down):
            out = function(down, hidden, x)
    else:
        out = function(down, hidden, x)
    return torch.autograd.grad(out, [hidden, x, *down.parameters()], torch.randn(4, 8)), out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("function", LETS_GO, ids=lambda f: f.__name__)
def test_what_only_hands_a_result_on_lets_the_product_go(function, bias):
    with ProductCount() as whole:
        expected, _ = gradients_of(function, leave_out=False, bias=bias)
    with ProductCount() as spared:
        found, out = gradients_of(function, leave_out=True, bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert spared.num_products == whole.num_products - 1
    assert out.isnan().all(), "whoever uses the value after all must not get a number"


@pytest.mark.parametrize("function", WANTS, ids=lambda f: f.__name__)
def test_what_needs_the_value_says_so(function):
    gradients_of(function, leave_out=False)
    with pytest.raises(ResultWanted):
        gradients_of(function, leave_out=True)


def test_only_one_product_of_a_matrix_is_a_candidate():
    transformers = pytest.importorskip("transformers")
    assert is_product(nn.Linear(2, 2))
    assert is_product(transformers.pytorch_utils.Conv1D(2, 2))
    assert not is_product(nn.Conv1d(2, 2, 1))
    assert not is_product(nn.LayerNorm(2))
    assert not is_product(None)


# Whole models.


def train(make_engine, model, batches, loss_of, **options):
    """Gradients of every step, parameters at the end, and the engine."""
    engine = make_engine(model, options)
    found = []
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        engine.backward(loss_of(engine.model, batch))
        found += [p.grad.clone() for p in engine.trainable.values() if p.grad is not None]
        engine.step()
    return found + [p.detach().clone() for p in engine.trainable.values()], engine


def compare(make_engine, model, batches, loss_of):
    """The engine that leaves products out, and that its numbers are those of full recomputes."""
    expected, whole = train(make_engine, copy.deepcopy(model), batches, loss_of, leave_out_products=False)
    found, engine = train(make_engine, model, batches, loss_of)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert whole.report()["products_left_out"] == 0
    assert engine.report()["recomputes"] == whole.report()["recomputes"]
    return engine


@pytest.mark.parametrize(("family", "left_out"), [("llama", 8), ("qwen", 8), ("gpt2", 8), ("moe", 0)])
def test_each_recompute_but_the_first_goes_without_where_the_family_ends_in_a_product(make_engine, family, left_out):
    """The first recompute of each of the four layers is whole: its output is looked at."""
    batches = [language_batch(step) for step in range(3)]
    engine = compare(make_engine, build_lora(family), batches, lambda model, batch: model(**batch).loss)
    assert engine.report()["products_left_out"] == left_out


def test_full_fine_tuning_goes_without_as_well(tmp_path):
    case = full_parity.Case("llama", "bfloat16", "adamw", 1, "not", False, "in place")
    with full_parity.make_engine(case, tmp_path) as engine:
        kept = full_parity.run_engine(case, engine)
        plan = replace(engine.plan, activations=None)
    with full_parity.make_engine(case, tmp_path, plan=plan) as engine:
        found = full_parity.run_engine(case, engine)
        report = engine.report()
    assert 0 < report["products_left_out"] < report["recomputes"]
    for step, (expected, got) in enumerate(zip(kept, found, strict=True)):
        assert expected.keys() == got.keys()
        assert [f"{step}: {name}" for name in got if not torch.equal(expected[name], got[name])] == []


class SumLayer(PlainLayer):
    """Its last product is only added."""

    def forward(self, hidden_BTD, wanted=False):
        inner = torch.nn.functional.gelu(self.up(self.norm(hidden_BTD) * self.scale))
        out = hidden_BTD + self.down(inner)
        return out * torch.sigmoid(out) if wanted else out


def test_a_layer_that_wants_the_result_in_some_calls_gets_it_then(make_engine):
    model = build_plain(SumLayer)

    def loss_of(model, batch):
        x, wanted = batch
        hidden = model.enter(x)
        for layer in model.layers:
            hidden = layer(hidden, wanted=wanted)
        return model.leave(hidden).square().mean()

    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    batches = [(x, wanted) for wanted in (False, False, True, False)]
    engine = compare(make_engine, model, batches, loss_of)
    assert engine.report()["products_left_out"] == 4, "once in each layer, until the result was wanted"


def test_a_hook_that_looks_at_the_output_sees_numbers(make_engine):
    model = build_plain(SumLayer)
    seen = []
    model.layers[1].down.register_forward_hook(lambda module, args, out: seen.append(float(out.detach().mean())))
    batches = [torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    engine = compare(make_engine, model, batches, lambda model, x: model(x).square().mean())
    assert engine.report()["products_left_out"] == 2 * 3, "in three of four layers"
    assert seen and not any(value != value for value in seen)
