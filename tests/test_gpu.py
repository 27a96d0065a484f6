"""What only a GPU can show: the kernels' bits, the leases of device memory, the order of real streams, parity.

Skipped where torch finds no GPU. `benchmarks/gpu.py` runs it before it measures anything.
"""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload_rt import arguments
from offload_rt._engine import Engine
from offload_rt.adamw import cpu_adam_torch
from offload_rt.adamw.cpu_adam import AdamW
from offload_rt.checkpoint.values import pack_values, unpack_values
from offload_rt.cli.main import main
from offload_rt.config import EngineConfig
from offload_rt.errors import ConfigError
from offload_rt.layers.discover import find_blocks
from offload_rt.layers.executor import RingExecutor
from offload_rt.memory.arena import Arena
from offload_rt.memory.cuda_memory import beside_plan_bytes, settle
from offload_rt.meter import DEVICE_TO_HOST, HOST_TO_DEVICE
from offload_rt.optimizer.arrivals import Arrivals
from offload_rt.optimizer.landing import Landing
from offload_rt.optimizer.pieces import TrainedParameter, trained_block
from offload_rt.optimizer.rules import AdamWRule
from offload_rt.plans import training_seconds
from offload_rt.plans.planning_budgets import passing_of
from offload_rt.profiling import bench, calibrate
from offload_rt.profiling.block_profile import profile_layer
from offload_rt.profiling.chunk_profile import profile_chunked_layer
from offload_rt.profiling.edge_profile import profile_head
from offload_rt.profiling.workbench import workbench_of
from offload_rt.quantized import codec, nf4_products
from offload_rt.running.replanning import ADOPT_STEPS, WINDOW_STEPS
from offload_rt.running.steps import WARM_STEPS
from offload_rt.tiering.tiers import HostResidence, NvmeResidence, Tiers
from offload_rt.transfers.links import Links
from offload_rt.transfers.recording import Recorder
from offload_rt.transfers.streams import COMPUTE
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.errors import PlanInfeasible
from planners.plans.activations import Action, ActivationPolicy, Chunk, whole_batch
from planners.plans.placement import Tier
from planners.plans.plan import DecodeScope, Ring, StatePlacement
from planners.plans.schedule import walk
from planners.problems.hardware import load_hardware
from planners.rule.streaming_problem import Cuts
from tests import adapter_tiers as tiers_of
from tests import full_parity as full
from tests import gpu_planning
from tests import tiny_training as tiny
from tests.changing_plans import plan_of, propose, results
from tests.conftest import build_base, build_lora, language_batch
from tests.parity import (
    BATCH_SIZE,
    SEQ_LEN,
    STEPS,
    Case,
    Trace,
    build,
    decode_in_place,
    engine_of,
    micro_batch,
    run_steps,
)
from tests.test_calibrate import TINY
from tests.test_device_engine import CASES
from tests.test_full_parity import ieee_square_root  # noqa: F401 - a fixture of this module too
from tests.test_parity import differences
from tests.test_streams import FakeStore
from tests.test_tied_edges import tied
from tests.test_tiled_linear import NUM_TILES, TILE_ROWS, TOKENS, batch
from tests.test_tiled_linear import model as untied
from tests.test_tracing import num_bytes, overlap, slices
from tests.test_triton import DTYPES, adam_state, same_bits, weights_of
from tests.tokenwise import errors, policy, waiting_in

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

EMULATED = torch.cuda.is_available() and torch.cuda.get_device_name() == "emulated GPU"
"""Kernels are interpreted there: large ones take minutes."""
MIB = 1 << 20
LONG = 20_000_000
"""Clock cycles of a kernel that only waits: about 10 ms."""


