"""Every mistake that the engine can meet: a typed error with its evidence, and the user's model as it was."""

import contextlib
import copy
import gc
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import offload_rt
from offload_rt.errors import (
    CheckpointError,
    ConfigError,
    IntegrityError,
    NonFiniteLoss,
    OffloadError,
    PlanInfeasible,
    QuantCoverageError,
    StorageError,
    StorageFull,
    StoreInUse,
    TargetNotMatched,
    UnsupportedModule,
)
from offload_rt.guards.additions import Additions
from offload_rt.wiring.assembly import change_over
from offload_rt.wiring.runtime import Change
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.plan import Plan, Tier
from tests.conftest import PlainLayer, build_base, build_lora, build_plain, language_batch

peft = pytest.importorskip("peft")


def lora(**changes):
    return peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", **changes})


def state(model):
    return {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}


def unchanged(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name][0] == before[name][0] and torch.equal(after[name][1], before[name][1]), name
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"batchsize": 2}, ConfigError, "did you mean 'batch_size'"),
        ({"optim": None}, ConfigError, "optim"),
        ({"nvme_path": "/x"}, ConfigError, "nvme"),
        ({"bits": 3}, ConfigError, "bits: 3"),
        ({"device": "cuda"}, ConfigError, "device"),
        ({"device": "tpu"}, ConfigError, "device"),
        ({"device_memory": "22GX"}, ConfigError, "device_memory"),
        ({"host_memory": 0}, ConfigError, "host_memory"),
        ({"nvme": "/nowhere/at/all"}, ConfigError, "does not exist"),
        ({"nvme": 5}, ConfigError, "nvme"),
        ({"seq_len": 0}, ConfigError, "seq_len"),
        ({"max_grad_norm": -1}, ConfigError, "max_grad_norm"),
        ({"commit_every": 1}, ConfigError, "commit_every"),
        ({"plan": "/nowhere.json"}, ConfigError, "plan: there is no file '/nowhere.json'; allowed: auto, optimise"),
        ({"plan": "optimize"}, ConfigError, "plan: there is no file 'optimize'; did you mean 'optimise'"),
        ({"plan": "/"}, ConfigError, r"plan: / cannot be read \(Is a directory\)"),
        ({"plan": 5}, ConfigError, "plan"),
        ({"adapters": "lora:r=4"}, ConfigError, "adapters"),
        ({"checkpoint": "/nowhere"}, CheckpointError, "nowhere"),
        ({"emulate": "rtx4091"}, ConfigError, "emulate: .*did you mean 'rtx4090'. .a profile's file may be given"),
        ({"emulate": 5}, ConfigError, "emulate: expected a hardware profile"),
        ({"plan": "optimise", "nvme": "/"}, ConfigError, "offload-rt calibrate --device cpu --nvme /"),
        ({"lr": -1.0}, (ConfigError, ValueError), "learning rate|lr"),
        ({"optimizer": "adamw"}, ConfigError, "optimizer: expected a class or .*, got 'adamw'"),
        ({"optimizer": lambda parameters: None}, ConfigError, "optimizer"),
        ({"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1), "lr": 1.0}, ConfigError, "lr"),
        ({"device_memory": 4096}, PlanInfeasible, "short by"),
    ],
)
def test_a_wrong_argument_is_named_and_the_model_is_as_it_was(arguments, error, words):
    model = build_plain()
    before = state(model)
    with pytest.raises(error, match=words):
        offload_rt.engine(model, **{"batch_size": 2, "seq_len": 16, **arguments})
    unchanged(model, before)


def test_a_built_optimizer_is_refused_and_the_model_is_as_it_was():
    model = build_plain()
    before = state(model)
    built = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(ConfigError, match="optimizer"):
        offload_rt.engine(model, optimizer=built)
    unchanged(model, before)


@pytest.mark.parametrize("which", ["stranger", "missing"])
def test_an_optimizer_over_other_parameters_is_refused_and_the_model_is_as_it_was(which):
    model = build_plain()
    before = state(model)

    def factory(parameters):
        chosen = parameters[1:] if which == "missing" else [*parameters, nn.Parameter(torch.zeros(1))]
        return torch.optim.SGD(chosen, lr=1.0)

    with pytest.raises(IntegrityError, match="trainable"):
        offload_rt.engine(model, optimizer=factory)
    unchanged(model, before)


