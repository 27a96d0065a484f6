"""A head by tiles of its rows: never whole in memory, within the criterion of cuts, and the cut is kept.

rows       |-- 0 --|-- 1 --|-- 2 --|-- 3 --|-|    two slots
pass 1      0       1       2       3       4                          all tokens of a batch through each
pass 2      4 and 3 are still there, then 2, 1, 0; the next batch begins with 0 and 1
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.plans.cuts import cuts_from_json
from planners.errors import PlanInfeasible
from planners.plans.plan import Plan, Tier
from planners.plans.vocabulary import HeadTiles, RowsSize
from tests.changing_plans import propose, results
from tests.conftest import build_lora
from tests.fake_device import FakeDevice
from tests.test_packed_linear import Halves, table

ROWS, WIDTH, TOKENS, TILE_ROWS = 1100, 256, 48, 256
NUM_TILES = 5
WITH_HOST = {"host_memory": "64MiB"}
PLACES = {"NVME": {}, "NVME through HOST": WITH_HOST, "HOST": WITH_HOST}


def model(dtype=torch.bfloat16):
    return build_lora("llama", dtype, 2, 0.0, vocab_size=ROWS, hidden_size=WIDTH)


def batch(seed=0):
    ids = torch.randint(3, ROWS, (2, TOKENS), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


def folder(parent, number):
    """Of its own: a store is locked by the engine that uses it."""
    found = parent / str(number)
    found.mkdir(exist_ok=True)
    return found


def made(make_engine, drive, place="NVME", built=None, **options):
    given = {"stream_edges": True, "poison": True, "record": True, "head_tile_rows": TILE_ROWS, **options}
    nvme = None if place == "HOST" else drive
    return make_engine(
        model() if built is None else built, given, batch_size=2, seq_len=TOKENS, nvme=nvme, **PLACES[place]
    )


def train(engine, steps=2):
    losses = []
    for step in range(steps):
        loss = engine(**batch(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach().clone() for name, p in engine.trainable.items()}


def gradients(run, names):
    run(**batch()).loss.backward()
    found = {name: p.grad.double() for name, p in run.named_parameters() if name in names}
    run.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 16])
def test_gradients_are_as_close_to_fp64_as_plain_ones(dtype, chunk, make_engine, disk_folder):
    names = {name for name, p in model(dtype).named_parameters() if p.requires_grad}
    exact = gradients(model(dtype).double(), names)
    plain = gradients(model(dtype), names)
    engine = made(make_engine, disk_folder, built=model(dtype), head_chunk_tokens=chunk)
    found = gradients(engine.model, names)
    assert chunk is None or engine._runtime.loss_head.counters.num_vocabulary_tiles == 2 * NUM_TILES
    assert engine.plan.head_tiles is not None and engine.plan.head_tiles.tile_rows == TILE_ROWS

    def error(of):
        return sum((of[name] - exact[name]).square().sum() for name in names).sqrt()

    assert 0 < error(found) <= 1.05 * error(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_by_tiles_is_as_close_to_fp64_as_a_whole_one(dtype, make_engine, disk_folder):
    built = model(dtype)
    head, weight = built.get_output_embeddings(), built.get_output_embeddings().weight.detach().clone()
    torch.manual_seed(1)
    rows = torch.randn(64, WIDTH).to(dtype).requires_grad_()
    grad = (torch.randn(64, ROWS) / ROWS).to(dtype)  # no row's is much larger than the others
    expected = torch.nn.functional.linear(rows, weight)
    (plain,) = torch.autograd.grad(expected, rows, grad)
    exact = grad.double() @ weight.double()
    made(make_engine, disk_folder, built=built)
    found = head(rows)
    assert torch.allclose(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found, rows, grad)
    assert (gradient.double() - exact).norm() <= 1.05 * (plain.double() - exact).norm()


def test_tiles_are_fetched_ahead_and_those_that_are_there_are_used(make_engine, disk_folder):
    engine = made(make_engine, disk_folder, head_chunk_tokens=16)
    executor = next(e for e in engine._runtime.executors if e.ring.name == "tiles")
    assert executor.ring.blocks[-1].endswith("lm_head[1024:1100]") and len(executor.ring.blocks) == NUM_TILES
    head = engine._runtime.loss_head
    for why, reads in [(None, 1), ("the test wants them to be read for each tile of tokens", 6)]:
        head.vocabulary_refusal = why
        train(engine, 1)  # the first call checks tiles besides, and ends of the ring are left by the last one
        before = executor.counters.num_fetches, head.counters.num_tiles, head.counters.num_vocabulary_tiles
        train(engine, 2)
        after = executor.counters.num_fetches, head.counters.num_tiles, head.counters.num_vocabulary_tiles
        visits = 0 if why else 2 * NUM_TILES
        fetches = reads * 2 * (NUM_TILES - 2)
        assert [b - a for a, b in zip(before, after, strict=True)] == [2 * fetches, 2 * 6, 2 * visits]
    assert engine.report()["prefetch_misses"] == 0
    assert executor.arena.peak_bytes == executor.arena.num_bytes == 2 * TILE_ROWS * WIDTH * 2
    assert [str(race) for race in engine._runtime.recorder.check()] == []


def test_rows_and_products_have_room_for_the_tokens_of_a_batch_however_many_rows_there_are(make_engine, disk_folder):
    engine = made(make_engine, disk_folder, head_chunk_tokens=16)
    num_tokens, row_bytes = 2 * TOKENS, 2 * WIDTH
    assert num_tokens < ROWS and engine.plan.lookups.room_bytes == num_tokens * row_bytes
    assert engine.plan.head_tiles == HeadTiles.of(
        engine.plan.head_tiles.block, RowsSize(num_rows=ROWS, row_bytes=row_bytes, most_rows=num_tokens), Tier.NVME,
        tile_rows=TILE_ROWS, num_tokens=16, batch_tokens=num_tokens,
    )  # fmt: skip


def test_places_and_slots_change_no_bit(make_engine, disk_folder):
    expected = train(made(make_engine, folder(disk_folder, 0)))
    assert all(loss == loss for loss in expected[0])
    runs = [made(make_engine, folder(disk_folder, 1), place) for place in ("NVME through HOST", "HOST")]
    plan = runs[0].plan
    one = replace(plan, head_tiles=replace(plan.head_tiles, num_slots=1))
    runs.append(
        make_engine(model(), plan=one, batch_size=2, seq_len=TOKENS, nvme=folder(disk_folder, 2), host_memory="64MiB")
    )
    device = FakeDevice(late_seconds=0.001, kernels_are_late=False)
    runs.append(made(make_engine, folder(disk_folder, 3), "NVME through HOST", device=device, layer_inputs=Tier.HOST))
    for run in runs:
        found = train(run)
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
        if run._runtime.recorder is not None:
            assert [str(race) for race in run._runtime.recorder.check()] == []
    runs[-1].close()
    device.close()


def test_odd_inputs_are_torchs_matter_and_errors_that_are_kept_keep_no_tile(make_engine, disk_folder):
    built = model()
    head = built.get_output_embeddings()
    made(make_engine, disk_folder, built=built)
    kept = []
    for _ in range(3):  # more than there are slots
        for inputs, message in [
            (torch.zeros(2, WIDTH + 1, dtype=torch.bfloat16), "mat1 and mat2 shapes"),
            (torch.zeros(2, WIDTH), "same dtype"),
        ]:
            with pytest.raises(RuntimeError, match=message) as error:
                head(inputs)
            kept.append(error.value)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="mat1 and mat2") as error:
            head(torch.zeros(2, WIDTH + 1))  # while it has a tile
        kept.append(error.value)
    assert head(input=torch.ones(WIDTH, dtype=torch.bfloat16)).shape == (ROWS,)
    nothing = torch.zeros(0, 3, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    found = head(nothing)
    found.sum().backward()
    assert found.shape == (0, 3, ROWS) and nothing.grad.shape == nothing.shape


def test_micro_batches_that_go_together_take_all_tiles_each(make_engine, disk_folder):
    found = []
    for together in (False, True):
        engine = make_engine(
            model(), {"stream_edges": True, "head_tile_rows": TILE_ROWS, "layer_major": together}, batch_size=2,
            seq_len=TOKENS, accumulation_steps=2, nvme=folder(disk_folder, int(together)),
        )  # fmt: skip
        losses = [engine.train_batch([batch(0), batch(1)]) for _ in range(2)]
        assert engine.report()["prefetch_misses"] == 0 and bool(engine.report()["passed_on"]) is together
        found.append((losses, {name: p.detach().clone() for name, p in engine.trainable.items()}))
    assert str(found[0][0]) == str(found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def check_evaluation(engine, plain):
    """Calls without labels, and what is generated, are those of the model in plain PyTorch."""
    plain.eval()
    engine.model.eval()
    ids = batch()["input_ids"][:1, :7]
    with torch.no_grad():
        assert torch.allclose(engine(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(engine.model.generate(ids, **settings), plain.generate(ids, **settings))


def test_evaluation_and_generation_have_their_logits(make_engine, disk_folder):
    check_evaluation(made(make_engine, disk_folder, built=model(torch.float32)), model(torch.float32))


def test_a_budget_without_room_for_the_head_plans_tiles_and_a_run_keeps_them(make_engine, disk_folder):
    numbers = iter(range(9))

    def engine(budget, drive=True, **options):
        built = build_lora("llama", torch.bfloat16, 2, 0.0, vocab_size=16384, hidden_size=WIDTH)
        nvme = folder(disk_folder, next(numbers)) if drive else None
        return make_engine(built, options, batch_size=1, seq_len=16, nvme=nvme, device_memory=budget)

    head_bytes = 16384 * WIDTH * 2
    with pytest.raises(PlanInfeasible) as short:
        engine("1MiB")
    budget = short.value.need_bytes
    found = engine(budget)
    tiles = found.plan.head_tiles
    assert tiles is not None and tiles.slots_bytes == head_bytes // 4
    assert [ring.name for ring in found.plan.rings] == ["layers"]
    assert found.report()["managed_bytes"] <= budget
    holdings = found.report()["holdings"]["device"]
    assert holdings["tiles of the head"] == head_bytes // 4 and "resident blocks" not in holdings
    assert Plan.from_json(found.plan.to_json()) == found.plan
    assert "2 tiles of 2048 rows at a time" in found.summary()
    cuts = cuts_from_json(found.report()["cuts"], of="run")
    assert cuts.head_tile_rows == 2048 and "the head by 2048 rows" in cuts.describe()
    assert engine("1GiB").plan.head_tiles is None
    assert engine("1GiB", cuts=cuts).plan.head_tiles == tiles
    assert engine("1GiB", cuts=replace(cuts, head_tile_rows=512)).plan.head_tiles.tile_rows == 512, "of a given plan"
    with pytest.raises(PlanInfeasible, match="other cuts"):
        engine(budget, cuts=replace(cuts, head_tile_rows=None))
    in_place = engine("1GiB", drive=False, cuts=cuts)
    assert in_place.plan.head_tiles == replace(tiles, rest=Tier.HOST)
    assert not in_place.plan.rings and in_place.plan.lookups is None
    planned, held = in_place.plan.peak_bytes["device"], in_place.report()["holdings"]["device"]
    assert held["weights"] == planned["weights"] == head_bytes
    ids = torch.arange(16).unsqueeze(0)
    losses = [run(input_ids=ids, labels=ids).loss for run in (found, in_place)]
    assert torch.equal(*losses)


def test_cuts_of_a_run_before_there_were_tiles_are_read():
    data = {"head_chunk_tokens": 8, "chunk_tokens": None, "layer_major": None}
    assert cuts_from_json(data, of="run").head_tile_rows is None
    with pytest.raises(CheckpointError, match="run: cuts have"):
        cuts_from_json({**data, "other": 1}, of="run")


def test_tiles_are_whole_pages_and_a_small_part_of_a_head():
    for num_rows, row_bytes in [(128256, 16384), (32000, 8192), (50257, 1536), (300, 6000), (7, 4096)]:
        size = RowsSize(num_rows=num_rows, row_bytes=row_bytes, most_rows=1)
        tile = size.tile_rows() * row_bytes
        assert tile % 4096 == 0 and (tile <= 64 << 20 or size.tile_rows() == 1)
        assert size.tile_rows() <= max(-(-num_rows // 8), 4096)


def test_tiles_that_cannot_be_are_refused(make_engine, disk_folder):
    plan = made(make_engine, disk_folder).plan
    tiles = plan.head_tiles
    for changed, message in [
        (replace(tiles, tile_rows=100), "tiles of 100 rows, 512 bytes each, in 131072 bytes"),
        (replace(tiles, product_bytes=tiles.product_bytes - 1), f"need {tiles.product_bytes}"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_engine(
                model(), plan=replace(plan, head_tiles=changed), batch_size=2, seq_len=TOKENS, nvme=disk_folder
            )  # fmt: skip
    with pytest.raises(ValueError, match="rest is DEVICE"):
        replace(tiles, rest=Tier.DEVICE)
    with pytest.raises(ValueError, match="0 slots"):
        replace(tiles, num_slots=0)
    assert HeadTiles.from_json({**vars(tiles), "rest": "nvme"}) == tiles


@pytest.mark.parametrize("place", ["NVME", "NVME through HOST"])
def test_a_change_of_plans_goes_on_with_rows_tiles_and_packed_products(place, make_engine, tmp_path):
    """To the bits of a run that does not change, and counted on."""

    def run(name, *, changes):
        way, drive = Halves(), tmp_path / name
        drive.mkdir()
        options = {
            "stream_edges": True, "poison": True, "head_tile_rows": TILE_ROWS, "head_chunk_tokens": 16,
            "product_ways": {way.name: way}, "packed_products": table(2 * TOKENS, shapes=("256x256", "128x256")),
        }  # fmt: skip
        engine = make_engine(model(), options, batch_size=2, seq_len=TOKENS, nvme=drive, bits=4, **PLACES[place])
        before, _ = train(engine)
        runtime = engine._runtime
        counters = runtime.heap.counters, runtime.transients.counters
        if changes:
            rings = tuple(replace(ring, num_slots=1) for ring in engine.plan.rings)
            tiles = replace(engine.plan.head_tiles, num_slots=3)
            propose(engine, replace(engine.plan, rings=rings, head_tiles=tiles))
        after = train(engine)
        report, runtime = engine.report(), engine._runtime
        assert counters[0] is runtime.heap.counters and counters[1] is runtime.transients.counters
        counted = report["lookups"], report["packed_products"], report["loss_head"], len(way.tokens)
        return engine, before, after, counted

    changed, first, (losses, weights), counted = run("changed", changes=True)
    assert results(changed) == ["changed"] and changed.plan.head_tiles.num_slots == 3
    stayed, expected_first, (expected, expected_weights), expected_counts = run("stayed", changes=False)
    assert (first, losses) == (expected_first, expected)
    assert [name for name in weights if not weights[name].equal(expected_weights[name])] == []
    rows, expected_rows = counted[0], expected_counts[0]
    assert rows["num_rows"] == expected_rows["num_rows"] > 0 and rows["num_pieces"] == expected_rows["num_pieces"]
    assert counted[1:] == expected_counts[1:] and counted[1] == counted[3] > 0 < counted[2]["num_tiles"]
