"""What the lives of `lifecycle_of_parameters` are made of: configurations, models, places, and the plain twin."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload_rt import optim
from offload_rt.config import EngineConfig
from offload_rt.wiring.runtime_options import RuntimeOptions
from offload_rt.wiring.workload import find_workload
from planners.plans.activations import Action, ActivationPolicy, whole_batch
from planners.plans.placement import UpdateMode
from planners.plans.plan import StatePlacement, Tier
from tests.lifecycle import Counted, options_of, scheduled
from tests.tiny_training import Model

VOCABULARY, WIDTH, ROWS, TOKENS = 32, 16, 2, 8

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "adamw of ours": lambda groups: optim.AdamW(groups, lr=1e-2),
    "adamw bf16": lambda groups: optim.AdamW(groups, lr=1e-2, moments="bfloat16"),
    "adamw 8bit": lambda groups: optim.AdamW(groups, lr=1e-2, moments="8bit"),
    "lion": lambda groups: optim.Lion(groups, lr=1e-3, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, dampening=0.1),
    "plain sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=1e-3),
}
MODELS = ("tiny", "tiny tied", "llama", "llama tied", "gpt2")
TRAINS = ("all", "all", "all", "not the embedding", "not the first layer", "not a layer between", "some of a layer",
          "norms and head", "last layer")  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """What stays the same as long as a run lives."""

    model: str
    dtype: torch.dtype
    trains: str
    dropout: float
    optimizer: str
    grouped: bool
    scheduled: bool
    accumulation: int
    max_grad_norm: float | None
    commit_every: int | None
    piece_elements: int

    @staticmethod
    def draw(draw: random.Random) -> Configuration:
        drawn = Configuration(
            model=draw.choice(MODELS),
            dtype=draw.choice((torch.bfloat16, torch.float32)),
            trains=draw.choice(TRAINS),
            dropout=draw.choice((0.0, 0.2)),
            optimizer=draw.choice(list(OPTIMIZERS)),
            grouped=draw.random() < 0.4,
            scheduled=draw.random() < 0.6,
            accumulation=draw.choice((1, 1, 2, 3)),
            max_grad_norm=draw.choice((None, None, 1e6, 2.0, 0.05)),
            commit_every=draw.choice((None, None, None, 1, 2, 3)),
            piece_elements=draw.choice((300, 600, 2000)),
        )
        if drawn.trains == "norms and head" and drawn.optimizer in ("adamw of ours", "adamw bf16", "adamw 8bit"):
            return replace(drawn, optimizer="adamw")  # which step float32 alone where there are no masters
        return drawn


def build(of: Configuration) -> nn.Module:
    """Equal at every call, and no random number is drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = _MODELS[of.model](of)
    made = made.to(of.dtype).train().requires_grad_(True)
    layers = next(m for m in made.modules() if isinstance(m, nn.ModuleList))
    if of.trains == "not the embedding":
        embedding(made).weight.requires_grad_(False)
    elif of.trains == "not the first layer":
        layers[0].requires_grad_(False)
    elif of.trains == "not a layer between":
        layers[1].requires_grad_(False)
    elif of.trains == "some of a layer":
        for name, parameter in layers.named_parameters():
            if "norm" in name or "bias" in name or "ln_" in name:
                parameter.requires_grad_(False)
    elif of.trains == "norms and head":
        for name, parameter in layers.named_parameters():
            parameter.requires_grad_("norm" in name or "ln_" in name)
    elif of.trains == "last layer":
        made.requires_grad_(False)
        layers[-1].requires_grad_(True)
    return made


def embedding(model: nn.Module) -> nn.Embedding:
    return next(m for m in model.modules() if isinstance(m, nn.Embedding))


def _tiny(of: Configuration) -> nn.Module:
    return Model(3, tied="tied" in of.model, dropout=of.dropout)


def _llama(of: Configuration) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings="tied" in of.model,
            attention_dropout=of.dropout, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=32,
        )
    )  # fmt: skip


def _gpt2(of: Configuration) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=3, n_head=2, n_positions=32, resid_pdrop=of.dropout,
            embd_pdrop=of.dropout, attn_pdrop=of.dropout, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


_MODELS: dict[str, Callable[[Configuration], nn.Module]] = {
    "tiny": _tiny, "tiny tied": _tiny, "llama": _llama, "llama tied": _llama, "gpt2": _gpt2,
}  # fmt: skip


def batch(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"input_ids": torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=generator)}


def groups_of(of: Configuration, parameters: Sequence[nn.Parameter]) -> Any:
    if not of.grouped:
        return list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.2},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr": 3e-3},
    ]


@dataclass(frozen=True)
class Saved:
    """What a run is after a step, of the twin."""

    step: int
    masters: dict[str, Tensor]
    state: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None
    counted: int
    rng: Tensor


