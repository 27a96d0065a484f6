"""Blocks whose bytes rest in several tiers: the bits of plain PyTorch, and exactly the planned bytes from each.

one layer   |== DEVICE ==|-- HOST --|.. NVME ..|      a slot of the ring holds the last two
"""

import functools
import time
from dataclasses import replace

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError, StorageError, StoreCorrupt
from offload_rt.memory.arena import Arena
from offload_rt.memory.parted import PartedBytes
from offload_rt.tensor_spec import TENSOR_ALIGNMENT_BYTES, TensorSpec, layout_block
from offload_rt.tiering.tiers import SplitResidence
from offload_rt.transfers.streams import Copier
from offload_rt.wiring import weights_assembly
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.placement import ClassPlan
from planners.plans.plan import Plan, Split, Tier
from tests.conftest import flip
from tests.fake_device import FakeDevice
from tests.parity import BATCH_SIZE, SEQ_LEN, Case, build, in_pairs, run_plain, run_steps
from tests.test_parity import differences

PAGE = 4096
SHARES = {
    "DEVICE and NVME": (0.5, 0.0),
    "DEVICE and HOST": (0.5, 0.5),
    "HOST and NVME": (0.0, 0.4),
    "all three": (0.3, 0.3),
}
"""Of a layer that stays in DEVICE, and that rests in HOST; what is left rests on NVME."""


@functools.cache
def plain(case):
    """What a case's splits are all compared with."""
    return run_plain(case)


def engine_for(case, folder, plan="auto", **arguments):
    defaults = {"bits": 4 if case.weights == "nf4" else None, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "lr": 1e-2}
    return Engine(build(case), nvme=folder, plan=plan, **{**defaults, **arguments})


def split_of(spec, shares):
    """As the shares say, rounded to what can be cut."""
    device = max(cut for cut in spec.cuts_bytes if cut <= shares[0] * spec.stored_bytes)
    host = int(shares[1] * spec.stored_bytes) // PAGE * PAGE
    if sum(shares) >= 1.0:
        host = spec.stored_bytes - device
    return Split(device_bytes=device, host_bytes=host, nvme_bytes=spec.stored_bytes - device - host)


def with_splits(plan, specs, shares, num_slots=2):
    """The plan with the blocks of all rings cut so."""
    splits = {name: split_of(specs[name], shares) for ring in plan.rings for name in ring.blocks}
    rings = tuple(
        replace(
            ring,
            num_slots=min(num_slots, len(ring.blocks)),
            slot_bytes=max(splits[name].streamed_bytes for name in ring.blocks),
        )
        for ring in plan.rings
    )
    classes = tuple(ClassPlan(name=name, blocks=(name,), weights=split) for name, split in splits.items())
    return replace(plan, rings=rings, classes=classes), splits


def plan_for(case, folder, shares, **arguments):
    with engine_for(case, folder, **arguments) as engine:
        specs = {block.name: block.spec for block in engine._runtime.blocks}
        return with_splits(engine.plan, specs, shares)


@pytest.mark.parametrize("weights, host_memory, shares", in_pairs(("nf4", "fp32"), (None, "64MiB"), SHARES.values()))
def test_any_split_has_the_bits_of_plain_pytorch_and_moves_what_it_says(weights, shares, host_memory, tmp_path):
    case = Case("llama", weights, 1, False, False, "from NVME")
    common = {"host_memory": host_memory}
    plan, splits = plan_for(case, tmp_path, shares, **common)
    options = RuntimeOptions(record=True, poison=True)
    with engine_for(case, tmp_path, Plan.from_json(plan.to_json()), options=options, **common) as engine:
        before = engine.report()
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        after, holdings = engine.report(), engine.report()["holdings"]
        assert differences(plain(case), found) == []
        assert [str(race) for race in engine._runtime.recorder.check()] == []
    (split,) = {splits[name] for name in plan.rings[0].blocks}  # of equal layers
    assert (split.device_bytes > 0, split.host_bytes > 0) == (shares[0] > 0, shares[1] > 0)
    fetches = after["fetches"]
    assert fetches > 0 and after["prefetch_misses"] == 0
    assert after["bytes_read"] - before["bytes_read"] == fetches * split.nvme_bytes
    moved = split.host_bytes if host_memory is None else split.streamed_bytes
    assert after["bytes_copied"] - before["bytes_copied"] == fetches * moved
    everywhere = {**holdings["device"], **holdings.get("host", {})}
    assert everywhere["ring of layers"] == 2 * split.streamed_bytes
    assert everywhere.get("weights", 0) == 4 * split.host_bytes
    assert 4 * split.device_bytes <= everywhere.get("what stays of layers", 0) <= 4 * (split.device_bytes + PAGE)