def test_what_is_no_module_is_refused():
    with pytest.raises(ConfigError, match="nn.Module"):
        offload_rt.engine({"a": 1})


def test_a_model_without_layers_is_refused():
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    with pytest.raises(UnsupportedModule, match="ModuleList"):
        offload_rt.engine(model)


def test_four_bits_of_a_model_of_which_everything_trains_are_refused_with_what_to_do():
    model = build_plain().requires_grad_(True)
    with pytest.raises(ConfigError, match="adapters="):
        offload_rt.engine(model, bits=4)


def test_adapters_that_match_nothing_name_their_targets_and_leave_the_model():
    model = build_base("llama", torch.float32, num_layers=2)
    before = state(model)
    with pytest.raises(TargetNotMatched, match="no_such_proj"):
        offload_rt.engine(model, adapters=lora(target_modules=["no_such_proj"]))
    after = state(model)
    assert after.keys() == before.keys()


def test_after_a_budget_that_was_too_small_the_same_call_with_more_works(make_engine):
    """What everybody does in a notebook: read the finding, raise the number, run the cell again."""
    model = build_base("llama", torch.float32, num_layers=2)
    with pytest.raises(PlanInfeasible):
        make_engine(model, adapters=lora(), device_memory="16KiB")
    engine = make_engine(model, adapters=lora(), device_memory="200MiB")
    engine.backward(engine(**language_batch(0)).loss)
    engine.step()


def test_adapters_that_begin_by_weights_that_are_not_there_are_refused():
    with torch.device("meta"):
        model = build_base("llama", torch.float32)
    with pytest.raises(ConfigError, match="'pissa' cannot begin without the base model's weights"):
        offload_rt.engine(model, adapters=lora(init_lora_weights="pissa", target_modules=["q_proj"]))


def test_a_second_set_of_adapters_is_refused():
    with pytest.raises(ConfigError, match="has adapters already"):
        offload_rt.engine(build_lora(), adapters=lora())


def test_a_meta_model_without_a_checkpoint_is_refused():
    with torch.device("meta"):
        model = build_plain()
    with pytest.raises(ConfigError, match="checkpoint="):
        offload_rt.engine(model)


def test_four_bits_where_nothing_is_frozen_are_refused_and_where_adapters_are_too_large_that_is_said():
    with pytest.raises(ConfigError, match="all layers train; give adapters="):
        offload_rt.engine(build_plain(num_layers=1).requires_grad_(True), bits=4)
    with pytest.raises(ConfigError, match="the adapters have more parameters than they stand on: .* a lower rank"):
        offload_rt.engine(build_base("llama", torch.float32, num_layers=1), bits=4, adapters=lora(r=64))


def test_sixteen_bits_left_over_are_an_error_with_names():
    model = build_plain(num_layers=2)
    for layer in model.layers:
        layer.table = nn.Parameter(torch.zeros(100, 100), requires_grad=False)
    with pytest.raises(QuantCoverageError, match="layers.0.table"):
        offload_rt.engine(model, bits=4)


def tiny_checkpoint(folder, change=None):
    torch.manual_seed(0)
    model = build_base("llama", torch.float32, num_layers=2)
    model.config.save_pretrained(folder)
    tensors = {name: t.contiguous().clone() for name, t in model.state_dict().items()}
    if change is not None:
        change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def meta_model():
    transformers = pytest.importorskip("transformers")
    config = build_base("llama", torch.float32, num_layers=2).config
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config)
        return peft.get_peft_model(base, lora())


