"""Pages that must not fall behind: the map of modules in docs/architecture.md, and drawings, which tools reflow."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("planners", "native", "offload_rt")


def rows_by_folder(page):
    """The names in the map's rows, by the folder whose row stands above them."""
    found, folder = {}, None
    for line in page.splitlines():
        if heading := re.match(r"\| \*\*(.+?)\*\* \|", line):
            name = heading[1].strip("`").rstrip("/")
            top = next((known for known in reversed(found) if known in PACKAGES), None)
            if name in PACKAGES or "/" in name:
                folder = name
            else:
                folder = f"{top}/{name}" if (ROOT / str(top) / name).is_dir() else top
            found.setdefault(folder, [])
        elif folder is not None and line.startswith("| `"):
            found[folder] += re.findall(r"`(.+?)`", line.split("|")[1])
    return found


def test_the_map_names_every_module_but_those_of_folders_that_it_gives_whole():
    wrong = []
    found = rows_by_folder((ROOT / "docs/architecture.md").read_text())
    assert len(found) > 20, found.keys()
    for folder, names in found.items():
        suffixes = ("*.cc", "*.h") if folder == "native" else ("*.py",)
        there = {path.stem for suffix in suffixes for path in (ROOT / folder).glob(suffix)} - {"__init__", "__main__"}
        wrong += [f"{folder}: no {name}" for name in names if not any(fnmatch(stem, name) for stem in there)]
        if names:
            lacks = [stem for stem in there if not any(fnmatch(stem, name) for name in names)]
            wrong += [f"{folder}: {stem} has no row" for stem in lacks]
    packages = [path for name in PACKAGES for path in (ROOT / name).iterdir() if (path / "__init__.py").exists()]
    wrong += [f"{path}: no row" for path in packages if str(path.relative_to(ROOT)) not in found]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_stands_behind_the_marks_of_code_but_its_language(page):
    marks = [line for line in page.read_text().splitlines() if line.startswith("```")]
    assert [line for line in marks if not re.fullmatch(r"```\w*", line)] == [] and len(marks) % 2 == 0
