"""The safetensors reader against golden bytes and broken files, and slab streams against whole tensors."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from offload_rt.checkpoint.safetensors_header import DTYPE_BITS, parse_header
from offload_rt.checkpoint.safetensors_reader import open_checkpoint
from offload_rt.checkpoint.sources import (
    TORCH_DTYPES,
    EntrySource,
    materialise,
)
from offload_rt.errors import CheckpointError, StorageError
from tests.conftest import SHARES_FIXTURES, open_descriptors

#   0       8                     76         84  86
#   | 68    | {"a":...,"b":...}   | a: 2 F32 | b: 2 U8 |
GOLDEN_HEADER = (
    b'{"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[2],"data_offsets":[8,10]}}'
)
GOLDEN = struct.pack("<Q", len(GOLDEN_HEADER)) + GOLDEN_HEADER + struct.pack("<ff", 1.5, -2.0) + b"\x07\x09"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def header_file(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write(path, struct.pack("<Q", len(text)) + text + data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_golden_bytes_give_names_shapes_and_ranges(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", GOLDEN)
    with open_checkpoint(tmp_path) as checkpoint:
        a, b = checkpoint.tensors["a"], checkpoint.tensors["b"]
        first = 8 + len(GOLDEN_HEADER)
        assert (a.shape, a.dtype, a.file, a.begin, a.end) == ((2, 1), "F32", file, first, first + 8)
        assert (b.shape, b.dtype, b.begin, b.end) == ((2,), "U8", first + 8, first + 10)
        assert checkpoint.num_bytes == 10
        assert materialise(EntrySource(checkpoint, a)).tolist() == [[1.5], [-2.0]]
        buffer = bytearray(1)
        checkpoint.read_into(b, 1, buffer)
        assert buffer == b"\x09"


def test_every_torch_dtype_reads_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2 if name == "BOOL" else 256, (3, 8), dtype=torch.uint8, generator=generator)
        .view(torch.uint8)
        .view(dtype)
        for name, dtype in TORCH_DTYPES.items()
    }
    more = {"scalar": torch.tensor(3.25), "empty": torch.empty(0, 4)}
    save_file({**tensors, **more}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        for name, tensor in tensors.items():
            found = checkpoint.tensors[name]
            assert (found.dtype, found.num_bytes * 8) == (name, tensor.numel() * DTYPE_BITS[name])
            read = materialise(EntrySource(checkpoint, found))
            assert read.dtype == tensor.dtype
            assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
        assert materialise(EntrySource(checkpoint, checkpoint.tensors["scalar"])).item() == 3.25
        assert list(EntrySource(checkpoint, checkpoint.tensors["empty"]).slabs(64)) == []


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 40, 8 + len(GOLDEN_HEADER), len(GOLDEN) - 1])
def test_truncated_file_is_named_as_truncated(tmp_path: Path, length: int) -> None:
    file = write(tmp_path / "t.safetensors", GOLDEN[:length])
    with pytest.raises(CheckpointError, match=r"t\.safetensors: truncated"):
        open_checkpoint(file)


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "garbage": (b"\xff\xfe garbage", b"", "starts with"),
    "array": (b"[1, 2]", b"", "starts with"),
    "cut json": (b'{"a": {"dtype": "F32"', b"", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x", "given twice",
    ),
    "NaN": (b'{"a": NaN}', b"", "not valid JSON"),
    "deep": (b'{"a":' + b"[" * 200_000, b"", "not valid JSON"),
    "unpaired surrogate": (b'{"\\ud800": {}}', b"", "not valid JSON"),
    "number for a tensor": ({"a": 3}, b"", "a: expected dtype, shape and data_offsets"),
    "field missing": ({"a": {"dtype": "F32", "shape": [1]}}, b"", "a: expected dtype"),
    "unknown dtype": ({"a": entry("F7", [1], 0, 1)}, b"x", "unknown dtype 'F7'"),
    "negative size": ({"a": entry("U8", [-1], 0, 1)}, b"x", "bad shape"),
    "size is a bool": ({"a": entry("U8", [True], 0, 1)}, b"x", "bad shape"),
    "size is a float": ({"a": entry("U8", [1.0], 0, 1)}, b"x", "bad shape"),
    "offsets backwards": ({"a": entry("U8", [1], 1, 0)}, b"x", "bad data_offsets"),
    "shape times dtype": ({"a": entry("F32", [3], 0, 8)}, b"x" * 8, r"is 12 bytes, .* span 8"),
    "overflow": ({"a": entry("F32", [2**63] * 50, 0, 8)}, b"x" * 8, "overflows"),
    "overlap": ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xyz", "b starts .* overlaps a"),
    "hole": ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"xyz", "b starts .* hole behind a"),
    "too long": ({"a": entry("U8", [1], 0, 1)}, b"xyz", "longer than its header says"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header_is_an_error_with_evidence(tmp_path: Path, case: str) -> None:
    header, data, message = BAD_HEADERS[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(header_file(tmp_path / "bad.safetensors", header, data))


def test_absurd_header_length_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(CheckpointError, match="header of 9223372036854775808 bytes"):
        open_checkpoint(file)


def test_lfs_pointer_says_git_lfs_pull(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", b"version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(file)


def index_of(**weight_map: Any) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


FOLDERS: dict[str, tuple[dict[str, bytes], str]] = {
    "empty": ({}, "neither model.safetensors nor model.safetensors.index.json"),
    "both": ({"model.safetensors": GOLDEN, "model.safetensors.index.json": index_of(a="s")}, "holds both"),
    "two odd names": ({"x.safetensors": GOLDEN, "y.safetensors": GOLDEN}, "2 files end in .safetensors"),
    "pickles": ({"pytorch_model.bin": b"PK"}, "pytorch_model.bin; it is a pickle.*save_pretrained"),
    "gguf": ({"model.gguf": b"GGUF"}, "gguf_file"),
    "adapter": ({"adapter_model.safetensors": GOLDEN}, "holds a peft adapter"),
    "index is no JSON": ({"model.safetensors.index.json": b"{"}, "not valid JSON"),
    "index is a list": ({"model.safetensors.index.json": b"[]"}, "not an object"),
    "index without map": ({"model.safetensors.index.json": b"{}"}, "no weight_map"),
    "shard missing": ({"model.safetensors.index.json": index_of(a="s1")}, r"names s1 \(for a\).* missing"),
    "shard outside": ({"model.safetensors.index.json": index_of(a="../s1")}, "'../s1' is not a file name"),
    "shard is a number": ({"model.safetensors.index.json": index_of(a=3)}, "3 is not a file name"),
    "tensor not in shard": (
        {"model.safetensors.index.json": index_of(c="s1"), "s1": GOLDEN},
        "names c in s1, which does not hold it",
    ),
    "tensor in two shards": (
        {
            "model.safetensors.index.json": index_of(a="s1", c="s2"), "s1": GOLDEN,
            "s2": GOLDEN.replace(b'"a"', b'"c"'),
        },
        "b is in s1 and in s2",
    ),
    "truncated": ({"model.safetensors.index.json": index_of(a="s1"), "s1": GOLDEN[:-1]}, "s1: truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folder_is_an_error_with_evidence(tmp_path: Path, case: str) -> None:
    files, message = FOLDERS[case]
    for name, data in files.items():
        write(tmp_path / name, data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_odd_named_file_and_shards_with_unindexed_tensors_open(tmp_path: Path) -> None:
    write(tmp_path / "weights.safetensors", GOLDEN)
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}
    write(tmp_path / "model.safetensors.index.json", index_of(a="weights.safetensors"))
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


def test_index_decides_where_two_shards_hold_a_tensor(tmp_path: Path) -> None:
    write(tmp_path / "s1", GOLDEN)
    write(tmp_path / "s2", GOLDEN)
    write(tmp_path / "model.safetensors.index.json", index_of(a="s1", b="s2"))
    tensors = open_checkpoint(tmp_path).tensors
    assert (tensors["a"].file.name, tensors["b"].file.name) == ("s1", "s2")


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_as_header_parse_or_raise_checkpoint_error(data: bytes) -> None:
    for header in (data, b"{" + data):
        with contextlib.suppress(CheckpointError):
            parse_header(header, file=Path("x"), data_bytes=10)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(["F32", "U8", "BOOL", "F4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
NUMBERS = st.integers(-1, 12) | st.sampled_from([2**31, 2**63, 2**64, 2**70])
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BOOL", "F4", "F9"]) | JSON_VALUES,
        "shape": st.lists(NUMBERS, max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON_VALUES,
    }
)


@given(st.dictionaries(st.text(max_size=3), TENSORS | JSON_VALUES, max_size=4), st.integers(0, 12))
@settings(max_examples=200, deadline=None)
def test_any_json_header_parses_or_raises_checkpoint_error(header: dict[str, Any], data_bytes: int) -> None:
    try:
        text = json.dumps(header).encode()
    except ValueError:
        return
    try:
        tensors = parse_header(text, file=Path("x"), data_bytes=data_bytes)
    except CheckpointError:
        return
    assert sum(tensor.num_bytes for tensor in tensors.values()) == data_bytes


@given(
    st.lists(st.tuples(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255)), min_size=1, max_size=3),
    st.integers(0, len(GOLDEN)),
)
@settings(max_examples=200, deadline=None, suppress_health_check=SHARES_FIXTURES)
def test_damaged_file_is_judged_as_the_safetensors_library_judges_it(
    tmp_path: Path, damage: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(GOLDEN)
    for position, value in damage:
        data[position] = value
    file = write(tmp_path / "d.safetensors", bytes(data[: length or None]))
    try:
        with open_checkpoint(file) as checkpoint:
            ours: set[str] | None = set(checkpoint.tensors)
    except CheckpointError:
        ours = None
    try:
        with safe_open(str(file), framework="pt") as theirs_file:
            theirs: set[str] | None = set(theirs_file.keys())
    except SafetensorError:
        theirs = None
    # a field that the format does not have is an error here, and skipped there
    assert ours == theirs or ours is None


def test_fingerprint_changes_with_name_time_header_and_data(tmp_path: Path) -> None:
    def fingerprint(data: bytes, name: str = "x.safetensors", mtime: int = 10**18) -> str:
        file = write(tmp_path / name, data)
        os.utime(file, ns=(mtime, mtime))
        with open_checkpoint(file) as checkpoint:
            return checkpoint.fingerprint()

    same = fingerprint(GOLDEN)
    assert fingerprint(GOLDEN) == same
    assert len({
        same, fingerprint(GOLDEN, name="y.safetensors"), fingerprint(GOLDEN, mtime=10**18 + 1),
        fingerprint(GOLDEN.replace(b'"a"', b'"c"')), fingerprint(GOLDEN[:-1] + b"\x00"),
    }) == 5  # fmt: skip
    assert len(fingerprint(struct.pack("<Q", 2) + b"{}")) == 64


def test_file_that_is_replaced_after_opening_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", GOLDEN)
    checkpoint = open_checkpoint(file)
    write(file, GOLDEN + b"more")
    with pytest.raises(CheckpointError, match="changed since"):
        checkpoint.read_into(checkpoint.tensors["a"], 0, bytearray(8))


def test_file_that_shrinks_while_read_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", GOLDEN)
    with open_checkpoint(file) as checkpoint:
        checkpoint.read_into(checkpoint.tensors["a"], 0, bytearray(8))
        os.truncate(file, len(GOLDEN) - 6)
        with pytest.raises(CheckpointError, match="truncated: 4 of 8 bytes"):
            checkpoint.read_into(checkpoint.tensors["a"], 0, bytearray(8))


def test_failed_and_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "x.safetensors", GOLDEN))
    real = os.preadv
    counts = []

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(len(buffers[0]))
        return real(descriptor, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", short)
    buffer = bytearray(8)
    checkpoint.read_into(checkpoint.tensors["a"], 0, buffer)
    assert struct.unpack("<ff", buffer) == (1.5, -2.0)
    assert counts == [8, 5, 2]

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "EIO")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageError, match=r"x.safetensors: read failed \(0 of 8 bytes at .*EIO") as caught:
        checkpoint.read_into(checkpoint.tensors["a"], 0, bytearray(8))
    assert (caught.value.errno, caught.value.wanted) == (5, 8)
    checkpoint.close()


def test_closing_gives_back_descriptors_and_ends_reading(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", GOLDEN)
    before = open_descriptors()
    with open_checkpoint(file) as checkpoint:
        checkpoint.read_into(checkpoint.tensors["a"], 0, bytearray(8))
        assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    assert len(os.listdir("/proc/self/fd")) == len(before)
    with pytest.raises(CheckpointError, match="after the checkpoint was closed"):
        checkpoint.read_into(checkpoint.tensors["a"], 0, bytearray(8))
    for begin, length in [(-1, 2), (0, 9), (8, 1)]:
        with pytest.raises(ValueError, match="asked for of 8 bytes"):
            checkpoint.read_into(checkpoint.tensors["a"], begin, bytearray(length))


def test_reads_leave_nothing_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: advised.append(rest))
    save_file({"w": torch.zeros(5000)}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        begin = checkpoint.tensors["w"].begin
        for _ in EntrySource(checkpoint, checkpoint.tensors["w"]).slabs(6000):
            pass
    assert [(o, o + n) for o, n, _ in advised] == [
        ((begin + i) // 4096 * 4096, begin + min(i + 6000, 20000)) for i in range(0, 20000, 6000)
    ]
    assert {advice for *_, advice in advised} == {os.POSIX_FADV_DONTNEED}
