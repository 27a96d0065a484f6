"""The io section of native.py: our ring against fio (reads, writes, a mix; 1 and 4 files), and CRC32C against memcpy.

Both use the same files with O_DIRECT, in requests of the same length, with the same number in flight, through and
through. fio keeps one buffer per request; the ring does what it is for: operations as long as a part of a block of
weights, started from Python ahead of their use, into a few slots that are used again and again. These are four times
fio's memory, and whoever serves a virtual drive copies from it: so the ring also runs with slots that together are as
large as fio's buffers.

    slot 0  [ op 0 ]            [ op 8 ]           files take turns; in the mix, every other operation writes
    slot 1       [ op 1 ]            [ op 9 ]
    ...
    slot 7                 [ op 7 ]
"""

import argparse
import json
import mmap
import os
import resource
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

from offload_rt.storage.drives import DriveProfile, probe

OPERATION_BYTES = 32 << 20
NUM_SLOTS = 8
CHECKSUM_BYTES = 256 << 20
TIMEOUT_SECONDS = 300.0
FIO_KIND = {"read": "read", "write": "write", "mix": "rw"}


class Contender(NamedTuple):
    backend: str = "io_uring"
    huge_pages: bool = False
    registered: bool = False
    probed: bool = False
    """Depth and request length that the probe of the drive chooses, instead of those that fio gets."""
    small_slots: bool = False
    """As much memory as fio has, in place of `OPERATION_BYTES` for each slot."""


CONTENDERS = {
    "io_uring": Contender(),
    "io_uring, fio's memory": Contender(small_slots=True),
    "io_uring, huge pages": Contender(huge_pages=True),
    "io_uring, huge pages, registered": Contender(huge_pages=True, registered=True),
    "as the store does": Contender(huge_pages=True, registered=True, probed=True),
    "threads": Contender("threads"),
}
FIO_FLAGS = {"fio": [], "fio, registered": ["--fixedbufs", "--registerfiles"]}


class Measured(NamedTuple):
    gigabytes_per_second: float
    cpu_seconds_per_gigabyte: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path(".bench"), help="where the files lie (default .bench)")
    parser.add_argument("--file-bytes", type=int, default=1 << 30, help="length of all together (default 1 GiB)")
    parser.add_argument("--depth", type=int, default=64, help="requests in flight (default 64)")
    parser.add_argument("--io-bytes", type=int, default=1 << 20, help="length of a request (default 1 MiB)")
    parser.add_argument("--fio-engine", default="io_uring", choices=["io_uring", "libaio"])


