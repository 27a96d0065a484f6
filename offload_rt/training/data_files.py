"""The files that examples are in: which ones a call means, and the JSON objects in their lines. No torch."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from offload_rt.errors import DataError

COMPRESSED = ".gz"
_GZIP = b"\x1f\x8b"
"""What a file that gzip has written begins with."""
_ENDINGS = (".jsonl", f".jsonl{COMPRESSED}")


def data_files(given: Sequence[str | Path]) -> list[Path]:
    """The files that are meant, in order: those given, and of a folder all with lines of JSON, by their names.

    One that is given twice comes twice. Raises `DataError` for what is neither file nor folder, and a folder without.
    """
    if "" in given:  # a shell's variable that is not set; as a path it is the current folder
        raise DataError("data: the name of a file is empty")
    found: list[Path] = []
    for path in (Path(each).expanduser() for each in given):
        if not path.exists():
            raise DataError(f"{path}: cannot be read (No such file or directory)")
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(entry for entry in path.iterdir() if entry.name.endswith(_ENDINGS) and entry.is_file())
        if not inside:
            raise DataError(f"{path}: a folder without files that end in {' or '.join(_ENDINGS)}")
        found += inside
    return found


def read_json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank; a file that ends in .gz is decompressed on the way."""
    try:
        opened = gzip.open if str(path).endswith(COMPRESSED) else open
        file: BinaryIO = opened(path, "rb")  # type: ignore[assignment]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        for line, raw in _lines(path, file):
            if line == 1 and raw.startswith(_GZIP) and not str(path).endswith(COMPRESSED):
                raise DataError(f"{path}: is compressed by gzip; name it so that it ends in {COMPRESSED}")
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start} of the line)") from error
            if not text:
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{line}: not JSON: {error.msg} at column {error.colno}{_hint(text)}") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or as many brackets
                raise DataError(f"{path}:{line}: cannot be read ({error})") from error
            if "\\ud" in text.lower() and not _is_unicode(record):
                raise DataError(f"{path}:{line}: has half of a surrogate pair (\\ud800 to \\udfff), which is no letter")
            if not isinstance(record, dict):
                raise DataError(f"{path}:{line}: expected an object, got {type(record).__name__}{_hint(text)}")
            yield line, record


def _hint(text: str) -> str:
    """What to say of a line where it looks like a part of one JSON document over all lines."""
    if text.startswith("["):
        return "; one JSON object a line is expected, not one array"
    return "; one JSON object a line is expected, not one over several" if text == "{" else ""


def _is_unicode(record: Any) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    line = 0
    try:
        for line, raw in enumerate(file, start=1):
            yield line, raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read behind line {line} ({error})") from error
