"""What was under way when in measured steps: the same bits, the bytes that are counted, waits by a block's name."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_rt._engine import Engine
from offload_rt.errors import ConfigError, OffloadError, StorageFull
from offload_rt.memory.arena import Arena
from offload_rt.meter import COMPUTE, CPU, DEVICE_TO_HOST, DEVICE_UPDATE, HOST_TO_DEVICE, SSD_READ, SSD_WRITE, WAIT
from offload_rt.running import tracing
from offload_rt.spans import STEP, Spans
from offload_rt.transfers import links
from offload_rt.transfers.device_spans import DeviceSpans
from offload_rt.transfers.file_io import file_io, open_file
from offload_rt.transfers.links import Links
from offload_rt.transfers.streams import Copy
from offload_rt.transfers.transfer import Leg, Transfer
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.perfetto import ROWS, Slice, chrome_trace
from planners.plans.placement import Tier
from tests import tiny_training as tiny
from tests.changing_plans import plan_of, propose
from tests.conftest import build_plain
from tests.fake_device import FakeDevice
from tests.parity import STEPS, Case, run_plain, run_steps
from tests.test_device_engine import engine_on
from tests.test_emulated_training import machine
from tests.test_parity import differences

MIB = 1 << 20
SLEEP = 0.05


def slices(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What is on each row of a trace, in its order; all lanes of a row together."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = json.loads(content)["traceEvents"]
    shown = {name: row for row, name in tracing.SHOWN.items()}
    rows = {e["tid"]: shown[e["args"]["name"].rstrip(" 0123456789")] for e in events if e["name"] == "thread_name"}
    found = defaultdict(list)
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        found[rows[event["tid"]]].append(event)
    return found


def num_bytes(found: dict[str, list[dict[str, Any]]], row: str) -> int:
    return sum(event["args"].get("bytes", 0) for event in found[row])


def overlap(events: list[dict[str, Any]]) -> list[str]:
    """Those that begin before the one before is over."""
    return [b["name"] for a, b in zip(events, events[1:], strict=False) if b["ts"] < a["ts"] + a["dur"] - 1e-3]


@pytest.mark.parametrize("place", ["BACKWARD", "SPECULATIVE, serial"])
def test_a_traced_run_has_the_bits_of_another_and_leaves_nothing_behind(place: str, tmp_path: Path) -> None:
    states = []
    for is_traced in (False, True):
        folder = tmp_path / str(is_traced)
        folder.mkdir()
        with tiny.engine(tiny.model(), place, folder) as run:
            said: list[str] = []
            if is_traced:
                run.trace(tmp_path / "t.json", steps=2, wait=1, on_ready=said.append)
            losses = tiny.train(run, range(4))
            states.append((losses, run.state()))
            runtime = run._runtime
            told = [runtime.links.spans, runtime.links.meter.traced, run.step_meter.spans]
            assert told + [block.spans for block in runtime.blocks] == [None] * (3 + len(runtime.blocks))
            assert runtime.links.io.records() == ([], 0)
    assert states[0][0] == states[1][0] and tiny.differences(states[0][1], states[1][1]) == []
    (text,) = said
    assert [line.split(":")[0] for line in text.splitlines()] == ["step 2", "step 3", "longest waits", "trace"]
    found = slices(tmp_path / "t.json")
    assert [event["name"] for event in found[STEP]] == ["step 2", "step 3"]
    assert [event["name"] for event in found[DEVICE_UPDATE]] == ["update"] * 2 and overlap(found[DEVICE_UPDATE]) == []
    passes = Counter(event["name"] for event in found[COMPUTE])
    blocks = {f"{phase} layers.{index}": 2 for phase in ("forward", "backward") for index in range(3)}
    assert passes == {"forward": 2, "backward": 2, **blocks}
    in_passes = [event for event in found[COMPUTE] if event["name"] in blocks]
    assert overlap(in_passes) == [] == overlap([e for e in found[COMPUTE] if e["name"] not in blocks])
    steps = [e["name"] for e in in_passes[: len(blocks)]]
    assert steps == [f"forward layers.{i}" for i in range(3)] + [f"backward layers.{i}" for i in (2, 1, 0)]
    assert {"layers.0", "layers.1", "layers.2"} <= {event["name"] for event in found[CPU]} and overlap(found[CPU]) == []


def test_nothing_is_made_for_a_trace_where_none_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tracing, "Spans")
    with tiny.engine(tiny.model(), "BACKWARD", tmp_path) as run:
        tiny.train(run, range(2))
        run.trace(tmp_path / "t.json", wait=1)
        with pytest.raises(NameError):
            tiny.train(run, range(1))
        run._changes.tracing._asked = None


@pytest.mark.parametrize("io", ["auto", "threads", "aiofiles"])
def test_bytes_of_drives_are_those_that_the_report_counts(
    io: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "file_io", lambda: file_io(io))
    with tiny.engine(tiny.model(), "BACKWARD", tmp_path) as run:
        run.trace(tmp_path / "t.json.gz", steps=2, wait=2)
        tiny.train(run, range(2))
        before = run.report()
        tiny.train(run, range(2))
        after = run.report()
        tiny.train(run, range(1))
    found = slices(tmp_path / "t.json.gz")
    for row, counter in ((SSD_READ, "bytes_read"), (SSD_WRITE, "bytes_written")):
        assert num_bytes(found, row) == after[counter] - before[counter] > 0
        assert {"layers.0/0", "layers.1/0"} <= {event["name"] for event in found[row]}
    assert "layers.1" in {event["name"] for event in found[SSD_READ]}


def test_copies_and_what_is_put_away_in_host_are_on_their_rows(tmp_path: Path) -> None:
    x_BTF = torch.randn(2, 16, 8)
    with Engine(
        build_plain(), batch_size=2, seq_len=16, lr=1e-3, host_memory="64MiB",
        options=RuntimeOptions(layer_inputs=Tier.HOST, fill=False),
    ) as run:  # fmt: skip
        run.trace(tmp_path / "t.json", wait=1)
        for step in range(2):
            before = run._runtime.links.reading()
            run(x_BTF).square().mean().backward()
            run.step()
            if step:
                moved = run._runtime.links.reading().since(before).moved_bytes
    found = slices(tmp_path / "t.json")
    for row in (HOST_TO_DEVICE, DEVICE_TO_HOST):
        assert num_bytes(found, row) == moved[row] > 0
    copies = [event for event in found[HOST_TO_DEVICE] if event["name"].startswith("layers.")]
    assert copies and overlap(copies) == []


def test_a_late_read_is_a_wait_for_its_block(tmp_path: Path) -> None:
    with tiny.engine(tiny.model(), "BACKWARD", tmp_path) as run:
        starts = run._runtime.links.read

        def read(file: Any, offset_bytes: int, slot: Any) -> Any:
            transfer = starts(file, offset_bytes, slot)
            if slot.owner == "layers.1":
                arrives = transfer._wait
                transfer._wait = lambda seconds: (time.sleep(SLEEP), arrives(seconds))[1]
            return transfer

        run._runtime.links.read = read  # type: ignore[method-assign]
        run.trace(tmp_path / "t.json", wait=2)
        tiny.train(run, range(3))
    late = [event for event in slices(tmp_path / "t.json")[WAIT] if event["dur"] >= SLEEP * 1e6]
    assert "layers.1" in {event["name"] for event in late}
    assert {event["args"]["waits for"] for event in late if event["name"] == "layers.1"} == {SSD_READ}


def test_a_wait_is_for_what_took_most_of_it() -> None:
    """Not for what it ended with: a copy to where it is used takes little of a read that is late."""
    legs = (Leg(SSD_READ, 5.0), Leg(HOST_TO_DEVICE, 6.0))
    read_and_copied = Transfer("copy", 1, lambda seconds: None, ())
    read_and_copied.legs = legs
    devices = Transfer("copy", 1, lambda seconds: None, ())
    devices.copy, devices.legs_before = Copy("copy", [], inward=True), legs[:1]
    for transfer in (read_and_copied, devices):
        assert transfer.waited_for(1.0, 6.0) == SSD_READ
        assert transfer.waited_for(4.5, 6.0) == HOST_TO_DEVICE == transfer.waited_for(5.5, 6.0)
    parts = [Transfer("part", 1, lambda seconds: None, ()) for _ in range(4)]
    with contextlib.closing(Links()) as joining:
        for part, (resource, arrived) in zip(parts, zip("abab", (2.0, 4.5, 7.0, 9.0), strict=True), strict=True):
            part.legs = (Leg(resource, arrived),)
        assert joining.join("all", parts).waited_for(0.0, 9.0) == "a"  # 2 and 2.5 s, 2.5 and 2 s of "b"


@pytest.mark.parametrize("late", [SSD_READ, CPU])
def test_waits_for_updates_are_for_what_these_wait_for(
    late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny.engine(tiny.model(), "BACKWARD", tmp_path) as run:
        stepper = run._training.stepper  # type: ignore[attr-defined]
        meter, traced = stepper._links.meter, Spans(Clock())
        meter.traced, clock = traced, traced.clock
        monkeypatch.setattr(meter, "clock", clock)
        with stepper._computing_waits():
            clock.now += 3.0  # type: ignore[attr-defined]
            stepper._waited[SSD_READ] += 2.0 if late == SSD_READ else 1.0
        meter.traced = None
    assert [(span.name, span.of) for span in traced.found] == [("updates", late)]


def test_a_trace_that_ends_while_threads_look_at_it_disturbs_none(tmp_path: Path) -> None:
    spans = Spans(Clock())

    class Ends(Links):
        is_seen = False

        @property
        def spans(self) -> Spans | None:  # type: ignore[override]
            self.is_seen = not self.is_seen
            return spans if self.is_seen else None

        @spans.setter
        def spans(self, value: Spans | None) -> None:
            pass

    (tmp_path / "file").write_bytes(bytes(4096))
    device, arena = FakeDevice(), Arena("a", 4096)
    with contextlib.closing(device), contextlib.closing(Ends()) as ending:
        for look in (
            lambda: ending._timed(HOST_TO_DEVICE, device.to_device, 1, "layer"),
            lambda: ending.stalled("layer", SSD_READ),
            lambda: ending.read(open_file(tmp_path / "file", writable=False), 0, arena.acquire(4096, "layer")).wait(),
        ):
            ending.is_seen = False
            look()


def test_emulated_links_are_on_the_rows_as_they_work_one_after_the_other(tmp_path: Path) -> None:
    with tiny.engine(tiny.model(), "", tmp_path, nvme=tmp_path, options={"rest": Tier.NVME}, emulate=machine()) as run:
        run.trace(tmp_path / "t.json", wait=1)
        tiny.train(run, range(1))
        before = run._runtime.links.reading()
        tiny.train(run, range(1))
        moved = run._runtime.links.reading().since(before).moved_bytes
    found = slices(tmp_path / "t.json")
    for row in (HOST_TO_DEVICE, DEVICE_TO_HOST, SSD_READ, SSD_WRITE):
        assert overlap(found[row]) == []
        assert 0 < num_bytes(found, row) <= moved[row], "what is through by the end of the step"
        assert found[row][0]["dur"] > 0


def test_what_an_asynchronous_device_does_is_in_it_by_its_own_clock(tmp_path: Path) -> None:
    case = Case("llama", "bf16", 1, False, False, "from HOST")
    device = FakeDevice(kernels_are_late=False)
    for stream in (device.to_device, device.to_host):
        stream.bytes_per_second = 1e6
    with engine_on(device, case, tmp_path) as run:
        run.trace(tmp_path / "t.json", wait=STEPS - 1)
        before = None

        def step() -> None:
            nonlocal before
            run.step()
            if run.step_number == STEPS - 1:
                before = run._runtime.links.reading()

        found = run_steps(1, run, run.backward, run.trainable, step)
        assert differences(run_plain(case), found) == [] and before is not None
        moved = run._runtime.links.reading().since(before).moved_bytes
        assert run._runtime.recorder is not None and run._runtime.recorder.check() == []
    device.close()
    traced = slices(tmp_path / "t.json")
    for row in (HOST_TO_DEVICE, DEVICE_TO_HOST):
        assert num_bytes(traced, row) == moved[row] > 0
        seconds = sum(event["dur"] for event in traced[row]) / 1e6
        assert seconds == pytest.approx(moved[row] / 1e6) and overlap(traced[row]) == []
    layers = {block.name for block in run._runtime.made_of.workload.layers}
    assert layers <= {event["name"] for event in traced[HOST_TO_DEVICE]}
    assert layers <= {event["name"] for event in traced[WAIT]}
    assert {f"forward {name}" for name in layers} <= {event["name"] for event in traced[COMPUTE]}


def test_where_marks_run_out_spans_are_left_out_and_counted() -> None:
    device = FakeDevice(kernels_are_late=False)
    spans = DeviceSpans(lambda: 0.0, device, num_pairs=2)
    ends = [spans.computing(f"layer {number}") for number in range(3)]
    for end in ends[1:]:
        end()
    spans.step_is_over(1)
    spans.settle()
    device.close()
    assert [span.name for span in spans.found] == ["layer 1"], "the first never ended"
    assert (spans.num_left_out, spans.num_steps) == (1, 0)


def test_a_change_of_plans_begins_the_trace_anew(tmp_path: Path) -> None:
    with tiny.engine(tiny.model(), "BACKWARD", tmp_path) as run:
        run.trace(tmp_path / "t.json", steps=2, wait=1)
        tiny.train(run, range(2))
        plan = replace(plan_of(run, "BACKWARD"), rings=run.plan.rings)
        propose(run, plan)
        tiny.train(run, range(3))
        assert run.report()["replanning"]["decisions"][0]["result"] == "changed"
        assert run._runtime.links.spans is None
    assert [event["name"] for event in slices(tmp_path / "t.json")[STEP]] == ["step 4", "step 5"]


def test_an_engine_that_closes_early_writes_what_there_is_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tiny.engine(tiny.model(), "in place", tmp_path) as run:
        run.trace(tmp_path / "t.json", steps=3, wait=1)
        with pytest.raises(ConfigError, match="t.json is not written yet; one trace at a time"):
            run.trace(tmp_path / "other.json")
        tiny.train(run, range(2))
    assert [event["name"] for event in slices(tmp_path / "t.json")[STEP]] == ["step 2"]
    assert "t.json lacks 2 step(s), which did not come" in caplog.text
    with pytest.raises(OffloadError, match="closed"):
        run.trace(tmp_path / "t.json")
    with tiny.engine(tiny.model(), "in place", tmp_path) as run:
        run.trace(tmp_path / "none.json", wait=1)
        tiny.train(run, range(1))
    assert "none.json is not written: no step was over" in caplog.text and not (tmp_path / "none.json").exists()


def test_what_cannot_be_written_is_refused_before_and_ends_no_run_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, told = tracing.write_atomically, []

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(path: Path, content: bytes) -> None:
        with monkeypatch.context() as patched, pytest.raises(StorageFull) as caught:
            patched.setattr("offload_rt.storage.drive_files.os.fsync", no_room)
            write(path, content)
        told.append(path)
        raise caught.value

    with tiny.engine(tiny.model(), "in place", tmp_path) as run:
        for path, wrong in (
            (tmp_path, "is a folder"),
            (Path(), "is a folder"),
            (tmp_path / "not" / "there", "No such file"),
        ):
            with pytest.raises(ConfigError, match=f"trace: .* cannot be written: {wrong}"):
                run.trace(path)
        for given in ({"steps": 0}, {"wait": -1}, {"steps": True}):
            with pytest.raises(ConfigError, match=f"trace: {next(iter(given))}: must be a whole number"):
                run.trace(tmp_path / "t.json", **given)
        monkeypatch.setattr(tracing, "write_atomically", full)
        run.trace(tmp_path / "t.json", wait=0)
        tiny.train(run, range(2))
    assert "t.json: cannot be written (errno 28, ENOSPC)" in caplog.text.replace("\n", " ")
    assert told == [tmp_path / "t.json"] and list(tmp_path.glob("*.json*")) == [], "it would keep the drive full"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_summary_says_what_was_busy_and_the_longest_waits() -> None:
    clock = Clock()
    spans = Spans(clock, most=8)
    spans.add(COMPUTE, "forward", 0.0, 4.0)
    spans.add(COMPUTE, "forward layers.0", 1.0, 2.0)
    spans.add(COMPUTE, "backward", 4.0, 9.0)
    for begin, end, name in ((0.5, 1.0, "layers.0"), (5.0, 7.0, "layers.1"), (7.5, 7.6, "layers.0")):
        spans.add(WAIT, name, begin, end, of=SSD_READ)
    spans.add(SSD_READ, "layers.1", 4.5, 7.0, 4096)
    spans.add(SSD_READ, "layers.0", 3.0, 6.0, 4096)
    clock.now = 10.0
    spans.step_is_over(5)
    spans.step_is_over(6)
    spans.add(CPU, "no room", 0.0, 1.0)
    assert tracing.summary(spans) == [
        "step 5: 10 s; busy: compute 64%, ssd_read 40%; computing waited 2.6 s: 2.6 s for ssd_read",
        "step 6: 0 ms; busy: nothing; computing waited 0 ms",
        "longest waits: 2 s for layers.1 (ssd_read) in step 5, backward, 500 ms for layers.0 (ssd_read) in step 5, "
        "forward, 100 ms for layers.0 (ssd_read) in step 5, backward",
        "1 span(s) had no room: at most 8 are kept; trace fewer steps",
    ]


def test_slices_that_overlap_are_drawn_in_lanes_and_those_inside_others_are_not() -> None:
    found = [Slice(COMPUTE, "forward", "", 0.0, 4.0), Slice(COMPUTE, "layer", "", 1.0, 2.0)]
    found += [Slice(SSD_READ, name, "", at, at + 2.0) for at, name in enumerate("abc")]
    events = json.loads(chrome_trace("a step", 7, ROWS, found))["traceEvents"]
    lanes = {event["name"]: event["tid"] for event in events if event["ph"] == "X"}
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert lanes["forward"] == lanes["layer"] == 0
    assert [names[lanes[name]] for name in "abc"] == ["SSD read", "SSD read 2", "SSD read"]
    assert {event["pid"] for event in events} == {7}


def test_no_reader_rounds_slices_into_one_another() -> None:
    """Perfetto leaves out a slice that begins in another and ends behind it, if by a nanosecond."""
    at, found = 0.0, []
    for number in range(200):
        end = at + 0.00012345678 * (1 + number % 7)
        found += [Slice(COMPUTE, "layer", "", at, end), Slice(COMPUTE, "in it", "", at + 1e-5, end)]
        at = end * (1 - 1e-15)  # as sums differ
    events = json.loads(chrome_trace("a step", 1, ROWS, found))["traceEvents"]
    drawn = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in drawn} == {0} and len(drawn) == len(found)
    ends: list[int] = []
    for event in drawn:
        begin, length = (int(event[key] * 1000) for key in ("ts", "dur"))  # as it reads them
        while ends and ends[-1] <= begin:
            ends.pop()
        assert length > 0 and (not ends or begin + length <= ends[-1])
        ends.append(begin + length)
