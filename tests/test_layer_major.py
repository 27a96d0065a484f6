"""Micro-batches that go through the model together: the bits of one after the other, and a fetch for all of them."""

import ctypes
import gc
import sys
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.layers.executor import RingExecutor
from offload_rt.layers.turns import Turns, shown
from offload_rt.plans import workload_sizes
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.activations import Action, whole_batch
from planners.plans.plan import StatePlacement, Tier
from tests.fake_device import FakeDevice
from tests.full_parity import Case, build, state_of, training_of
from tests.parity import BATCH_SIZE, FAMILIES, SEQ_LEN, in_turns, micro_batch
from tests.parity import Case as AdapterCase
from tests.parity import build as build_adapters

MICRO_BATCHES = 3
STEPS = 3


def quiet(model):
    """The same model without dropout: random numbers are drawn in another order when micro-batches go together."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def train(engine, same_length=True):
    losses = []
    for step in range(STEPS):
        batches = [micro_batch(step, index) for index in range(MICRO_BATCHES)]
        if not same_length:
            batches[1] = {name: value[:1, :7] for name, value in batches[1].items()}
        losses.append(engine.train_batch(batches))
    return losses


def options(**changes):
    return RuntimeOptions(
        rest=Tier.NVME, piece_elements=8192, record=True,
        state=StatePlacement(in_memory={}, gradients=Tier.NVME, state_slots=4, weight_slots=1, gradient_slots=1),
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("family, same_length", in_turns([name for name in FAMILIES if name != "plain"], (True, False)))
def test_full_fine_tuning_layer_by_layer_has_the_bits_of_one_after_the_other(family, same_length, tmp_path):
    found = {}
    case = Case(family, "bfloat16", "adamw", MICRO_BATCHES, "not", False, "in place")
    for layer_major in (False, True):
        folder = tmp_path / str(layer_major)
        folder.mkdir()
        with Engine(
            quiet(build(case)), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, accumulation_steps=MICRO_BATCHES,
            max_grad_norm=1e6, lr=1e-2, nvme=folder, options=options(layer_major=layer_major, num_slots=1),
        ) as engine:  # fmt: skip
            losses = train(engine, same_length)
            report = engine.report()
            assert (report["passed_on"] > 0) == layer_major
            visits = 2 * 4 - 1  # of four layers through one slot: the last one's stays for its backward
            assert report["fetches"] == STEPS * (visits if layer_major else MICRO_BATCHES * visits - 2)
            assert report["training"]["num_ahead_of_norm"] == len(training_of(engine).blocks) * (STEPS - 1)

            assert [str(race) for race in engine._runtime.recorder.check()] == []
            found[layer_major] = (losses, state_of(training_of(engine)))
    assert found[True][0] == found[False][0]
    for name, (master, weight) in found[False][1].items():
        assert torch.equal(master, found[True][1][name][0]), name
        assert torch.equal(weight, found[True][1][name][1]), name


def test_what_layers_that_train_keep_or_put_away_has_room_for_all_that_go_together(tmp_path):
    """Graphs of one micro-batch after the other are gone before the next; together, all of them wait."""
    case = Case("llama", "bfloat16", "adamw", MICRO_BATCHES, "not", False, "in place")
    ways = (whole_batch(Action.SWAP, Tier.HOST), whole_batch(Action.SWAP, Tier.NVME), whole_batch(Action.KEEP))
    chosen = {f"model.layers.{index}": way for index, way in enumerate(ways, 1)}
    booked = {"device": "kept activations", "host": "swapped activations", "nvme": "layer inputs, activations"}
    found, rooms = [], []
    for layer_major in (False, True):
        folder = tmp_path / str(layer_major)
        folder.mkdir()
        with Engine(
            build(case), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, accumulation_steps=MICRO_BATCHES, lr=1e-2,
            nvme=folder, host_memory="64MiB", options=options(layer_major=layer_major, activations=chosen),
        ) as engine:  # fmt: skip
            losses = train(engine)
            report = engine.report()
            found.append((losses, state_of(training_of(engine))))
            rooms.append([report["holdings"][tier][name] for tier, name in booked.items()])
        by_tier = report["tokenwise"]["bytes_by_group"]
        assert all(by_tier[f"chunk in {tier.value}"] > 0 for tier in Tier)
        assert report["recomputes"] == STEPS * MICRO_BATCHES and report["tokenwise"]["no_room_bytes"] == 0
    assert rooms[1] == [MICRO_BATCHES * num_bytes for num_bytes in rooms[0]]
    assert found[0][0] == found[1][0]
    for name, (master, weight) in found[0][1].items():
        assert torch.equal(master, found[1][1][name][0]) and torch.equal(weight, found[1][1][name][1]), name


@pytest.fixture
def autograd_has_threads(monkeypatch):
    """Runs backward passes as torch does for a GPU: on another thread, unless the calling one is told to do it."""
    here = torch.Tensor.backward
    ran = []

    def backward(loss, *args, **kwargs):
        if not torch._C._is_multithreading_enabled():
            return here(loss, *args, **kwargs)
        ran.append(loss)
        with ThreadPoolExecutor(1) as autograd:
            return autograd.submit(here, loss, *args, **kwargs).result()

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return ran


@pytest.fixture
def misses(monkeypatch):
    """Of each prefetch that missed: what was wanted, what waited for room, who had it, and what all threads did."""
    demand, noted = RingExecutor._demand, []

    def note(executor):
        leases = ", ".join(map(str, executor.arena._leases.values()))
        noted.append(f"{executor._visit} missed; waiting: {list(executor._pending)}; leased: {leases}")
        seen = [one for one in gc.get_objects() if isinstance(one, ctypes.Array)]
        noted.extend(f"  {type(one).__name__} <- {type(by)}" for one in seen for by in gc.get_referrers(one))
        noted.extend("".join(traceback.format_stack(frame, 8)) for frame in sys._current_frames().values())

    def noting(executor, index):
        note(executor)
        demand(executor, index)

    monkeypatch.setattr(RingExecutor, "_demand", noting)
    return noted


def test_on_a_device_backward_passes_take_turns_too(autograd_has_threads, misses, tmp_path):
    case = Case("llama", "bfloat16", "adamw", MICRO_BATCHES, "not", False, "in place")
    found = {}
    for layer_major in (False, True):
        folder = tmp_path / str(layer_major)
        folder.mkdir()
        device = FakeDevice(late_seconds=0.0005, kernels_are_late=False)
        with Engine(
            quiet(build(case)), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, accumulation_steps=MICRO_BATCHES, lr=1e-2,
            max_grad_norm=1e6, nvme=folder, device="cpu", host_memory="64MiB",
            options=options(layer_major=layer_major, num_slots=1, poison=True, device=device),
        ) as engine:  # fmt: skip
            losses = train(engine)
            report = engine.report()
            visits = 2 * 4 - 1
            assert report["fetches"] == STEPS * (visits if layer_major else MICRO_BATCHES * visits - 2)
            assert report["passed_on"] == layer_major * STEPS * MICRO_BATCHES * 2 * 4
            assert report["prefetch_misses"] == 0, "\n".join(misses)
            assert [str(race) for race in engine._runtime.recorder.check()] == []
            found[layer_major] = (losses, state_of(training_of(engine)))
        assert len(device.threads_on_compute) >= layer_major
        device.close()
    assert len(autograd_has_threads) == STEPS * MICRO_BATCHES, "those that were not to take turns"
    assert found[True][0] == found[False][0]
    for name, (master, weight) in found[False][1].items():
        assert torch.equal(master, found[True][1][name][0]), name
        assert torch.equal(weight, found[True][1][name][1]), name


@pytest.mark.parametrize("weights, stream_edges", in_turns(("nf4", "bf16"), (False, True)))
def test_adapters_layer_by_layer_have_the_bits_of_one_after_the_other(weights, stream_edges, tmp_path):
    found = {}
    case = AdapterCase("llama", weights, MICRO_BATCHES, False, False, "from NVME")
    for layer_major in (False, True):
        with Engine(
            quiet(build_adapters(case)), bits=4 if weights == "nf4" else None, batch_size=BATCH_SIZE, seq_len=SEQ_LEN,
            accumulation_steps=MICRO_BATCHES, lr=1e-2, nvme=tmp_path,
            options=RuntimeOptions(
                layer_major=layer_major, num_slots=1, head_chunk_tokens=8, layer_inputs=Tier.NVME,
                stream_edges=stream_edges,
            ),
        ) as engine:  # fmt: skip
            losses = train(engine)
            found[layer_major] = (losses, {n: p.detach().clone() for n, p in engine.trainable.items()})
            assert engine.report()["loss_head"]["num_tiles"] > 0
            fetches = engine._runtime.executors[0].counters.num_fetches
            found[f"fetches {layer_major}"] = fetches
    assert found[True][0] == found[False][0]
    assert all(torch.equal(value, found[True][1][name]) for name, value in found[False][1].items())
    assert found["fetches True"] <= found["fetches False"] // 2


def test_the_rule_takes_micro_batches_together_where_layers_stream_and_memory_holds_their_inputs(tmp_path):
    case = Case("llama", "bfloat16", "adamw", MICRO_BATCHES, "not", False, "in place")
    arguments = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "lr": 1e-2}
    with Engine(
        build(case), accumulation_steps=4, nvme=tmp_path, options=RuntimeOptions(rest=Tier.NVME), **arguments
    ) as e:
        assert e.plan.layer_major
    with Engine(build(case), nvme=tmp_path, options=RuntimeOptions(rest=Tier.NVME), **arguments) as e:
        assert not e.plan.layer_major
    with Engine(build(case), accumulation_steps=4, **arguments) as e:
        assert not e.plan.layer_major, "nothing is fetched"


def test_an_error_in_one_micro_batch_ends_all_and_leaves_the_engine_usable(tmp_path, monkeypatch):
    before = set(threading.enumerate())
    monkeypatch.setattr(workload_sizes, "thread_bytes", lambda device: 5000)
    case = Case("llama", "bfloat16", "adamw", MICRO_BATCHES, "not", False, "in place")
    with Engine(
        build(case), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, accumulation_steps=MICRO_BATCHES, lr=1e-2, nvme=tmp_path,
        options=options(layer_major=True),
    ) as engine:  # fmt: skip
        batches = [micro_batch(0, index) for index in range(MICRO_BATCHES)]
        wrong = [dict(batch) for batch in batches]
        wrong[1]["input_ids"] = wrong[1]["input_ids"] + 10_000
        with pytest.raises(IndexError):
            engine.train_batch(wrong)
        assert engine.step_number == 0
        engine.train_batch(batches)
        assert engine.step_number == 1
        theirs = [thread for thread in set(threading.enumerate()) - before if "turn" in thread.name]
        assert len(theirs) == MICRO_BATCHES
        assert engine.report()["holdings"]["device"]["workspaces of other micro-batches"] == 12288, "2 * 5000"
    assert not any(thread.is_alive() for thread in theirs)


def test_calls_take_turns_in_their_order_and_what_they_changed_is_taken_away_meanwhile():
    turns, log, value = Turns(), [], ["nobody"]

    def call(name):
        with shown(lambda: value.__setitem__(0, name), lambda: value.__setitem__(0, "nobody")):
            for round_ in range(2):
                log.append((round_, name, value[0]))
                turns.pass_on()
        return name

    assert turns.run([lambda name=name: call(name) for name in "abc"]) == ["a", "b", "c"]
    assert log == [(round_, name, name) for round_ in range(2) for name in "abc"]
    assert value == ["nobody"] and not turns.active
    turns.pass_on()  # outside: nothing


def test_the_threads_of_calls_stay_for_the_next_ones_until_they_are_closed():
    turns, threads = Turns(), []

    def call():
        threads.append(threading.current_thread())
        turns.pass_on()

    for num_calls in (3, 3, 2):
        turns.run([call] * num_calls)
    assert len(set(threads)) == 3 and len(threads) == 8
    turns.run([call] * 4)
    assert len(set(threads[8:])) == 4, "all of them wait for one another"
    turns.close()
    assert not any(thread.is_alive() for thread in threads)
    turns.run([call])
    turns.close()


def test_kept_threads_follow_the_caller_to_another_number_of_threads_of_torch():
    """Which decides how sums are divided, and so the bits."""
    turns, before = Turns(), torch.get_num_threads()
    try:
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            assert turns.run([torch.get_num_threads] * 2) == [number] * 2
    finally:
        torch.set_num_threads(before)
        turns.close()


def interrupted(began):
    """What waits for a call, and is interrupted when that has begun."""

    def result(future, timeout=None):
        assert began.wait(10)
        raise KeyboardInterrupt

    return result


def without_threads(began):
    """What begins calls, where the system has no thread for the second."""
    submit = ThreadPoolExecutor.submit

    def begin(pool, run, one, index, call):
        if index:
            assert began.wait(10)
            raise RuntimeError("can't start new thread")
        return submit(pool, run, one, index, call)

    return begin


@pytest.mark.parametrize(
    "owner, name, patch, error",
    [(Future, "result", interrupted, KeyboardInterrupt), (ThreadPoolExecutor, "submit", without_threads, RuntimeError)],
)
def test_calls_end_where_they_pass_on_once_their_caller_has_failed(monkeypatch, owner, name, patch, error):
    turns, began, is_over = Turns(), threading.Event(), threading.Event()

    def call():
        began.set()
        for _ in range(10_000):
            if is_over.is_set():
                return
            turns.pass_on()

    try:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, patch(began))
            with pytest.raises(error):
                turns.run([call] * 3)
        assert not turns.active
        assert turns.run([lambda: 1, lambda: 2]) == [1, 2]
    finally:
        is_over.set()
        turns.close()