class Twin:
    """The same in plain PyTorch, and what an engine has committed."""

    def __init__(self, of: Configuration) -> None:
        self.of = of
        self.model = build(of)
        self.weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.has_masters = of.trains != "norms and head"
        self.masters = dict(self.weights)
        if self.has_masters:
            self.masters = {n: nn.Parameter(p.detach().float().clone()) for n, p in self.weights.items()}
        self.optimizer = OPTIMIZERS[of.optimizer](groups_of(of, list(self.masters.values())))
        self.scheduler = scheduled(self.optimizer) if of.scheduled else None
        self.counted = Counted()
        self.step_number = self.num_skipped = 0
        self.begun = self.saved()

    def __call__(self, **arguments: Any) -> Any:
        if not self.of.model.startswith("tiny") and torch.is_grad_enabled():
            arguments = {**arguments, "use_cache": False}  # as the engine: keys lie otherwise in memory with one
        return self.model(**arguments)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self.take_gradients()

    def take_gradients(self) -> None:
        for name, weight in self.weights.items():
            if self.has_masters and weight.grad is not None:
                master, gradient = self.masters[name], weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                weight.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {n: p.grad.float().clone() for n, p in self.masters.items() if p.grad is not None}

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(list(self.masters.values()), max_norm)

    def step(self) -> bool:
        """Whether it was taken: not where a gradient is not finite."""
        if self.of.max_grad_norm is not None:
            self.clip_grad_norm_(self.of.max_grad_norm)
        finite = all(bool(p.grad.isfinite().all()) for p in self.masters.values() if p.grad is not None)
        if finite:
            self.optimizer.step()
            self.step_number += 1
            self._round()
        self.num_skipped = 0 if finite else self.num_skipped + 1
        self.zero_grad()
        return finite

    def zero_grad(self) -> None:
        for parameter in (*self.masters.values(), *self.weights.values()):
            parameter.grad = None

    def _round(self) -> None:
        if self.has_masters:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(self.masters[name])

    def saved(self) -> Saved:
        return Saved(
            step=self.step_number,
            masters={n: p.detach().clone() for n, p in self.masters.items()},
            state={n: copy.deepcopy(dict(self.optimizer.state.get(p, {}))) for n, p in self.masters.items()},
            groups=self.options(),
            scheduler=self.of_scheduler(),
            counted=self.counted.number,
            rng=torch.get_rng_state(),
        )

    def options(self) -> list[dict[str, Any]]:
        return options_of(self.optimizer)

    def of_scheduler(self) -> dict[str, Any] | None:
        return None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict())

    def restore(self, saved: Saved) -> None:
        self.zero_grad()
        self.step_number, self.num_skipped = saved.step, 0
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(saved.masters[name])
        self.optimizer.state.clear()
        for name, state in saved.state.items():
            if state:
                self.optimizer.state[self.masters[name]] = copy.deepcopy(state)
        for group, options in zip(self.optimizer.param_groups, saved.groups, strict=True):
            group.update(copy.deepcopy(options))
        if self.scheduler is not None and saved.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(saved.scheduler))
        self.counted.number = saved.counted
        self._round()


def draw_place(draw: random.Random, of: Configuration, folders: Sequence[Path]) -> dict[str, Any]:
    """Arguments of an engine that say where all rests."""
    place: dict[str, Any] = {}
    if folders:
        place["nvme"] = list(folders) if len(folders) > 1 else folders[0]
    if draw.random() < 0.4:
        place["host_memory"] = draw.choice(("64MiB", "64MiB", f"{draw.randrange(60, 900)}KiB"))
    options: dict[str, Any] = {"piece_elements": of.piece_elements}
    if draw.random() < 0.3:
        place["device_memory"] = f"{draw.randrange(60, 1500)}KiB"
        place["options"] = RuntimeOptions(**options)
        return place
    options["fill"] = draw.random() < 0.3
    if draw.random() < 0.3:
        options["serial_updates"] = True
    if draw.random() < 0.2:
        options["poison"] = True
    if draw.random() < 0.15:
        options["delay_seconds"] = 0.001
    if draw.random() < 0.3:
        options["num_slots"] = draw.choice((1, 2))
    if draw.random() < 0.3 and of.accumulation > 1 and not of.dropout:
        options["layer_major"] = True
    rests = [Tier.HOST] * ("host_memory" in place) + [Tier.NVME] * (2 if folders else 0)
    if rests and draw.random() < 0.7:
        options["rest"] = draw.choice(rests)
    if folders and draw.random() < 0.7:
        options["state"] = draw_state(draw, of, options)
    if options.get("rest") is Tier.NVME and "host_memory" in place and draw.random() < 0.4:
        options["weight_shares"] = (draw.choice((0.0, 0.3)), draw.choice((0.0, 0.5)))
    if draw.random() < 0.3:
        modes = [UpdateMode.AFTER, UpdateMode.SPECULATIVE, UpdateMode.BACKWARD]
        options["update_mode"] = draw.choice(modes)
    if draw.random() < 0.6:
        options["activations"] = draw_activations(draw, of, bool(folders), "host_memory" in place)
    place["options"] = RuntimeOptions(**options)
    return place


def layer_names(of: Configuration) -> list[str]:
    model = build(of)
    stack, layers = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    return [f"{stack}.{index}" for index in range(len(layers))]


def draw_activations(draw: random.Random, of: Configuration, nvme: bool, host: bool) -> dict[str, ActivationPolicy]:
    ways = [None, whole_batch(Action.KEEP)]
    ways += [whole_batch(Action.SWAP, Tier.HOST)] * host + [whole_batch(Action.SWAP, Tier.NVME)] * nvme
    drawn = {name: draw.choice(ways) for name in layer_names(of)}
    return {name: way for name, way in drawn.items() if way is not None}


def draw_state(draw: random.Random, of: Configuration, options: Mapping[str, Any]) -> StatePlacement | None:
    model = build(of)
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[of.optimizer](groups_of(of, trains))
    draft = find_workload(
        model, None, EngineConfig(), optimizer, RuntimeOptions(piece_elements=of.piece_elements)
    ).training
    if draft is None or draft.adapters:
        return None
    share = draw.choice((0.0, 0.0, 0.5, 1.0))
    counts = {block.name: sum(draw.random() < share for _ in block.pieces) for block in draft.blocks}
    gradients = draw.choice((Tier.HOST, Tier.NVME))
    return StatePlacement(
        in_memory={name: count for name, count in counts.items() if count}, gradients=gradients,
        state_slots=draw.choice((1, 2, 4)), weight_slots=draw.choice((1, 2)),
        gradient_slots=draw.choice((1, 2)) if gradients is Tier.NVME else 0,
    )  # fmt: skip
