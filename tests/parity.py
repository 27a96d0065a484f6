"""What the parity gate compares: tiny models of every family, a plain run and an engine's run of the same steps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from offload_rt._engine import Engine
from offload_rt.layers.discover import find_blocks
from offload_rt.quantized import codec
from offload_rt.tensor_spec import Encoding
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import DecodeScope, Tier

VOCABULARY = 96
SEQ_LEN = 12
BATCH_SIZE = 2
STEPS = 3
FULL = pytest.mark.full


class PlainBlock(nn.Module):
    """A layer without attention, with a frozen linear, a norm and adapters written by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.adapter = nn.Linear(width, 4, bias=False)
        self.adapter_out = nn.Linear(4, width, bias=False)
        for module in (self.norm, self.up, self.down):
            module.requires_grad_(False)

    def forward(self, x_BTD: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        hidden = self.norm(x_BTD)
        dropped = nn.functional.dropout(self.down(torch.tanh(self.up(hidden))), 0.1, self.training)
        return x_BTD + scale * dropped + self.adapter_out(self.adapter(hidden))


class PlainModel(nn.Module):
    """A module that is not transformers', whose layers sit in a ModuleList."""

    def __init__(self, width: int = 64, num_layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width).requires_grad_(False)
        self.layers = nn.ModuleList([PlainBlock(width) for _ in range(num_layers)])
        self.head = nn.Linear(width, VOCABULARY, bias=False).requires_grad_(False)
        self.checkpointing = False

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: Any = None) -> Any:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            if self.checkpointing:
                hidden = torch.utils.checkpoint.checkpoint(layer, hidden, scale=0.5, use_reentrant=False)
            else:
                hidden = layer(hidden, scale=0.5)
        logits = self.head(hidden).float()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return type("Output", (), {"loss": loss, "logits": logits})()


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip


def _qwen() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=1, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=4, n_head=4, n_positions=32))


def _moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, moe_intermediate_size=64,
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
            decoder_sparse_step=1, tie_word_embeddings=False, head_dim=16,
        )
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "qwen": _qwen,
    "gpt2": _gpt2,
    "moe": _moe,
    "plain": PlainModel,
}
TARGETS: dict[str, Any] = {
    "llama": "all-linear",
    "qwen": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "moe": ["q_proj", "o_proj"],
}

PLACES: dict[str, dict[str, Any]] = {
    "in place": {},
    "from HOST": {"host_memory": "64MiB"},
    "from NVME": {"nvme": True},
    "NVME through HOST, inputs in HOST": {
        "nvme": True,
        "host_memory": "64MiB",
        "options": RuntimeOptions(layer_inputs=Tier.HOST, decode_scope=DecodeScope.LINEAR, record=True),
    },
    "NVME, one slot, edges stream, inputs on NVME": {
        "nvme": True,
        "options": RuntimeOptions(layer_inputs=Tier.NVME, num_slots=1, stream_edges=True, record=True),
    },
    "NVME, layers decoded whole": {
        "nvme": True,
        "options": RuntimeOptions(decode_scope=DecodeScope.LAYER, num_slots=2),
    },
    "stress": {
        "nvme": True,
        "host_memory": "64MiB",
        "options": RuntimeOptions(
            layer_inputs=Tier.NVME,
            num_slots=2,
            stream_edges=True,
            decode_scope=DecodeScope.LINEAR,
            record=True,
            poison=True,
            placed_bytes=160,
            delay_seconds=0.004,
        ),  # fmt: skip
    },
}


@dataclass(frozen=True)
class Case:
    """One cell of the gate's matrix."""

    family: str
    weights: str
    accumulation: int
    clipping: bool
    checkpointing: bool
    place: str

    def __str__(self) -> str:
        clip = "clip" if self.clipping else "noclip"
        checkpointing = "ckpt" if self.checkpointing else "nockpt"
        return f"{self.family}-{self.weights}-x{self.accumulation}-{clip}-{checkpointing}-{self.place}".replace(
            " ", "_"
        )


