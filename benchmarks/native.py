"""Speed of the native core against the best that is commonly used: python benchmarks/native.py io|nf4|adam|all.

Each section is a module beside this one with `add_arguments(parser)` and `run(arguments)`, which prints a table and
returns what goes into the JSON file. Speeds are never asserted here; they are read.
"""

import argparse
import importlib
import json
from pathlib import Path

import rounds

SECTIONS = {"io": "native_io", "nf4": "native_nf4", "adam": "native_adam"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=[*SECTIONS, "all"])
    parser.add_argument("--rounds", type=int, default=5, help="recorded rounds (default 5)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    known, _ = parser.parse_known_args()
    names = list(SECTIONS) if known.section == "all" else [known.section]
    sections = {name: importlib.import_module(SECTIONS[name]) for name in names}
    for section in sections.values():
        section.add_arguments(parser)
    arguments = parser.parse_args()

    results = rounds.circumstances()
    for name, section in sections.items():
        results[name] = section.run(arguments)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
