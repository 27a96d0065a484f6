"""Results of a layer's operations in an arena: the same bits, shapes and strides, and nothing stays there."""

import copy

import pytest
import torch
from torch.nn import functional as F

from offload_rt.memory.arena import Arena
from offload_rt.memory.transients import _OUTPUTS, Transients
from offload_rt.plans import workload_sizes
from tests.conftest import build_lora, language_batch

MIB = 1 << 20
aten = torch.ops.aten


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def lies_in(arena, tensor):
    return arena.region.address <= tensor.data_ptr() < arena.region.address + arena.num_bytes


def half(*shape):
    return random(*shape, dtype=torch.bfloat16)


PLACED = {
    "mm": lambda: half(65, 33) @ half(33, 129),
    "mm of a transposed weight": lambda: F.linear(half(1, 65, 33), half(129, 33)),
    "addmm": lambda: F.linear(random(65, 33), random(129, 33), random(129)),
    "bmm": lambda: random(3, 17, 33) @ random(3, 33, 65),
    "add": lambda: half(65, 129) + half(65, 129),
    "add with alpha": lambda: torch.add(random(65, 129), random(65, 129), alpha=0.1),
    "add of two dtypes": lambda: half(65, 129) + random(65, 129),
    "sub": lambda: random(65, 129) - random(65, 129),
    "mul by a column": lambda: random(1, 65, 129) * random(1, 65, 1),
    "mul by a row": lambda: half(1, 65, 129) * half(129),
    "mul by a number": lambda: half(65, 129) * 0.1,
    "mul by a scalar tensor": lambda: half(65, 129) * torch.tensor(0.1),
    "mul by a number, as autograd does": lambda: aten.mul.Scalar(half(65, 129), 0.1),
    "div": lambda: half(65, 129) / 3,
    "neg": lambda: -half(65, 129),
    "pow": lambda: random(65, 129).pow(2),
    "sigmoid": lambda: half(65, 129).sigmoid(),
    "silu": lambda: F.silu(half(65, 129)),
    "silu_backward": lambda: aten.silu_backward(half(65, 129), half(65, 129)),
    "gelu": lambda: F.gelu(half(65, 129), approximate="tanh"),
    "gelu_backward": lambda: aten.gelu_backward(half(65, 129), half(65, 129), approximate="tanh"),
    "log_softmax": lambda: F.log_softmax(random(65, 129), -1),
    "log_softmax_backward": lambda: aten._log_softmax_backward_data(
        random(65, 129), random(65, 129), -1, torch.float32
    ),
    "nll_loss_backward": lambda: aten.nll_loss_backward(
        torch.tensor(1.0), random(65, 129), torch.arange(65), None, 2, -100, torch.tensor(65.0)
    ),
    "cast": lambda: half(65, 129).float(),
    "cast back, as autograd does": lambda: aten._to_copy(
        half(65, 129), dtype=torch.float32, layout=torch.strided, device=torch.device("cpu")
    ),
    "cast down": lambda: random(65, 129).to(torch.bfloat16),
    "clone": lambda: half(65, 129).clone(),
    "contiguous": lambda: half(129, 65).t().contiguous(),
}  # fmt: skip

NOT_PLACED = {
    "a small one": lambda: random(8, 8) + 1,
    "of integers": lambda: torch.arange(9000) * 2,
    "cast to integers": lambda: random(65, 129).to(torch.int64),
    "of a transposed operand": lambda: random(129, 65).t() * 2,
    "a clone that stays transposed": lambda: random(129, 65).t().clone(),
    "of operands that make a larger one": lambda: random(129, 1) + random(1, 65),
    "of operands that make one of a higher rank": lambda: random(65, 129) * random(3, 1, 129),
    "by an operation without a rule": lambda: random(65, 129).exp(),
    "sparse": lambda: (random(65, 129).to_sparse() * 2).to_dense(),
}


@pytest.mark.parametrize("name", [*PLACED, *NOT_PLACED])
def test_a_result_in_the_arena_is_the_one_that_pytorch_makes(name):
    operation = PLACED.get(name) or NOT_PLACED[name]
    expected = operation()
    arena = Arena("activations", MIB, poison=True)
    transients = Transients(arena, least_bytes=4096)
    with transients.placed():
        found = operation()
    assert lies_in(arena, found) is (name in PLACED)
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert torch.equal(found, expected)
    assert (transients.counters.num_placed > 0) is (name in PLACED)
    del found
    assert arena.held_bytes() == 0


def test_every_rule_is_tried_above():
    seen = set()

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func)
            return func(*args, **(kwargs or {}))

    with Seen():
        for operation in PLACED.values():
            operation()
    assert set(_OUTPUTS) <= seen


def test_an_operand_that_the_operation_would_cast_is_cast_in_the_arena():
    transients = Transients(Arena("activations", MIB), least_bytes=4096)
    left, right = half(65, 129), random(65, 129)
    with transients.placed():
        found = left + right
    assert torch.equal(found, left + right)
    assert (transients.counters.num_placed, transients.counters.placed_bytes) == (2, 2 * found.nbytes)


def test_what_finds_no_room_is_the_allocators():
    arena = Arena("activations", 8192)
    transients = Transients(arena, least_bytes=4096)
    with transients.placed():
        first = random(2, 1024) + 1
        second = random(2, 1024) + 1
    assert lies_in(arena, first) and not lies_in(arena, second)
    assert torch.equal(first, second)
    assert (transients.counters.placed_bytes, transients.counters.short_bytes) == (8192, 8192)