AXES: tuple[tuple[Any, ...], ...] = (
    tuple(FAMILIES),
    ("nf4", "bf16", "fp32"),
    (1, 3),
    (False, True),
    (False, True),
    tuple(PLACES),
)


def pairwise_cases() -> list[Case]:
    return [Case(*values) for values in covering(AXES, 2, dearest=AXES.index((1, 3)))]


def more_cases() -> list[Case]:
    """For the full run: every three values of three axes in one of the cells."""
    return [Case(*values) for values in covering(AXES, 3, dearest=AXES.index((1, 3)))]


def covering(axes: Sequence[Sequence[Any]], strength: int, *, dearest: int | None = None) -> list[list[Any]]:
    """A selection in which every combination of values of any `strength` axes occurs, the same at every call.

    By IPOG (Lei et al. 2007): all cells of the longest axes; then axis by axis, in each cell the value that adds most
    of what is missing, and a cell more for what none has. Where no combination asks for another, the axis of index
    `dearest` has its first value: the number of micro-batches, say, which is what a cell's time goes by.
    """
    order = sorted(range(len(axes)), key=lambda axis: -len(axes[axis]))
    lengths = [len(axes[axis]) for axis in order]
    cells: list[list[int | None]] = [list(one) for one in itertools.product(*map(range, lengths[:strength]))]
    for axis in range(strength, len(axes)):
        before = list(itertools.combinations(range(axis), strength - 1))
        missing = {
            (*zip(others, values, strict=True), (axis, value))
            for others in before
            for values in itertools.product(*(range(lengths[other]) for other in others))
            for value in range(lengths[axis])
        }
        for number, cell in enumerate(cells):
            known = [tuple((other, cell[other]) for other in others) for others in before]
            values = [(number + step) % lengths[axis] for step in range(lengths[axis])]  # by turns, where it is equal
            cell.append(max(values, key=lambda value: sum((*one, (axis, value)) in missing for one in known)))
            missing.difference_update((*one, (axis, cell[axis])) for one in known)
        for wanted in sorted(missing):
            fitting = (cell for cell in cells if all(cell[other] in (None, value) for other, value in wanted))
            cell = next(fitting, None)
            if cell is None:
                cell = [None] * (axis + 1)
                cells.append(cell)
            for other, value in wanted:
                cell[other] = value
    chosen = []
    for number, cell in enumerate(cells):
        values = [number % length if at is None else at for at, length in zip(cell, lengths, strict=True)]
        chosen.append([axes[axis][values[order.index(axis)]] for axis in range(len(axes))])
    return chosen if dearest is None else _cheaper(chosen, axes, strength, dearest)


def _cheaper(chosen: list[list[Any]], axes: Sequence[Sequence[Any]], strength: int, dearest: int) -> list[list[Any]]:
    """The same cells, with the first value of one axis wherever each combination that goes by it is in another cell."""

    def combinations(values: Sequence[Any]) -> set[tuple[tuple[int, Any], ...]]:
        return set(itertools.combinations(enumerate(values), strength))

    times = Counter(one for values in chosen for one in combinations(values))
    for values in chosen:
        cheaper = [*values[:dearest], axes[dearest][0], *values[dearest + 1 :]]
        lost = combinations(values) - combinations(cheaper)
        if all(times[one] > 1 for one in lost):
            times.subtract(lost)
            times.update(combinations(cheaper) - combinations(values))
            values[:] = cheaper
    return chosen


def in_turns(*axes: Iterable[Any]) -> list[Any]:
    """All cells of a few axes. Those that are not left to the full run have each value of the longest axis once, and
    those of the others by turns.
    """
    values = [list(axis) for axis in axes]
    kept = {tuple(turn % len(axis) for axis in values) for turn in range(max(map(len, values)))}
    return [
        pytest.param(*(axis[at] for axis, at in zip(values, cell, strict=True)), marks=() if cell in kept else FULL)
        for cell in itertools.product(*(range(len(axis)) for axis in values))
    ]


