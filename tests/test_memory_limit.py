"""A kernel memory limit below the size of what is trained: the run survives in it, and a plain one would not.

The limit is a memory cgroup (v1 or v2), which counts everything the process touches, page cache included.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.limited_training import STEPS, Shape, adamw, model, train
from tests.tiny_training import Plain

LIMIT_BYTES = 448 << 20
WIDTH, INNER, LAYERS = 1024, 8192, 15
"""15 layers of 32 MiB in bf16: 480 MiB of frozen weights."""

CHILD = """
import json, os, sys
from pathlib import Path
open(sys.argv[1], "w").write(str(os.getpid()))  # into the cgroup, before torch is imported
import torch
torch.set_num_threads(1)
from torch import nn
import offload_rt

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear({width}, {inner}, bias=False).requires_grad_(False)
        self.down = nn.Linear({inner}, {width}, bias=False).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones({width}))
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x))) * self.gain.to(x.dtype)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range({layers})])
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()

with torch.device("meta"):
    model = Model().to(torch.bfloat16)
for layer in model.layers:  # what trains is real
    layer.gain = nn.Parameter(torch.ones({width}))
if sys.argv[4] == "offload_rt":
    engine = offload_rt.engine(
        model, checkpoint=sys.argv[2], nvme=sys.argv[3], device_memory="160MiB", batch_size=1, seq_len=8, lr=1e-2)
    losses = []
    for step in range(2):
        torch.manual_seed(step)
        loss = engine(torch.randn(1, 8, {width}, dtype=torch.bfloat16))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    print(json.dumps(dict(losses=losses, report=engine.report()), default=str))
    engine.close()