@pytest.mark.parametrize("shares", [(0.0, 1.0), SHARES["all three"]], ids=["HOST", "all three"])
@pytest.mark.parametrize("nvme", [True, False])
def test_a_block_of_many_pieces_comes_to_where_it_rests(nvme, shares, tmp_path, monkeypatch):
    """As a block of more than 4 MiB does: whoever takes the pieces has one while the next is read."""
    monkeypatch.setattr(weights_assembly, "STAGING_BYTES", 2 * PAGE)
    case = Case("llama", "fp32", 1, False, False, "from NVME")
    if not nvme:
        shares = (1 - shares[1], shares[1])
    plan, splits = plan_for(case, tmp_path, shares, host_memory="64MiB")
    if not nvme:
        plan = replace(plan, rings=tuple(replace(ring, rest=Tier.HOST) for ring in plan.rings))
    assert min(split.total_bytes for split in splits.values()) > 4 * PAGE
    folder = tmp_path if nvme else None
    with engine_for(case, folder, plan, host_memory="64MiB") as engine:
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        assert differences(plain(case), found) == []


def test_a_device_that_holds_a_piece_for_long_is_waited_for(tmp_path, monkeypatch):
    """Compute is behind the copy of a piece, the host not yet: the piece's memory is the next one's only then."""
    monkeypatch.setattr(weights_assembly, "STAGING_BYTES", 4 * PAGE)
    returned = Copier._returned

    def late(self, copy, error):
        if "pieces of weights" in copy.name:
            time.sleep(0.1)
        returned(self, copy, error)

    monkeypatch.setattr(Copier, "_returned", late)
    case = Case("qwen", "nf4", 1, False, False, "from NVME")
    plan, _ = plan_for(case, tmp_path, SHARES["all three"], host_memory="64MiB")
    device = FakeDevice(kernels_are_late=False)
    options = RuntimeOptions(device=device, record=True, poison=True)
    with engine_for(case, tmp_path, plan, host_memory="64MiB", options=options) as engine:
        copies = [operation for operation in engine._runtime.recorder.operations if "copy of pieces" in operation.name]
        assert len(copies) > len(plan.rings[0].blocks), "some block came in several pieces"
        assert [str(race) for race in engine._runtime.recorder.check()] == []
    device.close()


def test_a_split_on_a_late_device_is_bit_equal_and_ordered(tmp_path):
    case = Case("qwen", "nf4", 1, False, False, "from NVME")
    plan, _ = plan_for(case, tmp_path, SHARES["all three"], host_memory="64MiB")
    device = FakeDevice(late_seconds=0.002, kernels_are_late=False)
    options = RuntimeOptions(device=device, record=True, poison=True)
    with engine_for(case, tmp_path, plan, host_memory="64MiB", options=options) as engine:
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        assert differences(plain(case), found) == []
        assert [str(race) for race in engine._runtime.recorder.check()] == []
    device.close()


