"""What users do with a step in the lives of `lifecycle_of_adapters`. Each gets a side, and the same numbers on both."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from tests.lifecycle_adapter_setting import NUM_LAYERS, ROWS, TOKENS, VOCABULARY, batch_of, layers_of
from tests.lifecycle_adapter_twin import Side


class Broken(Exception):
    """What a program lets fail."""


def loss_of(side: Side, draw: random.Random, **options: Any) -> Tensor:
    batch = batch_of(draw, rows=draw.choice([1, ROWS]), tokens=draw.choice([5, 8, TOKENS, TOKENS, TOKENS]))
    kind = draw.choice(["labels"] * 4 + ["logits", "the model's", "embeds", "autocast", "scaled"])
    if kind == "logits":
        labels = batch.pop("labels")
        logits = side(**batch, **options).logits.float()
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    if kind == "the model's":
        side.called()
        return side.model(**batch, **options).loss
    if kind == "embeds":
        ids = batch.pop("input_ids")
        with torch.no_grad():
            embeds = side.model.get_input_embeddings()(ids)
        return side(inputs_embeds=embeds, **batch, **options).loss
    if kind == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return side(**batch, **options).loss
    loss = side(**batch, **options).loss
    return loss * 3.0 if kind == "scaled" else loss


def forward(side: Side, draw: random.Random) -> Any:
    loss = loss_of(side, draw)
    side.losses.append(loss)
    return {"loss": loss.detach().clone()}


def backward(side: Side, draw: random.Random) -> Any:
    if not side.losses:
        return None
    loss = side.losses.pop(draw.randrange(len(side.losses)))
    if not loss.requires_grad:
        return None
    if draw.random() < 0.1:
        side.backward(loss, retain_graph=True)
        side.losses.append(loss)
    else:
        side.backward(loss)


def backward_of_sum(side: Side, draw: random.Random) -> Any:
    graphs = [loss for loss in side.losses if loss.requires_grad]
    if len(graphs) < 2:
        return None
    side.losses.clear()
    side.backward(graphs[0] + 0.5 * graphs[1])


def backward_twice(side: Side, draw: random.Random) -> Any:
    loss = loss_of(side, draw)
    if loss.requires_grad:
        side.backward(loss, retain_graph=True)
        side.backward(loss, **({"retain_graph": False} if draw.random() < 0.5 else {}))
    return {"loss": loss.detach().clone()}


def gradients_of(side: Side, draw: random.Random) -> Any:
    loss = loss_of(side, draw)
    wanted = [p for p in side.trainable.values() if p.requires_grad]
    chosen = wanted if draw.random() < 0.5 else draw.sample(wanted, min(2, len(wanted)))
    if not loss.requires_grad or not chosen:
        return None
    found = torch.autograd.grad(loss, chosen, allow_unused=True)
    return {str(index): gradient for index, gradient in enumerate(found) if gradient is not None}


def step(side: Side, draw: random.Random) -> Any:
    side.step()


def step_by_optimizer(side: Side, draw: random.Random) -> Any:
    side.called()
    if draw.random() < 0.5:
        side.clip_as_declared()
    side.optimizer.step()
    side.stepped()
    side.optimizer.zero_grad(set_to_none=draw.random() < 0.8)


def step_by_closure(side: Side, draw: random.Random) -> Any:
    side.called()

    def closure() -> Tensor:
        side.optimizer.zero_grad()
        loss = loss_of(side, random.Random(number))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    number = draw.randrange(1000)
    loss = side.optimizer.step(closure)
    side.stepped()
    side.optimizer.zero_grad()
    return {"loss": loss.detach()}


def schedule(side: Side, draw: random.Random) -> Any:
    side.scheduler.step()
    side.counted.number += 1
    return {"lr": side.scheduler.get_last_lr()}


def train_batch(side: Side, draw: random.Random) -> Any:
    num = draw.choice([side.of.accumulation] * 3 + [1, 2, 3])
    if side.of.dropout or side.of.model == "gpt2":  # whose numbers come in another order, layer-major
        num = 1
    return {"loss": side.train_batch([batch_of(draw) for _ in range(num)])}


def zero_grad(side: Side, draw: random.Random) -> Any:
    how = draw.randrange(3)
    if how == 0:
        side.optimizer.zero_grad()
    elif how == 1:
        side.model.zero_grad()
    else:
        side.optimizer.zero_grad(set_to_none=False)


def options(side: Side, draw: random.Random) -> Any:
    group = draw.choice(side.optimizer.param_groups)
    key = draw.choice(["lr", "weight_decay"])
    group[key] = draw.choice([0.0, 1e-3, 2e-2])


def freeze(side: Side, draw: random.Random) -> Any:
    if draw.random() < 0.5:
        for parameter in side.trainable.values() if not side.is_off else ():  # else autograd calls hooks with None
            parameter.requires_grad_(True)
    else:
        for name in draw.sample(list(side.trainable), 2):
            side.trainable[name].requires_grad_(False)


def edit_gradient(side: Side, draw: random.Random) -> Any:
    having = [name for name, p in side.trainable.items() if p.grad is not None]
    if not having:
        return None
    parameter, how = side.trainable[draw.choice(having)], draw.randrange(4)
    if how == 0:
        parameter.grad.mul_(2)  # type: ignore[union-attr]
    elif how == 1:
        parameter.grad = parameter.grad * 0.5  # type: ignore[operator]
    elif how == 2:
        parameter.grad = None
    else:
        parameter.grad.zero_()  # type: ignore[union-attr]


def hook(side: Side, draw: random.Random) -> Any:
    if side.hooks:
        side.hooks.pop().remove()
        return None
    parameter = side.trainable[draw.choice(list(side.trainable))]
    if not parameter.requires_grad:
        return None
    if draw.random() < 0.5:
        side.hooks.append(parameter.register_hook(lambda gradient: gradient * 2))
    else:

        def halve(p: Tensor) -> None:
            p.grad = p.grad * 0.5  # type: ignore[operator]

        side.hooks.append(parameter.register_post_accumulate_grad_hook(halve))


def clip(side: Side, draw: random.Random) -> Any:
    max_norm = draw.choice([0.01, 1.0, 100.0])
    if draw.random() < 0.5:
        return {"norm": side.clip(max_norm)}
    return {"norm": torch.nn.utils.clip_grad_norm_(side.model.parameters(), max_norm)}


def gradients(side: Side, draw: random.Random) -> Any:
    return {f"{index} {name}": gradient.clone() for index, (name, gradient) in enumerate(side.gradients())}


def drop(side: Side, draw: random.Random) -> Any:
    if side.losses:
        side.losses.pop(draw.randrange(len(side.losses)))


def bad(side: Side, draw: random.Random) -> Any:
    """A call that fails, in forward."""
    batch, how = batch_of(draw), draw.randrange(5)
    if how == 0:
        batch["input_ids"] = batch["input_ids"] + VOCABULARY
    elif how == 1:
        batch["labels"] = batch["labels"][:, :-2]
    elif how == 2:
        batch = batch_of(draw, tokens=TOKENS + 8)
    elif how == 3:
        batch["no_such_thing"] = 1  # type: ignore[assignment]
    else:

        def fail(*_: Any) -> None:
            raise Broken

        layer = layers_of(side.model)[draw.randrange(NUM_LAYERS)]
        inner = draw.choice([m for m in layer.modules() if isinstance(m, nn.Dropout)] or [layer])
        handle = inner.register_forward_hook(fail)
        try:
            side(**batch)
        finally:
            handle.remove()
        return None
    side(**batch)


def bad_backward(side: Side, draw: random.Random) -> Any:
    """A backward pass that fails on its way; half of a step's gradients are nobody's."""

    def fail(*_: Any) -> None:
        raise Broken

    loss = side(**batch_of(draw)).loss
    chosen = [p for p in side.trainable.values() if p.requires_grad]
    if not loss.requires_grad or not chosen:
        return None
    handle = draw.choice(chosen).register_hook(fail)
    try:
        side.backward(loss)
    finally:
        handle.remove()
        side.optimizer.zero_grad()
