"""The loss by tiles of a head's rows: the model's own loss and gradients, each tile in memory twice a batch.

rows       |-- 0 --|-- 1 --|-- 2 --|-|     each goes through all chunks of tokens
pass 1      0       1       2       3
pass 2      3       2       1       0
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from offload_rt.dtypes import dtype_name
from offload_rt.vocabulary.backbone import find_causal_model
from offload_rt.vocabulary.loss_head import LossHead
from offload_rt.vocabulary.tiled_linear import TiledLinear
from offload_rt.vocabulary.vocabulary_loss import VocabularyLoss
from planners.plans.schedule import Phase
from tests.conftest import VOCABULARY
from tests.test_loss_head import CHUNK, FAMILIES, FAMILIES_IN_FULL, assert_close, batch, build, gradients, num_learned

TILE_ROWS = 20
NUM_TILES = -(-VOCABULARY // TILE_ROWS)


class Rows:
    """In the place of an executor and its slots: gives copies of rows, and forgets them when they are released."""

    def __init__(self, weight, tiles):
        self.weight = weight
        self.tiles = tiles
        self.visits = []
        self._given = {}

    def acquire(self, index, phase, *, training):
        self.visits.append((index, phase, training))
        assert not self._given, "one tile at a time"
        begin, end = self.tiles[index]
        rows = self.weight.detach()[begin:end].clone()
        self._given[index] = rows

        def tensor(dtype, shape):
            assert (rows.dtype, tuple(rows.shape)) == (dtype, shape)
            return rows

        return SimpleNamespace(tensor=tensor)

    def release(self, index):
        self._given.pop(index).fill_(torch.nan)


def streamed(module, tile_rows=TILE_ROWS):
    """`module`, frozen, behind tiles of its rows."""
    module.weight.requires_grad_(False)
    num_rows = module.weight.shape[0]
    tiles = [(begin, min(begin + tile_rows, num_rows)) for begin in range(0, num_rows, tile_rows)]
    tensor = SimpleNamespace(dtype=dtype_name(module.weight.dtype, of="weight"), shape=module.weight.shape)
    block = SimpleNamespace(spec=SimpleNamespace(tensors=[tensor]))
    return TiledLinear(module, block, Rows(module.weight, tiles), tiles)


def untied(family="llama", dtype=torch.float32, **changes):
    return build(family, dtype, tie_word_embeddings=False, **changes)


def attached(model, linear, chunk_tokens=CHUNK):
    linear.attach()
    head = LossHead(find_causal_model(model), chunk_tokens, linear=linear)
    head.attach()
    return head


def with_a_streamed_head(model, chunk_tokens=CHUNK):
    linear = streamed(model.get_output_embeddings())
    return linear, lambda: attached(model, linear, chunk_tokens)


def significant(found):
    """Without biases of keys: a softmax over keys has no gradient by these, but for rounding."""
    return {name: gradient for name, gradient in found.items() if not name.endswith("k_proj.bias")}


WITH_A_BIAS = {"phi"}


@pytest.mark.parametrize(
    "family",
    [
        *(family for family in FAMILIES if family not in WITH_A_BIAS),
        *(pytest.param(family, marks=pytest.mark.full) for family in FAMILIES_IN_FULL if family not in WITH_A_BIAS),
    ],
)
def test_tiles_of_the_vocabulary_give_the_models_loss_and_every_gradient(family):
    model, inputs = untied(family), batch()
    linear, attach = with_a_streamed_head(model)
    plain = model(**inputs).loss
    expected = significant(gradients(model, plain))
    head = attach()
    model(**inputs)  # checks a few tokens besides
    linear._executor.visits.clear()
    output = model(**inputs)
    assert torch.allclose(output.loss, plain, rtol=1e-6)
    assert_close(significant(gradients(model, output.loss)), expected)
    assert output.logits is None and output.keys() == {"loss"} | (output.keys() - {"logits"})
    once = [(index, Phase.FORWARD, True) for index in range(NUM_TILES)]
    again = [(index, Phase.BACKWARD, True) for index in reversed(range(NUM_TILES))]
    assert linear._executor.visits == once + again
    assert head.report()["reads_head_per_tile_because"] is None
    assert head.report()["num_vocabulary_tiles"] == 2 * 2 * NUM_TILES


@pytest.mark.parametrize("chunk_tokens", [1, 5, 20])
def test_chunks_of_any_size_give_the_same_loss_and_no_more_logits(chunk_tokens):
    model, inputs = untied("gemma2"), batch()
    _, attach = with_a_streamed_head(model, chunk_tokens)
    plain = model(**inputs).loss
    expected = gradients(model, plain)
    head = attach()
    model(**inputs)
    seen = []
    inner = head.vocabulary.linear.answered

    def answered(answer):
        def noted(rows):
            seen.append(tuple(answer(rows).shape[-2:]))
            return answer(rows)

        return inner(noted)

    head.vocabulary.linear.answered = answered
    loss = model(**inputs).loss
    assert_close(gradients(model, loss), expected)
    assert len(seen) >= 2 * NUM_TILES
    assert all(num_tokens <= chunk_tokens and num_rows <= TILE_ROWS for num_tokens, num_rows in seen)


def test_a_batch_of_one_tile_of_tokens_takes_its_logits_once():
    model, inputs = untied(), batch()
    linear, attach = with_a_streamed_head(model, chunk_tokens=num_learned(inputs["labels"]))
    head = attach()
    model(**inputs).loss.backward()
    assert head.counters.num_tiles == 1 and head.counters.num_vocabulary_tiles == 0 and head.refusal is None


def test_labels_that_the_caller_shifted_and_the_callers_count_are_used():
    model, inputs = untied(), batch()
    _, attach = with_a_streamed_head(model)
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    for count in (torch.tensor(50), 50):
        wanted = {"shift_labels": shifted, "num_items_in_batch": count}
        plain = model(**inputs, **wanted).loss
        expected = gradients(model, plain)
        head = attach()
        loss = model(**inputs, **wanted).loss
        assert torch.allclose(loss, plain, rtol=1e-6) and head.counters.num_vocabulary_tiles == 2 * NUM_TILES
        assert_close(gradients(model, loss), expected)
        head.detach()
        head.vocabulary.linear.detach()


def test_without_gradients_there_is_one_pass():
    model, inputs = untied(), batch()
    linear, attach = with_a_streamed_head(model)
    plain = model(**inputs).loss
    attach()
    with torch.no_grad():
        model(**inputs)
        linear._executor.visits.clear()
        loss = model(**inputs).loss
    assert torch.allclose(loss, plain, rtol=1e-6) and not loss.requires_grad
    assert linear._executor.visits == [(index, Phase.FORWARD, False) for index in range(NUM_TILES)]


def test_under_autocast_products_are_those_of_autocast():
    model, inputs = untied(), batch()
    _, attach = with_a_streamed_head(model)
    truth = gradients(model, model(**inputs).loss)
    with torch.autocast("cpu", torch.bfloat16):
        plain = gradients(model, model(**inputs).loss)
        head = attach()
        found = gradients(model, model(**inputs).loss)

    def error(of):
        return torch.stack([(of[name] - truth[name]).norm() / truth[name].norm() for name in truth]).mean()

    assert head.counters.num_vocabulary_tiles == 2 * NUM_TILES
    assert 0.5 * error(plain) < error(found) <= 1.05 * error(plain)


def test_a_label_outside_the_vocabulary_is_refused():
    model, inputs = untied(), batch()
    _, attach = with_a_streamed_head(model)
    attach()
    model(**inputs)
    inputs["labels"][1, 3] = VOCABULARY
    with pytest.raises(IndexError, match=f"to {VOCABULARY}, for {VOCABULARY} logits"):
        model(**inputs)


class Behind(nn.Module):
    """A head that does something with its logits."""

    def __init__(self, linear, change):
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.change = change

    def forward(self, hidden):
        return self.change(self, self.linear(hidden))


REFUSED = {
    "depends on others": (lambda head, logits: logits - logits.mean(-1, keepdim=True), "depend on other logits"),
    "one for each row": (lambda head, logits: logits + torch.arange(float(VOCABULARY)), "cannot go on with some"),
    "trains": (lambda head, logits: logits * head.scale.requires_grad_(), "between head and loss trains"),
    "called twice": (lambda head, logits: torch.cat([logits, logits], -1)[..., :VOCABULARY], "one for each row"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_logits_that_are_not_each_for_itself_read_the_head_for_each_tile_of_tokens(case, caplog):
    change, why = REFUSED[case]
    model, inputs = untied(), batch()
    linear = streamed(model.lm_head)
    model.lm_head = Behind(model.lm_head, change)
    plain = model(**inputs).loss
    expected = gradients(model, plain)
    head = attached(model, linear)
    for _ in range(2):
        loss = model(**inputs).loss
        assert torch.allclose(loss, plain, rtol=1e-6)
        assert_close(gradients(model, loss), expected)
    assert why in head.report()["reads_head_per_tile_because"] and why in caplog.text
    assert head.refusal is None and head.counters.num_vocabulary_tiles == 0 and head.counters.num_tiles > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["a tile that is out", "large", "first label", "last label"])
def test_sums_hold_at_the_edges(case, dtype):
    torch.manual_seed(0)
    head = nn.Linear(16, VOCABULARY, bias=False).to(dtype)
    inputs_ND = torch.randn(9, 16).to(dtype) * (1000 if case == "large" else 1)
    targets_N = torch.full((9,), {"first label": 0, "last label": VOCABULARY - 1}.get(case, TILE_ROWS + 1))
    if case == "a tile that is out":
        nn.init.zeros_(head.weight[:TILE_ROWS])

    def change(logits):
        return logits.masked_fill(logits == 0, -torch.inf)

    taken = VocabularyLoss(streamed(head), chunk_tokens=4)
    arguments = inputs_ND, targets_N, lambda product, *_: change(product)
    losses_N, normalizers = taken.losses(*arguments, training=True)
    gradient_ND = taken.input_gradient(*arguments, normalizers, 1.0)
    inputs_ND.requires_grad_()
    expected_N = nn.functional.cross_entropy(change(head(inputs_ND)).float(), targets_N, reduction="none")
    (expected_ND,) = torch.autograd.grad(expected_N.sum(), inputs_ND)
    assert torch.allclose(losses_N, expected_N, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (gradient_ND - expected_ND).norm() <= tolerance * expected_ND.float().norm()


@pytest.mark.parametrize("labels", ["unlikely", "certain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_many_tiles_is_as_close_to_fp64_as_a_whole_one(dtype, labels):
    """Eight of them: shares that are rounded to bf16 one by one have 1.4 times plain's error (docs/log.md)."""
    torch.manual_seed(0)
    head = nn.Linear(128, 4096, bias=False).to(dtype)
    nn.init.normal_(head.weight)
    inputs_ND = torch.randn(64, 128).to(dtype) / 8
    logits_NV = inputs_ND @ head.weight.t()
    targets_N = logits_NV.argmin(1) if labels == "unlikely" else logits_NV.argmax(1)

    def whole(to):
        rows_ND, weight = inputs_ND.to(to).detach().requires_grad_(), head.weight.detach().to(to)
        logits_NV = rows_ND @ weight.t()
        loss = nn.functional.cross_entropy(logits_NV if to == torch.float64 else logits_NV.float(), targets_N)
        return torch.autograd.grad(loss, rows_ND)[0].double()

    visits: list[None] = []
    taken = VocabularyLoss(streamed(head, 512), chunk_tokens=10, between=lambda: visits.append(None))
    arguments = inputs_ND, targets_N, lambda product, *_: product
    _, normalizers = taken.losses(*arguments, training=True)
    found = taken.input_gradient(*arguments, normalizers, 1 / 64).to(dtype).double()
    exact, plain = whole(torch.float64), whole(dtype)
    assert len(visits) == 16
    assert 0 < (found - exact).norm() <= 1.05 * (plain - exact).norm()
