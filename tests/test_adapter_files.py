"""The files of an adapter: written beside the old ones, which are whole until all of the new ones are."""

from __future__ import annotations

import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file

from offload_rt.checkpoint.whole_folder import replaced_whole
from offload_rt.errors import CheckpointVerifyError, ConfigError, OffloadError
from tests.conftest import build_base, build_lora, language_batch
from tests.durable import Durable


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


def test_adapters_are_on_the_drive_before_their_folder_gets_its_name(make_engine, tmp_path, monkeypatch):
    model = build_lora(num_layers=1)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))  # in a folder of its own
    engine, durable = make_engine(model), Durable(monkeypatch)
    found = durable.at_rename(monkeypatch)
    engine.save_pretrained(tmp_path / "adapter")
    assert found == [[]]
    assert durable.has_name(tmp_path / "adapter")


def test_what_does_not_read_back_is_no_adapter(engine, tmp_path, monkeypatch):
    out = tmp_path / "adapter"
    engine.save_pretrained(out)
    before = contents(out)
    change(engine)
    save = engine.model.save_pretrained

    def saves_another(*arguments, **options):
        save(*arguments, **options)
        change(engine)

    monkeypatch.setattr(engine.model, "save_pretrained", saves_another)
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


def has_to_stay(how, out, monkeypatch):
    if how == "current":
        monkeypatch.chdir(out)
    elif how == "mount":
        monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(out))
    elif how == "parent":  # as an ordinary user is told of another's folder
        access = os.access
        monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(out.parent) and access(path, mode))
    else:
        monkeypatch.setattr("offload_rt.checkpoint.whole_folder._exchange", lambda one, other: False)


@pytest.mark.parametrize("how", ["current", "mount", "parent", "no exchange"])
def test_a_folder_that_has_to_stay_has_its_files_replaced_one_by_one(how, engine, tmp_path, monkeypatch):
    out = tmp_path / "adapter"
    engine.save_pretrained(out)
    first, inode = weights(out), out.stat().st_ino
    change(engine)
    has_to_stay(how, out, monkeypatch)
    seen = []
    monkeypatch.setattr("os.replace", lambda one, other: (seen.append(weights(out)), os.rename(one, other)))
    (out / ".adapter.partial-1").mkdir()  # a kill left it
    engine.save_pretrained("." if how == "current" else out)
    assert out.stat().st_ino == inode and len(seen) == 3, "an adapter is there all the time"
    assert all(torch.equal(weights(out)[name], value + 1) for name, value in first.items())
    assert contents(out).keys() == {path.name for path in out.iterdir()}, "nothing is left in it"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_private_folder_stays_private(engine, tmp_path):
    out = tmp_path / "adapter"
    out.mkdir(mode=0o700)
    for _ in range(2):
        engine.save_pretrained(out)
        assert out.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_was_moved_is_put_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / "model"
    out.mkdir()
    (out / "old").write_text("whole")
    rename, done = os.rename, []

    def fails(one, other):
        done.append(other)
        if len(done) == 2:
            raise KeyboardInterrupt
        rename(one, other)

    monkeypatch.setattr("offload_rt.checkpoint.whole_folder._exchange", lambda one, other: False)
    monkeypatch.setattr("os.rename", fails)
    with pytest.raises(KeyboardInterrupt), replaced_whole(out, 1, what="the model", is_ours=lambda name: True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (out / "old").read_text() == "whole"


def several(names, modules_to_save=None):
    """A model with adapters of these names, of which the first one trains. B is not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=modules_to_save
    )
    model = peft.get_peft_model(build_base("llama", torch.bfloat16, 1), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def all_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("names", "modules_to_save", "bits"),
    [(["mine"], ["lm_head"], None), (["default", "other"], None, 4), (["one", "two"], ["lm_head"], None)],
)
def test_adapters_of_any_name_are_saved_as_peft_saves_them(names, modules_to_save, bits, make_engine, tmp_path):
    out = tmp_path / "out"
    several(names, modules_to_save).save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    engine = make_engine(several(names, modules_to_save), bits=bits, nvme=tmp_path)
    engine.save_pretrained(out)
    assert all_of(out) == all_of(tmp_path / "plain")
    if len(names) > 1:
        with pytest.raises(ConfigError, match=rf"save_pretrained: .*{names[1]}.*Use engine\.save_pretrained"):
            engine.model.save_pretrained(tmp_path / "by peft")
    engine.model.save_pretrained(tmp_path / "by peft", selected_adapters=names[:1])
    engine.backward(engine(**language_batch(0)).loss)
    engine.step()
    engine.save_pretrained(out)  # over folders
    again = several(names, modules_to_save)
    for name in names:
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        again.load_adapter(out if name == "default" else out / name, name)
        found = peft.get_peft_model_state_dict(again, adapter_name=name, save_embedding_layers=False)
        plain = peft.get_peft_model_state_dict(
            several(names, modules_to_save), adapter_name=name, save_embedding_layers=False
        )
        assert found.keys() == plain.keys()
        assert all(torch.equal(value, plain[key]) is (name != names[0]) for key, value in found.items())
        trained = peft.get_peft_model_state_dict(engine.model, adapter_name=name, save_embedding_layers=False)
        assert all(torch.equal(found[key], value) for key, value in trained.items())


def test_a_half_of_an_adapter_that_does_not_train_is_saved_with_the_other(make_engine, tmp_path):
    model = build_lora(num_layers=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: value.clone() for name, value in expected.items()}
    engine = make_engine(model, bits=4, nvme=tmp_path)
    assert any("lora_A" in name for name in expected) and not any("lora_A" in name for name in engine.trainable)
    engine.save_pretrained(tmp_path / "out")
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())
    engine.close()
    with pytest.raises(OffloadError, match=r"closed: .*lora_A\.default\.weight is not in memory"):
        engine.save_pretrained(tmp_path / "out")
