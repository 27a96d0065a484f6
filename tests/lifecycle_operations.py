"""What users do in the lives of `lifecycle_of_parameters`: each of `OPERATIONS` does it on both sides."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload_rt.errors import ConfigError, OffloadError
from offload_rt.optimizer.log_commit import is_log
from offload_rt.plans.plan_check import check_plan
from offload_rt.plans.plan_options import with_options
from planners.rule.streaming import plan_streaming
from tests.changing_plans import propose
from tests.full_parity import training_of
from tests.lifecycle import Refused, same
from tests.lifecycle_of_parameters import Killed, Life, Root
from tests.lifecycle_twin import draw_place, embedding, layer_names


class Boom(Exception):
    """Of a user's own."""


def between(life: Life, where: str) -> None:
    """Something that a loop does besides, at `where` of a step: "micro-batches", "step" (before it), "after" it."""
    draw = life.draw
    if draw.random() > 0.35:
        return
    name = draw.choice(BETWEEN[where])
    life.history.append(f"    {where}: {name}")
    life.fired[f"{where}: {name}"] += 1
    BESIDES[name](life)


def train(life: Life) -> None:
    draw = life.draw
    num = life.of.accumulation
    if draw.random() < 0.1:
        num = draw.randrange(1, 4)
    number = draw.randrange(1000)
    factor = draw.choice((1.0, 1.0, 1.0, 100.0, 0.01))
    ahead = draw.random() < 0.15
    forwards = []
    for part in range(num):
        losses = life.forward(10 * number + part)
        forwards.append((losses[0] * factor, losses[1] * factor))
        if not ahead:
            between(life, "forward")
            life.backward(forwards.pop())
            between(life, "micro-batches")
    for losses in forwards:
        life.backward(losses)
        if draw.random() < 0.2:
            life.fired["zero between backward passes"] += 1
            zero(life)
    del forwards
    between(life, "step")
    stop = not any(p.grad is not None for p in life.twin.masters.values())
    if stop and life.is_full:
        life.fired["step without gradients"] += 1
        life._expect(OffloadError, life.engine.step)
        life.finish()
        raise Refused("no gradients")
    taken = life.step()
    life.counted.number += 1
    life.twin.counted.number += 1
    between(life, "after")
    if life.of.scheduled and life.twin.step_number:
        life.scheduler.step()
        life.twin.scheduler.step()
    if not taken:
        life.fired["a step was left out"] += 1


def train_batch(life: Life) -> None:
    number = life.draw.randrange(1000)
    batches = [life._batch(10 * number + part) for part in range(life.of.accumulation)]
    before = life.engine.step_number

    def on_twin() -> float:
        total = 0.0
        for each in batches:
            life.finish()
            loss = life.twin(**each).loss / len(batches)
            total += float(loss.detach())
            life.twin.backward(loss)
        life.finish()
        if life.twin.step():
            life.stepped()
        return total

    life.both("train_batch", lambda: life.engine.train_batch(batches), on_twin)
    if life.of.scheduled and life.twin.step_number > before:
        life.scheduler.step()
        life.twin.scheduler.step()


def evaluate(life: Life) -> None:
    arguments = life._batch(life.draw.randrange(1000))
    as_training = life.draw.random() < 0.3
    mode = life.draw.choice((torch.no_grad, torch.inference_mode))
    if life.draw.random() < 0.5:
        arguments.pop("labels", None)

    def result(out: Any) -> Any:
        return getattr(out, "loss", None) if getattr(out, "loss", None) is not None else out.logits

    def on(side: Any, model: nn.Module) -> Any:
        model.train(as_training)
        with mode():
            found = result(side(**arguments)).clone()
        model.train()
        return found

    def on_twin() -> Any:
        life.finish()
        return on(life.twin, life.twin.model)

    life.both("evaluate", lambda: on(life.engine, life.engine.model), on_twin)


def generate(life: Life) -> None:
    if life.of.model.startswith("tiny"):
        return
    ids = life._batch(life.draw.randrange(1000))["input_ids"][:, :4]
    settings = {"max_new_tokens": 3, "do_sample": life.draw.random() < 0.5, "eos_token_id": None, "pad_token_id": 0}
    settings["attention_mask"] = torch.ones_like(ids)

    def on(model: Any) -> Tensor:
        model.eval()
        found = model.generate(ids, **settings)
        model.train()
        return found

    def on_twin() -> Tensor:
        life.finish()
        return on(life.twin.model)

    life.both("generate", lambda: on(life.engine.model), on_twin)


