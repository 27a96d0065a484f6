"""The files of an adapter: written beside the old ones, which are whole until all of the new ones are."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from offload_rt.errors import CheckpointVerifyError
from tests.conftest import build_lora


@pytest.fixture
def engine(make_engine):
    return make_engine(build_lora(num_layers=1))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def change(engine):
    with torch.no_grad():
        for parameter in engine.trainable.values():
            parameter.add_(1)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_save_that_is_cut_off_leaves_the_adapter_before_it(failure, engine, tmp_path, monkeypatch):
    out = tmp_path / "adapter"
    engine.save_pretrained(out)
    before = contents(out)
    change(engine)

    def fails(*_, **__):
        raise failure("in the middle")

    with monkeypatch.context() as broken:
        broken.setattr(peft.LoraConfig, "save_pretrained", fails)  # behind the weights
        with pytest.raises((failure, OSError), match="in the middle"):
            engine.save_pretrained(out)
    assert contents(out) == before
    engine.save_pretrained(out)
    assert contents(out).keys() == before.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}, "nothing is left beside it"


def test_what_does_not_read_back_is_no_adapter(engine, tmp_path, monkeypatch):
    out = tmp_path / "adapter"
    engine.save_pretrained(out)
    before = contents(out)
    change(engine)
    save = type(engine.model).save_pretrained

    def saves_another(model, *arguments, **options):
        save(model, *arguments, **options)
        change(engine)

    monkeypatch.setattr(type(engine.model), "save_pretrained", saves_another)
    with pytest.raises(CheckpointVerifyError, match=f"{out}/adapter_model.safetensors: .* does not read back"):
        engine.save_pretrained(out)
    assert contents(out) == before


@pytest.mark.parametrize("has_folder", [False, True])
def test_what_is_somebody_elses_in_its_folder_stays(has_folder, engine, tmp_path):
    out = tmp_path / "adapter"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("---\nlicense: mit\n---\nwhat I wrote\n")
    if has_folder:
        (out / "checkpoint-1").mkdir()
        (out / "checkpoint-1" / "state").write_text("a trainer's")
    engine.save_pretrained(out)
    first = weights(out)
    change(engine)
    engine.save_pretrained(out)
    second = weights(out)
    assert all(torch.equal(second[name], value + 1) for name, value in first.items())
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (out / "notes.txt").read_text() == "mine"
    card = (out / "README.md").read_text()
    assert "what I wrote" in card and "license: mit" in card
    assert (out / "checkpoint-1" / "state").exists() is has_folder
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