def in_pairs(first: Iterable[Any], second: Iterable[Any], third: Iterable[Any]) -> list[Any]:
    """All cells of three axes of two values or more. Every other one is left to the full run: of any two axes, those
    that stay have every pair of values.
    """
    cells = itertools.product(*map(enumerate, (first, second, third)))
    return [pytest.param(a, b, c, marks=FULL if (i + j + k) % 2 else ()) for (i, a), (j, b), (k, c) in cells]


def build(case: Case) -> nn.Module:
    """The model of a case, equal at every call."""
    torch.manual_seed(7)
    model = FAMILIES[case.family]()
    model = model.to(torch.float32 if case.weights == "fp32" else torch.bfloat16)
    if case.family != "plain":
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=0.1,
            target_modules=TARGETS[case.family],
            fan_in_fan_out=case.family == "gpt2",
        )
        model = get_peft_model(model, config)
        with torch.no_grad():  # so that lora_A gets a gradient at the first step too
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
    if case.checkpointing:
        if case.family == "plain":
            model.checkpointing = True
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def decode_in_place(model: nn.Module) -> None:
    """Puts into a plain model the weights that an engine with bits=4 computes with."""
    for draft in find_blocks(model, bits=4):
        for spec, stored in zip(draft.spec.tensors, draft.parameters, strict=True):
            weight = stored.parameter.data
            if spec.encoding is Encoding.NF4:
                weight.copy_(_round_trip(weight))
            elif spec.encoding is Encoding.NF4_TRANSPOSED:
                weight.copy_(_round_trip(weight.t().contiguous()).t())
            elif spec.encoding is Encoding.NF4_EXPERTS:
                for expert in weight:
                    expert.copy_(_round_trip(expert.contiguous()))


def _round_trip(weight: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(weight, backend="torch"), weight.shape, weight.dtype, backend="torch")


def micro_batch(step: int, index: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1000 * step + index)
    input_ids = torch.randint(0, VOCABULARY, (BATCH_SIZE, SEQ_LEN))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, SEQ_LEN - 1 - index :] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


Trace = dict[str, torch.Tensor]


def run_plain(case: Case) -> list[Trace]:
    """Losses, gradients and parameters of every step, in plain PyTorch."""
    model = build(case)
    if case.weights == "nf4":
        decode_in_place(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(trainable.values()), lr=1e-2)

    def update() -> None:
        if case.clipping:
            torch.nn.utils.clip_grad_norm_(list(trainable.values()), 0.05)
        optimizer.step()
        optimizer.zero_grad()

    return run_steps(case.accumulation, model, lambda loss: loss.backward(), trainable, update)


def engine_of(case: Case, **place: Any) -> Engine:
    """An engine for the model and the steps of `case`; `place` says on what, and where its weights rest."""
    return Engine(
        build(case), bits=4 if case.weights == "nf4" else None, batch_size=BATCH_SIZE, seq_len=SEQ_LEN,
        accumulation_steps=case.accumulation, max_grad_norm=0.05 if case.clipping else None, lr=1e-2, **place,
    )  # fmt: skip


def run_engine(case: Case, folder: Path) -> tuple[list[Trace], Engine]:
    """The same with an engine, which the caller closes."""
    place = dict(PLACES[case.place])
    if place.pop("nvme", False):
        place["nvme"] = folder
    engine = engine_of(case, **place)
    try:
        return run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step), engine
    except BaseException:
        engine.close()
        raise


def run_steps(
    accumulation: int,
    forward: Callable[..., Any],
    backward: Callable[[torch.Tensor], None],
    trainable: dict[str, nn.Parameter],
    update: Callable[[], None],
    numbers: range = range(STEPS),
) -> list[Trace]:
    traces = []
    for step in numbers:
        trace: Trace = {}
        for index in range(accumulation):
            batch = micro_batch(step, index)
            torch.manual_seed(5000 + 10 * step + index)
            loss = forward(**batch).loss
            trace[f"loss {index}"] = loss.detach().clone()
            backward(loss)
        for name, parameter in trainable.items():
            if parameter.grad is not None:
                trace[f"gradient {name}"] = parameter.grad.clone()
        update()
        for name, parameter in trainable.items():
            trace[f"parameter {name}"] = parameter.detach().clone()
        traces.append(trace)
    return traces
