"""Hugging Face's Trainer around `engine.model`, with `engine.optimizer` or one of its own: the bits of Trainer around
the plain model.
"""

from __future__ import annotations

import pytest
import torch

from tests.conftest import build_lora, language_batch
from tests.saved_state import is_complete


def run(model, optimizer, folder):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    rows = [{name: rows[0] for name, rows in language_batch(seed, rows=1).items()} for seed in range(8)]
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.full
@pytest.mark.parametrize("whose", ["the engine's", "the trainer's"])
def test_adapters_train_in_a_trainer_to_the_bits_of_the_plain_model(whose, make_engine, disk_folder, tmp_path):
    plain = build_lora(dropout=0.0)
    begin = {name: p.detach().clone() for name, p in plain.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    is_given = whose == "the engine's"
    expected = run(plain, optimizer if is_given else None, tmp_path / "plain")
    engine = make_engine(build_lora(dropout=0.0), nvme=disk_folder, accumulation_steps=2, commit_every=1)
    given = engine.optimizer
    read_before = engine.report()["bytes_read"]
    found = run(engine.model, given if is_given else None, tmp_path / "streamed")
    assert engine.report()["bytes_read"] > read_before
    assert engine.step_number == engine.step_meter.num_steps == 2 and (engine.optimizer is given) is is_given
    engine.close()
    assert is_complete(engine.commit_folder)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert any(not torch.equal(found[name], begin[name]) for name in found)
    files = [tmp_path / kind / "adapter" / "adapter_model.safetensors" for kind in ("plain", "streamed")]
    assert files[0].read_bytes() == files[1].read_bytes()
