"""What the lives of `lifecycle_of_adapters` run on: models with adapters, optimizers, and where all of it rests."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.activations import Action, whole_batch
from planners.plans.plan import StatePlacement, Tier
from tests.adapter_tiers import IN_HOST, ON_NVME, OPTIMIZERS
from tests.conftest import VOCABULARY, build_lora

NUM_LAYERS, ROWS, TOKENS = 3, 2, 12
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama tied": {"family": "llama", "tie_word_embeddings": True},
    "gpt2": {"family": "gpt2"},
}
KEPT, AWAY = whole_batch(Action.KEEP), partial(whole_batch, Action.SWAP)
STREAMS: dict[str, dict[str, Any]] = {
    "in place": {},
    "filled": {"fill": True},
    "from HOST": {"host": True},
    "from NVMe": {"nvme": True},
    "one slot, inputs on NVMe": {
        "nvme": True, "options": {"layer_inputs": Tier.NVME, "num_slots": 1, "stream_edges": True},
    },
    "through HOST, inputs in HOST": {
        "nvme": True, "host": True, "options": {"layer_inputs": Tier.HOST, "num_slots": 2},
    },
    "kept and put away": {
        "nvme": True, "host": True, "activations": (KEPT, AWAY(Tier.NVME), AWAY(Tier.HOST)),
    },
    "some kept": {"nvme": True, "activations": (AWAY(Tier.NVME), None, KEPT)},
    "stress": {
        "nvme": True, "host": True,
        "options": {
            "layer_inputs": Tier.NVME, "num_slots": 2, "stream_edges": True, "poison": True, "placed_bytes": 160,
            "delay_seconds": 0.001,
        },
    },
    "layer-major": {"nvme": True, "options": {"layer_major": True}},
}  # fmt: skip
"""Where frozen weights and activations are."""
STATES: dict[str, dict[str, Any]] = {
    "in memory": {},
    "in HOST": {"host": True, "options": {"state": IN_HOST}},
    "on NVMe": {"nvme": True, "options": {"state": ON_NVME, "piece_elements": 1024}},
    "split": {
        "nvme": True, "host": True,
        "options": {
            "state": StatePlacement(in_memory={"adapters": 2}, gradients=Tier.HOST, state_slots=1),
            "piece_elements": 1024,
        },
    },
}  # fmt: skip
"""Where optimizer state is."""


@dataclass(frozen=True)
class Place:
    streams: str
    state: str
    committed: int | None
    """Steps between commits."""

    @property
    def in_tiers(self) -> bool:
        """Whether optimizer state is."""
        return self.state != "in memory"

    @property
    def has_log(self) -> bool:
        return self.in_tiers and (
            self.committed is not None or any(each.get("nvme") for each in (STREAMS[self.streams], STATES[self.state]))
        )

    @property
    def commits_every(self) -> int | None:
        """Steps between commits that are made."""
        return 1 if self.committed is None and self.state in ("on NVMe", "split") else self.committed

    def arguments(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Those of an engine for `model`."""
        both = [STREAMS[self.streams], STATES[self.state]]
        options: dict[str, Any] = {"fill": False, "replan": False}
        for each in both:
            options |= each.get("options", {}) | ({"fill": True} if each.get("fill") else {})
        activations = STREAMS[self.streams].get("activations")
        if activations is not None:
            stack = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
            options["activations"] = {f"{stack}.{i}": policy for i, policy in enumerate(activations) if policy}
        given: dict[str, Any] = {"options": RuntimeOptions(**options)}
        if any(each.get("host") for each in both):
            given["host_memory"] = "64MiB"
        if self.committed or any(each.get("nvme") for each in both):
            folder.mkdir(exist_ok=True)
            given["nvme"] = folder
        if self.committed:
            given["commit_every"] = self.committed
        return given


@dataclass(frozen=True)
class Setting:
    """What a program runs on."""

    model: str
    weights: str
    dropout: float
    dora: bool
    second: bool
    """Whether there is another adapter from the start, which does not train."""
    optimizer: str
    grouped: bool
    accumulation: int
    max_grad_norm: float | None
    place: Place


def draw_place(draw: random.Random) -> Place:
    return Place(draw.choice(list(STREAMS)), draw.choice(list(STATES)), draw.choice([None, 1, 2]))


def setting_of(seed: int) -> Setting:
    draw = random.Random(f"adapters {seed}")
    return Setting(
        model=draw.choice(list(MODELS)), weights=draw.choice(["fp32", "bf16", "nf4"]), dropout=draw.choice([0.0, 0.1]),
        dora=draw.random() < 0.1, second=draw.random() < 0.2,
        optimizer=draw.choice(list(OPTIMIZERS)), grouped=draw.random() < 0.3, accumulation=draw.choice([1, 1, 2]),
        max_grad_norm=draw.choice([None, 0.05]), place=draw_place(draw),
    )  # fmt: skip


def build(setting: Setting) -> nn.Module:
    """The model of a setting, equal at every call."""
    given = dict(MODELS[setting.model])
    dtype = torch.float32 if setting.weights == "fp32" else torch.bfloat16
    model = build_lora(given.pop("family"), dtype, NUM_LAYERS, setting.dropout, **given)
    if setting.dora:
        base = model.unload()
        config = replace(model.peft_config["default"], use_dora=True)
        torch.manual_seed(1)
        model = peft.get_peft_model(base, config)
    if setting.second:
        torch.manual_seed(2)
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=model.peft_config["default"].target_modules))
    model.config.use_cache = False  # in plain training a cache copies keys and values, which has other bits
    return model.train()


def make_optimizer(setting: Setting, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups: Any = parameters
    if setting.grouped:
        groups = [{"params": parameters[::2], "weight_decay": 0.2}, {"params": parameters[1::2], "lr": 3e-3}]
    return OPTIMIZERS[setting.optimizer](groups)


def batch_of(draw: random.Random, *, rows: int = ROWS, tokens: int = TOKENS, labels: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(draw.randrange(10**6))
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, tokens - draw.randrange(tokens // 3) :] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    return {**found, "labels": ids.masked_fill(mask == 0, -100)} if labels else found


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))