@pytest.fixture(autouse=True)
def context_is_whole():
    """Ends the run behind a test that broke the GPU's context: all others would fail, and bury what broke it."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"a test has broken the context of the GPU, it is the last one here: {error}", returncode=1)


@pytest.fixture
def device():
    from offload_rt.transfers.device_cuda import CudaDevice, find_device

    torch.cuda.synchronize()
    return CudaDevice(find_device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_elements", [0, 1, 7, 63, 64, 65, 4095, 4096, 4097, 16385, 100_003, 5_000_011])
def test_decode_on_the_gpu_agrees_with_the_cpus_twin(dtype: torch.dtype, num_elements: int) -> None:
    from offload_rt.quantized import nf4_triton

    for scale in (1.0, 1e-5, 1e-37, 1e30):
        blob = codec.encode(weights_of(num_elements, scale))
        before = nf4_triton.counters.decoded_elements
        found = codec.decode(blob.cuda(), (num_elements,), dtype)
        assert nf4_triton.counters.decoded_elements - before == num_elements
        assert same_bits(found.cpu(), codec.decode(blob, (num_elements,), dtype, backend="torch"))


def test_transposed_decode_on_the_gpu_agrees_with_the_cpus_twin() -> None:
    blob = codec.encode(weights_of(96 * 130))
    outs = [torch.empty(130, 96, dtype=torch.bfloat16, device=device) for device in ("cpu", "cuda")]
    codec.decode_transposed_into(blob, 96, 130, outs[0], backend="torch")
    codec.decode_transposed_into(blob.cuda(), 96, 130, outs[1])
    assert same_bits(outs[0], outs[1].cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, columns", [(65, 136), *([] if EMULATED else [(4096, 4096), (1000, 11008)])])
def test_the_fused_product_on_the_gpu_is_exact_and_deterministic(rows: int, columns: int, dtype: torch.dtype) -> None:
    """By the check that every way passes before the engine takes it; and its weights are the twin's, but for the sign
    of zeros, which a sum has not.
    """
    ways = {"fused": nf4_products.find_ways()["fused"]}
    found = nf4_products.measure(rows, columns, dtype, torch.device("cuda"), ways, lambda call: 1.0)
    assert found.left_out == {}
    blob = codec.encode(weights_of(rows * 136))
    unit = torch.eye(136, dtype=dtype, device="cuda")
    weight = ways["fused"].product(unit, blob.cuda(), rows, None).t().contiguous()
    assert torch.equal(weight.cpu(), codec.decode(blob, (rows, 136), dtype, backend="torch"))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.95), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_elements", [1, 65, 4097, 1_000_003])
def test_adam_on_the_gpu_agrees_with_the_cpus_twin(num_elements: int, grad: torch.dtype, betas) -> None:
    from offload_rt.adamw import adam_triton

    for moments, weight_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        plain = adam_state(num_elements, grad, moments)
        ours = [tensor.cuda() for tensor in plain]
        weights = [torch.zeros(num_elements, dtype=weight_dtype, device=place) for place in ("cpu", "cuda")]
        for step in (1, 2, 1000):
            scalars = AdamW(lr=1e-2, betas=betas, eps=1e-6).scalars(step, 0.7)
            cpu_adam_torch.step(scalars, *plain, weights[0])
            adam_triton.step(scalars, *ours, weights[1])
        for one, other in zip([*plain, weights[0]], [*ours, weights[1]], strict=True):
            assert same_bits(one, other.cpu())


def test_a_slot_of_device_memory_is_leased_as_long_as_a_tensor_sees_it(device) -> None:
    arena = device.arena("d", 2 * MIB, poison=True)
    slot = arena.acquire(MIB, "a")
    assert torch.isnan(slot.tensor(torch.float32, (8,), 4096)).all(), "memory is poisoned before its first lease"
    one, other = slot.tensor(torch.uint8, (MIB,)), slot.part(4096, 8192).tensor(torch.bfloat16, (2, 2048))
    other.fill_(1.5)
    assert one[4096:4098].view(torch.bfloat16).item() == 1.5, "two tensors of a slot see the same bytes"
    assert other.data_ptr() - one.data_ptr() == 4096 and one.data_ptr() % 64 == 0
    view = other.view(-1)[5:]
    del slot, one, other
    gc.collect()
    assert arena.held_bytes() == MIB
    del view
    gc.collect()
    assert arena.held_bytes() == 0
    again = arena.acquire(MIB, "b")
    assert torch.isnan(again.tensor(torch.float32, (8,), 4096)).all(), "and after it"
    with pytest.raises(TypeError, match="no bytes that the host can read"):
        again.buffer()


def test_host_arenas_are_locked(device) -> None:
    arena = Arena("h", 64 * MIB)
    device.lock(arena.name, arena.region)
    assert (device.locked_bytes, device.pageable_bytes) == (64 * MIB, 0)
    assert arena.acquire(MIB, "h").tensor(torch.uint8, (16,)).is_pinned()


@pytest.mark.parametrize("rest", [Tier.HOST, Tier.NVME])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_late_kernels_on_real_streams_see_their_blocks(device, rest: Tier, num_slots: int) -> None:
    """Every layer waits 10 ms before it reads its block, so that the host and the copies are far ahead of it."""
    num_blocks, num_bytes = 5, 8 * MIB
    recorder = Recorder(compute=COMPUTE)
    links = Links(recorder=recorder, device=device)
    tiers = Tiers(None, None, None, unified=False, poison=True, device=device)
    arena = tiers.arena(Tier.DEVICE, "ring", num_slots * num_bytes)
    names = tuple(f"b{i}" for i in range(num_blocks))
    if rest is Tier.HOST:
        home = tiers.arena(Tier.HOST, "weights", num_blocks * num_bytes)
        residences = []
        for i, name in enumerate(names):
            slot = home.acquire(num_bytes, name)
            slot.tensor(torch.uint8, (num_bytes,)).fill_(i + 1)
            residences.append(HostResidence(slot, links))
            del slot
    else:
        staging = tiers.arena(Tier.HOST, "staging", num_slots * num_bytes)
        residences = [NvmeResidence(FakeStore(links, 0.001), n, num_bytes, links, staging) for n in names]
    ring = Ring(name="layers", blocks=names, num_slots=num_slots, slot_bytes=num_bytes, rest=rest)
    executor = RingExecutor(ring, residences, arena, recorder=recorder)
    visits = [*walk(num_blocks, training=True)] * 3
    seen = []
    for one in visits:
        slot = executor.acquire(one.block, one.phase, training=True)
        block = slot.tensor(torch.uint8, (num_bytes,))
        torch.cuda._sleep(LONG)
        seen.append(torch.stack([block.min(), block.max()]))
        del slot, block
        executor.release(one.block)
    expected = [[one.block + 1] * 2 for one in visits]
    assert torch.stack(seen).tolist() == expected
    assert recorder.check() == []
    executor.drain()
    links.close()


def gpu_plain(case: Case) -> list[Trace]:
    model = build(case)
    if case.weights == "nf4":
        decode_in_place(model)
    model = model.cuda()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(trainable.values()), lr=1e-2)

    def forward(**batch):
        return model(**{name: value.cuda() for name, value in batch.items()})

    def update() -> None:
        if case.clipping:
            torch.nn.utils.clip_grad_norm_(list(trainable.values()), 0.05)
        optimizer.step()
        optimizer.zero_grad()

    return run_steps(case.accumulation, forward, lambda loss: loss.backward(), trainable, update)


@pytest.fixture
def exact_attention():
    """Fused attention adds up its backward in no fixed order."""
    kinds = ("flash", "mem_efficient", "cudnn")
    before = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds]
    for kind in kinds:
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    yield
    for kind, was in zip(kinds, before, strict=True):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(was)


@pytest.mark.parametrize("num_tokens", [512, 2000])
def test_attention_has_the_same_bits_with_and_without_a_graph(num_tokens: int) -> None:
    """A layer's forward runs without one here, in plain PyTorch with: torch may choose its kernel, and cuDNN its plan,
    by what backward needs. With the default choice, which training has.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    size = (1, 8, num_tokens, 128)
    qkv = [torch.randn(size, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(3)]
    with torch.no_grad():
        without = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    with_graph = torch.nn.functional.scaled_dot_product_attention(*(x.requires_grad_() for x in qkv), is_causal=True)
    assert same_bits(without, with_graph.detach())


@pytest.mark.parametrize("stream_edges", [True, None])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_on_the_gpu_is_bit_equal_to_plain_pytorch(
    case: Case, stream_edges: bool | None, tmp_path: Path, exact_attention: None
) -> None:
    expected = gpu_plain(case)
    assert differences(expected, gpu_plain(case)) == [], "plain PyTorch does not repeat itself here"
    engine = engine_of(
        case, device="cuda", device_memory="4GiB", host_memory="256MiB",
        nvme=tmp_path if case.place == "from NVME" else None,
        options=RuntimeOptions(
            layer_inputs=Tier.HOST, num_slots=2, stream_edges=stream_edges, record=True, poison=True,
            decode_scope=DecodeScope.LAYER if case.accumulation == 2 else None,
        ),
    )  # fmt: skip
    with engine:
        assert (
            differences(expected, run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step))
            == []
        )
        report = engine.report()
        recorder = engine._runtime.recorder
        assert recorder is not None and [str(race) for race in recorder.check()] == []
        assert report["device"].startswith("cuda:")
        assert report["prefetch_misses"] == 0
        assert report["nf4"] == "triton"
        assert report["gpu"]["pageable_bytes"] == 0
        if case.weights == "nf4":
            assert report["decodes"] > 0


