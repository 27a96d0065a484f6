"""Builds the native core; everything declarative is in pyproject.toml.

The extension is optional: where no C++20 compiler is found, or it fails, installation goes on with one line that
says so, and the plain twins (NF4 in torch, files through aiofiles) serve. `offload-rt doctor` shows which are in use.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("native").glob("*.cc"))


class OptionalBuildExt(build_ext):
    """`build_ext` that turns a failed compilation into one clear line."""

    gave_up = False

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # noqa: BLE001 - any failure of the tool chain means the same thing here
            self._give_up(error)

    def build_extension(self, ext: Extension) -> None:
        self.compiler.compile = side_by_side(self.compiler.compile, len(os.sched_getaffinity(0)))
        try:
            super().build_extension(ext)
        except Exception as error:  # noqa: BLE001
            self._give_up(error)

    def copy_extensions_to_source(self) -> None:
        # Called for editable installs; after a failed build there is nothing to copy.
        if not self.gave_up:
            super().copy_extensions_to_source()

    def _give_up(self, error: Exception) -> None:
        self.gave_up = True
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if reason.lower().startswith("command"):  # the whole command line of the compiler
            reason = "the C++ compiler is missing or failed"
        print(
            f"offload-rt: native core not built ({reason}); plain torch NF4 and aiofiles I/O will serve, slower",
            file=sys.stderr,
        )


def side_by_side(compile_all: Callable[..., list[str]], num_at_once: int) -> Callable[..., list[str]]:
    """setuptools' `compile` for so many sources at once: one after the other takes over a minute."""

    def compile_each(sources: Sequence[str], *arguments: Any, **options: Any) -> list[str]:
        with ThreadPoolExecutor(num_at_once) as pool:
            under_way = [pool.submit(compile_all, [source], *arguments, **options) for source in sources]
            return [name for one in under_way for name in one.result()]

    return compile_each


def pybind11_headers() -> str:
    """pybind11's own, or those that torch brings, where builds are not isolated and only that is installed."""
    try:
        import pybind11
    except ImportError:
        torch = find_spec("torch")
        if torch is None or torch.origin is None:
            raise
        return str(Path(torch.origin).parent / "include")
    return str(pybind11.get_include())


def extensions() -> list[Extension]:
    if not SOURCES:
        return []
    return [
        Extension(
            "_offload_rt_native",
            SOURCES,
            include_dirs=[pybind11_headers(), "native"],
            language="c++",
            # No -march: instruction sets are chosen at run time, so that one wheel serves every machine.
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-ffp-contract=off",  # multiply and add are fused where the source says so, nowhere else
                "-g0",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                # Of a compiler that is newer than this code a warning is no reason to go without the core.
                *(["-Werror"] if os.environ.get("OFFLOAD_RT_WERROR") else []),
            ],
            # The C++ runtime is linked in, so that a wheel does not depend on the user's; hidden, so that it does not
            # serve others, and without the parts that nobody calls, some of which want a newer C library.
            extra_link_args=[
                "-static-libstdc++",
                "-static-libgcc",
                "-Wl,--exclude-libs,ALL",
                "-Wl,--gc-sections",
                "-pthread",
                "-ldl",  # a part of the C library since glibc 2.34
            ],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuildExt})
