"""Buffers that a forward writes to are written once a step, as in plain PyTorch, though their layer runs twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload_rt._engine import Engine
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.activations import Action, whole_batch
from planners.plans.plan import Tier
from tests.conftest import build_base, build_lora, language_batch
from tests.parity import BATCH_SIZE, SEQ_LEN, VOCABULARY
from tests.test_frozen_weights import steps
from tests.test_tokenwise_engine import LINEAR, chunked
from tests.tokenwise import waiting_in

peft = pytest.importorskip("peft")

WIDTH = 32


class CountingLayer(nn.Module):
    """Its result depends on what it has counted, and on how many elements a buffer has that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH).requires_grad_(False)
        self.up = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean = 0.5 * self.mean + x_BTD.detach().mean()
        hidden = self.norm(self.up(x_BTD).transpose(1, 2)).transpose(1, 2)
        return x_BTD + self.scale * torch.tanh(hidden) * self.calls + self.adapter(x_BTD * self.mean)


class CountingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList([CountingLayer() for _ in range(3)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        loss = nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())
        return type("Output", (), {"loss": loss})()


def model() -> nn.Module:
    torch.manual_seed(0)
    return CountingModel().train()


def values(of: nn.Module) -> dict[str, torch.Tensor]:
    trained = {name: p.detach().clone() for name, p in of.named_parameters() if p.requires_grad}
    return trained | {name: buffer.clone() for name, buffer in of.named_buffers()}


def change(of: Any) -> None:
    of.layers[1].scale.mul_(2.0)
    of.layers[2].scale = torch.tensor(0.25)


def engine(**arguments: Any) -> Engine:
    return Engine(model(), lr=1e-2, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, device="cpu", **arguments)


@pytest.mark.parametrize("place", ["in memory", "from NVME"])
@pytest.mark.filterwarnings("ignore:layers write to buffers")
def test_buffers_and_gradients_are_those_of_plain_pytorch(place: str, tmp_path: Path) -> None:
    """Those that somebody changes between steps, in place or by another tensor, too."""
    twin = model()
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    losses = steps(twin, optimizer, range(2))
    change(twin)
    losses += steps(twin, optimizer, range(2, 4))
    on_drive = {"nvme": tmp_path, "options": RuntimeOptions(fill=False)} if place == "from NVME" else {}
    with engine(**on_drive) as run:
        found = steps(run, run.optimizer, range(2))
        change(run.model)
        found += steps(run, run.optimizer, range(2, 4))
        assert found == losses and float(twin.layers[0].calls) == 4  # type: ignore[index]
        expected, ours = values(twin), values(run.model)
        assert [name for name in expected if not torch.equal(expected[name], ours[name])] == []


def test_a_buffer_that_no_checkpoint_has_is_said_and_is_saved_where_it_is_tracked(tmp_path: Path) -> None:
    with engine() as run:
        run.track("norms", run.model.layers[1].norm)  # type: ignore[index]
        with pytest.warns(UserWarning, match=r"write to buffers in forward \(norm.num_batches_tracked.*engine.track"):
            steps(run, run.optimizer, range(2))
        run.save_checkpoint(tmp_path / "saved")
        mean = run.model.layers[1].norm.running_mean.clone()  # type: ignore[index]
    with engine() as run:
        run.track("norms", run.model.layers[1].norm)  # type: ignore[index]
        run.load_checkpoint(tmp_path / "saved")
        assert torch.equal(run.model.layers[1].norm.running_mean, mean) and mean.any()  # type: ignore[index]


def counted(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
    if module.training:
        module.calls.add_(1)
    return output * module.calls


def with_counted_mlps() -> Any:
    of: Any = build_lora(dtype=torch.float32, num_layers=2).train()
    for layer in of.base_model.model.model.layers:
        layer.mlp.register_buffer("calls", torch.ones(()), persistent=False)
        layer.mlp.register_forward_hook(counted)
    return of


def gradients_of_batches(run: Any, of: Any, trains_from: int = 1) -> dict[str, torch.Tensor]:
    """The first as it is evaluated, where layers write to nothing."""
    found = {}
    for number in range(3):
        of.train(number >= trains_from)
        run(**language_batch(number, tokens=SEQ_LEN)).loss.backward()
        found |= {f"{name} {number}": p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}
        of.zero_grad()
    return found | {name: buffer for name, buffer in of.named_buffers() if "calls" in name}


@pytest.mark.parametrize("kind", ["recomputed", "kept", "recomputed in one chunk", "by chunks"])
def test_layers_by_chunks_write_buffers_once_too_also_where_they_began_to_when_they_were_switched(
    kind: str, make_engine: Any, disk_folder: Path
) -> None:
    """Those that would run again, or by parts, are recomputed whole; a layer that is kept runs once and stays so."""
    policy = {
        "recomputed": None,
        "kept": whole_batch(Action.KEEP),
        "recomputed in one chunk": whole_batch(Action.RECOMPUTE),
        "by chunks": waiting_in(chunked(0.5, 2), Tier.NVME),
    }[kind]
    plain = with_counted_mlps()
    expected = gradients_of_batches(plain, plain)
    options = None if policy is None else {**LINEAR, "activations": policy}
    run = make_engine(with_counted_mlps(), options, bits=None, seq_len=SEQ_LEN, nvme=disk_folder)
    found = gradients_of_batches(run, run.model)
    assert found.keys() == expected.keys()
    inexact = " 0" if kind == "by chunks" else None  # the first batch goes by chunks: sums in another order
    assert [
        n for n in expected if not torch.equal(found[n], expected[n]) and not (inexact and n.endswith(inexact))
    ] == []
    assert [float(found[name]) for name in found if "calls" in name] == [3.0, 3.0]
    if policy is not None:
        refused = run.report()["tokenwise"]["refused"]
        assert [*refused.values()] == ([] if kind == "kept" else ["it writes to buffers in forward"])


def test_a_layer_by_chunks_writes_buffers_once_also_where_it_begins_to_by_itself(
    make_engine: Any, disk_folder: Path
) -> None:
    """Nothing is switched that anybody could see: the copies are there for chunks that have to be undone."""

    def found(run: Any, of: Any) -> dict[str, torch.Tensor]:
        count = False
        for layer in of.base_model.model.model.layers:
            layer.mlp.register_forward_hook(lambda module, *_: module.calls.add_(1) if count else None)
        run(**language_batch(0, tokens=SEQ_LEN)).loss.backward()
        of.zero_grad()
        count = True
        run(**language_batch(1, tokens=SEQ_LEN)).loss.backward()
        gradients = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
        return gradients | {name: buffer for name, buffer in of.named_buffers() if "calls" in name}

    plain = with_counted_mlps().eval()
    expected = found(plain, plain)
    options = {**LINEAR, "activations": waiting_in(chunked(0.5, 2), Tier.NVME)}
    run = make_engine(with_counted_mlps().eval(), options, bits=None, seq_len=SEQ_LEN, nvme=disk_folder)
    ours = found(run, run.model)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
    assert [float(ours[name]) for name in ours if "calls" in name] == [2.0, 2.0]


def with_spectral_norms(*, on_head: bool) -> Any:
    torch.manual_seed(0)
    base = build_base("llama", torch.float32, 2, mlp_bias=True)
    for layer in base.model.layers:
        torch.nn.utils.parametrizations.spectral_norm(layer.mlp.up_proj)
        torch.nn.utils.spectral_norm(layer.mlp.gate_proj)
        layer.mlp.register_forward_hook(lambda module, given, output: output.tanh())  # wants the last product
    if on_head:
        torch.nn.utils.parametrizations.spectral_norm(base.lm_head)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


SPECTRAL: dict[str, dict[str, Any]] = {
    "in memory": {},
    "from NVME": {"nvme": True, "options": RuntimeOptions(fill=False)},
    "loss in tiles": {"nvme": True, "options": RuntimeOptions(fill=False, head_chunk_tokens=8)},
}


@pytest.mark.parametrize("place", SPECTRAL)
@pytest.mark.filterwarnings("ignore:layers write to buffers", "ignore:`torch.nn.utils.spectral_norm`")
def test_a_weight_that_is_computed_from_buffers_is_computed_by_calls_alone(place: str, tmp_path: Path) -> None:
    """Spectral norms go on at each look at the weight, and would take one at rest for a weight."""
    on_head = place != "loss in tiles"  # each of which is a call
    twin = with_spectral_norms(on_head=on_head).train()
    expected = gradients_of_batches(twin, twin, 0) | dict(twin.named_buffers())
    given = {**SPECTRAL[place], **({"nvme": tmp_path} if "nvme" in SPECTRAL[place] else {})}
    ours = with_spectral_norms(on_head=on_head).train()
    with Engine(ours, lr=1e-2, batch_size=2, seq_len=SEQ_LEN, device="cpu", **given) as run:
        found = gradients_of_batches(run, run.model, 0) | dict(run.model.named_buffers())
        assert found.keys() == expected.keys()
        differing = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert [name for name in differing if on_head or "lora" not in name] == []
