"""Hugging Face's Trainer around `engine.model`, with `engine.optimizer` or one of its own: the bits of Trainer around
the plain model, also where it is killed and goes on from what it has saved.
"""

from __future__ import annotations

import pytest
import torch

from offload_rt.errors import ConfigError
from planners.plans.plan import StatePlacement, Tier
from tests.conftest import build_lora, language_batch
from tests.saved_state import is_complete

IN_TIERS = {"state": StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=2)}
NUM_ROWS = 9
"""So that of three steps an epoch, of two micro-batches of two rows, the last has one row."""


class Killed(BaseException):
    pass


def rows():
    found = []
    for seed in range(NUM_ROWS):
        row = {name: rows[0].clone() for name, rows in language_batch(seed, rows=1).items()}
        row["labels"][: seed % 5] = -100  # micro-batches of a step differ in what counts
        found.append(row)
    return found


def trainer_of(model, optimizer, folder, *, kill_in=None, save_with=None, **given):
    """A Trainer whose process dies in a step's end, before it saves; and which `save_with` an engine does."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == kill_in:
                raise Killed

        def on_save(self, args, state, control, **_):
            if save_with is not None:
                save_with.save_checkpoint(f"{args.output_dir}/checkpoint-{state.global_step}/engine")

    defaults = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine", "warmup_steps": 1,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**defaults, **given})
    evaluated = rows()[:3] if "eval_strategy" in given else None
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows(), eval_dataset=evaluated, optimizers=(optimizer, None),
        callbacks=[Callback()],
    )  # fmt: skip
    for printing in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def logged(trainer):
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    timed += ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "total_flos")
    return [{key: value for key, value in one.items() if key not in timed} for one in trainer.state.log_history]


def unequal(expected, found):
    assert expected.keys() == found.keys()
    return [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.full
@pytest.mark.parametrize("whose", ["the engine's", "the trainer's"])
def test_adapters_train_in_a_trainer_to_the_bits_of_the_plain_model(whose, make_engine, disk_folder, tmp_path):
    """Its last step is of one row alone; the model that was best, at the first of three evaluations, is taken back."""
    is_given = whose == "the engine's"
    choosing = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    plain = build_lora()
    begin = values(plain)
    trainer = trainer_of(plain, adamw(plain) if is_given else None, tmp_path / "plain", **choosing)
    trainer.train()
    trainer.save_model(str(tmp_path / "plain" / "adapter"))
    expected, log = values(plain), logged(trainer)
    engine = make_engine(build_lora(), nvme=disk_folder, accumulation_steps=2, commit_every=1)
    given = engine.optimizer
    read_before = engine.report()["bytes_read"]
    trainer = trainer_of(engine.model, given if is_given else None, tmp_path / "streamed", **choosing)
    trainer.train()
    trainer.save_model(str(tmp_path / "streamed" / "adapter"))
    assert engine.report()["bytes_read"] > read_before
    assert engine.step_number == 6 and (engine.optimizer is given) is is_given
    assert engine.step_meter.num_steps == 6, "evaluations come between steps"
    engine.close()
    assert is_complete(engine.commit_folder)
    assert logged(trainer) == log and trainer.state.best_global_step == 2
    found = values(engine.model)
    assert unequal(expected, found) == [] and unequal(begin, found) == list(begin)
    files = [tmp_path / kind / "adapter" / "adapter_model.safetensors" for kind in ("plain", "streamed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.full
@pytest.mark.parametrize(
    ("whose", "saves"),
    [("the engine's", "steps"), ("the engine's", "epoch"), ("the trainer's", "steps"), ("in tiers", "steps")],
)
def test_a_trainer_that_was_killed_goes_on_to_the_bits_of_one_that_was_not(
    whose, saves, make_engine, disk_folder, tmp_path
):
    saving = {"save_strategy": saves, "save_steps": 2}
    plain = build_lora()
    trainer = trainer_of(plain, None if whose == "the trainer's" else adamw(plain), tmp_path / "plain")
    trainer.train()
    expected, log = values(plain), logged(trainer)

    def made(**options):
        engine = make_engine(
            build_lora(), IN_TIERS if whose == "in tiers" else None, nvme=disk_folder, accumulation_steps=2
        )
        optimizer = None if whose == "the trainer's" else engine.optimizer
        saver = engine if whose == "in tiers" else None
        return engine, trainer_of(engine.model, optimizer, tmp_path / "cut", save_with=saver, **saving, **options)

    engine, trainer = made(kill_in=5)
    with pytest.raises(Killed):
        trainer.train()
    engine.close()
    engine, trainer = made()
    folder = tmp_path / "cut" / f"checkpoint-{4 if saves == 'steps' else 3}"
    if whose == "in tiers":
        with pytest.raises(ConfigError, match=r"without the state.*engine's is of step 0.*engine\.load_checkpoint"):
            trainer.train(resume_from_checkpoint=str(folder))
        engine.load_checkpoint(folder / "engine")
        trainer = trainer_of(engine.model, engine.optimizer, tmp_path / "cut")
    trainer.train(resume_from_checkpoint=str(folder))
    assert unequal(expected, values(engine.model)) == []
    assert logged(trainer) == log
    assert engine.step_number == trainer.state.global_step == 6
