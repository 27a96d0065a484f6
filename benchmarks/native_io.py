"""The io section of native.py: our ring against fio on one file, and CRC32C against memcpy.

Both write and read the same file with O_DIRECT, in requests of the same length, with the same number in flight.
fio keeps one buffer per request; the ring does what it is for: operations as long as a block of weights, started
from Python ahead of their use, into a few slots that are used again and again.

    slot 0  [ op 0 ]            [ op 4 ]
    slot 1       [ op 1 ]            [ op 5 ]
    slot 2            [ op 2 ]            ...
    slot 3                 [ op 3 ]
"""

import argparse
import json
import mmap
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _offload_rt_native as native
import numpy as np
import rounds

OPERATION_BYTES = 128 << 20
NUM_SLOTS = 4
CHECKSUM_BYTES = 256 << 20
TIMEOUT_SECONDS = 300.0


class Contender(NamedTuple):
    backend: str
    huge_pages: bool = False


CONTENDERS = {
    "io_uring": Contender("io_uring"),
    "threads": Contender("threads"),
    "io_uring, huge pages": Contender("io_uring", huge_pages=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path(".bench"), help="where the file lies (default .bench)")
    parser.add_argument("--file-bytes", type=int, default=2 << 30, help="its length (default 2 GiB)")
    parser.add_argument("--depth", type=int, default=64, help="requests in flight (default 64)")
    parser.add_argument("--io-bytes", type=int, default=1 << 20, help="length of a request (default 1 MiB)")
    parser.add_argument("--fio-engine", default="io_uring", choices=["io_uring", "libaio"])


def ring_gigabytes_per_second(contender: Contender, kind: str, path: Path, arguments: argparse.Namespace) -> float:
    arena = open_arena(huge_pages=contender.huge_pages)
    slots = [arena[i * OPERATION_BYTES :][:OPERATION_BYTES] for i in range(NUM_SLOTS)]
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with native.Ring(arguments.depth, arguments.io_bytes, contender.backend) as ring:
            submit = ring.read if kind == "read" else ring.write
            started: deque[int] = deque()
            begin = time.perf_counter()
            for index, offset in enumerate(range(0, arguments.file_bytes, OPERATION_BYTES)):
                if len(started) == NUM_SLOTS:
                    ring.wait(started.popleft(), TIMEOUT_SECONDS)
                length = min(OPERATION_BYTES, arguments.file_bytes - offset)
                started.append(submit(fd, path.name, offset, slots[index % NUM_SLOTS][:length]))
            while started:
                ring.wait(started.popleft(), TIMEOUT_SECONDS)
            return arguments.file_bytes / (time.perf_counter() - begin) / 1e9
    finally:
        os.close(fd)


def fio_gigabytes_per_second(kind: str, path: Path, arguments: argparse.Namespace) -> float:
    command = [
        "fio",
        "--name=file",
        f"--filename={path}",
        f"--rw={kind}",
        f"--size={arguments.file_bytes}",
        f"--bs={arguments.io_bytes}",
        f"--iodepth={arguments.depth}",
        f"--ioengine={arguments.fio_engine}",
        "--direct=1",
        "--thread",
        "--scramble_buffers=0",  # the ring does not change what it writes either
        "--output-format=json",
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(finished.stdout)["jobs"][0][kind]["bw_bytes"] / 1e9


def open_arena(*, huge_pages: bool) -> memoryview:
    """Touched, page-aligned, private memory; fresh for each run, as fio's is.

    A request of 1 MiB over 4 KiB pages has 256 of them to pin and to describe to the drive. fio has those, so the
    ratio is taken against them; huge pages, which an arena should have, stand beside it.
    """
    mapping = mmap.mmap(-1, NUM_SLOTS * OPERATION_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    np.frombuffer(mapping, dtype=np.uint8)[:] = 1
    return memoryview(mapping)


def lay_out(path: Path, num_bytes: int) -> None:
    """Writes the file once, not compressible, so that nobody is the first to allocate its extents."""
    chunk = np.random.default_rng(0).integers(0, 256, 16 << 20, dtype=np.uint8)
    with path.open("wb") as file:
        for offset in range(0, num_bytes, len(chunk)):
            file.write(chunk[: num_bytes - offset])
        os.fsync(file.fileno())


def compare_with_fio(arguments: argparse.Namespace) -> dict[str, Any]:
    arguments.dir.mkdir(parents=True, exist_ok=True)
    path = arguments.dir / f"native_io_{os.getpid()}.bin"
    rings = {
        name: contender
        for name, contender in CONTENDERS.items()
        if contender.backend == "threads" or native.io_uring_available()[0]
    }
    compared: dict[str, Any] = {}
    try:
        lay_out(path, arguments.file_bytes)
        for kind in ("read", "write"):
            contenders: dict[str, Callable[[], float]] = {
                name: partial(ring_gigabytes_per_second, contender, kind, path, arguments)
                for name, contender in rings.items()
            }
            if shutil.which("fio"):
                contenders["fio"] = partial(fio_gigabytes_per_second, kind, path, arguments)
            speeds = rounds.interleave(contenders, arguments.rounds)
            compared[kind] = {name: rounds.summary(values) for name, values in speeds.items()}
            if "fio" in speeds:
                compared[kind]["over_fio"] = {name: rounds.ratio(speeds, name, "fio") for name in rings}
    finally:
        path.unlink(missing_ok=True)
    return compared


def compare_with_memcpy(num_rounds: int) -> dict[str, Any]:
    source = np.random.default_rng(0).integers(0, 256, CHECKSUM_BYTES, dtype=np.uint8)
    target = np.zeros_like(source)

    def gigabytes_per_second(work: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        work()
        return CHECKSUM_BYTES / (time.perf_counter() - begin) / 1e9

    speeds = rounds.interleave(
        {
            "crc32c": lambda: gigabytes_per_second(lambda: native.crc32c(source)),
            "memcpy": lambda: gigabytes_per_second(lambda: np.copyto(target, source)),
        },
        num_rounds,
    )
    compared: dict[str, Any] = {name: rounds.summary(values) for name, values in speeds.items()}
    compared["over_memcpy"] = rounds.ratio(speeds, "crc32c", "memcpy")
    return compared


def print_row(name: str, unit: str, row: dict[str, Any]) -> None:
    print(f"{name:36} {row['median']:8.3f} {unit:5} [{row['min']:.3f}, {row['max']:.3f}]")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints, and returns the io section."""
    files = compare_with_fio(arguments)
    for kind, rows in files.items():
        for name, row in rows.items():
            if name != "over_fio":
                print_row(f"{kind} {name}", "GB/s", row)
        for name, row in rows.get("over_fio", {}).items():
            print_row(f"{kind} {name} over fio", "times", row)
    if not shutil.which("fio"):
        print("fio is not installed: speeds without a comparison")
    checksum = compare_with_memcpy(arguments.rounds)
    for name, row in checksum.items():
        print_row(name.replace("over_memcpy", "crc32c over memcpy"), "times" if "over" in name else "GB/s", row)
    configuration = {
        name: getattr(arguments, name) for name in ("file_bytes", "depth", "io_bytes", "fio_engine", "rounds")
    }
    return {"configuration": configuration, "files": files, "checksum": checksum}
