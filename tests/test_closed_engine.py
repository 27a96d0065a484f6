"""An engine that is closed: its memory is given back, whoever still holds it or a loss; what it is asked then."""

from __future__ import annotations

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import OffloadError
from offload_rt.memory.mapped import Watch
from offload_rt.plans import workload_sizes
from tests.changing_plans import propose
from tests.conftest import build_lora, build_plain, language_batch


@pytest.fixture
def watch():
    watched = Watch()
    yield watched
    watched.close()


def mapped(watch):
    """Arenas that are there, by name, with their bytes."""
    found = {}
    for mapping, is_there in watch.changes:
        if is_there:
            found[id(mapping)] = mapping
        else:
            found.pop(id(mapping), None)
    return {mapping.name: mapping.num_bytes for mapping in found.values() if mapping.num_bytes}


def adapters(make_engine, folder, **more):
    return make_engine(build_lora(num_layers=3), nvme=folder, bits=4, **more), language_batch(0)


def all_parameters(make_engine, folder, **more):
    model = build_plain(num_layers=3).requires_grad_(True)
    return make_engine(model, nvme=folder, commit_every=1, **more), {"x_BTF": torch.randn(2, 4, 8)}


def loss_of(engine, batch):
    found = engine(**batch)
    return found.loss if hasattr(found, "loss") else found.square().mean()


@pytest.mark.parametrize("made", [adapters, all_parameters])
def test_closing_gives_memory_back_whoever_still_holds_the_engine_or_a_loss(made, make_engine, disk_folder, watch):
    engine, batch = made(make_engine, disk_folder)
    engine.backward(loss_of(engine, batch))
    engine.step()
    loss = loss_of(engine, batch)
    before = mapped(watch)
    assert before.keys() > ({"ring of layers"} if made is adapters else {"optimizer state", "gradients"})
    report = engine.report()
    engine.close()
    assert mapped(watch) == {"resident blocks": before["resident blocks"]}
    assert engine.report().keys() == report.keys() and engine.step_number == 1
    with pytest.raises(OffloadError, match="backward: its forward ran before the engine was closed"):
        loss.backward()
    engine.close()  # once more


@pytest.mark.parametrize("made", [adapters, all_parameters])
def test_an_engine_that_cannot_be_made_holds_no_memory(made, make_engine, disk_folder, watch, monkeypatch):
    """Though its error is kept, as a notebook keeps the last one."""
    monkeypatch.setattr(Engine, "_look_after", lambda engine, runtime: 1 / (not mapped(watch)["resident blocks"]))
    with pytest.raises(ZeroDivisionError) as kept:
        made(make_engine, disk_folder)
    assert mapped(watch) == {} and kept.value is not None


@pytest.mark.parametrize("made", [adapters, all_parameters])
def test_weights_that_never_leave_memory_stay_the_models(made, make_engine, disk_folder):
    engine, batch = made(make_engine, disk_folder, device_memory="64MiB")
    shown = {name: p for name, p in engine.model.named_parameters() if p.untyped_storage().nbytes() >= p.nbytes}
    before = {name: p.detach().clone() for name, p in shown.items()}
    engine.close()
    assert len(shown) > 4 and all(torch.equal(p, before[name]) for name, p in shown.items())
    if made is all_parameters:
        assert engine.model(**batch).isfinite().all()


@pytest.mark.parametrize("end", ["closed", "another plan"])
def test_what_a_hook_has_kept_of_a_layer_stays_whole(end, make_engine, disk_folder, monkeypatch):
    """It lies in memory of the engine's: results of a layer do, where they are large."""
    monkeypatch.setattr(workload_sizes, "PLACED_RESULTS", 64)
    kept = []
    engine, batch = adapters(make_engine, disk_folder, options={"placed_bytes": 1024})
    first = engine._runtime
    first.layers[1].layer.mlp.gate_proj.register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    engine.backward(loss_of(engine, batch))
    engine.step()
    assert first.transients.arena.held_bytes() > 0
    copy = kept[0].clone()
    if end == "closed":
        engine.close()
    else:
        propose(engine, engine.plan, commits=False)
        loss_of(engine, batch)
        assert engine._runtime is not first
    assert torch.equal(kept[0], copy) and copy.abs().sum() > 0


@pytest.mark.parametrize(
    ("asked", "call"),
    [
        ("train_batch", lambda engine, folder: engine.train_batch([{}])),
        ("clip_grad_norm_", lambda engine, folder: engine.clip_grad_norm_(1.0)),
        ("gradients", lambda engine, folder: engine.gradients()),
        ("load_checkpoint", lambda engine, folder: engine.load_checkpoint(folder / "saved")),
        ("save_checkpoint", lambda engine, folder: engine.save_checkpoint(folder / "again")),
    ],
)
def test_what_a_closed_engine_cannot_do_says_so(asked, call, make_engine, disk_folder):
    engine, batch = all_parameters(make_engine, disk_folder)
    engine.backward(loss_of(engine, batch))
    engine.step()
    engine.save_checkpoint(disk_folder / "saved")
    engine.close()
    with pytest.raises(OffloadError, match=f"{asked}: the engine is closed; nothing was done"):
        call(engine, disk_folder)
    assert not (disk_folder / "again").exists()


def test_adapters_are_saved_as_ever_when_the_engine_is_closed(make_engine, disk_folder):
    engine, batch = adapters(make_engine, disk_folder)
    engine.backward(loss_of(engine, batch))
    engine.step()
    engine.close()
    engine.save_checkpoint(disk_folder / "saved")
    engine.save_pretrained(disk_folder / "adapter")
    again, _ = adapters(make_engine, disk_folder)
    again.load_checkpoint(disk_folder / "saved")
    assert again.step_number == 1 and (disk_folder / "adapter" / "adapter_model.safetensors").exists()
