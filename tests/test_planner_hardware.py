"""Profiles by name and from files: what is written is read, and what is wrong is named."""

import json

import pytest

from planners.problems.hardware import Drive, hardware_names, load_hardware, named_hardware, parse_drive, with_budgets
from planners.units import ProblemError, parse_size

GIB = 1 << 30


@pytest.mark.parametrize("name", hardware_names())
def test_a_profile_survives_its_file(tmp_path, name):
    path = tmp_path / "machine.json"
    path.write_text(named_hardware(name).to_json())
    assert load_hardware(path) == named_hardware(name)


def test_names_are_read_as_people_write_them():
    assert named_hardware("RTX 4090") == named_hardware("rtx4090") == named_hardware("GeForce-RTX-4090")


def test_an_unknown_gpu_gets_the_nearest():
    with pytest.raises(ProblemError, match="did you mean 'rtx4090'"):
        named_hardware("rtx4091")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["device"].pop("memory_bytes"), ":4: device: has no key 'memory_bytes'"),
        (lambda d: d["device"].update(memory_bytes=-1), ":5: device.memory_bytes: must be between 1 and"),
        (lambda d: d["device"].update(memory_bytes=24.5), "device.memory_bytes: expected a whole number"),
        (lambda d: d["device"].update(memory_bytes=1 << 70), "device.memory_bytes: must be between"),
        (lambda d: d["device"].update(reserve_bytes=1 << 50), "device.reserve_bytes: leaves nothing"),
        (lambda d: d["device"].update(memory_byte=1), "device.memory_byte: unknown key; did you mean 'memory_bytes'"),
        (lambda d: d["links"].update(duplex=2), "links.duplex: must be between 0 and 1"),
        (lambda d: d["links"].update(duplex="x"), "links.duplex: expected a number"),
        (lambda d: d["links"].update(duplex=float("nan")), "links.duplex: expected a number"),
        (lambda d: d["drives"][0].update(read_bytes_per_second=7.0), "drives.read_bytes_per_second: must be"),
        (lambda d: d.update(drives={}), "drives: expected a list"),
        (lambda d: d.update(schema="offload-hardware/9"), ":2: schema: expected 'offload-hardware/1'"),
        (lambda d: d.update(gpu="x"), "gpu: unknown key"),
        (lambda d: d.pop("host"), "has no key 'host'"),
        (lambda d: d.update(unified=1), "unified: expected true or false"),
        (lambda d: d.update(unified=True), "host.memory_bytes: must be 0"),
        (lambda d: d.update(name=3), "name: expected a text"),
        (lambda d: d.update(measured=3), "measured: expected an object"),
    ],
)
def test_a_bad_profile_names_path_line_and_key(tmp_path, change, message):
    data = json.loads(named_hardware("rtx4090").to_json())
    change(data)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(data, indent=1))
    with pytest.raises(ProblemError) as caught:
        load_hardware(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_a_missing_profile_is_named():
    with pytest.raises(ProblemError, match="nowhere.json: No such file"):
        load_hardware("nowhere.json")


def test_a_drive_is_read_from_one_word():
    assert parse_drive("2TB@7.0r/5.0w") == Drive(
        capacity_bytes=2 * 10**12, read_bytes_per_second=7e9, write_bytes_per_second=5e9, endurance_bytes=1200 * 10**12
    )
    assert parse_drive("500GiB").capacity_bytes == 500 * 2**30
    assert parse_drive("1TB@3r/2w,tbw=300TB").endurance_bytes == 300 * 10**12


@pytest.mark.parametrize(
    "text, message",
    [
        ("2TB@7.0/5.0", "cannot read the rates"),
        ("2TB@r/5.0w", "as GB/s"),
        ("2TB@0r/5w", "is not a rate"),
        ("2TB@nanr/5w", "is not a rate"),
        ("2TB@7r/9000000w", "is not a rate"),
        ("0TB", "more than zero"),
        ("-2TB", "more than zero"),
        ("2XB", "unknown unit"),
        ("2EiB", "unknown unit"),
        ("9999PB", "at most 1 EiB"),
        ("2TB,wear=1TB", "unknown setting"),
    ],
)
def test_a_bad_drive_says_what_is_wrong(text, message):
    with pytest.raises(ProblemError, match=message):
        parse_drive(text)


def test_binary_and_decimal_units_are_told_apart():
    assert parse_size("1GB", field="x") == 10**9
    assert parse_size(" 1.5 gib ", field="x") == 3 * 2**29


def test_several_drives_add_up_and_their_bus_may_limit_them():
    from dataclasses import replace

    two = with_budgets(named_hardware("rtx4090"), drives=(parse_drive("1TB@7r/5w"), parse_drive("2TB@3r/2w")))
    assert (two.nvme_bytes, two.read_bytes_per_second, two.write_bytes_per_second) == (3 * 10**12, 10e9, 7e9)
    assert replace(two, max_drive_read_bytes_per_second=8e9).read_bytes_per_second == 8e9


def test_a_budget_beyond_the_machine_is_a_contradiction():
    with pytest.raises(ProblemError, match="more than rtx4090 has"):
        with_budgets(named_hardware("rtx4090"), device_memory_bytes=48 * 2**30)
    for budgets in ({"host_memory_bytes": 30 * GIB}, {"host_memory_bytes": 2 * GIB, "device_memory_bytes": 31 * GIB}):
        with pytest.raises(ProblemError, match="that cpu has of both"):
            with_budgets(named_hardware("cpu"), **budgets)


def test_a_host_budget_makes_two_tiers_of_one():
    alone = with_budgets(named_hardware("cpu"), host_memory_bytes=8 * GIB)
    both = with_budgets(named_hardware("cpu"), host_memory_bytes=8 * GIB, device_memory_bytes=24 * GIB)
    assert not alone.unified and (alone.device.memory_bytes, alone.host.memory_bytes) == (24 * GIB, 8 * GIB)
    assert (both.device.memory_bytes, both.device.reserve_bytes) == (24 * GIB, 0)
    assert with_budgets(named_hardware("cpu"), device_memory_bytes=8 * GIB).unified


def test_a_device_budget_is_of_managed_bytes():
    given = with_budgets(named_hardware("rtx4090"), device_memory_bytes=22 * 2**30)
    assert (given.device.memory_bytes, given.device.reserve_bytes) == (22 * 2**30, 0)