@pytest.mark.parametrize("damage", ["truncate", "missing tensor", "shape", "nan", "empty", "no file"])
def test_a_bad_checkpoint_is_an_error_and_leaves_no_finished_store(disk_folder, damage):
    folder = disk_folder / "model"
    folder.mkdir()
    drive = disk_folder / "drive"
    drive.mkdir()

    def change(tensors):
        name = "model.layers.1.mlp.down_proj.weight"
        if damage == "missing tensor":
            del tensors[name]
        elif damage == "shape":
            tensors[name] = tensors[name][:-1].clone()
        elif damage == "nan":
            tensors[name][3, 4] = float("nan")

    tiny_checkpoint(folder, change)
    path = folder / "model.safetensors"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no file":
        path.unlink()
    with pytest.raises(CheckpointError) as raised:
        offload_rt.engine(meta_model(), checkpoint=folder, bits=4, nvme=drive, batch_size=2, seq_len=16)
    if damage in ("missing tensor", "shape", "nan"):
        assert "down_proj" in str(raised.value)
    assert list(drive.glob("*/manifest.json")) == []


def test_a_good_checkpoint_on_a_meta_model_equals_the_model_in_memory(make_engine, disk_folder):
    folder = disk_folder / "model"
    folder.mkdir()
    plain = tiny_checkpoint(folder)
    engine = make_engine(meta_model(), checkpoint=folder, nvme=disk_folder)
    batch = language_batch(0)
    with torch.no_grad():
        assert torch.equal(engine(**batch).logits, plain(**batch).logits)  # lora_B is zero
    engine.backward(engine(**batch).loss)
    engine.step()