FULL_PLACES = {
    "from HOST": {},
    "on NVME": {"rest": Tier.NVME, "piece_elements": 8192},
    "from HOST, half updated on the device": {"piece_elements": 4096, "device_share": 0.5},
    "on NVME, half updated on the device": {"rest": Tier.NVME, "piece_elements": 4096, "device_share": 0.5},
    "gradients on NVME": {
        "rest": Tier.NVME, "piece_elements": 8192,
        "state": StatePlacement(
            in_memory={}, gradients=Tier.NVME, state_slots=2, weight_slots=1, gradient_slots=1
        ),
    },
}  # fmt: skip
FULL_CASES = [
    full.Case("llama", "bfloat16", "adamw", 1, "rarely", False, "from HOST"),
    full.Case("qwen", "bfloat16", "adamw", 4, "rarely", True, "on NVME"),
    full.Case("gpt2", "float32", "lion", 1, "not", False, "on NVME", "put away"),
    full.Case("llama", "bfloat16", "adamw", 1, "rarely", False, "from HOST, half updated on the device", "each way"),
    full.Case("qwen", "bfloat16", "adamw bf16", 4, "rarely", True, "on NVME, half updated on the device", "each way"),
    full.Case("llama", "bfloat16", "adamw 8bit", 4, "not", False, "gradients on NVME"),
]


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_full_fine_tuning_on_the_gpu_is_bit_equal_to_plain_pytorch(
    case: full.Case, tmp_path: Path, exact_attention: None
) -> None:
    expected = full.run_plain(case, device="cuda")
    place = FULL_PLACES[case.place]
    options = RuntimeOptions(num_slots=2, layer_inputs=Tier.HOST, poison=True, **place)
    with full.make_engine(
        replace(case, place="in place"), tmp_path, device="cuda", device_memory="4GiB", host_memory="256MiB",
        nvme=bool(place), options=options,
    ) as engine:  # fmt: skip
        for step, (want, got) in enumerate(zip(expected, full.run_engine(case, engine), strict=True), 1):
            assert [f"step {step}: {name}" for name in got if not torch.equal(want[name], got[name])] == []
        report = engine.report()
        assert report["training"]["num_steps"] == full.STEPS
        assert report["prefetch_misses"] == 0
        assert full.training_of(engine).home.landing.num_copies > 0
        assert (report["training"]["num_pieces_on_device"] > 0) == ("updated on the device" in case.place)
        full.check_activations(case, engine)


@pytest.mark.parametrize("tier, layer_inputs", [(Tier.HOST, Tier.HOST), (Tier.NVME, Tier.NVME)])
def test_activations_put_away_on_the_gpu_change_no_bit(
    tier: Tier, layer_inputs: Tier, tmp_path: Path, exact_attention: None
) -> None:
    case = Case("llama", "nf4", 1, False, False, "from NVME")
    found = []
    for chosen in (None, ActivationPolicy(chunks=(Chunk(num_tokens=SEQ_LEN, action=Action.SWAP, tier=tier),))):
        with Engine(
            build(case), bits=4, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, lr=1e-2, device="cuda", host_memory="256MiB",
            nvme=tmp_path, options=RuntimeOptions(activations=chosen, layer_inputs=layer_inputs, poison=True),
        ) as engine:  # fmt: skip
            found.append(run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step))
            report = engine.report()
        if chosen is not None:
            assert report["tokenwise"]["swapped_bytes"] == report["tokenwise"]["loaded_bytes"] > 0
            assert report["tokenwise"]["refused"] == {}
    assert differences(*found) == []


def test_tracked_tensors_of_a_gpu_are_loaded_where_there_is_none() -> None:
    packed = pack_values({"average": torch.ones(3, device="cuda")}, of="a run")
    assert unpack_values(packed)["average"].device.type == "cpu"


def test_micro_batches_take_turns_on_the_gpu(tmp_path: Path, exact_attention: None) -> None:
    case = full.Case("llama", "bfloat16", "adamw", 3, "not", False, "in place")
    found = []
    for layer_major in (False, True):
        folder = tmp_path / str(layer_major)
        folder.mkdir()
        with Engine(
            full.build(case), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, accumulation_steps=3, lr=1e-2, nvme=folder,
            device="cuda", host_memory="256MiB",
            options=RuntimeOptions(rest=Tier.NVME, num_slots=1, layer_major=layer_major, piece_elements=8192),
        ) as engine:  # fmt: skip
            losses = [engine.train_batch([micro_batch(step, index) for index in range(3)]) for step in range(3)]
            report = engine.report()
            assert (report["passed_on"] > 0) == layer_major
            workspaces = report["holdings"]["device"].get("workspaces of other micro-batches", 0)
            assert (MIB < workspaces < 256 * MIB) == layer_major
            found.append((losses, full.state_of(full.training_of(engine))))
    assert found[0][0] == found[1][0]
    for name, (master, weight) in found[0][1].items():
        assert torch.equal(master, found[1][1][name][0]) and torch.equal(weight, found[1][1][name][1]), name


