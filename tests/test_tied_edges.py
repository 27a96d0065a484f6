"""Embedding and head that are one matrix: it rests once, lookups read its rows, products its tiles.

matrix     |-- 0 --|-- 1 --|-- 2 --|-- 3 --|-|    in HOST or on NVMe, and nowhere else
lookup        r   r          r                    rows of the batch's tokens, through a room
products    0       1       2       3       4     through two slots, twice a batch
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from offload_rt.errors import ConfigError, StoreCorrupt
from offload_rt.plans.cuts import cuts_from_json
from offload_rt.tiering.rows import pieces_of
from planners.errors import PlanInfeasible
from planners.plans.plan import Plan, Ring, Tier
from tests.conftest import build_base, build_lora, flip
from tests.fake_device import FakeDevice
from tests.test_tiled_linear import (
    NUM_TILES,
    PLACES,
    ROWS,
    TILE_ROWS,
    TOKENS,
    WIDTH,
    batch,
    check_evaluation,
    folder,
    gradients,
    made,
    train,
)

NAME = "base_model.model.model.embed_tokens"
ROW_BYTES = 2 * WIDTH
TABLE_BYTES = (ROWS * ROW_BYTES + 4095) // 4096 * 4096


def tied(dtype=torch.bfloat16, num_rows=ROWS):
    return build_lora("qwen", dtype, 2, 0.0, vocab_size=num_rows, hidden_size=WIDTH)


def made_tied(make_engine, drive, place="NVME", built=None, **options):
    return made(make_engine, drive, place, tied() if built is None else built, head_chunk_tokens=16, **options)


def ring_of(engine):
    (ring,) = [executor for executor in engine._runtime.executors if executor.ring.name == "tiles"]
    return ring


def races(engine):
    return [str(race) for race in engine._runtime.recorder.check()]


@pytest.mark.parametrize("place", PLACES)
def test_the_matrix_rests_once_and_only_rows_and_tiles_of_it_are_read(place, make_engine, disk_folder):
    built = tied()
    table = built.get_input_embeddings().weight.detach().clone()
    engine = made_tied(make_engine, disk_folder, place, built)
    plan, runtime = engine.plan, engine._runtime
    assert plan.lookups.blocks == (NAME,) == (plan.head_tiles.block,)
    assert NAME not in plan.resident and [ring.name for ring in plan.rings] == ["layers"]
    assert [type(module).__name__ for module in runtime.streamed] == ["LookupModule", "TiledLinear"]
    assert [block.name for block in runtime.blocks].count(NAME) == 1
    stored = sum(draft.spec.stored_bytes for draft in runtime.made_of.workload.drafts)
    if place == "HOST":
        assert engine.report()["holdings"]["host"]["weights"] == stored
    else:
        assert runtime.store.stored_bytes == stored
        assert runtime.links.counters.bytes_read == TABLE_BYTES, "verified once, for rows and tiles together"
    ids = batch()["input_ids"]
    before = engine.report()["bytes_read"]
    assert torch.equal(built.get_input_embeddings()(ids), nn.functional.embedding(ids, table))
    counted, tiles = engine.report()["lookups"], ring_of(engine)
    tiles.drain()
    assert tiles.counters.num_fetches == 1  # begun by the lookup
    assert counted["num_rows"] == ids.unique().numel()
    if place != "HOST":
        spec = runtime.made_of.workload.draft(NAME).spec.tensors[0]
        room, pages = plan.lookups.room_bytes, plan.lookups.pages_bytes
        pieces = pieces_of(ids.unique().tolist(), spec, most_rows=room // ROW_BYTES, most_bytes=pages)
        assert counted["page_bytes"] == sum(piece.num_bytes for piece in pieces) < TABLE_BYTES
        assert engine.report()["bytes_read"] - before == counted["page_bytes"] + TILE_ROWS * ROW_BYTES
    train(engine, 1)  # the first call checks tiles besides, and ends of the ring are left by the last one
    fetched, misses = tiles.counters.num_fetches, engine.report()["prefetch_misses"]
    train(engine, 1)
    assert tiles.counters.num_fetches - fetched == 2 * (NUM_TILES - 2)
    assert engine.report()["prefetch_misses"] == misses
    assert tiles.arena.peak_bytes == tiles.arena.num_bytes == 2 * TILE_ROWS * ROW_BYTES
    assert races(engine) == []


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16])
def test_gradients_are_as_close_to_fp64_as_plain_ones(dtype, make_engine, disk_folder):
    names = {name for name, p in tied(dtype).named_parameters() if p.requires_grad}
    exact = gradients(tied(dtype).double(), names)
    plain = gradients(tied(dtype), names)
    engine = made_tied(make_engine, disk_folder, built=tied(dtype))
    found = gradients(engine.model, names)
    head = engine._runtime.loss_head
    assert head.counters.num_vocabulary_tiles == 2 * NUM_TILES and head.vocabulary_refusal is None

    def error(of):
        return sum((of[name] - exact[name]).square().sum() for name in names).sqrt()

    assert 0 < error(found) <= 1.05 * error(plain)


@pytest.mark.parametrize(
    ("place", "late"),
    [
        ("HOST", False),
        ("NVME through HOST", True),
        *(pytest.param(*rest, marks=pytest.mark.full) for rest in (("NVME through HOST", False), ("HOST", True))),
    ],
)
def test_places_change_no_bit(place, late, make_engine, disk_folder):
    expected = train(made_tied(make_engine, folder(disk_folder, 0)))
    device = FakeDevice(late_seconds=0.001, kernels_are_late=False) if late else None
    options = {"device": device, "layer_inputs": Tier.HOST} if late else {}
    run = made_tied(make_engine, folder(disk_folder, 1), place, **options)
    found = train(run)
    assert found[0] == expected[0] and run.report()["lookups"]["num_rows"] > 0
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
    assert races(run) == []
    run.close()
    if device is not None:
        device.close()


def test_evaluation_and_generation_have_their_logits(make_engine, disk_folder):
    check_evaluation(made_tied(make_engine, disk_folder, built=tied(torch.float32)), tied(torch.float32))


def test_a_checkpoint_goes_on_in_another_place_to_the_bit_and_adapters_are_peft_s(make_engine, disk_folder, tmp_path):
    whole = made_tied(make_engine, folder(disk_folder, 0))
    losses = [train(whole, 1)[0], train(whole, 1)[0]]
    first = made_tied(make_engine, folder(disk_folder, 1))
    assert train(first, 1)[0] == losses[0]
    first.save_checkpoint(tmp_path / "state")
    first.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert names and all("lora_" in name for name in names)
    first.close()
    other = made_tied(make_engine, folder(disk_folder, 2), "HOST")
    other.load_checkpoint(tmp_path / "state")
    found = train(other, 1)
    assert found[0] == losses[1]
    assert all(torch.equal(found[1][name], p) for name, p in whole.trainable.items())


def test_a_budget_without_room_for_the_matrix_plans_both_and_a_run_keeps_its_tiles(make_engine, disk_folder):
    num_rows = 4096
    table_bytes, numbers = num_rows * ROW_BYTES, iter(range(9))

    def engine(budget, *, drive=True, **options):
        nvme = folder(disk_folder, next(numbers)) if drive else None
        return make_engine(
            tied(num_rows=num_rows), options, batch_size=1, seq_len=16, nvme=nvme, device_memory=budget
        )  # fmt: skip

    def losses(run):
        ids = torch.randint(3, num_rows, (1, 16), generator=torch.Generator().manual_seed(0))
        found = []
        for _ in range(2):
            loss = run(input_ids=ids, labels=ids).loss
            run.backward(loss)
            run.step()
            found.append(float(loss.detach()))
        return found

    with pytest.raises(PlanInfeasible) as short:
        engine("1MiB")
    budget = short.value.need_bytes
    found = engine(budget)
    assert max(found.report()["holdings"]["device"].values()) < table_bytes
    tiles, lookups = found.plan.head_tiles, found.plan.lookups
    assert tiles.slots_bytes == table_bytes // 4 and (tiles.block,) == lookups.blocks
    assert found.report()["managed_bytes"] <= budget
    assert Plan.from_json(found.plan.to_json()) == found.plan
    cuts = cuts_from_json(found.report()["cuts"], of="run")
    assert cuts.head_tile_rows == tiles.tile_rows == 512
    with pytest.raises(PlanInfeasible, match="other cuts"):
        engine(budget, cuts=replace(cuts, head_tile_rows=None))
    expected = losses(found)
    assert engine("1GiB").plan.head_tiles is None
    again = engine("1GiB", cuts=cuts)
    assert again.plan.head_tiles == tiles and losses(again) == expected
    in_place = engine("1GiB", drive=False, cuts=cuts)
    assert in_place.plan.head_tiles == replace(tiles, rest=Tier.HOST) and not in_place.plan.rings
    assert in_place.plan.lookups.blocks == lookups.blocks and losses(in_place) == expected
    holdings = in_place.report()["holdings"]["device"]
    assert holdings["weights"] == table_bytes == in_place.plan.peak_bytes["device"]["weights"]


def test_a_whole_model_is_saved_with_the_matrix_once(make_engine, disk_folder, tmp_path):
    built = build_base("qwen", torch.bfloat16, 2, vocab_size=ROWS, hidden_size=WIDTH).requires_grad_(False)
    built.model.norm.weight.requires_grad_(True)
    expected = built.model.embed_tokens.weight.detach().clone()
    engine = made_tied(make_engine, disk_folder, built=built)
    assert engine.plan.head_tiles is not None
    engine.save_pretrained(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["model.embed_tokens.weight"], expected) and "lm_head.weight" not in found


def test_a_spoiled_matrix_is_found_by_rows_and_by_tiles(make_engine, disk_folder):
    built = tied()
    engine = made_tied(make_engine, disk_folder, built=built)
    store = engine._runtime.store
    at = store._blocks[NAME][1].stripes[0].offset_bytes
    flip(store.folders[0] / "weights.bin", at + 700 * ROW_BYTES)
    with pytest.raises(StoreCorrupt, match="embed_tokens, bytes"):
        built.get_input_embeddings()(torch.tensor([[700]]))
    with pytest.raises(StoreCorrupt, match="embed_tokens, bytes"):
        built.get_output_embeddings()(torch.ones(1, WIDTH, dtype=torch.bfloat16))


def test_plans_that_take_half_of_it_are_refused_and_a_ring_takes_all(make_engine, disk_folder):
    first = made_tied(make_engine, disk_folder)
    first.close()
    plan, lookups = first.plan, first.plan.lookups
    ring = Ring(name="edges", blocks=(NAME,), num_slots=1, slot_bytes=TABLE_BYTES, rest=Tier.NVME)

    def engine(**changes):
        return make_engine(tied(), plan=replace(plan, **changes), batch_size=2, seq_len=TOKENS, nvme=disk_folder)

    for changes, message in [
        ({"head_tiles": None}, "which is the head, too"),
        ({"lookups": None}, "which is the embedding, too"),
        ({"lookups": replace(lookups, rest=Tier.HOST, pages_bytes=0)}, "from host, its tiles from nvme"),
        ({"rings": (*plan.rings, ring)}, f"places '{NAME}' twice"),
        ({"resident": (*plan.resident, NAME)}, f"places '{NAME}' twice"),
    ]:
        with pytest.raises(ConfigError, match=message):
            engine(**changes)
    assert engine(rings=(*plan.rings, ring), lookups=None, head_tiles=None).plan.head_tiles is None