else:
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(1)  # touches every page
"""


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """The `cgroup.procs` file of a new memory cgroup, or a skip that says why there is none."""
    v1 = Path("/sys/fs/cgroup/memory")
    root, knob = (v1, "memory.limit_in_bytes") if v1.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
    group = root / f"offload_rt-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / knob).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):  # no swap, where it is accounted for
            (group / ("memory.memsw.limit_in_bytes" if root == v1 else "memory.swap.max")).write_text(
                str(limit_bytes) if root == v1 else "0"
            )
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield group / "cgroup.procs"
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def write_checkpoint(path: Path) -> None:
    """A safetensors file of all layers, written without holding them."""
    header: dict[str, object] = {}
    offset = 0
    for layer in range(LAYERS):
        for name, shape in (("up", [INNER, WIDTH]), ("down", [WIDTH, INNER])):
            end = offset + 2 * WIDTH * INNER
            header[f"layers.{layer}.{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header).encode()
    weight = (torch.randn(INNER * WIDTH, generator=torch.Generator().manual_seed(0)) * 0.01).to(torch.bfloat16)
    raw = weight.view(torch.uint8).numpy().data
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(2 * LAYERS):
            file.write(raw)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_child(procs: Path, checkpoint: Path, nvme: Path, how: str) -> subprocess.CompletedProcess[str]:
    program = CHILD.format(width=WIDTH, inner=INNER, layers=LAYERS)
    return subprocess.run(
        [sys.executable, "-c", program, str(procs), str(checkpoint), str(nvme), how],
        capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip


def test_a_model_larger_than_the_memory_limit_trains_in_it(tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.safetensors"
    write_checkpoint(checkpoint)
    (tmp_path / "nvme").mkdir()
    with memory_cgroup(LIMIT_BYTES) as procs:
        finished = run_child(procs, checkpoint, tmp_path / "nvme", "offload_rt")
        assert finished.returncode == 0, finished.stderr[-2000:]
        found = json.loads(finished.stdout.splitlines()[-1])
        assert found["report"]["stored_bytes"] > LIMIT_BYTES
        assert found["report"]["bytes_read"] >= 2 * found["report"]["stored_bytes"]
        assert all(loss == loss for loss in found["losses"])
        # The limit is real: holding the weights, as a plain run must, is killed by the kernel.
        plain = run_child(procs, checkpoint, tmp_path / "nvme", "plain")
        assert plain.returncode == -9, f"the limit did not hold: {plain.returncode} {plain.stderr[-500:]}"


MIB = 1 << 20
SHAPES = [
    pytest.param(Shape(512, 2048, 8, 1 << 18, budget_bytes=32 * MIB, limit_bytes=64 * MIB), id="17M"),
    pytest.param(
        Shape(1024, 4096, 18, 1 << 20, budget_bytes=160 * MIB, limit_bytes=256 * MIB), id="151M", marks=pytest.mark.full
    ),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_state_several_times_the_memory_limit_trains_in_it_to_the_bit(shape: Shape, disk_folder: Path) -> None:
    """Masters, moments, weights and gradients on the drive; the same losses as plain PyTorch without a limit."""
    checkpoint, nvme = disk_folder / "model.safetensors", disk_folder / "nvme"
    nvme.mkdir()
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model(shape).named_parameters())
    save_file(
        {n: (torch.randn(p.shape, generator=generator) / 50).to(p.dtype) for n, p in parameters.items()}, checkpoint
    )
    with memory_cgroup(shape.limit_bytes) as procs:
        finished = subprocess.run(
            [sys.executable, "-m", "tests.limited_training", str(procs), str(checkpoint), str(nvme),
             json.dumps(asdict(shape))],
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr[-2000:]
        hold = f"import os; open({str(procs)!r}, 'w').write(str(os.getpid())); b'x' * {state(shape)}"
        held = subprocess.run([sys.executable, "-c", hold], check=False)
        assert held.returncode == -9, "the limit did not hold"
    found = json.loads(finished.stdout.splitlines()[-1])
    training = found["report"]["training"]
    assert found["state"]["gradients"] == "nvme"
    on_nvme = training["state_bytes"] - training["state_in_memory_bytes"] + found["report"]["stored_bytes"]
    assert on_nvme > 0.85 * state(shape) > 3 * shape.limit_bytes
    assert training["num_steps"] == training["num_commits"] == STEPS  # the first state, and all but the last step
    assert found["report"]["bytes_read"] > STEPS * state(shape)
    twin = model(shape).to_empty(device="cpu")
    twin.load_state_dict(load_file(checkpoint))
    assert found["losses"] == train(Plain(twin, adamw), shape)


def state(shape: Shape) -> int:
    """Bytes of masters, two moments, bfloat16 weights and gradients."""
    return 16 * sum(parameter.numel() for parameter in model(shape).parameters())


LONG = """
import json, os, sys
open(sys.argv[1], "w").write(str(os.getpid()))  # into the cgroup, before torch is imported
import torch
torch.set_num_threads(1)
import peft, transformers
import offload_rt
from offload_rt.memory import heap
from offload_rt.wiring import activation_assembly
if sys.argv[3] == "guard alone":
    heap.is_tight = activation_assembly.is_tight = lambda slack_bytes, wanted_bytes: False
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=4096)
model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
with offload_rt.engine(
    model, adapters=lora, nvme=sys.argv[2], batch_size=1, seq_len=4096, lr=1e-3, device_memory=80 << 20,
) as engine:
    for step in range(2):
        ids = torch.randint(0, 1024, (1, 4096))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    print(json.dumps(engine.report()["allocator"]))
"""
LONG_LIMIT_BYTES = 390 << 20
"""Imports hold 270 MiB that are no file (without compilers, see conftest), oneDNN's kernels take 20, the plan 80."""


@pytest.mark.full
def test_a_layers_own_holes_stay_within_the_memory_limit(disk_folder: Path) -> None:
    """Layers whose tensors take 56 MiB, of 80. With a guard that only looks between layers the kernel kills it."""

    def ran(how: str) -> subprocess.CompletedProcess[str]:
        with memory_cgroup(LONG_LIMIT_BYTES) as procs:
            return subprocess.run(
                [sys.executable, "-c", LONG, str(procs), str(disk_folder), how],
                capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": os.getcwd()},
            )  # fmt: skip

    finished = ran("mapped")
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert json.loads(finished.stdout.splitlines()[-1])["mapped_from_bytes"] is not None
    assert ran("guard alone").returncode == -9