def test_new_weights_land_behind_long_kernels_and_before_the_next(device) -> None:
    links = Links(device=device)
    arena = Arena("landing", 2 * MIB)
    device.lock(arena.name, arena.region)
    landing = Landing(arena, MIB, links)
    weights = torch.zeros(MIB // 4, device="cuda")
    seen = []
    for value in range(8):
        torch.cuda._sleep(LONG)
        seen.append(torch.stack([weights.min(), weights.max()]))
        with landing.room_for(weights) as new:
            new.fill_(value + 1)
        landing.order()
    assert torch.stack(seen).tolist() == [[value, value] for value in range(8)]
    links.close()


def test_gradients_of_long_kernels_arrive_whole(device) -> None:
    links = Links(device=device)
    arena = Arena("gradients", 8 * MIB, poison=True)
    device.lock(arena.name, arena.region)
    parameters = [TrainedParameter("p", torch.nn.Parameter(torch.zeros(MIB // 4, device="cuda")), None)]
    blocks = [trained_block(f"b{index}", parameters, AdamWRule("float32"), accumulates=False) for index in range(8)]
    arrivals, found, under_way = Arrivals(links, None), [], []
    for index, block in enumerate(blocks):
        torch.cuda._sleep(LONG)
        gradient = torch.full((MIB // 4,), float(index), device="cuda")
        place = arena.acquire(MIB, block.name)
        under_way.append(arrivals.start(block, {0: gradient}, {0: place}, lambda one: found.append(one[0].clone())))
        del gradient, place  # what is computed next takes its memory, as far as the device lets it
        torch.full((MIB // 4,), -1.0, device="cuda")
    for arrival in under_way:
        arrival.settle(links.wait)
    assert [(float(one.min()), float(one.max())) for one in found] == [(float(i), float(i)) for i in range(8)]
    links.close()


def test_a_steady_step_takes_nothing_from_the_driver(tmp_path: Path) -> None:
    case = Case("llama", "nf4", 1, False, False, "from HOST")
    engine = Engine(
        build(case), bits=4, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, device="cuda", host_memory="256MiB", lr=1e-2,
        options=RuntimeOptions(num_slots=2, layer_inputs=Tier.HOST, stream_edges=True),
    )  # fmt: skip
    with engine:
        counts = []
        for _ in range(3):
            run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
            counts.append((torch.cuda.memory_stats()["num_device_alloc"], engine.report()["gpu"]["locked_bytes"]))
    assert counts[2] == counts[1]
    assert STEPS > 1


def test_a_budget_holds_for_all_that_the_process_has_of_the_gpu() -> None:
    case, budget_bytes = Case("llama", "nf4", 1, False, False, "from HOST"), 2 << 30
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with Engine(
        build(case), bits=4, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, device="cuda", device_memory=budget_bytes,
        host_memory="256MiB", lr=1e-2, options=RuntimeOptions(num_slots=2, stream_edges=True),
    ) as engine:  # fmt: skip
        run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        report = engine.report()
        capacity_bytes = engine._runtime.tiers.account(Tier.DEVICE).capacity_bytes
    beside_bytes = report["gpu"]["beside_allocator_bytes"]
    assert 64 * MIB < beside_bytes < budget_bytes
    assert capacity_bytes is not None and capacity_bytes + 64 * MIB < budget_bytes
    assert report["gpu"]["reserved_peak_bytes"] + beside_bytes <= budget_bytes


def test_a_model_on_another_stream_is_refused() -> None:
    case = Case("plain", "bf16", 1, False, False, "from HOST")
    engine = Engine(build(case), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, device="cuda", host_memory="256MiB")
    ids = torch.zeros(1, 4, dtype=torch.long, device="cuda")
    with engine, torch.cuda.stream(torch.cuda.Stream()):
        for called in (engine, engine.model, lambda **inputs: engine.train_batch([inputs])):
            with pytest.raises(ConfigError, match="the model runs on"):
                called(input_ids=ids, labels=ids)


def test_a_graph_is_not_captured_of_a_model_that_an_engine_manages(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("plain", "bf16", 1, False, False, "from HOST")
    engine = Engine(build(case), batch_size=BATCH_SIZE, seq_len=SEQ_LEN, device="cuda", host_memory="256MiB")
    ids = torch.zeros(1, 4, dtype=torch.long, device="cuda")
    with engine:
        for where in ("cuda", "cpu"):
            there = ids.to(where)
            with monkeypatch.context() as now:
                now.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                for called in (engine, lambda **inputs: engine.train_batch([inputs])):
                    with pytest.raises(ConfigError, match=r"^a CUDA graph is being captured"):
                        called(input_ids=there, labels=there)
                if where == "cuda":
                    with pytest.raises(ConfigError, match=r"^a CUDA graph is being captured"):
                        engine.model(input_ids=there, labels=there)
        engine.backward(engine(input_ids=ids, labels=ids).loss)


def test_the_most_that_was_reserved_is_known_when_a_meter_has_begun_anew(device) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    kept_bytes = torch.cuda.memory_reserved()  # workspaces of products, of each thread that was there
    torch.empty(kept_bytes + 64 * MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    with device.meter():
        pass
    assert device.report()["reserved_peak_bytes"] >= kept_bytes + 64 * MIB > torch.cuda.max_memory_reserved()


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


def within(engine: Engine, budget_bytes: int) -> bool:
    """Whether what torch's allocator has reserved at most, and what CUDA has beside it, is within the budget."""
    gpu = engine.report()["gpu"]
    return 0 < gpu["reserved_peak_bytes"] + gpu["beside_allocator_bytes"] <= budget_bytes


def gradients_of(model: torch.nn.Module, names: set[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = model.to("cuda", dtype)
    model(**on_gpu(batch())).loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if name in names}


@pytest.mark.parametrize("made", [tied, untied], ids=["tied", "untied"])
def test_a_vocabulary_by_rows_and_tiles_on_the_gpu_gives_one_result_and_is_as_exact_as_plain(
    made, tmp_path: Path, exact_attention: None
) -> None:
    names = {name for name, p in made().named_parameters() if p.requires_grad}
    exact, plain = (gradients_of(made(), names, dtype) for dtype in (torch.float64, torch.bfloat16))
    found = []
    for rest in (Tier.HOST, Tier.NVME):
        with Engine(
            made(), batch_size=2, seq_len=TOKENS, lr=1e-2, device="cuda", device_memory="4GiB", host_memory="256MiB",
            nvme=tmp_path if rest is Tier.NVME else None,
            options=RuntimeOptions(
                stream_edges=True, head_tile_rows=TILE_ROWS, head_chunk_tokens=16, layer_inputs=Tier.HOST, record=True,
                poison=True,
            ),
        ) as engine:  # fmt: skip
            losses = []
            for step in range(2):
                loss = engine(**batch(step)).loss
                engine.backward(loss)
                if not step:
                    gradients = {name: gradient.double().clone() for name, gradient in engine.gradients()}
                engine.step()
                losses.append(loss.item())
            report, runtime = engine.report(), engine._runtime
            assert runtime.recorder is not None and [str(race) for race in runtime.recorder.check()] == []
            assert runtime.loss_head is not None
            assert runtime.loss_head.counters.num_vocabulary_tiles == 2 * 2 * NUM_TILES
            assert report["lookups"]["num_rows"] > 0 and (report["lookups"]["page_bytes"] > 0) == (rest is Tier.NVME)
            found.append((losses, gradients, {name: p.detach().clone() for name, p in engine.trainable.items()}))
    (losses, gradients, parameters), other = found
    assert losses == other[0]
    assert all(torch.equal(parameters[name], other[2][name]) for name in parameters)

    def error(of: dict[str, torch.Tensor]) -> float:
        return float(sum((of[name] - exact[name]).square().sum() for name in names)) ** 0.5

    assert 0 < error(gradients) <= 1.2 * error(plain)


CHUNKED = {
    "swapped to HOST": (policy(1.0, 2, num_tokens=SEQ_LEN), Tier.HOST, (Tier.HOST,)),
    "one to HOST, one to NVME": (policy(1.0, 2, num_tokens=SEQ_LEN), Tier.NVME, (Tier.HOST, Tier.NVME)),
    "one swapped, one again": (policy(0.5, 2, num_tokens=SEQ_LEN), Tier.HOST, (Tier.NVME,)),
    "kept": (policy(1.0, 2, num_tokens=SEQ_LEN, action=Action.KEEP), Tier.DEVICE, (Tier.HOST,)),
}


def test_chunks_of_tokens_on_the_gpu_give_the_same_bits_wherever_they_wait(
    tmp_path: Path, exact_attention: None
) -> None:
    found = {}
    for name, (chosen, layer_inputs, tiers) in CHUNKED.items():
        model = build_lora("llama", torch.bfloat16, num_layers=3, dropout=0.0).train()
        with Engine(
            model, batch_size=2, seq_len=SEQ_LEN, lr=1e-2, device="cuda", device_memory="4GiB", host_memory="256MiB",
            nvme=tmp_path,
            options=RuntimeOptions(
                activations=waiting_in(chosen, *tiers), layer_inputs=layer_inputs, rest=Tier.NVME, num_slots=1,
                record=True, poison=True,
            ),
        ) as engine:  # fmt: skip
            trace = {}
            for step in range(2):
                loss = engine(**language_batch(step, tokens=SEQ_LEN)).loss
                engine.backward(loss)
                trace[f"loss {step}"] = loss.detach().clone()
                trace |= {f"{name} {step}": gradient.clone() for name, gradient in engine.gradients()}
                engine.step()
            report, recorder = engine.report(), engine._runtime.recorder
            assert recorder is not None and [str(race) for race in recorder.check()] == []
            assert report["tokenwise"]["refused"] == {} and report["tokenwise"]["num_passes"] == 2 * 3, name
            assert report["tokenwise"]["swapped_bytes"] == report["tokenwise"]["loaded_bytes"], name
            assert (report["tokenwise"]["swapped_bytes"] > 0) == (name != "kept"), name
            found[name] = trace
    expected = found.pop("kept")
    for name, trace in found.items():
        assert [key for key in expected if not torch.equal(expected[key], trace[key])] == [], name
    plain = build_lora("llama", torch.bfloat16, num_layers=3, dropout=0.0).train().cuda()
    plain(**on_gpu(language_batch(0, tokens=SEQ_LEN))).loss.backward()
    gradients = {f"{name} 0": p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert max(errors({name: expected[name] for name in gradients}, gradients).values()) < 4e-2


ON_NVME = {
    "state": StatePlacement(in_memory={"adapters": 2}, gradients=Tier.HOST, state_slots=3), "piece_elements": 1024,
    "device_share": 1.0,
}  # fmt: skip


def adapters_on_gpu(case: tiers_of.Case, place: str, folder: Path) -> Engine:
    folder.mkdir()
    options = {"layer_inputs": Tier.HOST, "num_slots": 2, "poison": True, **(ON_NVME if place == "on NVME" else {})}
    return tiers_of.make_engine(
        case, folder, place="on the GPU", device="cuda", device_memory="4GiB", host_memory="256MiB",
        nvme=place == "on NVME", options=options,
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", ["default", "adamw kernel"])
def test_state_of_adapters_goes_through_the_gpu_and_by_checkpoints_from_place_to_place(
    optimizer: str, tmp_path: Path
) -> None:
    """Saved after each step by one engine, gone on with by the next, whose state rests elsewhere."""
    case = tiers_of.Case("plain", "fp32", optimizer, 1, 0.05, True, "on NVME")
    with adapters_on_gpu(case, "in memory", tmp_path / "expected") as engine:
        expected = tiers_of.Running(case, engine).steps(range(3))
    folders: list[Path] = []
    for step, place in enumerate(("in memory", "on NVME", "in memory")):
        with adapters_on_gpu(case, place, tmp_path / f"drive {step}") as engine:
            running = tiers_of.Running(case, engine)
            if folders:
                engine.load_checkpoint(folders[-1])
            assert tiers_of.unequal(expected[step : step + 1], running.steps(range(step, step + 1))) == [], place
            report = engine.report()["training"]
            assert (report is None) == (place == "in memory")
            assert report is None or report["bytes_to_device"] == report["bytes_to_host"] > 0
            folders.append(tmp_path / f"after {step}")
            engine.save_checkpoint(folders[-1])


def test_adapters_in_the_gpus_memory_have_no_8_bit_moments(tmp_path: Path) -> None:
    case = tiers_of.Case("plain", "fp32", "adamw 8bit", 1, None, False, "")
    with pytest.raises(ConfigError, match="'8bit' is stepped on the CPU alone, and adapters are on cuda:0"):
        adapters_on_gpu(case, "in memory", tmp_path / "drive")


def test_full_fine_tuning_on_the_gpu_changes_over_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def made(name: str, place: str) -> tiny.Made:
        (tmp_path / name).mkdir()
        given = {"device": "cuda", "device_memory": "4GiB", "host_memory": "64MiB", "max_grad_norm": 1e6}
        return tiny.engine(tiny.model(dropout=0.2), place, tmp_path / name, nvme=tmp_path / name, **given)

    with made("expected", "from HOST") as run:
        losses, states = [], []
        for step in range(5):
            losses += tiny.train(run, [step])
            states.append(run.state())
    with made("first", "SPECULATIVE, split") as run:
        assert tiny.train(run, range(2)) == losses[:2]
        propose(run, plan_of(run, "from HOST"))
        assert tiny.train(run, [2]) == losses[2:3]
        assert results(run) == ["changed"] and tiny.differences(run.state(), states[2]) == []
        run.save_checkpoint(tmp_path / "saved")
    with made("second", "BACKWARD, tight") as run:
        run.load_checkpoint(tmp_path / "saved")
        assert tiny.train(run, [3, 4]) == losses[3:] and tiny.differences(run.state(), states[4]) == []


def test_evaluation_and_generation_between_forward_and_backward_on_the_gpu_leave_a_step_right(
    tmp_path: Path, exact_attention: None
) -> None:
    case = Case("llama", "bf16", 1, False, False, "from NVME")
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = on_gpu(micro_batch(9, 0))["input_ids"][:1, :5]
    plain = build(case).cuda()
    with engine_of(
        case, device="cuda", device_memory="4GiB", host_memory="256MiB", nvme=tmp_path,
        options=RuntimeOptions(num_slots=2, stream_edges=True, poison=True, rest=Tier.NVME),
    ) as engine:  # fmt: skip
        found = []
        for model, call in ((plain, lambda **batch: plain(**on_gpu(batch))), (engine.model, engine)):
            torch.manual_seed(3)
            loss = call(**micro_batch(0, 0)).loss
            model.eval()
            with torch.no_grad():
                between = call(**micro_batch(1, 0))
            text = model.generate(prompt, **settings)
            model.train()
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            found.append({"loss": loss, "between": between.loss, "logits": between.logits, "text": text, **gradients})
        assert found[0].keys() == found[1].keys()
        assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="Trainer spreads the plain model over them")
def test_a_trainer_on_the_gpu_trains_to_the_bits_of_the_plain_model(tmp_path: Path, exact_attention: None) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    rows = [{name: rows[0] for name, rows in language_batch(seed, rows=1).items()} for seed in range(8)]

    def run(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2,
            report_to=[], save_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = build_lora(dropout=0.0).cuda()
    expected = run(plain, torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2))
    with Engine(
        build_lora(dropout=0.0), batch_size=2, seq_len=16, lr=1e-2, accumulation_steps=2, device="cuda",
        device_memory="4GiB", host_memory="256MiB", nvme=tmp_path,
        options=RuntimeOptions(rest=Tier.NVME, num_slots=2, poison=True),
    ) as engine:  # fmt: skip
        before = engine.report()["fetches"]
        assert engine.optimizer is not None
        found = run(engine.model, engine.optimizer)
        assert engine.report()["fetches"] > before and engine.report()["prefetch_misses"] == 0
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


WIDE = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 2048}
WHAT_TRAINS = {
    "adapters": lambda: build_lora(num_layers=6, **WIDE),
    "all parameters": lambda: build_base("llama", torch.bfloat16, **WIDE).train(),
    "adapters, the vocabulary by rows and tiles": lambda: tied(num_rows=16384),
}


@pytest.mark.parametrize("trains", WHAT_TRAINS)
def test_the_budget_that_an_error_names_is_enough_the_longest_step_is_rehearsed_in_it_and_it_holds(
    trains: str, tmp_path: Path
) -> None:
    def train(budget: int | str) -> dict:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with Engine(
            WHAT_TRAINS[trains](), batch_size=4, seq_len=128, lr=1e-2, device="cuda", device_memory=budget,
            host_memory="256MiB", nvme=tmp_path,
        ) as engine:  # fmt: skip
            for step in range(2):
                engine.backward(engine(**language_batch(step, rows=4, tokens=100 + step)).loss)
                engine.step()
            assert engine.report()["prefetch_misses"] == 0 and within(engine, engine.config.device_memory_bytes or 0)
            assert (engine.plan.head_tiles is not None) == ("tiles" in trains)
            return engine.report()["rehearsal"]

    settle(torch.device("cuda"))
    with pytest.raises(PlanInfeasible) as short:
        train(beside_plan_bytes(torch.device("cuda"), 0) + MIB)
    message, rehearsed = str(short.value), {}
    for _ in range(2):  # the rehearsal, too, may find it short
        named = re.search(r"device_memory of ([0-9.]+ \w+)", message)
        assert named is not None, message
        try:
            rehearsed = train(named[1])
            break
        except PlanInfeasible as again:
            message = str(again)
    assert rehearsed["result"] in ("fits", "within the budget") and rehearsed["measured_bytes"] > 0


KIB = 1 << 10
WORKSPACES_BYTES = 64 * MIB
"""At most, that products keep of a stream."""
WAITED_SECONDS = 0.004
"""At least, for a kernel of `LONG`, on any GPU."""
NO_CUTS = {"head_chunk_tokens": None, "chunk_tokens": None, "layer_major": None}
RESULTS = ("left out", "fits", "within the budget", "less freed memory is granted")
PLANNED = {
    "resident, all kept": (4000, None, (True, False, False), True),
    "from HOST": (730, None, (False, True, False), False),
    "from NVMe, state in tiers": (600, 600, (True, True, True), False),
}
"""KiB of DEVICE and HOST that a plan may have; whether some of a layer's weights is in DEVICE, in HOST, on NVMe, and
whether what it saves is kept."""


@pytest.mark.parametrize("place", PLANNED)
def test_the_optimisers_plan_on_the_gpu_is_bit_equal_to_plain_pytorch_within_its_budget(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_attention: None
) -> None:
    device_kib, host_kib, parts, kept = PLANNED[place]
    case, asked = Case("llama", "bf16", 1, True, False, "from HOST"), []
    expected = gpu_plain(case)
    gpu_planning.calibrated(monkeypatch, tmp_path, asked)
    gpu_planning.room_for_plans(monkeypatch, device_kib * KIB)
    gpu_planning.unmeasured(monkeypatch)
    engine = engine_of(
        case, device="cuda", device_memory="4GiB", host_memory=f"{host_kib}KiB" if host_kib else "64MiB",
        nvme=tmp_path if "NVMe" in place else None, plan="optimise",
        options=RuntimeOptions(record=True, poison=True, piece_elements=1024, cuts=Cuts(**NO_CUTS)),
    )  # fmt: skip
    with engine:
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        assert differences(expected, found) == []
        plan, report, recorder = engine.plan, engine.report(), engine._runtime.recorder
        weights, saved = plan.entry("layer").weights, plan.entry("layer").tokens[-1]
        assert plan.planner == "optimiser" and asked == ["cuda:0"]
        assert (weights.device_bytes > 0, weights.host_bytes > 0, weights.nvme_bytes > 0) == parts
        assert (saved.device_tokens == SEQ_LEN) == kept
        assert (plan.state is not None) == ("tiers" in place)
        assert plan.state is None or report["training"]["bytes_to_device"] > 0
        assert recorder is not None and [str(race) for race in recorder.check()] == []
        assert report["prefetch_misses"] == 0 and 0 < report["memory"]["device"] <= device_kib * KIB
        assert report["memory"]["host"] <= (host_kib or 64 * KIB) * KIB
        assert report["rehearsal"]["result"] in RESULTS
        assert "predicted" in engine.summary()


def test_chunks_that_the_optimiser_plans_on_the_gpu_give_the_rules_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_attention: None
) -> None:
    """Of layers that were profiled there by chunks, in DEVICE memory, or with less of that than they take."""
    gpu_planning.calibrated(monkeypatch, tmp_path)
    case, found, resident = Case("llama", "bf16", 1, False, False, "from HOST"), [], set()
    on_their_way: set[int] = set()
    for plan, device_kib in (("auto", 4000), ("optimise", 4000), ("optimise", 800)):
        with monkeypatch.context() as patch:
            gpu_planning.room_for_plans(patch, device_kib * KIB)
            if plan == "auto":
                patch.setattr(arguments, "calibrated", lambda *_: None)
            cuts = Cuts(**{**NO_CUTS, "chunk_tokens": 4})
            engine = engine_of(
                case, device="cuda", device_memory="4GiB", host_memory="64MiB", nvme=tmp_path, plan=plan,
                options=RuntimeOptions(cuts=cuts, record=True, poison=True),
            )  # fmt: skip
        with engine:
            found.append(run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step))
            report, recorder = engine.report(), engine._runtime.recorder
            assert recorder is not None and [str(race) for race in recorder.check()] == []
            assert report["tokenwise"]["num_passes"] > 0 and report["memory"]["device"] <= device_kib * KIB
            if plan == "optimise":
                assert engine.plan.planner == "optimiser" and engine.plan.cuts.chunk_tokens == 4
                made_of, account = engine._runtime.made_of, engine._runtime.tiers.account(Tier.DEVICE)
                passing = passing_of(made_of.workload, made_of.problem, 4)  # is in the plan's reserve
                on_their_way.add(account.holdings.get("layer inputs on their way", 0))
                assert max(on_their_way) in (0, passing.device_bytes)
                layers = [entry for entry in engine.plan.classes if entry.name.startswith("layer")]
                assert sum(len(entry.blocks) for entry in layers) == 4, "of one class, or as chunks were dealt"
                resident.add(all(entry.weights.streamed_bytes == 0 for entry in layers))
    assert resident == {True, False} and max(on_their_way) > 0
    assert differences(found[0], found[1]) == differences(found[0], found[2]) == []


@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_a_profile_is_taken_on_the_gpu_and_sees_how_slow_that_is(
    chunk_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass through a layer has a kernel that only waits, which no clock of the host's sees by itself."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    ran_on, plain = set(), LlamaMLP.forward

    def late(mlp: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        ran_on.update({hidden.device.type, *(p.device.type for p in mlp.parameters())})
        torch.cuda._sleep(LONG)
        return plain(mlp, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", late)
    model = build_lora("llama")
    (draft, *_) = [draft for draft in find_blocks(model, bits=None) if draft.is_layer]
    gc.collect()
    settle(torch.device("cuda"))
    state, held = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    size = {"batch_size": 2, "seq_len": 8}
    with workbench_of(EngineConfig(device="cuda:0")) as bench:
        if chunk_tokens is None:
            found = profile_layer(model, draft, **size, bench=bench)
        else:
            found = profile_chunked_layer(model, draft, **size, chunk_tokens=chunk_tokens, bench=bench)
        head = profile_head(
            hidden_size=64, vocabulary=128, num_tokens=16, tile_tokens=16, dtype=torch.bfloat16, bench=bench
        )
    assert ran_on == {"cuda"}
    passes = 1 if chunk_tokens is None else 2
    assert found.forward > passes * WAITED_SECONDS and found.backward > passes * WAITED_SECONDS
    assert found.kept is not None and found.kept.forward > WAITED_SECONDS
    assert found.kept.saved_bytes > 0 and head.forward > 0
    assert chunk_tokens is None or (found.chunks is not None and found.chunks.peak_bytes > 0)
    gc.collect()
    assert torch.equal(torch.cuda.get_rng_state(), state) and torch.cuda.memory_allocated() <= held + WORKSPACES_BYTES
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_auto_chooses_the_optimisers_plan_on_the_gpu_where_that_is_faster_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_attention: None
) -> None:
    case, asked = Case("llama", "bf16", 1, False, False, "from HOST"), []
    expected = gpu_plain(case)
    gpu_planning.unmeasured(monkeypatch)
    gpu_planning.room_for_plans(monkeypatch, 64 * MIB)
    given = {"device": "cuda", "device_memory": "4GiB", "host_memory": "64MiB"}
    monkeypatch.setattr(arguments, "calibrated", lambda *_: None)
    with engine_of(case, **given) as engine:
        choice = engine.report()["plan_choice"]
        assert engine.plan.planner == choice["chosen"] == "fixed streaming rule"
        assert "nothing was predicted" in engine.report()["replanning"]["off"]
        assert "`offload-rt calibrate --device cuda:0` would let the optimiser plan" in choice["why"]
    gpu_planning.calibrated(monkeypatch, tmp_path, asked)
    free = {"device": "cuda", "host_memory": "64MiB"}  # a GPU's free memory is there to be used
    with engine_of(case, **free, options=RuntimeOptions(fill=False)) as engine:
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        report = engine.report()
        choice = report["plan_choice"]
        assert engine.plan.planner == choice["chosen"] == "optimiser" and asked == ["cuda:0"]
        assert choice["optimised_step_seconds"] < 0.9 * choice["rule_step_seconds"]
        assert choice["optimised_step_seconds"] == report["predicted"]["step_seconds"]
        assert f"auto: optimiser: {choice['why']}" in engine.summary()
        assert differences(expected, found) == []


class OtherCard:
    """The properties of a card that is like this one."""

    uuid = "another"

    def __init__(self, properties: object) -> None:
        self._properties = properties

    def __getattr__(self, name: str) -> object:
        return getattr(self._properties, name)


def test_the_gpus_links_and_kernels_are_calibrated_and_remembered_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "Sizes", lambda: TINY)
    moved, name = [], torch.cuda.get_device_name()
    if EMULATED:  # interpreted, it is slower than any machine
        monkeypatch.setattr(calibrate, "nf4_decode", calibrate.element_wise)

    class Counting(Links):
        def close(self) -> None:
            moved.append(self.reading().moved_bytes)
            super().close()

    monkeypatch.setattr(bench, "Links", Counting)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert calibrate.calibrated("cuda:0", ()) is None
    assert main(["calibrate", "--device", "cuda", "--out", str(tmp_path / "gpu.json")]) == 0
    assert torch.cuda.memory_stats()["allocation.all.allocated"] > before + 10
    passes = TINY.passes + 1
    assert moved == [
        {"host_to_device": 2 * passes * TINY.copy_bytes}, {"device_to_host": 2 * passes * TINY.copy_bytes},
        {"host_to_device": passes * TINY.copy_bytes}, {"device_to_host": passes * TINY.copy_bytes},  # beside AdamW
    ]  # fmt: skip
    hardware = calibrate.calibrated("cuda:0", ())
    assert hardware is not None and hardware.name == name and not hardware.unified
    assert hardware.device.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert hardware.host.memory_bytes == bench.Cpu().memory_bytes()
    assert hardware == load_hardware(tmp_path / "gpu.json")
    assert calibrate.calibrated("cpu", ()) is None, "which was not measured"
    with monkeypatch.context() as patch:  # another card of this model, which has this one's number in another process
        of_this = torch.cuda.get_device_properties(0)
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: OtherCard(of_this))
        assert calibrate.calibrated("cuda:0", ()) is None


FULL_PLANNED = {
    "state in HOST": (4000, 8000, False, 1e7, 4),
    "state on NVMe": (1160, 2500, True, 1e7, 1),
    "state in HOST, stepped by both": (4000, 8000, False, 5e4, 4),
}
"""KiB of DEVICE and HOST that a plan may have, whether there is a drive, what the processor steps in a second, and
layers whose activations are kept."""


@pytest.mark.parametrize("place", FULL_PLANNED)
def test_all_parameters_train_by_the_optimisers_plan_on_the_gpu_to_the_bits_of_plain_pytorch(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_attention: None
) -> None:
    device_kib, host_kib, on_nvme, steps_per_second, num_kept = FULL_PLANNED[place]
    case = full.Case("llama", "bfloat16", "adamw", 1, "rarely", False, "in place")
    expected = full.run_plain(case, device="cuda")
    gpu_planning.calibrated(monkeypatch, tmp_path)
    gpu_planning.room_for_plans(monkeypatch, device_kib * KIB)
    gpu_planning.unmeasured(monkeypatch)
    monkeypatch.setattr(training_seconds, "steps_per_second", lambda *_, **__: steps_per_second)
    with full.make_engine(
        case, tmp_path, device="cuda", device_memory="4GiB", host_memory=f"{host_kib}KiB", nvme=on_nvme,
        plan="optimise", options=RuntimeOptions(poison=True, piece_elements=8192),
    ) as engine:  # fmt: skip
        for step, (want, got) in enumerate(zip(expected, full.run_engine(case, engine), strict=True), 1):
            assert [f"step {step}: {name}" for name in got if not torch.equal(want[name], got[name])] == []
        plan, report = engine.plan, engine.report()
        assert plan.planner == "optimiser" and plan.state is not None
        assert (plan.state.state_slots > 0) == on_nvme
        assert (report["training"]["num_pieces_on_device"] > 0) == bool(plan.state.on_device) == ("both" in place)
        kept = [policy for policy in (plan.activations or {}).values() if policy == whole_batch(Action.KEEP)]
        assert len(kept) == num_kept and report["recomputes"] == (4 - num_kept) * full.STEPS
        assert report["tokenwise"]["no_room_bytes"] == 0 < report["tokenwise"]["kept_bytes"]
        landing = "new weights on their way to DEVICE"
        holdings = engine._runtime.tiers.account(Tier.HOST).holdings
        assert plan.peak_bytes["host"][landing] == holdings[landing] > 0
        assert report["training"]["num_steps"] == full.STEPS and report["prefetch_misses"] == 0
        assert 0 < report["memory"]["device"] <= device_kib * KIB and report["memory"]["host"] <= host_kib * KIB
        assert report["rehearsal"]["result"] in RESULTS and "predicted" in engine.summary()


def test_auto_asks_the_optimiser_on_the_gpu_where_all_parameters_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_attention: None
) -> None:
    """Without filling the rule streams layers that there is room for; the device has its share of updates in both."""
    case = full.Case("llama", "bfloat16", "adamw", 1, "rarely", False, "in place")
    expected = full.run_plain(case, device="cuda")
    gpu_planning.calibrated(monkeypatch, tmp_path)
    gpu_planning.room_for_plans(monkeypatch, 1160 * KIB)
    gpu_planning.unmeasured(monkeypatch)
    with full.make_engine(
        case, tmp_path, device="cuda", device_memory="4GiB", host_memory="2500KiB", nvme=True,
        options=RuntimeOptions(poison=True, piece_elements=8192, fill=False),
    ) as engine:  # fmt: skip
        for step, (want, got) in enumerate(zip(expected, full.run_engine(case, engine), strict=True), 1):
            assert [f"step {step}: {name}" for name in got if not torch.equal(want[name], got[name])] == []
        report = engine.report()
        choice = report["plan_choice"]
        assert engine.plan.planner == choice["chosen"] == "optimiser", choice["why"]
        assert choice["optimised_step_seconds"] < 0.97 * choice["rule_step_seconds"]
        assert report["training"]["num_commits"] > full.STEPS - 1 and report["replanning"]["off"] is None


def test_drives_that_drift_from_their_calibration_are_seen_on_the_gpu_and_no_number_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_attention: None
) -> None:
    """They are said to be far slower than this machine's. Copies and computing have the seconds that the GPU notes."""
    device_kib, host_kib, *_ = PLANNED["from NVMe, state in tiers"]
    case, losses = Case("llama", "bf16", 1, False, False, "from HOST"), []
    gpu_planning.calibrated(monkeypatch, tmp_path)
    gpu_planning.room_for_plans(monkeypatch, device_kib * KIB)
    gpu_planning.unmeasured(monkeypatch)
    for replan in (False, True):
        folder = tmp_path / f"{replan}"
        folder.mkdir()
        with engine_of(
            case, device="cuda", device_memory="4GiB", host_memory=f"{host_kib}KiB", nvme=folder, plan="optimise",
            options=RuntimeOptions(piece_elements=1024, cuts=Cuts(**NO_CUTS), replan=replan),
        ) as engine:  # fmt: skip
            steps = WARM_STEPS + WINDOW_STEPS + ADOPT_STEPS + 2
            losses.append([engine.train_batch([micro_batch(step, 0)]) for step in range(steps)])
            report = engine.report()["replanning"]
            assert report["off"] == (None if replan else "switched off")
            drifted = {name for one in report["decisions"] for name in re.findall(r"(\w+) takes", one["because"])}
            assert bool(drifted & {"ssd_read", "ssd_write"}) == replan
            resources = engine.report()["steady_step"]["resources"]
            assert all(resources[name]["busy_seconds"] > 0 for name in ("compute", "host_to_device", "device_to_host"))
    assert losses[0] == losses[1]


def more_than_measured(tmp_path, monkeypatch):
    """A calibrated GPU with little room for plans, layers that save more than a profile says: KiB, case, its twin's."""
    device_kib, case = 1075, Case("llama", "bf16", 1, False, False, "from HOST")
    expected = gpu_plain(case)
    gpu_planning.calibrated(monkeypatch, tmp_path)
    gpu_planning.room_for_plans(monkeypatch, device_kib * KIB)
    gpu_planning.unmeasured(monkeypatch, saved_bytes=6000)
    return device_kib, case, expected


def test_a_rehearsal_on_the_gpu_has_the_optimiser_plan_again_where_a_layer_saves_more_than_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_attention: None
) -> None:
    device_kib, case, expected = more_than_measured(tmp_path, monkeypatch)
    with engine_of(
        case, device="cuda", device_memory="4GiB", host_memory="64MiB", plan="optimise",
        options=RuntimeOptions(poison=True, cuts=Cuts(**NO_CUTS)),
    ) as engine:  # fmt: skip
        first = engine.plan
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        report = engine.report()
        assert report["rehearsal"]["result"] == "planned again" and engine.plan != first
        assert engine.plan.planner == "optimiser" and report["memory"]["device"] <= device_kib * KIB
        assert differences(expected, found) == []


def test_a_rehearsal_on_the_gpu_goes_back_to_the_rules_plan_where_auto_has_chosen_the_optimisers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact_attention: None
) -> None:
    device_kib, case, expected = more_than_measured(tmp_path, monkeypatch)
    with engine_of(
        case, device="cuda", device_memory="4GiB", host_memory="64MiB",
        options=RuntimeOptions(poison=True, fill=False, cuts=Cuts(**NO_CUTS)),
    ) as engine:  # fmt: skip
        assert engine.plan.planner == "optimiser"
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        report = engine.report()
        assert report["rehearsal"]["result"] == "planned again"
        assert engine.plan.planner == report["plan_choice"]["chosen"] == "fixed streaming rule"
        assert report["memory"]["device"] <= device_kib * KIB
        assert differences(expected, found) == []


def test_a_traced_step_has_the_times_of_the_gpus_own_clock(tmp_path: Path, exact_attention: None) -> None:
    case = Case("llama", "bf16", 1, False, False, "from HOST")
    options = RuntimeOptions(num_slots=2, layer_inputs=Tier.HOST, stream_edges=True)
    readings = []
    with engine_of(case, device="cuda", device_memory="4GiB", host_memory="256MiB", options=options) as engine:
        engine.trace(tmp_path / "t.json", wait=WARM_STEPS)
        for number in range(WARM_STEPS + 1):
            readings.append(engine._runtime.links.reading())
            engine.train_batch([micro_batch(number, 0)])
        moved = engine._runtime.links.reading().since(readings[-1]).moved_bytes
        layers = [block.name for block in engine._runtime.made_of.workload.layers]
    traced = slices(tmp_path / "t.json")
    for row in (HOST_TO_DEVICE, DEVICE_TO_HOST):
        assert num_bytes(traced, row) == moved[row] > 0 and overlap(traced[row]) == []
    passes = [f"forward {name}" for name in layers] + [f"backward {name}" for name in reversed(layers)]
    in_order = [event for event in traced["compute"] if event["name"] in passes]
    assert [event["name"] for event in in_order] == passes and overlap(in_order) == []
    (step,) = traced["step"]
    assert all(0 <= event["ts"] <= step["dur"] for event in in_order) and set(layers) <= {
        event["name"] for event in traced["wait"]
    }
