"""Embeddings by rows: only the pages of the rows that a batch needs, the bits of the whole table.

table    |row 0|row 1|row 2|row 3| ...     wanted: 1, 2 and 9; a piece holds two rows
pages    |----|----|----|----|----|        a row may begin anywhere in a page
read          [.........]      [....]      neighbours together, 9 in a piece of its own
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from offload_rt.errors import BudgetExceeded, ConfigError, StoreCorrupt, UnsupportedModule
from offload_rt.tensor_spec import Encoding, TensorSpec
from offload_rt.tiering import tiers
from offload_rt.tiering.rows import PageRange, Piece, pieces_of
from offload_rt.tiering.tiers import TierAccount
from planners.errors import PlanInfeasible
from planners.plans.plan import Plan, Tier
from planners.plans.schedule import Phase
from planners.plans.vocabulary import Lookups
from planners.units import PAGE_BYTES
from tests.conftest import build_base, build_lora, flip
from tests.fake_device import FakeDevice
from tests.parity import PlainModel

VOCABULARY, SMALL, WIDTH, TOKENS = 32768, 2048, 256, 64
TABLE_BYTES = VOCABULARY * WIDTH * 2
ROW_BYTES = WIDTH * 2
PLACES = {
    "NVME": {"host_memory": None},
    "NVME through HOST": {"host_memory": "64MiB"},
    "HOST": {"host_memory": "64MiB"},
}


def spec(row_bytes=ROW_BYTES, offset_bytes=0):
    return TensorSpec(
        name="t", shape=(VOCABULARY, row_bytes // 2), dtype="BF16", encoding=Encoding.RAW, offset_bytes=offset_bytes
    )


@pytest.mark.parametrize("row_bytes", [512, 4096, 6000, 16384])
@pytest.mark.parametrize("offset_bytes", [0, 64])
@pytest.mark.parametrize("gap_bytes", [0, 8192])
def test_pieces_have_the_pages_of_their_rows_and_keep_to_their_room(row_bytes, offset_bytes, gap_bytes):
    generator = torch.Generator().manual_seed(row_bytes)
    rows = sorted({*range(100, 120), *torch.randint(0, VOCABULARY, (60,), generator=generator).tolist()})
    table, most_bytes = spec(row_bytes, offset_bytes), 32 * PAGE_BYTES
    pieces = list(pieces_of(rows, table, most_rows=16, most_bytes=most_bytes, gap_bytes=gap_bytes))
    assert [(a.end, b.begin) for a, b in zip(pieces, pieces[1:], strict=False)] == [(p.end, p.end) for p in pieces[:-1]]
    assert (pieces[0].begin, pieces[-1].end) == (0, len(rows))
    for piece in pieces:
        assert 0 < piece.end - piece.begin <= 16 and piece.num_bytes <= most_bytes
        wanted = set()
        for row in rows[piece.begin : piece.end]:
            start = offset_bytes + row * row_bytes
            wanted |= set(range(start // PAGE_BYTES, (start + row_bytes - 1) // PAGE_BYTES + 1))
        read = [set(range(r.begin_bytes // PAGE_BYTES, r.end_bytes // PAGE_BYTES)) for r in piece.ranges]
        assert set.union(*read) >= wanted and sum(map(len, read)) == len(set.union(*read))
        if gap_bytes == 0:
            assert set.union(*read) == wanted
        for one, other in zip(piece.ranges, piece.ranges[1:], strict=False):
            assert one.last < other.first and other.begin_bytes - one.end_bytes > gap_bytes


def test_neighbours_are_one_request_and_a_row_larger_than_the_room_is_refused():
    assert list(pieces_of([8, 9, 16], spec(), most_rows=9, most_bytes=1 << 20, gap_bytes=0)) == [
        Piece(0, 3, (PageRange(PAGE_BYTES, 3 * PAGE_BYTES, 8, 16),))
    ]
    assert list(pieces_of([], spec(), most_rows=9, most_bytes=1 << 20)) == []
    with pytest.raises(ValueError, match="the pages of a row are 8192 of 4096 bytes"):
        list(pieces_of([1], spec(row_bytes=6000), most_rows=9, most_bytes=4096))


def model(num_rows=VOCABULARY):
    return build_lora("llama", torch.bfloat16, 2, 0.0, vocab_size=num_rows, hidden_size=WIDTH)


def small():
    return model(SMALL)


def batch(seed=0, num_rows=SMALL):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, num_rows, (2, TOKENS), generator=generator)
    return {"input_ids": ids, "labels": ids}


def made(make_engine, folder, place, built=None, **options):
    arguments = {**PLACES[place], "nvme": None if place == "HOST" else folder}
    given = {"stream_edges": True, "poison": True, "record": True, "room_bytes": 16 * 1024, **options}
    return make_engine(model() if built is None else built, given, batch_size=2, seq_len=TOKENS, **arguments)


def embedding_of(engine):
    return engine.model.get_input_embeddings()


@pytest.mark.parametrize("place", PLACES)
def test_rows_are_those_of_the_table_and_nothing_else_is_read(place, make_engine, disk_folder):
    built = model()
    table = built.get_input_embeddings().weight.detach().clone()
    engine = made(make_engine, disk_folder, place, built)
    lookups = engine.plan.lookups
    assert lookups is not None and lookups.blocks == ("base_model.model.model.embed_tokens",)
    assert lookups.rest is (Tier.HOST if place == "HOST" else Tier.NVME)
    ids = batch(num_rows=VOCABULARY)["input_ids"]
    before = engine.report()["bytes_read"]
    found = embedding_of(engine)(ids)
    read, counted = engine.report()["bytes_read"] - before, engine.report()["lookups"]
    assert torch.equal(found, nn.functional.embedding(ids, table))
    assert counted["num_rows"] == ids.unique().numel() and counted["num_pieces"] >= 4
    head = next(e for e in engine._runtime.executors if e.ring.name == "edges")
    head.drain()
    assert head.counters.num_fetches == 1  # begun by the lookup
    if place == "HOST":
        assert counted["page_bytes"] == 0
    else:
        assert read - TABLE_BYTES == counted["page_bytes"] < TABLE_BYTES // 4
        pieces = pieces_of(ids.unique().tolist(), spec(), most_rows=32, most_bytes=32 * 1024)
        assert counted["page_bytes"] == sum(piece.num_bytes for piece in pieces)
    assert torch.equal(embedding_of(engine)(ids[:, ::3].int()), nn.functional.embedding(ids[:, ::3], table))
    assert torch.equal(embedding_of(engine)(ids[:0]), nn.functional.embedding(ids[:0], table))
    assert [str(race) for race in engine._runtime.recorder.check()] == []


def test_pages_are_verified_on_their_first_read_and_no_later_one(make_engine, disk_folder):
    engine = made(make_engine, disk_folder, "NVME")
    ids = torch.tensor([[40, 41, 20000]])
    embedding_of(engine)(ids)
    assert engine.report()["lookups"]["num_verified_pages"] == 2
    embedding_of(engine)(ids)
    assert engine.report()["lookups"]["num_verified_pages"] == 2
    store = engine._runtime.store
    at = store._blocks["base_model.model.model.embed_tokens"][1].stripes[0].offset_bytes
    flip(store.folders[0] / "weights.bin", at + 30000 * ROW_BYTES + 3)
    first = 30000 * ROW_BYTES // PAGE_BYTES * PAGE_BYTES
    with pytest.raises(StoreCorrupt, match=f"embed_tokens, bytes {first} to {first + PAGE_BYTES}: checksum"):
        embedding_of(engine)(torch.tensor([[5, 30000]]))
    assert embedding_of(engine)(ids).isfinite().all()  # its memory came back


@pytest.mark.parametrize("odd", [-1, VOCABULARY])
def test_an_id_out_of_range_is_torchs_own_error(odd, make_engine, disk_folder):
    engine = made(make_engine, disk_folder, "NVME")
    with pytest.raises(IndexError, match=f"index out of range in self.*not row {odd}"):
        embedding_of(engine)(torch.tensor([[1, odd]]))
    with pytest.raises(RuntimeError, match="Expected tensor for argument #1 'indices'"):
        embedding_of(engine)(torch.tensor([[0.5]]))


def losses_of(engine, steps=2):
    found = []
    for step in range(steps):
        loss = engine(**batch(step)).loss
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    return found, {name: p.detach().clone() for name, p in engine.trainable.items()}


@pytest.mark.parametrize("place", PLACES)
def test_training_with_rows_has_the_bits_of_training_with_the_table(place, make_engine, disk_folder):
    expected = losses_of(make_engine(small(), batch_size=2, seq_len=TOKENS))
    engine = made(make_engine, disk_folder, place, small())
    found = losses_of(engine)
    assert found[0] == expected[0] and all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
    assert engine.report()["prefetch_misses"] == 0 and engine.report()["lookups"]["num_rows"] > 100
    whole = made(make_engine, disk_folder, place, small(), look_up_rows=False) if place == "HOST" else None
    if whole is not None:  # the switch
        assert whole.plan.lookups is None and losses_of(whole)[0] == expected[0]
    given = {"inputs_embeds": embedding_of(engine)(batch()["input_ids"]).detach(), "labels": batch()["labels"]}
    before = engine.report()["lookups"]["num_rows"]
    with torch.no_grad():
        assert torch.equal(engine(**given).loss, engine(**batch()).loss)
    assert engine.report()["lookups"]["num_rows"] == before + batch()["input_ids"].unique().numel()


def test_rows_go_to_a_late_device_and_not_the_table(make_engine, disk_folder):
    expected = losses_of(make_engine(small(), batch_size=2, seq_len=TOKENS))
    for place in ("HOST", "NVME through HOST"):
        device = FakeDevice(late_seconds=0.001, kernels_are_late=False)
        engine = made(make_engine, disk_folder, place, small(), device=device, layer_inputs=Tier.DEVICE)
        found = losses_of(engine)
        assert found[0] == expected[0]
        assert [str(race) for race in engine._runtime.recorder.check()] == []
        assert engine._runtime.tiers.account(Tier.DEVICE).holdings["rows of embeddings"] == 16 * 1024
        engine.close()
        device.close()


class Scaled(nn.Embedding):
    """As Gemma's, with a row for what the vocabulary does not have, as Idefics'."""

    def forward(self, ids):
        odd = ids >= self.num_embeddings
        rows = super().forward(ids.masked_fill(odd, 0)) * torch.tensor(3.0, dtype=self.weight.dtype)
        return rows.masked_fill(odd.unsqueeze(-1), 0.5)


class Summed(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + self.weight.sum(0)


@pytest.mark.parametrize("kind", [Scaled, Summed])
def test_a_modules_own_forward_runs_on_its_own_ids(kind, make_engine, disk_folder):
    built = model()
    own = built.get_input_embeddings()
    embedding = kind(VOCABULARY, WIDTH, padding_idx=5, dtype=torch.bfloat16)
    embedding.weight = own.weight
    built.set_input_embeddings(embedding)
    embedding.weight.requires_grad_(False)
    ids = torch.tensor([[1, VOCABULARY + 7, 5, 9]]) if kind is Scaled else torch.tensor([[1, 2]])
    expected = embedding(ids)
    made(make_engine, disk_folder, "NVME", built)
    if kind is Summed:
        with pytest.raises(UnsupportedModule, match="Summed does more with its weight than look up rows .sum"):
            embedding(ids)
    else:
        assert torch.equal(embedding(ids), expected)


def test_an_adapter_on_the_embedding_trains_and_is_saved_as_without_rows(make_engine, disk_folder, tmp_path):
    peft = pytest.importorskip("peft")

    def built():
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, lora_dropout=0.0, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"
        )
        base = small().unload()
        found = peft.get_peft_model(base.requires_grad_(False), config)
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.02)
        return found

    whole = make_engine(built(), batch_size=2, seq_len=TOKENS)
    expected = losses_of(whole)
    engine = made(make_engine, disk_folder, "NVME", built())
    found = losses_of(engine)
    files = []
    for run, name in ((whole, "whole"), (engine, "rows")):
        run.save_pretrained(tmp_path / name)
        files.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys() and all("lora_" in name for name in files[0])
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert engine.plan.lookups is not None and any("lora_embedding" in name for name in found[1])
    assert found[0] == expected[0] and all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]}),
        (True, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]}),
        (False, {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    ],
    ids=["rows that train", "rows of a tied pair", "DoRA"],
)
def test_an_edge_whose_weight_an_adapter_reads_stays_in_memory(tied, settings, make_engine, disk_folder):
    peft = pytest.importorskip("peft")

    def built():
        torch.manual_seed(1)
        base = build_base("llama", torch.bfloat16, 2, vocab_size=SMALL, hidden_size=WIDTH, tie_word_embeddings=tied)
        return peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))

    expected = losses_of(make_engine(built(), batch_size=2, seq_len=TOKENS))
    engine = made(make_engine, disk_folder, "NVME", built())
    found = losses_of(engine)
    assert engine.plan.lookups is None
    assert not any("embed_tokens" in name for ring in engine.plan.rings for name in ring.blocks)
    assert found[0] == expected[0] and all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def test_an_embedding_that_trains_is_saved_and_a_frozen_head_is_not_wherever_it_rests(
    make_engine, disk_folder, tmp_path
):
    files = []
    for options in ({"stream_edges": True}, None):
        built = small()
        embedding = built.get_input_embeddings().requires_grad_(True)
        engine = make_engine(built, options, batch_size=2, seq_len=TOKENS, nvme=disk_folder)
        engine.save_pretrained(tmp_path / str(len(files)))
        files.append(load_file(tmp_path / str(len(files)) / "adapter_model.safetensors"))
        engine.close()
    assert files[0].keys() == files[1].keys() and not any("lm_head" in name for name in files[0])
    (name,) = [name for name in files[0] if "lora_" not in name]
    assert name.endswith("embed_tokens.weight") and torch.equal(files[0][name], embedding.weight.detach())


def test_a_budget_without_room_for_the_table_plans_rows(make_engine, disk_folder):
    def engine(budget, **arguments):
        return make_engine(
            model(), batch_size=2, seq_len=TOKENS, nvme=disk_folder, device_memory=budget, **arguments
        )  # fmt: skip

    with pytest.raises(PlanInfeasible) as short:
        engine("8MiB")
    found = engine(short.value.need_bytes + (9 << 20))  # room for the head as a whole, which tiles save, and no table
    assert found.plan.lookups is not None and "edges" in {ring.name for ring in found.plan.rings}
    holdings = found.report()["holdings"]["device"]
    edges = ("ring of edges", "rows of embeddings", "pages of embeddings", "checksums of pages")
    assert TABLE_BYTES < sum(holdings[name] for name in edges) < TABLE_BYTES * 9 // 8
    assert "resident blocks" not in holdings
    assert holdings["rows of embeddings"] == 2 * TOKENS * ROW_BYTES
    planned = found.plan.peak_bytes["device"]
    assert holdings["pages of embeddings"] + holdings["checksums of pages"] == planned["rows on their way"]
    assert "rows of base_model.model.model.embed_tokens rest in nvme, 64 KiB at a time" in found.summary()
    losses_of(found, 1)
    assert Plan.from_json(found.plan.to_json()) == found.plan


def test_plans_that_cannot_be_run_are_refused(make_engine, disk_folder):
    engine = made(make_engine, disk_folder, "NVME", small())
    lookups = engine.plan.lookups
    with pytest.raises(ValueError, match="rest is DEVICE"):
        Lookups(blocks=("a",), rest=Tier.DEVICE, room_bytes=1)
    with pytest.raises(ValueError, match="from nvme with pages_bytes 0"):
        Lookups(blocks=("a",), rest=Tier.NVME, room_bytes=1)
    for changed, message in [
        (replace(lookups, blocks=("base_model.model.lm_head",)), "no frozen embedding"),
        (replace(lookups, room_bytes=100), "a row of .* has 512"),
        (replace(lookups, rest=Tier.HOST, pages_bytes=0), "HOST, which is DEVICE"),
    ]:
        rings = tuple(
            replace(ring, blocks=lookups.blocks) if ring.name == "edges" and "head" in changed.blocks[0] else ring
            for ring in engine.plan.rings
        )
        plan = replace(engine.plan, lookups=changed, rings=rings)
        with pytest.raises(ConfigError, match=message):
            make_engine(small(), plan=plan, batch_size=2, seq_len=TOKENS, nvme=disk_folder)


@pytest.mark.parametrize("place", PLACES)
def test_a_whole_model_is_saved_with_its_table(place, make_engine, disk_folder, tmp_path):
    built = PlainModel()
    expected = built.embedding.weight.detach().clone()
    engine = made(make_engine, disk_folder, place, built, room_bytes=4096)
    assert engine.plan.lookups is not None
    engine.save_pretrained(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["embedding.weight"], expected)
    account, access = engine._runtime.tiers.account(Tier.HOST), engine._runtime.accesses["embedding"]
    for peaks in (engine.report()["peaks"][tier.value] for tier in (Tier.DEVICE, account.tier)):
        assert peaks["phases"]["save"]["beside"] == {}
    assert engine.report()["peaks"]["over"] == []
    before, in_arenas = dict(account.holdings), account.arena_bytes
    slot = access.acquire(Phase.FORWARD, training=False)
    booked = 0 if place == "HOST" else slot.num_bytes
    assert account.holdings == before | ({"embedding, whole": booked} if booked else {})
    assert account.arena_bytes == in_arenas + booked
    del slot
    access.release()
    assert (account.holdings, account.arena_bytes, account.passing_bytes) == (before, in_arenas, 0)
    assert engine._peaks._planned_bytes(account, "save") - account.used_bytes == booked
    account.capacity_bytes = account.used_bytes
    if place != "HOST":
        with pytest.raises(BudgetExceeded, match="embedding, whole needs 24 KiB, 0 B of"):
            engine.save_pretrained(tmp_path / "again")
        assert account.holdings == before


def test_what_cannot_be_mapped_is_not_booked(monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOMEM, "no memory")

    account = TierAccount(Tier.HOST, 1 << 20)
    monkeypatch.setattr(tiers, "Arena", refused)
    with pytest.raises(OSError, match="no memory"):
        account.lend("embedding, whole", 4096)
    assert (account.holdings, account.arena_bytes, account.passing_bytes, account.most_passing_bytes) == ({}, 0, 0, 0)


def test_a_tied_head_with_a_bias_streams_whole_and_its_bias_stays(make_engine, disk_folder):
    built = build_base("qwen", torch.bfloat16, 2, vocab_size=SMALL, hidden_size=WIDTH).requires_grad_(False)
    built.lm_head.bias = nn.Parameter(torch.ones(SMALL, dtype=torch.bfloat16), requires_grad=False)
    built.model.norm.weight.requires_grad_(True)
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = built(input_ids=ids).logits
    engine = made(make_engine, disk_folder, "NVME", built, head_tile_rows=256)
    assert engine.plan.head_tiles is None and engine.plan.lookups is None
    assert [ring.blocks for ring in engine.plan.rings if ring.name == "edges"] == [("model.embed_tokens",)]
    with torch.no_grad():
        assert torch.equal(engine(input_ids=ids).logits, expected)
    losses_of(engine, 1)