def test_edges_stream_from_host_and_nvme(tmp_path):
    case = Case("qwen", "bf16", 2, True, True, "from NVME")  # whose embedding and head are two blocks
    stream = RuntimeOptions(stream_edges=True)
    plan, splits = plan_for(case, tmp_path, SHARES["HOST and NVME"], accumulation_steps=2, options=stream)
    assert len(plan.rings) == 2
    arguments = {"accumulation_steps": 2, "max_grad_norm": 0.05, "options": RuntimeOptions(poison=True)}
    with engine_for(case, tmp_path, plan, **arguments) as engine:
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
        assert differences(plain(case), found) == []
        counters = [executor.counters for executor in engine._runtime.executors]
    assert all(counter.num_fetches > 0 for counter in counters)
    assert all(splits[name].host_bytes and splits[name].nvme_bytes for name in plan.rings[1].blocks)


def test_without_a_drive_a_split_is_encoded_into_its_places(tmp_path):
    case = Case("moe", "nf4", 1, False, False, "from HOST")  # experts are stacks of NF4 tensors
    arguments = {"nvme": None, "host_memory": "64MiB"}
    with Engine(build(case), bits=4, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, **arguments) as engine:
        specs = {block.name: block.spec for block in engine._runtime.blocks}
        plan, splits = with_splits(engine.plan, specs, SHARES["DEVICE and HOST"])
    with Engine(build(case), bits=4, batch_size=BATCH_SIZE, seq_len=SEQ_LEN, lr=1e-2, plan=plan, **arguments) as engine:
        assert all(splits[name].device_bytes > 0 for name in plan.rings[0].blocks)
        found = run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)
    assert differences(plain(case), found) == []


def test_a_flipped_bit_is_found_wherever_it_would_have_gone(tmp_path):
    case = Case("llama", "nf4", 1, False, False, "from NVME")
    plan, splits = plan_for(case, tmp_path, SHARES["all three"])
    first = splits[plan.rings[0].blocks[0]]
    (weights,) = tmp_path.glob("offload_rt-*/weights.bin")  # whose first block is that layer
    for position in (8, first.device_bytes + 8, first.total_bytes - PAGE):
        flip(weights, position)
        with pytest.raises(StoreCorrupt, match="layers.0: checksum"):
            engine_for(case, tmp_path, plan)
        flip(weights, position)
    with engine_for(case, tmp_path, plan) as engine:
        flip(weights, first.device_bytes + first.host_bytes + 8)  # after the start: only this part is read
        with pytest.raises(StoreCorrupt, match="which is what the block held at the start"):
            run_steps(case.accumulation, engine, engine.backward, engine.trainable, engine.step)


def test_splits_that_cannot_be_run_are_refused_by_name(tmp_path):
    case = Case("llama", "fp32", 1, False, False, "from NVME")
    plan, splits = plan_for(case, tmp_path, SHARES["all three"])

    def refused(match, **changes):
        broken = tuple(replace(e, weights=replace(e.weights, **changes)) for e in plan.classes)
        with pytest.raises(ConfigError, match=match):
            engine_for(case, tmp_path, replace(plan, classes=broken))

    (split,) = set(splits.values())
    device, host, nvme = split.device_bytes, split.host_bytes, split.nvme_bytes
    refused("bytes are placed, it has", nvme_bytes=nvme + 1)
    refused(f"cannot be cut at {device + 8} bytes; below it, at {device}", device_bytes=device + 8, nvme_bytes=nvme - 8)
    refused("are not whole pages of 4096", host_bytes=host - 8, nvme_bytes=nvme + 8)
    refused("stream through slots of", device_bytes=0, nvme_bytes=nvme + device)
    with pytest.raises(ConfigError, match="rest on NVME, but nvme= gives no folder"):
        engine_for(case, None, plan)
    whole = replace(plan.rings[0], blocks=plan.rings[0].blocks[1:])
    with pytest.raises(ConfigError, match="is resident, but its class streams"):
        engine_for(case, tmp_path, replace(plan, rings=(whole,), resident=(*plan.resident, plan.rings[0].blocks[0])))