def measure_ring(
    contender: Contender, kind: str, paths: list[Path], profile: DriveProfile, arguments: argparse.Namespace
) -> Measured:
    slot_bytes = arguments.depth * arguments.io_bytes // NUM_SLOTS if contender.small_slots else OPERATION_BYTES
    arena = open_arena(NUM_SLOTS * slot_bytes, huge_pages=contender.huge_pages)
    fds = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in paths]
    each_bytes = arguments.file_bytes // len(paths)
    places = [(fd, at) for at in range(0, each_bytes, slot_bytes) for fd in fds]
    try:
        with native.Ring(arguments.depth, arguments.io_bytes, contender.backend) as ring:
            if contender.registered:
                ring.register_memory(arena)
            if contender.probed:
                ring.tune(fds[0], min(profile.depth, arguments.depth), profile.io_bytes)
            started: deque[int] = deque()
            cpu, begin = cpu_seconds(), time.perf_counter()
            for index, (fd, at) in enumerate(places):
                if len(started) == NUM_SLOTS:
                    ring.wait(started.popleft(), TIMEOUT_SECONDS)
                slot = arena[index % NUM_SLOTS * slot_bytes :][: min(slot_bytes, each_bytes - at)]
                writes = kind == "write" or (kind == "mix" and index // len(fds) % 2 == 1)
                started.append((ring.write if writes else ring.read)(fd, "file", at, slot))
            while started:
                ring.wait(started.popleft(), TIMEOUT_SECONDS)
            seconds = time.perf_counter() - begin
            gigabytes = each_bytes * len(paths) / 1e9
            return Measured(gigabytes / seconds, (cpu_seconds() - cpu) / gigabytes)
    finally:
        for fd in fds:
            os.close(fd)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure_fio(flags: list[str], kind: str, paths: list[Path], arguments: argparse.Namespace) -> Measured:
    command = [
        "fio",
        "--name=files",
        f"--filename={':'.join(str(path) for path in paths)}",
        "--file_service_type=roundrobin",
        f"--rw={FIO_KIND[kind]}",
        f"--size={arguments.file_bytes}",
        f"--bs={arguments.io_bytes}",
        f"--iodepth={arguments.depth}",
        f"--ioengine={arguments.fio_engine}",
        "--direct=1",
        "--thread",
        "--scramble_buffers=0",  # the ring does not change what it writes either
        "--output-format=json",
        *flags,
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(finished.stdout)["jobs"][0]
    gigabytes = (job["read"]["io_bytes"] + job["write"]["io_bytes"]) / 1e9
    seconds = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
    cpu_share = (job["usr_cpu"] + job["sys_cpu"]) / 100
    return Measured(gigabytes / seconds, cpu_share * job["job_runtime"] / 1e3 / gigabytes)


def open_arena(num_bytes: int, *, huge_pages: bool) -> memoryview:
    """Touched, page-aligned, private memory; fresh for each run, as fio's is.

    A request of 1 MiB over 4 KiB pages has 256 of them to pin and to describe to the drive. fio has those, so the
    ratio is taken against them; huge pages, which an arena should have, stand beside it.
    """
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
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
    paths = [arguments.dir / f"native_io_{os.getpid()}_{number}.bin" for number in range(4)]
    rings = {
        name: contender
        for name, contender in CONTENDERS.items()
        if contender.backend == "threads" or native.io_uring_available()[0]
    }
    profile = probe(arguments.dir, "io_uring") if native.io_uring_available()[0] else DriveProfile()
    compared: dict[str, Any] = {"profile": vars(profile)}
    for num_files in (1, 4):
        used = paths[:num_files]
        try:
            for path in used:
                lay_out(path, arguments.file_bytes // num_files)
            for kind in ("read", "write", "mix"):
                name = f"{kind}, {num_files} file" + ("s" if num_files > 1 else "")
                compared[name] = compare(kind, used, rings, profile, arguments)
        finally:
            for path in used:
                path.unlink(missing_ok=True)
    return compared


def compare(
    kind: str, paths: list[Path], rings: dict[str, Contender], profile: DriveProfile, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Speeds, processor time, and speeds over fio's, round by round."""
    cpu: dict[str, list[float]] = {}

    def recorded(name: str, measure: Callable[[], Measured]) -> float:
        measured = measure()
        cpu.setdefault(name, []).append(measured.cpu_seconds_per_gigabyte)
        return measured.gigabytes_per_second

    measures: dict[str, Callable[[], Measured]] = {
        name: partial(measure_ring, contender, kind, paths, profile, arguments) for name, contender in rings.items()
    }
    if shutil.which("fio"):
        measures |= {name: partial(measure_fio, flags, kind, paths, arguments) for name, flags in FIO_FLAGS.items()}
    speeds = rounds.interleave(
        {name: partial(recorded, name, measure) for name, measure in measures.items()}, arguments.rounds
    )
    row: dict[str, Any] = {
        "gigabytes_per_second": {name: rounds.summary(values) for name, values in speeds.items()},
        "cpu_seconds_per_gigabyte": {name: rounds.summary(values[1:]) for name, values in cpu.items()},
    }
    if "fio" in speeds:
        row["over_fio"] = {name: rounds.ratio(speeds, name, "fio") for name in speeds if name != "fio"}
    return row


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
    for kind, row in files.items():
        if kind == "profile":
            continue
        for name, speed in row["gigabytes_per_second"].items():
            over = row.get("over_fio", {}).get(name)
            cpu = 1e3 * row["cpu_seconds_per_gigabyte"][name]["median"]
            text = f"{kind:14} {name:33} {speed['median']:6.2f} GB/s [{speed['min']:.2f}, {speed['max']:.2f}]"
            text += f" {cpu:6.1f} ms cpu/GB"
            print(text + (f"  {over['median']:.2f} of fio [{over['min']:.2f}, {over['max']:.2f}]" if over else ""))
    if not shutil.which("fio"):
        print("fio is not installed: speeds without a comparison")
    checksum = compare_with_memcpy(arguments.rounds)
    for name, row in checksum.items():
        print_row(name.replace("over_memcpy", "crc32c over memcpy"), "times" if "over" in name else "GB/s", row)
    configuration = {
        name: getattr(arguments, name) for name in ("file_bytes", "depth", "io_bytes", "fio_engine", "rounds")
    }
    if shutil.which("fio"):
        found = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True)
        configuration["fio"] = found.stdout.strip()
    return {"configuration": configuration, "files": files, "checksum": checksum}
