"""Instructions per element of the native kernels, counted by callgrind: unlike time, they repeat to the digit.

A kernel that stops being vectorised, or looks up twice what it looked up once, shows here. valgrind has no AVX-512, so
these are the AVX2 kernels, compiled as setup.py compiles them.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[1] / "native"
SOURCES = ["tests/instructions.cc", "float16.cc", "isa.cc", "dynamic_map.cc", *("nf4*.cc", "cpu_adam*.cc")]
COUNTED = ("void offload_rt::nf4::decode<*", "std::optional<*> offload_rt::nf4::encode<*", "offload_rt::adam::step(*")

MEASURED = {
    "nf4 decode bfloat16": 1.02,
    "nf4 decode float32": 1.19,
    "nf4 encode bfloat16": 4.42,
    "adamw": 4.98,
    "adamw 8-bit moments": 15.29,
}
"""With GCC 12.2."""
SLACK = 1.15
"""For other compilers."""

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed"),
    pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are AVX2's"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("instructions") / "instructions"
    sources = [str(path) for pattern in SOURCES for path in sorted(NATIVE.glob(pattern))]
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", f"-I{NATIVE}"]
    subprocess.run(["g++", *flags, *sources, "-o", str(output)], check=True, capture_output=True, timeout=240)
    return output


def count(program: Path, kernel: str, num_elements: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    command += [f"--toggle-collect={function}" for function in COUNTED]
    done = subprocess.run(
        [*command, str(program), kernel, str(num_elements)], check=True, capture_output=True, text=True
    )
    collected = re.search(r"Collected : (\d+)", done.stderr)
    assert collected, done.stderr
    return int(collected[1])


@pytest.mark.parametrize("kernel", MEASURED)
def test_a_kernel_takes_no_more_instructions_than_measured(program: Path, kernel: str) -> None:
    few, many = 16384, 81920
    per_element = (count(program, kernel, many) - count(program, kernel, few)) / (many - few)
    print(f"{kernel}: {per_element:.2f} instructions an element")
    assert 0 < per_element <= SLACK * MEASURED[kernel]