def test_weights_that_train_are_cut_by_a_plan_file_too(tmp_path):
    """Their bits are in `test_parted_training`; here is what a plan file may say."""

    def model():
        return build(Case("llama", "fp32", 1, False, False, "in place")).get_base_model().requires_grad_(True)

    arguments = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "nvme": tmp_path}
    options = RuntimeOptions(rest=Tier.NVME, piece_elements=8192)
    with Engine(model(), options=options, **arguments) as engine:
        specs = {block.name: block.spec for block in engine._runtime.blocks}
        plan, splits = with_splits(replace(engine.plan, activations=None), specs, SHARES["HOST and NVME"])
    options = RuntimeOptions(piece_elements=8192)
    with Engine(model(), plan=Plan.from_json(plan.to_json()), options=options, **arguments) as engine:
        parted = engine._training.home.parted
        assert {name: parts.split for name, parts in parted.items()} == splits
    without = replace(plan, state=replace(plan.state, weight_slots=0))
    rings = tuple(replace(ring, rest=Tier.HOST) for ring in plan.rings)
    with pytest.raises(ConfigError, match="that train rest on NVME and need weight_slots of at least 1"):
        Engine(model(), plan=replace(without, rings=rings), options=options, **arguments)


def test_cuts_are_pages_at_which_a_tensor_begins():
    shapes = [(8,), (2000,), (1024,), (3,), (5000,)]  # begin at bytes 0, 256, 8448, 12544, 12800
    spec = layout_block("b", [TensorSpec(name=str(i), shape=shape, dtype="F32") for i, shape in enumerate(shapes)])
    offsets = [tensor.offset_bytes for tensor in spec.tensors]
    assert spec.cuts_bytes == (0, 2 * PAGE, 3 * PAGE, spec.stored_bytes)
    assert all(offset % TENSOR_ALIGNMENT_BYTES == 0 for offset in offsets)
    assert [spec.first_streamed_bytes(cut) for cut in spec.cuts_bytes[1:]] == [8448, 12544, spec.stored_bytes]
    for cut in spec.cuts_bytes:
        first = spec.first_streamed_bytes(cut)
        assert cut % PAGE == 0 and cut <= first < cut + PAGE
        assert first in (*offsets, spec.stored_bytes)
        assert all(t.offset_bytes + t.stored_bytes <= first for t in spec.tensors if t.offset_bytes < first)
    with pytest.raises(ValueError, match="cannot be cut at 100 bytes; below it, at 0"):
        spec.first_streamed_bytes(100)


def test_parts_know_where_a_tensor_lies():
    arena = Arena("a", 4 * PAGE)
    resident, streamed = arena.acquire(PAGE + 64, "r"), arena.acquire(2 * PAGE, "s")
    both = PartedBytes(resident, streamed, PAGE)
    streamed.tensor(torch.uint8, (2 * PAGE,)).fill_(2)
    resident.tensor(torch.uint8, (PAGE + 64,)).fill_(1)
    for offset, holds in ((0, 1), (PAGE + 63, 1), (PAGE + 64, 2), (3 * PAGE - 1, 2)):
        tensor = both.tensor(torch.uint8, (1,), offset)
        assert (int(tensor), both.offset_of(tensor)) == (holds, offset)
    assert both.offset_of(torch.zeros(1)) is None


def test_a_part_that_fails_is_told_when_no_other_is_under_way():
    waited = []

    class Part:
        num_bytes = PAGE

        def __init__(self, error=None, at_start=None):
            self.error, self.at_start = error, at_start

        def fetch(self, slot):
            if self.at_start is not None:
                raise self.at_start
            return self

        def wait(self):
            waited.append(self)
            if self.error is not None:
                raise self.error

    slot = Arena("a", 3 * PAGE).acquire(3 * PAGE, "s")
    broken = StorageError("gone", path="/p", errno=5)
    parts = [Part(), Part(error=broken), Part()]
    residence = SplitResidence([(i * PAGE, part) for i, part in enumerate(parts)])
    assert residence.num_bytes == 3 * PAGE
    with pytest.raises(StorageError, match="gone"):
        residence.fetch(slot).wait()
    assert waited == parts
    waited.clear()
    late = SplitResidence([(0, parts[0]), (PAGE, Part(at_start=broken))])
    with pytest.raises(StorageError, match="gone"):
        late.fetch(slot)
    assert waited == parts[:1]