def test_a_sequence_longer_than_planned_names_both_lengths(make_engine):
    engine = make_engine(build_lora(), seq_len=16)
    for batch in (
        language_batch(0, tokens=17),
        {"inputs_embeds": torch.zeros(1, 17, 64, dtype=torch.bfloat16)},
    ):
        with pytest.raises(ConfigError, match="17 tokens.*16"):
            engine(**batch)
    with pytest.raises(ConfigError, match="17 tokens.*16"):
        engine(input_ids=None, inputs_embeds=torch.zeros(1, 17, 64, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="batch_size"):
        engine(**language_batch(0, rows=3, tokens=16))
    engine(**language_batch(0, rows=2, tokens=16))


def test_a_nan_loss_updates_nothing(make_engine):
    engine = make_engine(build_lora())
    before = {name: p.detach().clone() for name, p in engine.trainable.items()}
    loss = engine(**language_batch(0)).loss * float("nan")
    with pytest.raises(NonFiniteLoss, match="step 1"):
        engine.backward(loss)
    assert list(engine.gradients()) == []
    assert all(torch.equal(before[name], p) for name, p in engine.trainable.items())


def test_a_train_batch_that_breaks_off_leaves_no_half_gradient_for_the_next(make_engine, caplog):
    good, bad = language_batch(0), language_batch(1)
    twin, engine = make_engine(build_lora(dropout=0.0), accumulation_steps=2), make_engine(build_lora(dropout=0.0))
    bad["labels"] = torch.full_like(bad["labels"], -100)  # all ignored: the loss is NaN
    with pytest.raises(NonFiniteLoss):
        engine.train_batch([good, bad])
    loss = engine(**good).loss
    engine.backward(loss)
    engine.step()
    assert twin.train_batch([good]) == float(loss)
    for name, parameter in twin.trainable.items():
        assert torch.equal(parameter, engine.trainable[name]), name
    said = "neither of one that was taken back, nor of a whole batch of fewer than were declared"
    assert "step() came after" not in caplog.text, said


def test_a_train_batch_whose_step_is_refused_leaves_no_gradient_for_the_next(make_engine):
    good = language_batch(0)
    twin, engine = make_engine(build_lora(dropout=0.0)), make_engine(build_lora(dropout=0.0))
    hook = next(iter(engine.trainable.values())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(IntegrityError, match="is not finite"):
        engine.train_batch([language_batch(1)])
    hook.remove()
    assert list(engine.gradients()) == []
    assert engine.train_batch([good]) == twin.train_batch([good])
    for name, parameter in twin.trainable.items():
        assert torch.equal(parameter, engine.trainable[name]), name


def test_all_weights_cannot_be_told_to_rest_in_device_memory():
    with pytest.raises(ConfigError, match="rest: .*HOST or NVME"):
        RuntimeOptions(rest=Tier.DEVICE)


def test_an_empty_train_batch_is_refused(make_engine):
    with pytest.raises(ConfigError, match="micro-batch"):
        make_engine(build_plain()).train_batch([])


@pytest.mark.parametrize("batches", [{"input_ids": torch.ones(1, 4)}, [torch.ones(1, 4)]])
def test_a_train_batch_that_is_no_list_of_arguments_is_refused(make_engine, batches):
    with pytest.raises(ConfigError, match="train_batch: expected a list of batches, .* got (dict|Tensor)"):
        make_engine(build_plain()).train_batch(batches)


def test_a_step_of_a_closed_engine_is_refused(make_engine):
    engine = make_engine(build_lora())
    engine.backward(engine(**language_batch(0)).loss)
    engine.close()
    with pytest.raises(OffloadError, match="step: the engine is closed; nothing was done"):
        engine.step()
    assert engine.step_number == 0


def test_a_step_without_backward_is_refused(make_engine):
    engine = make_engine(build_lora())
    with pytest.raises(IntegrityError, match="without backward"):
        engine.step()
    assert engine.step_number == 0


def test_gradients_that_are_not_finite_are_refused_in_any_step_that_clips(make_engine):
    """The norm is there anyway: one infinite gradient would make every parameter NaN."""
    engine = make_engine(build_lora(), max_grad_norm=1.0)
    for step in range(4):
        engine.backward(engine(**language_batch(step)).loss)
        if step == 3:
            next(iter(engine.trainable.values())).grad.view(-1)[0] = float("inf")
            with pytest.raises(IntegrityError, match="finite"):
                engine.step()
        else:
            engine.step()
    assert all(p.isfinite().all() for p in engine.trainable.values())


@pytest.mark.parametrize("kind", ["zero", "infinite"])
def test_gradients_of_the_first_steps_are_checked(make_engine, kind):
    engine = make_engine(build_lora())
    engine.backward(engine(**language_batch(0)).loss)
    for _, gradient in engine.gradients():
        gradient.fill_(0.0 if kind == "zero" else float("inf"))
    with pytest.raises(IntegrityError, match="zero" if kind == "zero" else "not finite"):
        engine.step()


def test_a_step_that_moves_nothing_is_found(make_engine):
    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            return None

    engine = make_engine(build_plain(), optimizer=lambda parameters: Idle(parameters, lr=1.0))
    engine.backward(engine(torch.randn(2, 3, 8)).sum())
    with pytest.raises(IntegrityError, match="changed no parameter"):
        engine.step()


def test_a_model_of_which_nothing_trains_evaluates_and_says_so_when_it_should_step(make_engine):
    engine = make_engine(build_plain().requires_grad_(False))
    assert engine.optimizer is None
    engine(torch.randn(2, 3, 8))
    for action in (engine.step, lambda: engine.save_checkpoint("x"), lambda: engine.load_checkpoint("x")):
        with pytest.raises(ConfigError, match="nothing trains"):
            action()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_stepped_in_sixteen_bits_without_masters_is_named(make_engine, caplog, dtype):
    model = build_plain().requires_grad_(False).to(dtype)
    model.leave.weight.requires_grad_(True)
    make_engine(model)
    said = [record.message for record in caplog.records if "no fp32 masters" in record.message]
    assert len(said) == (1 if dtype is torch.bfloat16 else 0)
    assert all("1 tensors" in message and "leave.weight" in message for message in said)


def test_layers_that_train_have_masters_and_nothing_is_said(make_engine, caplog):
    make_engine(build_plain().requires_grad_(True).to(torch.bfloat16))
    assert "masters" not in caplog.text


def test_two_engines_on_one_store_exclude_each_other_and_the_second_model_survives(make_engine, disk_folder):
    make_engine(build_plain(), nvme=disk_folder)
    model = build_plain()
    before = state(model)
    with pytest.raises(StoreInUse):
        make_engine(model, nvme=disk_folder)
    unchanged(model, before)


def test_a_drive_that_is_too_small_writes_nothing_and_leaves_the_model(disk_folder):
    model = build_plain()
    before = state(model)
    with pytest.raises((StorageFull, PlanInfeasible)):
        offload_rt.engine(model, nvme=f"{disk_folder}:4KiB", batch_size=2, seq_len=16)
    assert list(disk_folder.glob("*/weights.bin")) == []
    unchanged(model, before)


def test_a_drive_that_is_too_small_for_the_weights_of_adapters_is_told_how_large_it_must_be(make_engine, disk_folder):
    """What is short is told of state that rests in memory: in pieces on the drive it would take more of that."""
    with pytest.raises(PlanInfeasible) as raised:
        offload_rt.engine(build_lora(), nvme=f"{disk_folder}:4KiB", batch_size=2, seq_len=16)
    needs = raised.value.needs
    assert needs.keys() == {"nvme"}
    engine = make_engine(build_lora(), nvme=f"{disk_folder}:{needs['nvme']}B")
    assert engine.report()["memory"]["nvme"] == needs["nvme"]


def test_the_limit_of_a_drive_holds_for_weights_and_layer_inputs_together(make_engine, disk_folder):
    engine = make_engine(build_plain(), nvme=disk_folder)
    stored = engine.report()["stored_bytes"]
    engine.close()
    for spare in (0, 4096):
        try:
            engine = make_engine(build_plain(), {"layer_inputs": Tier.NVME}, nvme=f"{disk_folder}:{stored + spare}B")
        except (OffloadError, PlanInfeasible):
            continue
        assert engine.report()["memory"]["nvme"] <= stored + spare


def test_every_budget_that_the_plan_accepts_is_kept_when_it_runs(make_engine, disk_folder):
    """Down to the byte: whatever `plan_streaming` predicts for a budget, the engine lives within it."""
    for host_memory in (None, "20MiB"):
        budget, plans = 10 << 20, 0
        while True:
            arguments = {"nvme": disk_folder, "host_memory": host_memory, "device_memory": budget}
            try:
                engine = make_engine(build_lora(num_layers=3), bits=4, **arguments)
                engine.backward(engine(**language_batch(0)).loss)  # the rehearsal may refuse what formulas accept
            except PlanInfeasible:
                break
            engine.step()
            assert engine.report()["memory"]["device"] <= budget
            budget = engine.plan.predicted_bytes(Tier.DEVICE) - 1
            engine.close()
            plans += 1
        assert plans > 3


def test_a_plan_for_another_workload_is_refused(make_engine, tmp_path):
    plan = make_engine(build_plain()).plan
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert make_engine(build_plain(), plan=path).plan == plan
    with pytest.raises(ConfigError, match="made for workload"):
        make_engine(build_plain(), plan=path, batch_size=3)
    data = json.loads(plan.to_json())
    data["resident"] = data["resident"][1:]
    with pytest.raises(OffloadError, match="plan"):
        make_engine(build_plain(), plan=Plan.from_json(json.dumps(data)))


def test_a_router_loss_that_would_lose_its_gradient_is_refused(make_engine):
    model = build_lora("moe", output_router_logits=True)
    engine = make_engine(model)
    with pytest.raises(UnsupportedModule, match="output_router_logits"):
        engine(**language_batch(0))


def test_tracking_what_has_no_state_is_refused(make_engine):
    with pytest.raises(ConfigError, match="state_dict"):
        make_engine(build_plain()).track("x", 5)


def test_a_failed_start_leaves_no_descriptor_and_no_thread(disk_folder):
    import os
    import threading

    def attempt():
        with pytest.raises((StorageError, PlanInfeasible)):
            offload_rt.engine(build_plain(), nvme=f"{disk_folder}:4KiB", batch_size=2, seq_len=16)

    def open_now():
        gc.collect()  # of what other tests have left
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    attempt()
    descriptors, threads = open_now()
    for _ in range(3):
        attempt()
    found_descriptors, found_threads = open_now()
    assert found_descriptors <= descriptors and found_threads <= threads


def test_the_users_model_is_not_copied_over_by_a_twin(make_engine):
    """The engine works on the user's own module: its parameters are the ones that the optimizer steps."""
    model = build_plain()
    twin = copy.deepcopy(model)
    engine = make_engine(model)
    assert engine.model is model
    engine.backward(engine(torch.randn(2, 3, 8)).square().sum())
    engine.step()
    assert not torch.equal(model.layers[0].scale, twin.layers[0].scale)


def with_second_adapter(seed=0):
    model = build_lora(dtype=torch.float32, dropout=0.0, seed=seed)
    model.add_adapter("second", lora(r=2, init_lora_weights=False))
    return model


def test_an_adapter_that_is_frozen_is_a_reference_without_gradients_and_refused_with_them(make_engine, disk_folder):
    """peft lets an adapter that it switches on require gradients; one made before the engine would rest for ever."""
    plain = with_second_adapter()
    engine = make_engine(with_second_adapter(), nvme=disk_folder)
    batch = language_batch(0)
    for model in (plain, engine.model):
        model.set_adapter("second")
    with torch.no_grad():
        assert torch.equal(engine(**batch).loss, plain(**batch).loss)
    with pytest.raises(UnsupportedModule, match=r"lora_A\.second\.weight was frozen when the engine was made"):
        engine(**batch)
    engine.model.set_adapter("default")
    engine.backward(engine(**batch).loss)
    engine.step()


def test_an_adapter_that_was_added_since_is_refused_where_it_would_train(make_engine, disk_folder):
    """No optimizer has it; by itself, it would have autograd save weights in slots that others use by then."""
    engine = make_engine(build_lora(dtype=torch.float32), nvme=disk_folder)
    batch = language_batch(0)
    engine.model.add_adapter("late", lora(r=2))
    engine.backward(engine(**batch).loss)
    for active in ("late", ["default", "late"]):
        engine.model.base_model.set_adapter(active)
        with pytest.raises(UnsupportedModule, match=r"late\.weight requires a gradient and was not there"):
            engine(**batch)
        with torch.no_grad():
            engine(**batch)


def test_an_adapter_that_was_added_since_to_other_modules_is_refused_too(make_engine):
    """PEFT puts a layer of its own into each one's place: nothing comes behind what there was."""
    base = build_base("llama", torch.float32, 2)
    engine = make_engine(peft.get_peft_model(base, lora(target_modules=["down_proj"])))
    batch = language_batch(0)
    engine.backward(engine(**batch).loss)
    engine.model.add_adapter("late", lora(r=2, target_modules=["gate_proj"]))
    late = [p for name, p in engine.model.named_parameters() if ".late." in name]
    stays = [id(tensor) for layer in engine._runtime.layers for tensor in layer.beside_block()]
    assert {*map(id, late)} < {*stays}, "what is saved of them for backward is put away nowhere"
    engine.model.base_model.set_adapter("late")
    with pytest.raises(UnsupportedModule, match=r"late\.weight requires a gradient and was not there"):
        engine(**batch)


def test_an_adapter_that_was_added_before_a_change_of_plans_is_no_older_than_the_engine_either(make_engine):
    engine = make_engine(build_lora(dtype=torch.float32))
    batch = language_batch(0)
    engine.model.add_adapter("late", lora(r=2))
    runtime = engine._runtime
    engine._changes.go_on_with(change_over(runtime, Change(problem=runtime.made_of.problem, plan=runtime.plan)))
    engine.backward(engine(**batch).loss)
    engine.model.base_model.set_adapter("late")
    with pytest.raises(UnsupportedModule, match=r"late\.weight requires a gradient and was not there"):
        engine(**batch)


def test_a_layer_is_walked_through_where_something_was_added_and_only_there():
    layer = nn.ModuleDict({"down": nn.Linear(2, 2), "more": nn.ModuleDict()})
    additions = Additions(layer)
    assert additions.find() == additions.find() == [] and additions.num_walks == 1
    for number in range(2):  # of the same name, in the place of one that is gone
        layer["more"]["late"] = nn.Linear(2, 2, bias=False)
        assert [name for name, _ in additions.find()] == ["more.late.weight"] and additions.num_walks == 2 + number
        assert additions.find()[0][1] is layer["more"]["late"].weight
    layer["down"].register_parameter("scale", nn.Parameter(torch.ones(2)))
    assert {name for name, _ in additions.find()} == {"more.late.weight", "down.scale"}
    del layer["more"]["late"]
    assert [name for name, _ in additions.find()] == ["down.scale"] and additions.num_walks == 5
    layer["down"].weight = nn.Parameter(torch.ones(2, 2))  # in the middle, as is what follows
    assert [name for name, _ in additions.find()] == ["down.weight", "down.scale"] and additions.num_walks == 6
    layer["down"] = nn.Sequential(layer["down"])
    assert [name for name, _ in additions.find()] == ["down.0.weight", "down.0.scale"] and additions.num_walks == 7


def test_a_cache_is_refused_where_gradients_are_taken(make_engine):
    """It would be empty: the next token would be taken for the first."""
    engine = make_engine(build_lora(dtype=torch.float32))
    engine.model.eval()
    ids = language_batch(0)["input_ids"]
    begun = engine(input_ids=ids[:, :-1], use_cache=True)
    with pytest.raises(UnsupportedModule, match=r"past_key_values: .*torch\.no_grad"):
        engine(input_ids=ids[:, -1:], past_key_values=begun.past_key_values)
    with torch.no_grad():
        begun = engine(input_ids=ids[:, :-1], use_cache=True)
        last = engine(input_ids=ids[:, -1:], past_key_values=begun.past_key_values).logits
        assert torch.allclose(last, engine(input_ids=ids).logits[:, -1:], atol=1e-5)


def test_an_empty_cache_is_not_refused(make_engine):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    windows = transformers.MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, sliding_window=4)
    base = transformers.AutoModelForCausalLM.from_config(windows)  # its cache has tensors before it has keys
    engine = make_engine(base, adapters=lora(target_modules=["q_proj"]))
    assert engine(**language_batch(0), use_cache=True).loss.requires_grad


class Clamps(PlainLayer):
    """Bounds a weight of its own before it is used, as Gemma 3n does."""

    def forward(self, hidden_BTD):
        self.up.weight.data.clamp_(-1, 1)
        return super().forward(hidden_BTD)


def test_a_layer_that_writes_to_a_quantized_weight_is_refused_and_works_unquantized(make_engine):
    for bits in (4, None):
        engine = make_engine(build_plain(Clamps, num_layers=2), bits=bits, seq_len=8)
        refused = pytest.raises(UnsupportedModule, match=r"layers\.0 writes to a quantized weight.* give bits=None")
        with refused if bits else contextlib.nullcontext():
            engine.backward(engine(torch.ones(2, 8, 8)).sum())
            engine.step()


class Carried:
    """What autograd cannot see through."""

    def __init__(self, hidden_BTD):
        self.hidden_BTD = hidden_BTD


class Wraps(nn.Module):
    """Takes a tensor or an object, gives a tensor or an object."""

    def __init__(self, gives):
        super().__init__()
        self.linear, self.scale, self.gives = nn.Linear(32, 32), nn.Parameter(torch.ones(32)), gives

    def forward(self, given):
        hidden_BTD = given.hidden_BTD if isinstance(given, Carried) else given
        return self.gives(hidden_BTD + self.linear(hidden_BTD) * self.scale)


@pytest.mark.parametrize("gives, does", [(Carried, "returns"), (torch.clone, "is called with")])
def test_tensors_inside_objects_are_refused_as_they_would_get_no_gradient(make_engine, gives, does):
    model = build_plain(Wraps, num_layers=2, gives=gives)
    engine = make_engine(model)
    given = torch.randn(2, 4, 32, requires_grad=True)
    with pytest.raises(UnsupportedModule, match=f"Wraps {does} a Carried"):
        model.layers[0](Carried(given) if does == "is called with" else given)
    assert engine.step_number == 0


def test_an_adapter_that_the_drive_has_no_room_for_is_a_typed_error(make_engine, disk_folder, monkeypatch):
    model = build_lora()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    engine = make_engine(model)
    with pytest.raises(StorageFull, match=r"out: the adapter could not be written: .*ENOSPC"):
        engine.save_pretrained(disk_folder / "out")
