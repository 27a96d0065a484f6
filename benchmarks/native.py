"""Speed of the native core against the best that is commonly used: python benchmarks/native.py io|nf4|adam|all.

Each section is a module beside this one with `add_arguments(parser)` and `run(arguments)`, which prints a table and
returns what goes into its place in the record. Speeds are never asserted here; they are read.
"""

import argparse
import importlib
import json
import time
from pathlib import Path

import rounds

SECTIONS = {"io": "native_io", "nf4": "native_nf4", "adam": "native_adam"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=[*SECTIONS, "all"])
    parser.add_argument("--rounds", type=int, default=5, help="recorded rounds (default 5)")
    parser.add_argument("--record", metavar="HARDWARE", help="into results/native_HARDWARE_YYYYMM.json, per section")
    known, _ = parser.parse_known_args()
    names = list(SECTIONS) if known.section == "all" else [known.section]
    sections = {name: importlib.import_module(SECTIONS[name]) for name in names}
    for section in sections.values():
        section.add_arguments(parser)
    arguments = parser.parse_args()

    results = {name: {**rounds.circumstances(), **section.run(arguments)} for name, section in sections.items()}
    if arguments.record:
        place = Path(__file__).parent / "results" / f"native_{arguments.record}_{time.strftime('%Y%m')}.json"
        known = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
        place.write_text(json.dumps({**known, **results}, indent=1) + "\n", encoding="utf-8")
        print(f"recorded in {place}")


if __name__ == "__main__":
    main()
