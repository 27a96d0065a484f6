"""The most that there was in each tier, by phase: held against a spy on every mapping, and files counted by hand.

mapped   |- staging -|            |---- arenas of the tiers -----------------------------------> engine.close()
                                            |- log -----------------------------------------> |- snapshot -|
phase    |------------- ingest ---------------------|------ step ------|------ save ------|------ step ...
"""

import gc
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from offload_rt.memory import arena as arenas
from offload_rt.memory import mapped
from offload_rt.memory.arena import Arena
from offload_rt.plans import planning
from offload_rt.running import peaks
from offload_rt.running.comparison import peak_lines
from offload_rt.storage import store
from offload_rt.storage.commit_layout import LOG_BUFFER_BYTES
from offload_rt.storage.drives import PROBE_BYTES, drive_profile
from offload_rt.transfers.links import Links
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.errors import PlanInfeasible
from planners.plans.plan import StatePlacement, Tier
from planners.rule.attempts import SAVING
from tests.conftest import build_base, build_lora, language_batch
from tests.test_planning import SECONDS, machine

SEQ_LEN = 512
"""So long that activations are planned to take more than the buffers of fixed size that a log is filled through."""
TIERED = RuntimeOptions(state=StatePlacement(in_memory={}, gradients=Tier.HOST, state_slots=2))
KINDS = {
    "adapters": (build_lora, {"bits": 4}, None),
    "adapters, two tiers": (build_lora, {"bits": 4, "host_memory": "64MiB", "device_memory": "64MiB"}, None),
    "adapters, layer inputs on NVMe": (build_lora, {"bits": 4}, {"layer_inputs": Tier.NVME}),
    "adapters, state on NVMe": (build_lora, {"bits": 4}, vars(TIERED)),
    "all parameters in memory": (lambda: build_base("llama", torch.bfloat16), {}, None),
    "all parameters on NVMe": (lambda: build_base("llama", torch.bfloat16), {}, {"rest": Tier.NVME}),
}
SELDOM = ("adapters", "all parameters in memory")
"""What the others map, too."""


class Spy:
    """Every region, as the C library's caller sees it: what is mapped now, and the most since `begin`."""

    def __init__(self):
        self.now = self.most = 0

    def begin(self):
        self.most = self.now


@pytest.fixture
def spy(monkeypatch):
    found = Spy()

    class Seen(arenas.Region):
        def __new__(cls, num_bytes):
            region = super().__new__(cls, num_bytes)
            region.counted = num_bytes
            found.now += num_bytes
            found.most = max(found.most, found.now)
            return region

        def __del__(self):
            found.now -= self.counted
            super().__del__()

    monkeypatch.setattr(arenas, "Region", Seen)
    # The spy hears of what is given back a few instructions before the engine: no thread may map something between.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    yield found
    sys.setswitchinterval(interval)


def train(engine, numbers=range(2)):
    for number in numbers:
        loss = engine(**language_batch(number)).loss
        engine.backward(loss)
        engine.step()


def lengths(*folders):
    return {path: path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()}


def in_memory(found, phase):
    """Over all tiers: the phases here have one peak, of both tiers at once."""
    return sum(found[tier]["phases"][phase]["bytes"] for tier in ("device", "host") if tier in found)


