"""Calibration: every number comes from the work it names, and the planner takes what was written."""

import json
import os
import random
import time
from dataclasses import fields, replace

import pytest
import torch

from offload_rt.cli import calibrate as command
from offload_rt.cli.main import main
from offload_rt.errors import ConfigError, StorageError, StorageFull
from offload_rt.profiling import bench, calibrate
from offload_rt.profiling.bench import Bench, Cpu, Sizes, Spread
from offload_rt.profiling.calibrate import keep, measure, remembered
from offload_rt.transfers.links import Links
from planners.problems.hardware import load_hardware

MIB = 1 << 20
TINY = Sizes(
    seconds=0.0, passes=2, pass_seconds=0.0, matrix=64, attention_tokens=64, copy_bytes=MIB, elements=1 << 14,
    params=1 << 14, operation_bytes=1 << 16, file_bytes=MIB,
)  # fmt: skip
SLEEP_SECONDS = 0.02


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command measures tiny things, and keeps them in a cache of its own."""
    monkeypatch.setattr(calibrate, "Sizes", lambda: TINY)
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(tmp_path / "cache"))


def slowed(work):
    """`work`, a fiftieth of a second later."""

    def make(*arguments, **options):
        run, amount = work(*arguments, **options)

        def late():
            time.sleep(SLEEP_SECONDS)
            run()

        return late, amount

    return make


BENCH = Bench(Cpu(), TINY)
FIELDS = {
    "matmul": lambda h: h.device.matmul_flops_per_second,
    "element_wise": lambda h: h.device.memory_bytes_per_second,
    "nf4_decode": lambda h: h.device.nf4_decode_bytes_per_second,
    "adamw": lambda h: h.device.adamw_params_per_second,
    "small_operations": lambda h: 1 / h.device.operation_seconds,
}


def test_what_takes_less_than_a_look_at_the_clock_is_done_several_times_between_two(monkeypatch):
    """As on a GPU, for which one waits longer than a small kernel takes."""
    now, run_seconds, wait_seconds = [0.0], 1e-3, 4e-3

    def takes(seconds):
        now[0] += seconds

    device = Cpu()
    monkeypatch.setattr(device, "synchronize", lambda: takes(wait_seconds), raising=False)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    work = (lambda: takes(run_seconds)), 1.0
    alone, together = (
        Bench(device, replace(TINY, pass_seconds=seconds)).rate("x", work) for seconds in (0.0, 200 * run_seconds)
    )
    assert alone == pytest.approx(1 / (run_seconds + wait_seconds))
    assert 0.9 / run_seconds < together <= 1 / run_seconds


@pytest.mark.parametrize("name", FIELDS)
def test_a_number_falls_when_the_work_that_it_names_is_slowed(monkeypatch, name):
    """Nothing that sleeps for a fiftieth of a second does more than fifty times its amount in one."""
    work = getattr(calibrate, name)
    amount = work(BENCH, torch.bfloat16)[1] if name == "matmul" else work(BENCH)[1]
    monkeypatch.setattr(calibrate, name, slowed(work))
    hardware = measure("cpu", (), TINY).hardware
    assert FIELDS[name](hardware) <= amount / SLEEP_SECONDS
    if name == "adamw":
        assert hardware.host.adamw_params_per_second == hardware.device.adamw_params_per_second


def test_attention_is_a_share_of_the_products_rate(monkeypatch):
    amount = calibrate.attention(BENCH, backward=False)[1]
    monkeypatch.setattr(calibrate, "attention", slowed(calibrate.attention))
    found = measure("cpu", (), TINY)
    rate = found.spread["attention forward FLOP/s"].median
    share = rate / found.hardware.device.matmul_flops_per_second
    assert rate <= amount / SLEEP_SECONDS
    assert found.hardware.device.attention_forward_efficiency == pytest.approx(max(0.001, min(2.0, share)))


class SlowLinks(Links):
    """Links whose every operation starts late."""

    def copy(self, *arguments, **options):
        time.sleep(SLEEP_SECONDS)
        return super().copy(*arguments, **options)

    def read(self, *arguments):
        time.sleep(SLEEP_SECONDS)
        return super().read(*arguments)


def test_throttled_links_and_drives_are_measured_as_such(monkeypatch, disk_folder):
    for module in (bench, calibrate):
        monkeypatch.setattr(module, "Links", SlowLinks)
    hardware = measure("cpu", (disk_folder,), TINY).hardware
    slow = TINY.copy_bytes / SLEEP_SECONDS
    assert hardware.links.host_to_device_bytes_per_second <= slow
    assert hardware.links.device_to_host_bytes_per_second <= slow
    assert hardware.drives[0].read_bytes_per_second <= TINY.operation_bytes / SLEEP_SECONDS
    assert os.listdir(disk_folder) == []


def test_writes_are_measured_as_writes(monkeypatch, disk_folder):
    moved = []

    class Counting(Links):
        def close(self):
            moved.append((self.counters.bytes_read, self.counters.bytes_written, self.counters.bytes_copied))
            super().close()

    for module in (bench, calibrate):
        monkeypatch.setattr(module, "Links", Counting)
    monkeypatch.setattr(calibrate, "drive_profile", lambda folder, io: bench.DriveProfile())
    measure("cpu", (disk_folder,), TINY)
    one, four = TINY.operation_bytes, 4 * TINY.operation_bytes
    passes = TINY.passes + 1
    assert moved[-1] == (passes * (four + 2 * one), TINY.file_bytes + passes * (four + 2 * one), 0)
    assert [m[2] for m in moved[:2]] == [2 * passes * TINY.copy_bytes] * 2


def test_two_directions_gain_between_nothing_and_everything():
    assert calibrate._together(both=2.0, one=1.0, other=1.0) == 1.0
    assert calibrate._together(both=1.0, one=1.0, other=1.0) == 0.0
    assert calibrate._together(both=0.5, one=1.0, other=1.0) == 0.0
    assert calibrate._together(both=1.5, one=1.0, other=1.0) == pytest.approx(0.5)


@pytest.mark.parametrize(("together_seconds", "share"), [(1.0, 1.0), (1.25, 0.75), (2.0, 0.01), (0.9, 1.0)])
def test_adamw_is_stepped_while_copies_run_and_keeps_what_they_leave_it(together_seconds, share, monkeypatch):
    """Both by themselves take a second."""
    steps, started = [], []

    class Watched(Links):
        def copy(self, *arguments, **options):
            started.append(super().copy(*arguments, **options))
            return started[-1]

    class Timed(Bench):
        def rate(self, name, work):
            run, amount = work
            run()
            assert amount == 1000.0
            return amount / together_seconds

    def unwaited():
        return sum(not transfer.was_waited_for for transfer in started)

    monkeypatch.setattr(bench, "Links", Watched)
    monkeypatch.setattr(calibrate, "adamw", lambda _: (lambda: steps.append(unwaited()), 100.0))
    found = calibrate._share_beside_copies(Timed(Cpu(), TINY), stepped=1000.0, both=2.0 * TINY.copy_bytes)
    assert found == pytest.approx(share) and steps == [2] * 10 and unwaited() == 0


def test_a_rate_is_a_median_with_quartiles(monkeypatch):
    times = iter([0.0, *[at for took in (1.0, 2.0, 4.0, 5.0, 10.0) for at in (0.0, took)], 1e9])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(times))
    five = Bench(Cpu(), Sizes(seconds=0.0, passes=5, pass_seconds=0.0))
    assert five.rate("x", (lambda: None, 20.0)) == 5.0
    assert five.spread["x"] == Spread(5.0, 3.0, 15.0, 5)


def test_nothing_of_the_caller_changes():
    before = (torch.get_num_threads(), torch.random.get_rng_state(), random.getstate(), torch.is_grad_enabled())
    measure("cpu", (), TINY)
    assert before[0] == torch.get_num_threads() and torch.equal(before[1], torch.random.get_rng_state())
    assert before[2] == random.getstate() and before[3] == torch.is_grad_enabled()


def test_the_planner_takes_what_was_written(tiny, tmp_path, disk_folder, capsys):
    path = tmp_path / "machine.json"
    assert main(["calibrate", "--nvme", str(disk_folder), "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert "quartiles" in said and "NF4 decode" in said
    hardware = load_hardware(path)
    assert (
        hardware.unified and len(hardware.drives) == 1 and hardware.device.memory_bytes > hardware.device.reserve_bytes
    )
    data = json.loads(path.read_text())
    assert data["measured"]["matmul bfloat16 FLOP/s"]["median"] == hardware.device.matmul_flops_per_second
    assert {f.name for f in fields(Spread)} == set(data["measured"]["AdamW params/s"])
    assert main(["plan", "--model", "smollm2-135m", "--hardware", str(path), "--seq-len", "512", "--no-advice"]) == 0
    assert hardware.name in capsys.readouterr().out


def test_a_machine_is_measured_once_and_again_when_asked(tiny, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(calibrate, "measure", lambda *a: calls.append(a) or measure(*a))
    assert main(["calibrate"]) == 0
    assert main(["calibrate", "--out", "-"]) == 0
    out, err = capsys.readouterr()
    assert len(calls) == 1 and "measured before" in err
    assert json.loads(out[out.index("{") :])["schema"] == "offload-hardware/1"
    assert main(["calibrate", "--again"]) == 0
    assert len(calls) == 2


def test_what_is_remembered_is_for_this_machine_and_a_month(tiny, monkeypatch):
    known = calibrate.identity("cpu", ())
    keep("x", known, measure("cpu", (), TINY))
    assert remembered("x", known) is not None
    assert remembered("x", {**known, "threads": -1}) is None
    now = time.time()
    monkeypatch.setattr(calibrate.time, "time", lambda: now + calibrate.MAX_AGE_SECONDS + 1)
    assert remembered("x", known) is None
    calibrate.remember("x", {"identity": known, "measured": "yesterday", "profile": {}})
    assert remembered("x", known) is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--device", "tpu"], "device: 'tpu' cannot be calibrated yet; allowed: cpu, cuda, cuda:N"),
        (["--nvme", "/nowhere"], "nvme: /nowhere is not a folder"),
        (["--out", "/nowhere/x.json"], "out: /nowhere/x.json: No such file"),
        (["--nvmes", "x"], "unknown option --nvmes; did you mean '--nvme'"),
    ],
)
def test_a_wrong_call_is_one_line(tiny, argv, message, capsys):
    assert main(["calibrate", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_full_drive_is_found_before_it_is_written(tmp_path):
    with pytest.raises(StorageFull, match="calibration needs .* free"):
        measure("cpu", (tmp_path,), Sizes(**{**vars(TINY), "file_bytes": 1 << 60}))
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConfigError, match="cannot be calibrated yet"):
        measure("tpu", (), TINY)


def test_a_drive_that_fails_says_where(monkeypatch, disk_folder):
    def broken(*arguments):
        raise StorageError("made to fail", path=str(disk_folder), errno=5)

    monkeypatch.setattr(calibrate.Links, "write", broken)
    monkeypatch.setattr(calibrate, "drive_profile", lambda folder, io: bench.DriveProfile())
    with pytest.raises(StorageError, match="made to fail"):
        measure("cpu", (disk_folder,), TINY)
    assert os.listdir(disk_folder) == []


def test_a_further_device_is_a_further_entry(monkeypatch):
    class Other(Cpu):
        unified = False
        waits = 0

        def describe(self):
            return "another"

        def synchronize(self):
            Other.waits += 1

    monkeypatch.setitem(bench.DEVICES, "other", Other)
    hardware = measure("other", (), TINY).hardware
    assert (hardware.name, hardware.unified) == ("another", False) and hardware.host.memory_bytes > 0
    assert Other.waits >= 12 * TINY.passes


def test_rates_are_shown_with_their_prefix():
    assert command.scaled(2.5e9) == ("2.5 G", 1e9)
    assert command.scaled(12.0)[0].startswith("12")