def test_what_is_kept_leaves_the_arena():
    arena = Arena("activations", MIB, poison=True)
    transients = Transients(arena, least_bytes=4096)
    with transients.placed():
        made = random(33, 65) + 1
    outside = random(33, 65) + 1
    assert transients.kept(outside) is outside
    kept = transients.kept(made)
    assert torch.equal(kept, outside) and not lies_in(arena, kept)
    turned = transients.kept(made.t())
    assert turned.stride() == (1, 65) and torch.equal(turned, outside.t())
    del made
    assert arena.held_bytes() == 0
    assert torch.equal(kept, outside)


def test_without_an_arena_nothing_is_placed():
    transients = Transients()
    with transients.placed():
        made = random(600, 600) + 1
    assert transients.kept(made) is made
    assert transients.counters.num_placed == 0


TOKENS = 64


def train(make_engine, model, placed_bytes, folder, **arguments):
    """Losses, gradients and weights of two steps, and the engine."""
    options = {"placed_bytes": placed_bytes, "poison": True, "head_chunk_tokens": 32}
    engine = make_engine(
        copy.deepcopy(model), options=options, bits=4, nvme=folder, batch_size=2, seq_len=TOKENS, **arguments
    )
    seen = []
    for step in range(2):
        loss = engine(**language_batch(step, rows=2, tokens=TOKENS)).loss
        assert held(engine) == 0, "no layer's output stays there until its backward"
        engine.backward(loss)
        assert held(engine) == 0
        gradients = {name: parameter.grad.clone() for name, parameter in engine.trainable.items()}
        engine.step()
        seen.append({"loss": loss.detach(), **gradients})
    return [*seen, {name: parameter.detach().clone() for name, parameter in engine.trainable.items()}], engine


def held(engine):
    arena = engine._runtime.transients.arena
    return 0 if arena is None else arena.held_bytes()


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_training_is_the_same_with_activations_in_the_arena(make_engine, disk_folder, modules_to_save, monkeypatch):
    monkeypatch.setattr(workload_sizes, "PLACED_RESULTS", 64)
    model = build_lora()
    if modules_to_save:  # the gradient of the head is a result that stays
        model.get_base_model().lm_head.weight.requires_grad_(True)
    (disk_folder / "a").mkdir(), (disk_folder / "b").mkdir()
    plain, without = train(make_engine, model, 0, disk_folder / "a")
    placed, engine = train(make_engine, model, 2048, disk_folder / "b")
    for expected, found in zip(plain, placed, strict=True):
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    counters = engine.report()["transients"]
    per_layer = counters["num_placed"] / 2 / 4
    assert per_layer > 60, "forward, recompute and backward of a layer with adapters have that many large results"
    assert counters["short_bytes"] < counters["placed_bytes"] / 4
    assert without.report()["transients"]["num_placed"] == 0
    holdings = [e.report()["holdings"]["device"] for e in (without, engine)]
    assert holdings[1]["activations"] == pytest.approx(holdings[0]["activations"] * 5 / 4, abs=4096)
    assert sum(holdings[0].values()) == pytest.approx(sum(holdings[1].values()), abs=4096), "planned bytes all the same"
    assert engine.report()["arena_bytes"] - without.report()["arena_bytes"] == holdings[1]["activations"]


def test_activations_are_an_arena_where_frozen_layers_run_whole_and_are_large(make_engine, disk_folder, monkeypatch):
    monkeypatch.setattr(workload_sizes, "PLACED_RESULTS", 1)
    small = make_engine(build_lora(), bits=4)
    assert small._runtime.transients.arena is None, "a layer of some KiB has no result of 1 MiB"
    large = make_engine(build_lora(), bits=4, options={"placed_bytes": 4096})
    assert large._runtime.transients.arena.num_bytes == large.report()["holdings"]["device"]["activations"]
    trained = make_engine(build_lora().get_base_model().requires_grad_(True), options={"placed_bytes": 4096})
    assert trained._runtime.transients.arena is None
    assert workload_sizes.allocator_slack_bytes(1000 * MIB, 280 * MIB, placed=True) == 384 * MIB
    assert workload_sizes.allocator_slack_bytes(1000 * MIB, 280 * MIB) == 816 * MIB


def test_freed_memory_is_planned_for_results_that_get_no_place(make_engine, monkeypatch):
    """The plan asks what the runtime asks: by the size of results that is set for this engine."""
    for name, value in (("PLACED_RESULTS", 1), ("ALLOCATOR_SLACK_BYTES", 0), ("SLACK_BESIDE_ACTIVATIONS_BYTES", 0)):
        monkeypatch.setattr(workload_sizes, name, value)
    slack = {}
    for placed_bytes in (0, 4096):
        engine = make_engine(build_lora(), bits=4, options={"placed_bytes": placed_bytes})
        assert (engine._runtime.transients.arena is None) is (placed_bytes == 0)
        slack[placed_bytes] = engine.plan.allocator_slack_bytes
    assert slack[0] > slack[4096] == 0


@pytest.mark.parametrize("tokens", [33, 35])
def test_the_arena_takes_no_byte_more_than_is_planned(tokens, make_engine, disk_folder, monkeypatch):
    """However the activations' bytes lie to pages, of which it is made."""
    monkeypatch.setattr(workload_sizes, "PLACED_RESULTS", 1)
    engine = make_engine(build_lora(), bits=4, seq_len=tokens, nvme=disk_folder, options={"placed_bytes": 4096})
    holdings, planned = engine.report()["holdings"]["device"], engine.plan.peak_bytes["device"]
    both = ("activations", "freed, held back by the allocator")
    assert engine._runtime.transients.arena.num_bytes == holdings["activations"] > planned["activations"]
    assert sum(holdings[item] for item in both) == sum(planned[item] for item in both)