@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=pytest.mark.full) if name in SELDOM else name for name in KINDS]
)
def test_peaks_are_those_of_every_mapping_and_every_file(kind, make_engine, tmp_path, spy):
    build, arguments, options = KINDS[kind]
    nvme, saved = tmp_path / "nvme", tmp_path / "saved"
    nvme.mkdir()
    model = build()
    links = Links()
    drive_profile(nvme, links.io)  # it is probed once in a user's life
    links.close()
    spy.begin()
    most = {}
    with make_engine(model, options, nvme=nvme, device="cpu", seq_len=SEQ_LEN, **arguments) as engine:
        most["ingest"] = spy.most
        spy.begin()
        train(engine)
        most["step"] = spy.most
        before_files = lengths(nvme)
        spy.begin()
        engine.save_checkpoint(saved)
        most["save"] = spy.most
        spy.begin()
        engine.load_checkpoint(saved)
        most["resume"] = spy.most
        found = engine.report()["peaks"]
        account = engine._runtime.tiers.account(Tier.NVME)
        unlinked = sum(
            size for name, size in account.holdings.items() if name in ("layer inputs, activations", "gradients")
        )
        holdings = {
            tier: account.arena_bytes for tier, account in engine._runtime.tiers.accounts.items() if account.arena_bytes
        }
        lines = engine.summary()
    assert found["over"] == [], "not in the plan"
    if "host" in found and found["host"]["planned_bytes"]:
        # A spy on all memory knows no tiers; what is beside them is HOST's.
        assert in_memory(found, "step") == most["step"] and in_memory(found, "save") == most["save"]
        assert in_memory(found, "ingest") >= most["ingest"] and in_memory(found, "resume") == most["resume"]
    else:
        assert {name: in_memory(found, name) for name in most} == most
    for tier, arena_bytes in holdings.items():
        of = found[tier.value]["phases"]["step"]
        assert of["bytes"] == arena_bytes + sum(of["beside"].values())
        assert all(0 <= leased <= arena_bytes for leased in of["leased"].values()) and any(of["leased"].values())
    files = found["nvme"]["phases"]
    for phase in ("step", "save", "resume"):
        assert files[phase].get("scratch", 0) == unlinked
        managed = sum(size for path, size in before_files.items() if path.name in peaks.FILES)
        assert files[phase].get("weights", 0) + files[phase].get("state", 0) == managed
        assert managed + unlinked == found["nvme"]["planned_bytes"], "to the byte"
    assert files["save"]["checkpoint"] == sum(lengths(saved).values()) > 0
    assert "at most" not in lines  # there is no steady step yet
    shown = peak_lines(found)
    assert shown[0].startswith("device: ingest ") and shown[-1].startswith("process, beside arenas: ")


def test_a_checkpoint_that_is_replaced_counts_with_the_one_before(make_engine, tmp_path):
    with make_engine(build_lora(), device="cpu") as engine:
        train(engine, range(1))
        engine.save_checkpoint(tmp_path / "saved")
        engine.save_checkpoint(tmp_path / "saved")
        found = engine.report()["peaks"]
    one = sum(lengths(tmp_path / "saved").values())
    assert found["nvme"]["phases"]["save"]["checkpoint"] == pytest.approx(2 * one, abs=64)


