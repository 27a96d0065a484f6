"""Loops whose loss is not one call's: of preferences, of a teacher, by a closure. The bits are those of plain PyTorch.

preferences    forward chosen | forward rejected | both without adapters, no_grad | one backward
a teacher      forward without adapters, no_grad | forward with labels | forward for logits | one backward
a closure      optimizer.step(closure): zero_grad | forward | backward | the step
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from planners.plans.plan import StatePlacement, Tier
from tests.changing_plans import propose, results, with_pieces_in_memory
from tests.conftest import build_lora, language_batch

STEPS = 3
PLACES = {
    "in memory": None,
    "in tiers": {"state": StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=2)},
}


def log_probabilities(model, ids):
    found = functional.log_softmax(model(input_ids=ids).logits[:, :-1].float(), dim=-1)
    return found.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)


def of_preferences(model, number):
    pair = [language_batch(number)["input_ids"], language_batch(number + 100)["input_ids"]]
    chosen, rejected = (log_probabilities(model, ids) for ids in pair)
    with torch.no_grad(), model.disable_adapter():
        reference = [log_probabilities(model, ids) for ids in pair]
    return -functional.logsigmoid((chosen - reference[0]) - (rejected - reference[1])).mean()


def of_a_teacher(model, number):
    batch = language_batch(number)
    with torch.no_grad(), model.disable_adapter():
        teacher = model(input_ids=batch["input_ids"]).logits.float()
    loss = model(**batch).loss
    student = functional.log_softmax(model(input_ids=batch["input_ids"]).logits.float(), dim=-1)
    return loss + functional.kl_div(student, functional.softmax(teacher, dim=-1), reduction="batchmean")


def backward_then_step(loss_of):
    def step(model, optimizer, number):
        loss = loss_of(model, number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def by_a_closure(model, optimizer, number):
    """As Lightning steps."""

    def closure():
        loss = model(**language_batch(number)).loss
        optimizer.zero_grad()
        loss.backward()
        return loss

    return optimizer.step(closure).item()


LOOPS = {
    "preferences": backward_then_step(of_preferences),
    "a teacher": backward_then_step(of_a_teacher),
    "a closure": by_a_closure,
}


def train(model, optimizer, loop):
    losses = []
    for number in range(STEPS):
        torch.manual_seed(number)  # of dropout
        losses.append(LOOPS[loop](model, optimizer, number))
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("loop", "place"),
    [
        ("preferences", "in memory"),
        pytest.param("preferences", "in tiers", marks=pytest.mark.full),
        pytest.param("a teacher", "in memory", marks=pytest.mark.full),
        ("a teacher", "in tiers"),
        pytest.param("a closure", "in memory", marks=pytest.mark.full),
        ("a closure", "in tiers"),
    ],
)
def test_loops_of_other_losses_have_the_bits_of_the_plain_model(loop, place, make_engine, disk_folder):
    plain = build_lora(num_layers=2)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    losses, expected = train(plain, optimizer, loop)
    engine = make_engine(build_lora(num_layers=2), PLACES[place], nvme=disk_folder)
    read_before = engine.report()["bytes_read"]
    found_losses, found = train(engine.model, engine.optimizer, loop)
    assert found_losses == losses and engine.step_number == STEPS
    assert engine.report()["bytes_read"] > read_before
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    begin = dict(build_lora(num_layers=2).named_parameters())
    assert all(not torch.equal(value, begin[name]) for name, value in found.items())


def test_a_plan_that_changes_where_adapters_are_switched_off_leaves_what_trains(make_engine, disk_folder):
    """The first call of a step is a reference's. With nothing that trains, nothing would be clipped."""
    plain = build_lora(num_layers=2)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    options = {**PLACES["in tiers"], "piece_elements": 1024}
    engine = make_engine(build_lora(num_layers=2), options, nvme=disk_folder, max_grad_norm=0.01)
    for number in range(STEPS):
        for model in (plain, engine.model):
            with torch.no_grad(), model.disable_adapter():
                model(**language_batch(number))
            torch.manual_seed(number)
            model(**language_batch(number)).loss.backward()
        assert [name for name, _ in engine.gradients()] == list(engine.trainable)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        engine.step()
        propose(engine, with_pieces_in_memory(engine, number + 1))
    assert results(engine) == ["changed"] * (STEPS - 1)
    expected = dict(plain.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in engine.trainable.items())
