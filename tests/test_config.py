"""Arguments are read once, strictly, and a mistake names the field, the value and what is allowed."""

import math
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_rt.config import EngineConfig, NvmePath, parse_adapters, parse_bytes, parse_nvme
from offload_rt.errors import ConfigError, nearest
from offload_rt.memory import arena


@pytest.mark.parametrize(
    "text, num_bytes",
    [
        ("1", 1), ("4096", 4096), ("1B", 1), ("1kB", 1000), ("1KiB", 1024), ("22GiB", 22 * 2**30),
        ("22 GiB", 22 * 2**30), (" 1.5 MiB ", 3 * 2**19), ("1gib", 2**30), ("2TB", 2 * 10**12), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_sizes_are_read(text, num_bytes):
    assert parse_bytes(text, field="f") == num_bytes


@given(st.integers(1, 2**62))
def test_whole_numbers_are_kept_to_the_byte(num_bytes):
    assert parse_bytes(num_bytes, field="f") == num_bytes
    assert parse_bytes(str(num_bytes), field="f") == num_bytes


@pytest.mark.parametrize(
    "value",
    ["", "GiB", "-1", "1 2", "1e9", "nan", "0", 0, -5, "0.1B", "1.2.3MiB", None, 1.5, True, b"1", [1]],
)
def test_what_is_no_size_is_refused_by_field_and_value(value):
    with pytest.raises(ConfigError) as raised:
        parse_bytes(value, field="device_memory")
    assert "device_memory" in str(raised.value) and repr(value) in str(raised.value)


def test_an_absurd_size_is_a_config_error_too():
    with pytest.raises(ConfigError):
        parse_bytes("9" * 400, field="f")


def test_an_unknown_unit_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'gib'"):
        parse_bytes("22GiiB", field="f")


def test_nvme_none_is_no_drive():
    assert parse_nvme(None) == ()


def test_nvme_takes_a_path_with_and_without_a_limit():
    assert parse_nvme("/a") == (NvmePath(path=Path("/a")),)
    assert parse_nvme(Path("/a")) == (NvmePath(path=Path("/a")),)
    assert parse_nvme("/a:500GiB") == (NvmePath(path=Path("/a"), capacity_bytes=500 * 2**30),)
    assert parse_nvme(["/a:1MiB", "/b"]) == (
        NvmePath(path=Path("/a"), capacity_bytes=2**20),
        NvmePath(path=Path("/b")),
    )
    assert parse_nvme("~/a")[0].path == Path.home() / "a"


def test_a_folder_whose_name_looks_like_a_limit_is_a_folder(tmp_path):
    folder = tmp_path / "odd:1GiB"
    folder.mkdir()
    assert parse_nvme(str(folder)) == (NvmePath(path=folder),)


@pytest.mark.parametrize("value", [[], "/a:0", "/a:5XB", 5, 1.5, True, [5], [None]])
def test_what_is_no_drive_is_refused(value):
    with pytest.raises(ConfigError, match="nvme"):
        parse_nvme(value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("bits", 3), ("bits", 8), ("bits", "4"), ("bits", 0), ("bits", True),
        ("batch_size", 0), ("batch_size", -1), ("batch_size", 1.0), ("batch_size", True), ("batch_size", "2"),
        ("seq_len", 0), ("seq_len", None), ("accumulation_steps", 0),
        ("max_grad_norm", 0), ("max_grad_norm", -1.0), ("max_grad_norm", float("nan")), ("max_grad_norm", "1"),
        ("commit_every", 0), ("commit_every", 1), ("commit_every", "1"),
    ],
)  # fmt: skip
def test_a_wrong_argument_names_its_field(field, value):
    with pytest.raises(ConfigError, match=field):
        EngineConfig(**{field: value})


@pytest.mark.parametrize("value", [1.5, "1", 0, -1])
def test_commits_are_counted_in_whole_steps(value):
    with pytest.raises(ConfigError, match="commit_every"):
        EngineConfig(commit_every=value, nvme=(NvmePath(path=Path("/a")),))


def test_the_defaults_and_the_edges_are_accepted():
    EngineConfig()
    EngineConfig(bits=4, batch_size=1, seq_len=1, max_grad_norm=1e-9, accumulation_steps=1)
    EngineConfig(commit_every=1, nvme=(NvmePath(path=Path("/a")),))


def test_adapters_are_read():
    assert parse_adapters("lora") == {"r": 16, "target_modules": "all-linear", "lora_alpha": 32}
    assert parse_adapters("lora:r=8,alpha=4,dropout=0.1,targets=q_proj+v_proj") == {
        "r": 8, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    assert parse_adapters("lora:targets=all-linear")["target_modules"] == "all-linear"


@pytest.mark.parametrize(
    "text, word",
    [
        ("lroa", "lora"), ("", "lora"), ("lora:rank=8", "rank"), ("lora:r", "no value"), ("lora:r=", "no value"),
        ("lora:r=x", "not a number"), ("lora:r=0", "at least 1"), ("lora:drpout=0.1", "dropout"),
        ("lora:dropout=1", "below 1"),
    ],
)  # fmt: skip
def test_wrong_adapters_name_what_is_wrong(text, word):
    with pytest.raises(ConfigError, match=word):
        parse_adapters(text)


def test_the_nearest_name_is_offered_or_all_of_them():
    assert nearest("batchsize", ["batch_size", "bits"]) == "did you mean 'batch_size'?"
    assert nearest("zzz", ["b", "a"]) == "allowed: a, b"


@pytest.mark.parametrize("text", ["abc", "60s", "", "0", "-3", "nan"])
def test_waiting_for_no_time_is_refused_before_anything_waits(monkeypatch, text):
    monkeypatch.setenv("OFFLOAD_RT_IO_TIMEOUT", text)
    with pytest.raises(ConfigError, match=f"OFFLOAD_RT_IO_TIMEOUT: .* above zero, got {text!r}"):
        runpy.run_path(arena.__file__)


@pytest.mark.parametrize("text, seconds", [(None, 60.0), ("0.25", 0.25), ("inf", math.inf)])
def test_who_waits_takes_its_patience_from_the_environment(monkeypatch, text, seconds):
    monkeypatch.delenv("OFFLOAD_RT_IO_TIMEOUT", raising=False)
    if text is not None:
        monkeypatch.setenv("OFFLOAD_RT_IO_TIMEOUT", text)
    assert runpy.run_path(arena.__file__)["WAIT_SECONDS"] == seconds