def test_memory_that_nobody_reserved_is_over_the_plan_and_named(make_engine, caplog):
    with make_engine(build_lora(), device="cpu") as engine:
        train(engine, range(1))
        assert engine.report()["peaks"]["over"] == []
        planned = engine.report()["peaks"]["device"]["planned_bytes"]
        hidden = Arena("nobody's", planned)
        del hidden  # it is a peak although it is gone
        found = engine.report()["peaks"]
        arena_bytes = engine._runtime.tiers.account(Tier.DEVICE).arena_bytes
    mapped_bytes = -(-planned // 4096) * 4096
    assert found["over"] == [{"tier": "device", "phase": "step", "bytes": arena_bytes + mapped_bytes - planned}]
    assert found["device"]["phases"]["step"]["beside"] == {"nobody's": mapped_bytes}
    assert "step: arenas took" in caplog.text and "not reserved: nobody's" in caplog.text
    assert peak_lines(found)[-1].startswith("over the plan: device by ") and "in step" in peak_lines(found)[-1]


SNAPSHOTS = {"adapters": "state of adapters", "all parameters": "snapshot"}
"""What memory is called that state goes through."""
PASSING = {
    "drive probe": ({"rest": Tier.NVME}, PROBE_BYTES),
    "pieces of weights": ({"rest": Tier.HOST}, 0),
}


def probing(monkeypatch, name, num_bytes):
    """Whoever asks for a drive's speed takes so much memory for a moment."""

    def profile(*arguments):
        if num_bytes:
            Arena(name, num_bytes)
        return drive_profile(*arguments)

    monkeypatch.setattr(store, "drive_profile", profile)


@pytest.mark.parametrize("name", PASSING)
def test_buffers_of_a_first_start_are_planned_within_the_budget(name, make_engine, tmp_path, caplog, monkeypatch):
    options, num_bytes = PASSING[name]
    probing(monkeypatch, name, num_bytes)
    budgets = {"device_memory": "64MiB", "host_memory": "64MiB"}
    with make_engine(build_lora(), options, nvme=tmp_path, device="cpu", bits=4, **budgets) as engine:
        found = engine.report()["peaks"]
        lines = peak_lines(found)
    ingest = found["host"]["phases"]["ingest"]
    assert ingest["bytes"] > found["host"]["planned_bytes"], "they take more than what lasts"
    assert found["host"]["passing_bytes"] == ingest["beside"][name] > 0
    assert not [one for one in found["over"] if one["phase"] == "ingest"] and "ingest: arenas took" not in caplog.text
    assert any(line.startswith("host: ") and line.endswith(" for a moment of ingest") for line in lines)


def test_a_layer_is_timed_in_memory_of_the_device(make_engine, caplog, monkeypatch):
    """HOST has not so much, and less is planned there."""
    monkeypatch.setattr(planning, "profile_head", lambda **_: SECONDS)
    hardware = replace(machine(4 << 20, 256 << 10), drives=())
    with make_engine(build_lora(), device="cpu", plan="optimise", emulate=hardware) as engine:
        found = engine.report()["peaks"]
    ingest = found["device"]["phases"]["ingest"]
    assert sum(size for name, size in ingest["beside"].items() if name.startswith("profile")) > 256 << 10
    assert found["over"] == [] and "arenas took" not in caplog.text


@pytest.mark.parametrize(
    ("name", "num_bytes", "host_memory", "passing_bytes"),
    [
        ("drive probe", 2 * PROBE_BYTES, "64MiB", PROBE_BYTES),
        ("nobody's", PROBE_BYTES, "64MiB", 0),
        ("drive probe", PROBE_BYTES, "8MiB", None),
    ],
)
def test_a_first_start_that_takes_more_is_over_the_plan(
    name, num_bytes, host_memory, passing_bytes, make_engine, tmp_path, caplog, monkeypatch
):
    probing(monkeypatch, name, num_bytes)
    budgets = {"device_memory": "64MiB", "host_memory": host_memory}
    options = {"rest": Tier.NVME}
    with make_engine(build_lora(), options, nvme=tmp_path, device="cpu", bits=4, **budgets) as engine:
        found = engine.report()["peaks"]
    host = found["host"]
    planned = host["budget_bytes"] if passing_bytes is None else host["planned_bytes"] + passing_bytes
    assert found["over"] == [{"tier": "host", "phase": "ingest", "bytes": num_bytes - planned}]
    assert "ingest: arenas took" in caplog.text and f"not reserved: {name}" in caplog.text


@pytest.mark.parametrize("kind", ["adapters", "all parameters"])
def test_a_host_of_the_least_size_holds_the_log_and_what_state_is_saved_through(kind, make_engine, tmp_path, caplog):
    """In no phase is anything over the plan, loading from another run's log included; a page less is refused."""
    adapters = kind == "adapters"
    options = {**vars(TIERED), "piece_elements": 4096} if adapters else {"rest": Tier.NVME, "piece_elements": 4096}
    folders = {name: tmp_path / name for name in ("one", "other", "saved", "again")}

    def started(folder, host_memory):
        folders[folder].mkdir(exist_ok=True)
        budgets = {"device_memory": "64MiB", "host_memory": host_memory, "nvme": folders[folder]}
        torch.manual_seed(0)
        model = build_lora() if adapters else build_base("llama", torch.bfloat16)
        return make_engine(model, options, device="cpu", bits=4 if adapters else None, seq_len=64, **budgets)

    for folder in ("one", "other"):  # what a first start takes for a moment is another matter
        with started(folder, "64MiB") as roomy:
            train(roomy, range(1))
            roomy.save_checkpoint(folders["saved"] / folder)
    with pytest.raises(PlanInfeasible) as refused:
        started("one", 4096)
    least = refused.value.needs["host"]
    with pytest.raises(PlanInfeasible) as refused:
        started("one", least - 4096)
    assert refused.value.need_bytes == least == refused.value.have_bytes + 4096
    with started("one", least) as run:
        assert run.plan.predicted_bytes(Tier.HOST) == least
        piece_bytes = max(piece.num_bytes for block in run._training.blocks for piece in block.pieces)
        items = run.plan.peak_bytes["host"]
        assert items["commit log"] == LOG_BUFFER_BYTES and items[SAVING] == 2 * piece_bytes + LOG_BUFFER_BYTES
        run.load_checkpoint(run.commit_folder)
        train(run, range(1))
        run.save_checkpoint(folders["again"])
        run.load_checkpoint(folders["again"])
        run.load_checkpoint(next(path.parent for path in folders["other"].rglob("log.json")))
        train(run, range(1))
        found = run.report()["peaks"]
    assert found["over"] == [] and "arenas took" not in caplog.text
    phases = found["host"]["phases"]
    assert all(SNAPSHOTS[kind] in phases[phase]["beside"] for phase in ("save", "resume"))
    assert not phases["step"]["beside"], "its memory is reserved"
    assert "commit log" in phases["resume"]["beside"] and phases["step"]["leased"]["commit log"] <= LOG_BUFFER_BYTES


@pytest.mark.parametrize("where", ["on its way", "in memory"])
def test_a_new_log_is_filled_out_of_memory_that_is_reserved(where, make_engine, tmp_path, spy):
    """Nothing but the plan's arenas is mapped while it is made, and the state that training begins with is not its
    zeros.
    """
    options = {"rest": Tier.NVME, "piece_elements": 4096} if where == "on its way" else None
    links = Links()
    drive_profile(tmp_path, links.io)
    links.close()
    spy.begin()
    with make_engine(build_base("llama", torch.bfloat16), options, nvme=tmp_path, device="cpu", seq_len=64) as engine:
        assert bool(engine.plan.state.state_slots) == (where == "on its way")
        arena_bytes = sum(account.arena_bytes for account in engine._runtime.tiers.accounts.values())
        found = engine.report()["peaks"]
        assert spy.most == arena_bytes and found["device"]["phases"]["ingest"]["beside"] == {}
        home, log = engine._training.home, engine._training.home.log
        for block in engine._training.blocks:
            for piece in block.pieces:
                room = Arena("room", piece.num_bytes).acquire(piece.num_bytes, "room")
                engine._runtime.links.wait(home.fetch(piece, room))
                assert any(bytes(room.buffer())), piece.name
    assert log.committed.sequence == 1


def test_two_engines_do_not_count_each_others_budgets(make_engine):
    with make_engine(build_lora(), device="cpu") as one:
        train(one, range(1))
        before = one.report()["peaks"]["device"]["phases"]["step"]["bytes"]
        with make_engine(build_lora(seed=1), device="cpu") as other:
            train(other, range(1))
            assert other.report()["peaks"]["device"]["phases"]["step"]["bytes"] == before > 0
        assert one.report()["peaks"]["device"]["phases"]["step"]["bytes"] == before


def test_changes_are_told_in_their_order_and_to_whoever_watches():
    gc.collect()  # arenas of other tests that nobody has let go
    before, early = Arena("before", 4096), mapped.Watch()
    late = mapped.Watch()
    first = Arena("first", 4096)
    with mapped.reserved_from("somebody"):
        second = Arena("second", 8192)
    slot = first.acquire(10, "holder")
    del first, second, before
    told = [(mapping.name, mapping.account, is_mapped) for mapping, is_mapped in early.changes]
    assert told == [
        ("first", None, True), ("second", "somebody", True), ("second", "somebody", False), ("before", None, False),
    ], "memory that a slot sees is not given back"  # fmt: skip
    late.close()
    del slot
    assert early.changes[-1][0].name == "first" and late.changes[-1][0].name == "before"
    early.close()
    early.close()
    sizes = [mapping.num_bytes for mapping, is_mapped in early.changes if is_mapped]
    assert sizes == [4096, 8192] and all(one is not other for one, other in pairwise(early.changes))