def dropped(life: Life) -> None:
    """A forward whose loss nobody wants."""
    losses = life.forward(life.draw.randrange(1000))
    del losses


def failing(life: Life) -> None:
    """A forward that somebody's hook ends, or a backward pass."""
    layer = life.draw.randrange(3)
    name = layer_names(life.of)[layer]
    in_backward = life.draw.random() < 0.5
    number = life.draw.randrange(1000)

    def boom(*_: Any) -> None:
        raise Boom

    def on(side: Any, model: nn.Module) -> None:
        module = model.get_submodule(name)
        if in_backward:
            loss = side(**life._batch(number)).loss
            side_boom = _Exploding.apply(loss)
            with suppress(Boom):
                side.backward(side_boom)
            return
        handle = module.register_forward_pre_hook(boom)
        with suppress(Boom):
            side(**life._batch(number))
        handle.remove()

    def on_twin() -> None:
        life.finish()
        on(life.twin, life.twin.model)

    life.both("failing", lambda: on(life.engine, life.engine.model), on_twin)


class _Exploding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise Boom


def not_finite(life: Life) -> None:
    """A loss, or gradients alone, that are not finite; the loop goes on."""
    if not life.is_full or life.twin.num_skipped >= 3:
        return
    losses = life.forward(life.draw.randrange(1000))
    if life.draw.random() < 0.3:
        life.backward((losses[0] * float("inf"), losses[1] * float("inf")))
        raise AssertionError("a loss that is not finite was taken")
    for _ in range(life.of.accumulation - 1):
        life.backward(losses)
        losses = life.forward(life.draw.randrange(1000))
    life.backward((losses[0] + (losses[0] * 0).sqrt(), losses[1] + (losses[1] * 0).sqrt()))
    between(life, "step")
    if any(p.grad is not None for p in life.twin.masters.values()):
        life.step()
    if life.of.scheduled and life.twin.step_number and life.draw.random() < 0.5:
        life.scheduler.step()
        life.twin.scheduler.step()


def zero(life: Life) -> None:
    if life.draw.random() < 0.5:
        life.engine.optimizer.zero_grad()
    else:
        life.engine.model.zero_grad()
    life.twin.zero_grad()


def sensitivity(life: Life) -> None:
    """The gradient of an activation, and of nothing else."""
    number = life.draw.randrange(1000)

    def on(side: Any, model: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handle = embedding(model).register_forward_hook(lambda module, args, output: seen.append(output))
        loss = side(**life._batch(number)).loss
        handle.remove()
        if not seen[-1].requires_grad:
            return loss
        return torch.autograd.grad(loss, seen[-1])[0]

    def on_twin() -> Tensor:
        life.finish()
        return on(life.twin, life.twin.model)

    life.both("sensitivity", lambda: on(life.engine, life.engine.model), on_twin)


def rates(life: Life) -> None:
    group = life.draw.randrange(len(life.twin.optimizer.param_groups))
    lr = life.draw.choice((1e-3, 5e-3, 2e-2))
    decay = life.draw.choice((None, 0.0, 0.05))
    for optimizer in (life.engine.optimizer, life.twin.optimizer):
        optimizer.param_groups[group]["lr"] = lr
        if decay is not None and "weight_decay" in optimizer.param_groups[group]:
            optimizer.param_groups[group]["weight_decay"] = decay


def look_at_gradients(life: Life) -> None:
    life.both(
        "gradients", lambda: {n: g.float().clone() for n, g in life.engine.gradients()}, life.twin.gradients
    )  # fmt: skip


def clip(life: Life) -> None:
    """By hand: refused where it comes too late."""
    if life.of.max_grad_norm is not None or not any(p.grad is not None for p in life.twin.masters.values()):
        return
    norm = life.draw.choice((0.1, 1e5))
    life.both("clip", lambda: life.engine.clip_grad_norm_(norm), lambda: life.twin.clip_grad_norm_(norm))


def look(life: Life) -> None:
    """What only reads."""
    engine = life.engine
    for does in (
        engine.report, engine.summary, lambda: engine.plan, lambda: dict(engine.model.state_dict()),
        engine.optimizer.state_dict, lambda: engine.committed,
    ):  # fmt: skip
        does()


def state_dicts(life: Life) -> None:
    """A trainer takes the optimizer's state_dict, and gives it back."""
    if not life.is_full:
        return
    optimizer = life.engine.optimizer
    life.both("state_dict", lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())), lambda: None)


