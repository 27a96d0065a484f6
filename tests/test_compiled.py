"""`torch.compile` around a model that an engine manages ends in one sentence of ours; what is left out of it works."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from offload_rt.errors import ConfigError
from offload_rt.guards import compiling
from tests.conftest import build_plain

PROGRAM = """
import torch
from offload_rt._engine import Engine
from tests.conftest import build_plain

engine = Engine(build_plain(), batch_size=2, seq_len=8, device_memory="64MiB")
batch = torch.ones(2, 8, 8)

def calls(batch):
    return engine.model(2 * batch) + 1

for fullgraph in (False, True):
    for what in (engine.model, calls):
        torch._dynamo.reset()
        try:
            torch.compile(what, fullgraph=fullgraph, backend="eager")(batch)
        except Exception as error:
            print(type(error).__name__, "the compiler would trace how an engine moves weights" in str(error))
torch._dynamo.reset()
plain = torch.compiler.disable(engine.model)
compiled = torch.compile(lambda batch: plain(2 * batch) + 1, backend="eager")
print(torch.equal(compiled(batch), calls(batch)))
engine.close()
"""


@pytest.mark.full
def test_the_compiler_meets_a_refusal_that_says_what_to_do_and_not_an_error_of_its_own():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "TORCHDYNAMO_DISABLE": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["ConfigError True"] * 2 + ["Unsupported True"] * 2 + ["True"]


def test_a_call_is_refused_while_a_compiler_looks_at_frames_and_before_any_other_hook(make_engine, monkeypatch):
    engine = make_engine(build_plain(num_layers=1), seq_len=8)
    batch, seen = torch.ones(2, 8, 8), []
    with monkeypatch.context() as now:
        now.setattr(compiling, "_compiler", lambda: print)
        now.setattr(engine._changes, "begin_call", lambda **_: seen.append("begun"))
        with pytest.raises(ConfigError, match=r"^compile: .* from code that is not compiled"):
            engine.model(batch)
        assert not seen
    engine(batch)
    engine.close()
    assert not engine.model._forward_pre_hooks
