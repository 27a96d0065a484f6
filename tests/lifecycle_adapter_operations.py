"""What users do besides in the lives of `lifecycle_of_adapters`, and the programs that are made of all of it."""

from __future__ import annotations

import copy
import random
from typing import Any

import peft
import torch
from safetensors.torch import load_file

from tests import lifecycle_adapter_steps as steps
from tests.lifecycle import Program
from tests.lifecycle_adapter_setting import batch_of, draw_place, setting_of
from tests.lifecycle_adapter_steps import loss_of
from tests.lifecycle_adapter_twin import Operation, Side, Twin


def evaluate(side: Side, draw: random.Random) -> Any:
    mode = draw.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
    was = side.model.training
    changes_mode, labels = draw.random() < 0.8, draw.random() < 0.5
    hidden = {"output_hidden_states": True} if draw.random() < 0.2 else {}
    batch = batch_of(draw, rows=draw.choice([1, 2]), tokens=draw.choice([4, 7, 12, 16]), labels=labels)
    if changes_mode:
        side.model.eval()
    try:
        with mode():
            output = side(**batch, **hidden)
    finally:
        if changes_mode:
            side.model.train(was)
    found = {"loss": output.loss} if labels else {"logits": output.logits}
    if hidden:
        found |= {f"hidden {index}": value for index, value in enumerate(output.hidden_states)}
    return {key: value.detach().clone() for key, value in found.items()}


def generate(side: Side, draw: random.Random) -> Any:
    was = side.model.training
    if draw.random() < 0.7 or side.is_checkpointing:
        side.model.eval()
    ids = batch_of(draw, rows=draw.choice([1, 2]), tokens=6)["input_ids"]
    options: dict[str, Any] = {"do_sample": True} if draw.random() < 0.4 else {"do_sample": False}
    if draw.random() < 0.2:
        options["num_beams"] = 2
    with torch.no_grad():
        side.called()
    try:
        found = side.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0, **options
        )
    finally:
        side.model.train(was)
    return {"ids": found}


def without_adapters(side: Side, draw: random.Random) -> Any:
    mode = draw.choice([torch.no_grad, torch.enable_grad])
    with mode(), side.model.disable_adapter():
        loss = loss_of(side, draw)
    return {"loss": loss.detach().clone()}


def adapters_off(side: Side, draw: random.Random) -> Any:
    side.model.base_model.disable_adapter_layers()
    side.is_off = True


def adapters_on(side: Side, draw: random.Random) -> Any:
    side.model.base_model.enable_adapter_layers()
    side.is_off = False


