"""A checkpoint of full fine-tuning as safetensors by parameter name: masters and moments, for any other program.

    python -m offload_rt.optimizer.by_name CHECKPOINT OUT

A checkpoint holds state in pieces; its `layout.json` says which elements of which parameter lie where, see
docs/checkpoints.md. Here they are put together again, a piece in memory at a time. Needs no model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_rt.checkpoint.safetensors_writer import SafetensorsWriter, all_written, file_bytes
from offload_rt.checkpoint.whole_folder import replaced_whole
from offload_rt.checksum import crc32c
from offload_rt.dtypes import dtype_name, torch_dtype
from offload_rt.errors import CheckpointError, CheckpointVerifyError, ConfigError
from offload_rt.optimizer.pieces import MASTER, TrainedBlock
from offload_rt.optimizer.state import state_extent
from offload_rt.storage.snapshot import read_manifest

LAYOUT = "layout.json"
LAYOUT_VERSION = 1


def layout_json(blocks: Sequence[TrainedBlock], rule: str | None = None) -> bytes:
    """What `layout.json` holds: where the state of each parameter lies in the extents. Of a log, also whose it is."""
    parameters: dict[str, dict[str, Any]] = {}
    for block in blocks:
        for piece in block.pieces:
            for segment in piece.segments:
                trained = block.parameters[segment.parameter]
                shape, dtype = list(trained.parameter.shape), dtype_name(trained.parameter.dtype, of=trained.name)
                entry = parameters.setdefault(trained.name, {"shape": shape, "dtype": dtype, "segments": []})
                state = {t.name: {"dtype": t.dtype, "shape": t.shape, "offset": t.offset_bytes} for t in segment.state}
                entry["segments"].append(
                    {"extent": state_extent(piece), "begin": segment.begin, "end": segment.end, "state": state}
                )
    layout: dict[str, Any] = {"version": LAYOUT_VERSION, "parameters": parameters}
    return json.dumps(layout if rule is None else {**layout, "rule": rule}).encode()


def export_state(checkpoint: Path, out: Path) -> None:
    """Writes `out`/<state name>.safetensors (master, exp_avg, ...), each tensor under its parameter's name. Blocks.

    What a state has besides tensors (step counts) stays in `payload.bin`. A tensor with as many elements as its
    parameter has its shape; other state cut into ranges is flat. Raises `CheckpointError` for a folder that is no
    checkpoint of full fine-tuning, `CheckpointVerifyError` where its bytes have changed.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; give a folder that does not")
    layout = read_layout_json(checkpoint)["parameters"]
    extents = {extent["name"]: extent for extent in read_manifest(checkpoint)["extents"]}
    outlines = _outlines(layout)
    writers: dict[str, SafetensorsWriter] = {}
    need = sum(map(file_bytes, outlines.values())) + (1 << 20)
    with replaced_whole(out, need, what="the state") as partial, all_written(writers):
        for state, outline in outlines.items():
            writers[state] = SafetensorsWriter(partial / f"{state}.safetensors", outline)
        with open(checkpoint / "state.bin", "rb") as file:
            for name, segments in _by_extent(layout):
                piece = _read(file.fileno(), checkpoint / "state.bin", extents[name])
                for parameter, segment in segments:
                    for state, place in segment["state"].items():
                        dtype, count = torch_dtype(place["dtype"]), math.prod(place["shape"])
                        values = torch.frombuffer(piece, dtype=dtype, count=count, offset=place["offset"])
                        writers[state].write_next(parameter, values)


def read_layout_json(folder: Path) -> dict[str, Any]:
    """What `layout_json` gave. Raises `CheckpointError`."""
    try:
        data: dict[str, Any] = json.loads((folder / LAYOUT).read_text())
        if data["version"] != LAYOUT_VERSION:
            raise CheckpointError(f"{folder}: written by another version of offload_rt ({data['version']})")
        data["parameters"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: not a checkpoint of full fine-tuning ({error!r})") from None
    return data


def check_layout(folder: Path, blocks: Sequence[TrainedBlock], layout: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where the state of `blocks` lies otherwise than `layout`, which was read in `folder`."""
    here, there = json.loads(layout_json(blocks))["parameters"], layout["parameters"]
    odd = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    if odd:
        raise CheckpointError(
            f"{folder}: holds the state of {len(odd)} parameters otherwise than this run, first: {odd[0]}"
        )


def _outlines(layout: dict[str, dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """For each state: parameter name to a tensor of its shape and dtype, on the meta device."""
    outlines: dict[str, dict[str, Tensor]] = {MASTER: {}}
    for name, entry in layout.items():
        segments = entry["segments"]
        for state, place in segments[0]["state"].items():
            size = sum(math.prod(segment["state"][state]["shape"]) for segment in segments)
            shape = place["shape"] if len(segments) == 1 else [size]
            shape = entry["shape"] if size == math.prod(entry["shape"]) else shape
            outlines.setdefault(state, {})[name] = torch.empty(shape, dtype=torch_dtype(place["dtype"]), device="meta")
    return outlines


def _by_extent(layout: dict[str, dict[str, Any]]) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Extents with what lies in them. Ranges of a parameter come in order: its pieces are."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, entry in layout.items():
        for segment in entry["segments"]:
            found.setdefault(segment["extent"], []).append((name, segment))
    yield from found.items()


def _read(fd: int, path: Path, extent: dict[str, Any]) -> bytearray:
    data = bytearray(extent["length_bytes"])
    view, done = memoryview(data), 0
    while done < len(data):
        count = os.preadv(fd, [view[done:]], extent["offset_bytes"] + done)
        if not count:
            raise CheckpointVerifyError(f"{path}: ends at byte {extent['offset_bytes'] + done}")
        done += count
    found = crc32c(view)
    if found != extent["crc32c"]:
        raise CheckpointVerifyError(f"{path}: {extent['name']} has checksum {found:08x}, not {extent['crc32c']:08x}")
    return data


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m offload_rt.optimizer.by_name", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    export_state(arguments.checkpoint, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
