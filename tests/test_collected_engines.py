"""What nobody closed and nobody sees any more goes when it is collected."""

from __future__ import annotations

import gc
import threading
import weakref

import torch

from offload_rt._engine import Engine
from tests.conftest import build_plain


def test_an_engine_of_all_parameters_is_collected_with_its_thread_and_its_parameters():
    gc.collect()
    before = set(threading.enumerate())
    engine = Engine(build_plain(num_layers=2).requires_grad_(True), batch_size=2, seq_len=16, lr=1e-2)
    engine.backward(engine(torch.randn(2, 4, 8)).square().mean())
    engine.step()
    seen = [weakref.ref(engine), *(weakref.ref(parameter) for parameter in engine.model.parameters())]
    threads = set(threading.enumerate()) - before
    assert any(thread.name == "offload_rt-updates" for thread in threads)
    del engine
    gc.collect()
    assert not any(each() is not None for each in seen)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