def add_adapter(side: Side, draw: random.Random) -> Any:
    if "added" in side.model.peft_config:
        side.model.delete_adapter("added")
        return None
    targets = side.model.peft_config["default"].target_modules
    side.model.add_adapter("added", peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def other_adapter(side: Side, draw: random.Random) -> Any:
    names = [name for name in side.model.peft_config if name != "default"]
    if not names:
        return None
    name, number = draw.choice(names), draw.randrange(1000)
    mode = draw.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
    side.model.set_adapter(name)
    try:
        with mode():
            loss = loss_of(side, random.Random(number))
    finally:
        side.model.set_adapter("default")
    return {"loss": loss.detach().clone()}


def write(side: Side, draw: random.Random) -> Any:
    names = draw.sample(list(side.trainable), 2)
    with torch.no_grad():
        for name in names:
            parameter = side.trainable[name]
            how = draw.randrange(3)
            if how == 0:
                parameter.mul_(0.9)
            elif how == 1:
                parameter.copy_(parameter * 1.1)
            elif not side.losses:  # whose backward would not see it
                parameter.data = parameter.data * 0.8


def average(side: Side, draw: random.Random) -> Any:
    """Other weights while something is evaluated."""
    how, number = draw.randrange(3), draw.randrange(1000)
    before = {name: p.detach().clone() for name, p in side.trainable.items()}
    kept = {name: p.data for name, p in side.trainable.items()}
    with torch.no_grad():
        for p in side.trainable.values():
            if how == 0:
                p.copy_(p * 0.5)
            elif how == 1:
                p.data.copy_(p * 0.5)
            else:
                p.data = p.data * 0.5
    try:
        return evaluate(side, random.Random(number))
    finally:
        with torch.no_grad():
            for name, p in side.trainable.items():
                if how == 0:
                    p.copy_(before[name])
                elif how == 1:
                    p.data.copy_(before[name])
                else:
                    p.data = kept[name]


def state_dict(side: Side, draw: random.Random) -> Any:
    if draw.random() < 0.5:
        return {n: v.clone() for n, v in side.model.state_dict().items() if "lora_" in n and ".default" in n}
    return {n: v.clone() for n, v in peft.get_peft_model_state_dict(side.model, save_embedding_layers=False).items()}


def load_state_dict(side: Side, draw: random.Random) -> Any:
    if draw.random() < 0.5:
        values = {n: v * 0.9 for n, v in side.model.state_dict().items() if "lora_" in n and ".default" in n}
        side.model.load_state_dict(values, strict=False)
    else:
        values = peft.get_peft_model_state_dict(side.model, save_embedding_layers=False)
        peft.set_peft_model_state_dict(side.model, {n: v * 0.9 for n, v in values.items()})


def reload_optimizer(side: Side, draw: random.Random) -> Any:
    side.optimizer.load_state_dict(copy.deepcopy(side.optimizer.state_dict()))
    side.reloaded()


def save(side: Side, draw: random.Random) -> Any:
    side.save(side.num_saved)
    side.num_saved += 1


def load(side: Side, draw: random.Random) -> Any:
    if side.num_saved:
        side.load(draw.randrange(side.num_saved))


def reopen(side: Side, draw: random.Random) -> Any:
    place = draw_place(draw)
    if side.num_saved:
        side.reopen(place, draw.randrange(side.num_saved))


def resume(side: Side, draw: random.Random) -> Any:
    """From what was committed last. A life does so where there is something."""
    side.reopen(side.place, None)


def save_pretrained(side: Side, draw: random.Random) -> Any:
    folder = side.folder / f"{type(side).__name__} adapter"
    side.save_pretrained(folder)
    found: dict[str, Any] = dict(load_file(folder / "adapter_model.safetensors"))
    return found


def look(side: Side, draw: random.Random) -> Any:
    side.look(draw.randrange(6))


def change_plan(side: Side, draw: random.Random) -> Any:
    side.change_plan(draw.randrange(6))


def mode(side: Side, draw: random.Random) -> Any:
    side.model.train(draw.random() < 0.7)


def checkpointing(side: Side, draw: random.Random) -> Any:
    side.is_checkpointing = draw.random() < 0.6
    if isinstance(side, Twin):  # it would run layers again itself, in whatever mode they are
        return
    if side.is_checkpointing:
        side.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        side.model.gradient_checkpointing_disable()


STEPS: dict[str, Operation] = {
    "forward": steps.forward, "backward": steps.backward, "backward_of_sum": steps.backward_of_sum,
    "backward_twice": steps.backward_twice, "gradients_of": steps.gradients_of, "step": steps.step,
    "step_by_optimizer": steps.step_by_optimizer, "step_by_closure": steps.step_by_closure,
    "schedule": steps.schedule, "train_batch": steps.train_batch, "zero_grad": steps.zero_grad,
    "options": steps.options, "freeze": steps.freeze, "edit_gradient": steps.edit_gradient, "hook": steps.hook,
    "clip": steps.clip, "gradients": steps.gradients, "drop": steps.drop, "bad": steps.bad,
    "bad_backward": steps.bad_backward,
}  # fmt: skip
BESIDES: dict[str, Operation] = {
    "evaluate": evaluate, "generate": generate, "without_adapters": without_adapters, "adapters_off": adapters_off,
    "adapters_on": adapters_on, "add_adapter": add_adapter, "other_adapter": other_adapter, "write": write,
    "average": average, "state_dict": state_dict, "load_state_dict": load_state_dict,
    "reload_optimizer": reload_optimizer, "save": save, "load": load, "reopen": reopen, "resume": resume,
    "save_pretrained": save_pretrained, "look": look, "change_plan": change_plan, "mode": mode,
    "checkpointing": checkpointing,
}  # fmt: skip
OPERATIONS = {**STEPS, **BESIDES}
SELDOM = {"reopen": 0.5, "resume": 1.0, "generate": 0.5, "save_pretrained": 0.5, "change_plan": 1.5, "load": 1.0}


def program_of(seed: int, length: int = 30) -> Program:
    """Steps, and between any two of their parts what else users do."""
    draw, accumulation = random.Random(f"program {seed}"), setting_of(seed).accumulation
    names = [name for name in OPERATIONS if name not in ("forward", "backward", "step", "schedule")]
    chosen = draw.sample(names, draw.randrange(4, 14))  # others do not come: each program has a subject
    weights = [SELDOM.get(name, 1.0) for name in chosen]
    program: list[tuple[str, int]] = []

    def add(name: str) -> None:
        if name in ("load", "reopen") and all(before != "save" for before, _ in program):
            name = "save"
        program.append((name, draw.randrange(1 << 30)))

    def perhaps() -> None:
        while draw.random() < 0.35:
            add(*draw.choices(chosen, weights))

    while len(program) < length:
        perhaps()
        for _ in range(accumulation):
            add("forward")
            perhaps()
            add("backward")
            perhaps()
        add("step")
        perhaps()
        if draw.random() < 0.7:
            add("schedule")
    return program