def save(life: Life) -> None:
    folder = life.folder / f"checkpoint-{next(life.numbers)}"
    in_place = life.root is not None and life.is_full and life.draw.random() < 0.3
    if in_place:
        folder = life.engine.commit_folder

    def on_twin() -> None:
        life.finish()
        saved = life.twin.saved()
        if life.has_log:
            life.root.committed, life.due, life.can_go_back = saved, None, True
        if not in_place:
            life.checkpoints.append((folder, saved))

    life.both("save", lambda: life.engine.save_checkpoint(folder), on_twin)


def load(life: Life) -> None:
    """A checkpoint, this run's commit, or another drive's."""
    commits = [
        root for root in life.roots if root.committed is not None and root.committed.step and life.is_full
        and root is not life.root and len(root.folders) == 1
    ]  # fmt: skip
    own = life.root is not None and life.root.committed is not None and life.root.committed.step and life.is_full
    kind = life.draw.random()
    if own and kind < 0.4:
        life.finish()
        life.engine.load_checkpoint(life.engine.commit_folder)
        life._restored(life.root.committed)
        return
    if commits and kind < 0.6:
        root = life.draw.choice(commits)
        folder, saved = _log_in(root.folders[0]), root.committed
    elif life.checkpoints:
        folder, saved = life.draw.choice(life.checkpoints)
    else:
        return
    life.both("load", lambda: life.engine.load_checkpoint(folder), lambda: torch.set_rng_state(saved.rng))
    life.finish()
    life._restored(saved, from_commit=False)


def _log_in(folder: Path) -> Path:
    """The folder in which a run on `folder` has committed."""
    return next(each for each in sorted(folder.iterdir()) if each.is_dir() and is_log(each))


def export(life: Life) -> None:
    """`save_pretrained`, read by transformers."""
    if life.of.model.startswith("tiny"):
        return
    folder = life.folder / f"model-{next(life.numbers)}"
    life.both("save_pretrained", lambda: life.engine.save_pretrained(folder), life.finish)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=life.of.dtype)
    same("save_pretrained", loaded.state_dict(), life.twin.model.state_dict())
    shutil.rmtree(folder)


def kill(life: Life) -> None:
    """What is on the drives is all that is left."""
    if life.root is None or not life.has_log:
        return
    number = next(life.numbers)
    folders = [life.folder / f"nvme-{number}-{i}" for i in range(len(life.root.folders))]
    if len(folders) > 1:
        return  # a log says where its other drives are
    for old, new in zip(life.root.folders, folders, strict=True):
        shutil.copytree(old, new)
    life.killed_root = Root(folders, life.root.committed)
    life.roots.append(life.killed_root)
    raise Killed


def close_and_reopen(life: Life) -> None:
    saved = life.twin.saved()
    root = life.root
    kept = life.draw.random() < 0.5
    folder = life.folder / f"checkpoint-{next(life.numbers)}"
    if kept or root is None:
        life.both("save", lambda: life.engine.save_checkpoint(folder), life.finish)
        if life.has_log:
            life.root.committed, life.due = saved, None
        life.checkpoints.append((folder, saved))
    life.close()
    if kept or root is None:
        life.open()
        life.engine.load_checkpoint(folder)
        torch.set_rng_state(saved.rng)
        life._restored(saved, from_commit=False)
    else:
        life.open(root=root)


def freeze(life: Life) -> None:
    """Some parameters are switched off, or on again."""
    if not life.is_full:
        return
    layer = life.draw.choice(layer_names(life.of))
    names = [name for name in life.twin.weights if name.startswith(f"{layer}.")]
    if life.draw.random() < 0.3:
        names = names[: life.draw.randrange(len(names) + 1)]
    on = life.draw.random() < 0.5
    left = set(life.twin.weights) - (set() if on else life.off | set(names))
    if not left:
        return
    of_engine = dict(life.engine.model.named_parameters())
    for name in names:
        of_engine[name].requires_grad_(on)
        life.twin.weights[name].requires_grad_(on)
    life.off = life.off - set(names) if on else life.off | set(names)


