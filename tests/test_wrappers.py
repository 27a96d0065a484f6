"""Data-parallel wrappers around a model that an engine manages: refused where they first look at it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from offload_rt.errors import ConfigError
from tests.conftest import PlainLayer, build_plain


@pytest.fixture
def group(tmp_path):
    """One process, as a launcher would have begun it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def engine(make_engine, disk_folder):
    return make_engine(build_plain(num_layers=2), seq_len=8, nvme=disk_folder)


def asked_by(name, of):
    """A model whose parameters somebody in the Python module `name` asks for."""
    exec("def ask(model): return list(model.parameters())", module := {"__name__": name})
    return lambda: module["ask"](of)


def train(engine):
    loss = engine(torch.ones(2, 8, 8)).square().mean()
    engine.backward(loss)
    engine.step()


def test_what_spreads_a_model_over_processes_is_refused_and_leaves_it_as_it_was(engine, group):
    layer, whole = engine.model.layers[0], engine.model
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    parameters, kinds = dict(whole.named_parameters()), [type(module) for module in whole.modules()]
    for name, wrap in (
        ("DistributedDataParallel", lambda: DistributedDataParallel(whole)),
        ("DistributedDataParallel", lambda: DistributedDataParallel(layer)),
        ("FullyShardedDataParallel", lambda: FullyShardedDataParallel(whole, device_id=torch.device("cpu"))),
        (
            "FullyShardedDataParallel",
            lambda: FullyShardedDataParallel(
                whole, auto_wrap_policy=ModuleWrapPolicy({PlainLayer}), device_id=torch.device("cpu")
            ),
        ),
        ("fully_shard", lambda: fully_shard(layer, mesh=mesh)),
        ("fully_shard", lambda: fully_shard(whole, mesh=mesh)),
        ("DeepSpeed", asked_by("deepspeed.runtime.engine", whole)),
        ("DataParallel", asked_by("torch.nn.parallel.data_parallel", whole)),
    ):
        advice = "sees several GPUs: .*CUDA_VISIBLE_DEVICES=0" if name == "DataParallel" else "no torchrun"
        with pytest.raises(ConfigError, match=f"^{name}: .*{advice}.* engine.model itself"):
            wrap()
    assert dict(whole.named_parameters()) == parameters and [type(module) for module in whole.modules()] == kinds
    train(engine)
    assert engine.step_number == 1


def test_others_ask_as_ever_and_so_does_everybody_once_the_engine_is_closed(engine, group):
    model = engine.model
    assert asked_by("deepspeedy", model)() == list(model.parameters()) == [p for _, p in model.named_parameters()]
    assert isinstance(DistributedDataParallel(nn.Linear(2, 2)), nn.Module)
    engine.close()
    assert not any("named_parameters" in vars(module) for module in model.modules())
    assert asked_by("deepspeed", model)() == list(model.parameters())
