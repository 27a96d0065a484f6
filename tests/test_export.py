"""`save_pretrained` of a whole model: what transformers loads is what trained, wherever its weights rested."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from offload_rt._engine import Engine
from offload_rt.checkpoint import safetensors_writer, whole_folder
from offload_rt.checkpoint.safetensors_writer import SafetensorsWriter
from offload_rt.errors import CheckpointVerifyError, ConfigError, StorageFull, UnsupportedModule
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import Tier
from tests.conftest import flip, open_descriptors
from tests.durable import Durable
from tests.full_parity import PLACES, Case, make_engine, one_loss
from tests.parity import BATCH_SIZE, SEQ_LEN, micro_batch

CASES = [
    ("llama", "bfloat16", "in place"), ("llama", "float32", "stress"), ("llama", "bfloat16", "on NVME"),
    ("qwen", "float32", "on NVME"), ("qwen", "bfloat16", "from HOST"),
    ("gpt2", "bfloat16", "on NVME but for two layers"), ("gpt2", "float32", "state in HOST, committed"),
    ("moe", "bfloat16", "on NVME"), ("moe", "float32", "from HOST"),
]  # fmt: skip


def case(family: str = "llama", dtype: str = "float32", place: str = "on NVME") -> Case:
    return Case(family, dtype, "adamw", 1, "not", False, place)


def trained(found: Case, folder: Path, steps: int = 2, **arguments: Any) -> Engine:
    folder.mkdir(exist_ok=True)
    engine = make_engine(found, folder, **arguments)
    for step in range(steps):
        engine.backward(one_loss(engine, step, 0))
        engine.step()
    return engine


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize(("family", "dtype", "place"), CASES)
def test_transformers_loads_what_trained(family: str, dtype: str, place: str, tmp_path: Path) -> None:
    assert place in PLACES
    with trained(case(family, dtype, place), tmp_path / "drive") as engine:
        engine.save_pretrained(tmp_path / "out", max_shard_bytes=60_000)
        engine.model.eval()
        batch = {key: value for key, value in micro_batch(9, 0).items() if key != "labels"}
        with torch.no_grad():
            expected = engine(**batch).logits
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
        assert loaded.dtype == getattr(torch, dtype)
        loaded.to(loaded.dtype)  # the rotary frequencies too, as those of the model that trained
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, expected)
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors_in(tmp_path / "out"))
        # ... under the names and in the files' dtypes that transformers itself would have written
        loaded.save_pretrained(tmp_path / "theirs")
        theirs, ours = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "out")
        assert set(theirs) == set(ours)
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
        for name in ("config.json", "generation_config.json"):
            assert json.loads((tmp_path / "theirs" / name).read_text()) == json.loads(
                (tmp_path / "out" / name).read_text()
            )


def test_training_goes_on_as_if_nothing_had_been_saved(tmp_path: Path) -> None:
    losses = []
    for saves in (False, True):
        with trained(case(), tmp_path / f"drive {saves}") as engine:
            if saves:
                engine.save_pretrained(tmp_path / "out")
            losses.append([])
            for step in (2, 3):
                loss = one_loss(engine, step, 0)
                engine.backward(loss)
                engine.step()
                losses[-1].append(float(loss.detach()))
    assert losses[0] == losses[1]


def test_steps_that_ran_ahead_are_not_saved(tmp_path: Path) -> None:
    """Between backward and step, blocks may have been stepped already; what is saved is the last whole step."""
    clipped = Case("llama", "float32", "adamw", 1, "rarely", False, "on NVME")
    with trained(clipped, tmp_path / "drive") as engine:
        engine.save_pretrained(tmp_path / "before")
        engine.backward(one_loss(engine, 3, 0))
        report = engine.report()["training"]
        assert report["num_ahead_of_norm"] > 0
        engine.save_pretrained(tmp_path / "ahead")
        engine.step()
        engine.save_pretrained(tmp_path / "after")
    before, ahead, after = (tensors_in(tmp_path / name) for name in ("before", "ahead", "after"))
    assert all(torch.equal(before[name], ahead[name]) for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_a_shard_is_never_larger_than_asked_but_for_a_tensor_that_is(tmp_path: Path) -> None:
    with trained(case("qwen"), tmp_path / "drive", steps=0) as engine:
        engine.save_pretrained(tmp_path / "one")
        engine.save_pretrained(tmp_path / "many", max_shard_bytes="40KB")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 5 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    for path in shards:
        with safe_open(path, framework="pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= 40_000 or len(sizes) == 1


def test_a_file_that_is_finished_is_on_the_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable = Durable(monkeypatch)
    writer = SafetensorsWriter(tmp_path / "f", {"a": torch.empty(3, device="meta")})
    writer.write("a", torch.ones(3))
    writer.finish()
    assert durable.missing(tmp_path / "f") == []
    writer.close()


def test_a_model_is_on_the_drive_before_its_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trained(case("qwen", place="in place"), tmp_path / "drive", steps=0) as engine:
        durable = Durable(monkeypatch)
        found = durable.at_rename(monkeypatch)
        engine.save_pretrained(tmp_path / "out", max_shard_bytes=150_000)
        assert found == [[]]
        assert durable.has_name(tmp_path / "out")
        assert (tmp_path / "out" / "config.json").exists()


def test_a_module_of_ones_own_is_saved_under_its_names(tmp_path: Path) -> None:
    with trained(case("plain"), tmp_path / "drive", steps=1) as engine:
        names = set(dict(engine.model.named_parameters()))
        engine.save_pretrained(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert set(tensors_in(tmp_path / "out")) == names


def test_frozen_layers_come_from_the_store_and_those_in_4_bits_are_refused(tmp_path: Path) -> None:
    for bits in (None, 4):
        torch.manual_seed(7)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, tie_word_embeddings=False,
            )
        ).to(torch.bfloat16).requires_grad_(False)  # fmt: skip
        model.lm_head.weight.requires_grad_(True)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with Engine(
            model, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, bits=bits, nvme=tmp_path,
            options=RuntimeOptions(rest=Tier.NVME, num_slots=1),
        ) as engine:  # fmt: skip
            if bits == 4:
                with pytest.raises(UnsupportedModule, match=r"model.layers.0.*4 bits"):
                    engine.save_pretrained(tmp_path / "out4")
                assert not (tmp_path / "out4").exists()
                continue
            engine.save_pretrained(tmp_path / "out")
            found = tensors_in(tmp_path / "out")
            assert set(found) == set(before)
            assert all(torch.equal(found[name], before[name]) for name in found)


class Killed(BaseException):
    """What runs after it changes nothing."""


SYSTEM_CALLS = ["mkdir", "rename", "replace", "fsync", "fdatasync", "link", "pwrite", "rmdir", "unlink"]


def test_killed_at_any_call_the_folder_holds_the_old_model_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counting(left: int | None) -> contextlib.AbstractContextManager[pytest.MonkeyPatch]:
        calls.clear()
        patch = monkeypatch.context()

        def call(name: str, real: Any, *arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            if left is not None and len(calls) > left:
                raise Killed
            return real(*arguments, **keywords)

        context = patch.__enter__()
        for name in SYSTEM_CALLS:
            real = getattr(os, name)
            context.setattr(os, name, lambda *a, name=name, real=real, **k: call(name, real, *a, **k))
        return patch

    with trained(case("qwen", place="in place"), tmp_path / "drive", steps=0) as engine:
        out = tmp_path / "out"
        engine.save_pretrained(out)
        (out / "tokenizer.json").write_text("kept")
        old = tensors_in(out)
        one = counting(None)
        engine.save_pretrained(out, max_shard_bytes=150_000)
        one.__exit__(None, None, None)
        total = len(calls)
        assert {"rename", "fsync", "link", "pwrite"} <= set(calls) | {"rename"} and total > 30
        engine.backward(one_loss(engine, 0, 0))
        engine.step()
        engine.save_pretrained(tmp_path / "new", max_shard_bytes=150_000)
        new = tensors_in(tmp_path / "new")
        outcomes = set()
        for left in range(0, total, 3):
            one = counting(left)
            with contextlib.suppress(Killed):
                engine.save_pretrained(out, max_shard_bytes=150_000)
            one.__exit__(None, None, None)
            found = tensors_in(out)
            assert (out / "tokenizer.json").read_text() == "kept"
            for name, wanted in (("old", old), ("new", new)):
                if all(torch.equal(found[key], wanted[key]) for key in old):
                    outcomes.add(name)
                    break
            else:
                pytest.fail(f"cut at {left}: a mixture")
        assert "old" in outcomes
        engine.save_pretrained(out)
        assert {path.name for path in out.iterdir()} == {
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
        }  # fmt: skip
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_too_little_space_is_found_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trained(case(place="in place"), tmp_path / "drive", steps=0) as engine:
        usage = shutil.disk_usage(tmp_path)
        need = sum(p.nbytes for p in engine.model.parameters())
        monkeypatch.setattr(whole_folder.shutil, "disk_usage", lambda path: usage._replace(free=need))
        with pytest.raises(StorageFull, match=r"the model needs .* are free"):
            engine.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drive"]


def test_a_full_drive_is_typed_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with trained(case(place="in place"), tmp_path / "drive", steps=0) as engine:
        monkeypatch.setattr(safetensors_writer.os, "pwrite", full)
        before = open_descriptors()
        with pytest.raises(StorageFull):
            engine.save_pretrained(tmp_path / "out")
        monkeypatch.undo()
        assert open_descriptors() == before, "a deleted file that is open takes up what is left of the drive"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drive"]


def test_a_flipped_bit_is_found_when_it_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SafetensorsWriter.finish

    def flipping(writer: SafetensorsWriter) -> None:
        flip(writer.path, -5, mask=4)
        real(writer)

    with trained(case(place="in place"), tmp_path / "drive", steps=0) as engine:
        monkeypatch.setattr(SafetensorsWriter, "finish", flipping)
        with pytest.raises(CheckpointVerifyError, match="reads back with checksum"):
            engine.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_place_for_a_model_is_refused(tmp_path: Path) -> None:
    with trained(case(place="in place"), tmp_path / "drive", steps=0) as engine:
        run, adapter = tmp_path / "run", tmp_path / "adapter"
        (run / "checkpoint-1").mkdir(parents=True)
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        for folder, match in ((run, "holds a folder, checkpoint-1"), (adapter, "holds an adapter")):
            with pytest.raises(ConfigError, match=match):
                engine.save_pretrained(folder)
        with pytest.raises(ConfigError, match="max_shard_bytes"):
            engine.save_pretrained(tmp_path / "out", max_shard_bytes="5 parsecs")
        engine.save_pretrained(tmp_path / "model")
        model: nn.Module = AutoModelForCausalLM.from_pretrained(tmp_path / "model").requires_grad_(True)
    with (
        Engine(model, checkpoint=tmp_path / "model", batch_size=1, seq_len=8) as second,
        pytest.raises(ConfigError, match="is what this run began from"),
    ):
        second.save_pretrained(tmp_path / "model")