def change_plan(life: Life) -> None:
    """At the end of a step another plan is found better: the change is behind the commit of that step."""
    if not life.is_full or "device_memory" in life.place or life.place.get("host_memory", "64MiB") != "64MiB":
        return  # nobody has looked whether it fits
    made_of = life.engine._runtime.made_of
    options = draw_place(life.draw, life.of, life.root.folders if life.root is not None else ())["options"]
    try:
        plan = plan_streaming(made_of.problem, rest=options.rest)
        plan = with_options(plan, made_of.workload, options, made_of.problem.training)
        check_plan(plan, made_of.problem, made_of.workload)
    except (OffloadError, ValueError):
        return
    if plan.layer_major and life.of.dropout:
        return  # a cut
    for part in range(life.of.accumulation):
        life.backward(life.forward(part))
    if life.step():
        propose(life.engine, plan)
        if life.has_log and life.due is None:
            life.due = life.twin.saved()
        life.fired["plan proposed"] += 1


def traced(life: Life) -> None:
    with suppress(ConfigError):
        life.engine.trace(life.folder / f"trace-{next(life.numbers)}.json", steps=1, wait=0, on_ready=lambda text: None)


def swap(life: Life) -> None:
    """Weights that are in memory are others for an evaluation, and what they were again."""
    if not life.is_full:
        return
    training = training_of(life.engine)
    shown = [
        each.parameter for block in training.blocks for each in block.parameters
        if training.home.shows(block, each) and training.home.landing is None
    ]  # fmt: skip
    before = [p.detach().clone() for p in shown]
    with torch.no_grad():
        for p in shown:
            p.mul_(0.5)
        if life.draw.random() < 0.5:
            life.engine(**life._batch(1))
            life.finish()
        for p, value in zip(shown, before, strict=True):
            p.copy_(value)


def no_step(life: Life) -> None:
    """A step without a backward pass is refused."""
    if life.is_full:  # torch's own takes one that changes nothing
        life._expect(OffloadError, life.engine.step)
        life.finish()


BESIDES: dict[str, Callable[[Life], None]] = {
    "evaluate": evaluate, "generate": generate, "dropped": dropped, "zero": zero, "rates": rates,
    "gradients": look_at_gradients, "clip": clip, "look": look, "save": save, "load": load, "export": export,
    "kill": kill, "state_dicts": state_dicts, "traced": traced, "swap": swap,
    "sensitivity": sensitivity,
}  # fmt: skip
BETWEEN = {
    "forward": ("evaluate", "generate", "look", "save", "rates", "kill", "gradients", "dropped", "export"),
    "micro-batches": ("evaluate", "generate", "zero", "rates", "gradients", "look", "save", "kill", "dropped",
                      "sensitivity"),
    "step": ("evaluate", "zero", "rates", "gradients", "gradients", "clip", "look", "save", "load", "export", "kill",
             "state_dicts", "dropped"),
    "after": ("evaluate", "generate", "rates", "look", "save", "load", "export", "kill", "state_dicts", "swap",
              "gradients", "traced", "dropped", "sensitivity"),
}  # fmt: skip
OPERATIONS: dict[str, Callable[[Life], None]] = {
    "train": train, "train_batch": train_batch, "failing": failing, "not finite": not_finite,
    "close and reopen": close_and_reopen, "freeze": freeze, "change of plans": change_plan, "no step": no_step,
    **BESIDES,
}  # fmt: skip
WEIGHTS = {
    "train": 12, "train_batch": 3, "failing": 1.5, "not finite": 1.5, "close and reopen": 1.5, "freeze": 0.6,
    "change of plans": 2, "no step": 0.3, "clip": 0, "zero": 0.2, "save": 1, "load": 1.5, "kill": 1, "rates": 1,
    "evaluate": 1, "generate": 0.7, "export": 0.5, "look": 0.3, "dropped": 0.7, "gradients": 0.1, "traced": 0.3,
    "sensitivity": 0.5, "swap": 0.4, "state_dicts": 0.4,
}  # fmt: skip


def program_of(seed: int, length: int = 16) -> list[tuple[str, int]]:
    draw = random.Random(f"program {seed}")
    names = draw.choices(list(WEIGHTS), weights=list(WEIGHTS.values()), k=length)
    return [(name, draw.randrange(1 << 30)) for name in names]
