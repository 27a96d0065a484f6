"""The guide's snippets: those of trainers are run as they stand; of all, what they ask of the engine is there."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from pathlib import Path

import pytest
import torch

import offload_rt
from offload_rt._engine import Engine
from tests.conftest import build_lora, language_batch
from tests.saved_state import is_complete

ROOT = Path(__file__).resolve().parents[1]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def snippets(text):
    return [ast.parse(block) for block in PYTHON.findall(text)]


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_what_snippets_ask_for_is_there(page):
    arguments = set(inspect.signature(Engine.__init__).parameters)
    asked = [node for snippet in snippets((ROOT / page).read_text()) for node in ast.walk(snippet)]
    names = {
        (node.value.id, node.attr)
        for node in asked
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    made = {"model", "optimizer"}  # by __init__
    of_engine = {name for owner, name in names if owner == "engine"} - made
    assert of_engine and all(hasattr(Engine, name) for name in of_engine), of_engine
    assert all(hasattr(offload_rt, name) for owner, name in names if owner == "offload_rt")
    calls = [node for node in asked if isinstance(node, ast.Call) and ast.unparse(node.func) == "offload_rt.engine"]
    assert calls and {keyword.arg for call in calls for keyword in call.keywords} <= arguments


@pytest.mark.full
def test_trainers_run_as_the_guide_says(make_engine, disk_folder, tmp_path, monkeypatch):
    section = (ROOT / "docs/guide.md").read_text().split("## Trainers")[1].split("\n## ")[0]
    found = snippets(section)
    assert len(found) == 3
    rows = [{name: rows[0] for name, rows in language_batch(seed, rows=1).items()} for seed in range(6)]
    monkeypatch.chdir(tmp_path)
    for number, snippet in enumerate(found):
        shutil.rmtree("run", ignore_errors=True)
        assert len(ast.unparse(snippet).splitlines()) <= 10
        engine = make_engine(build_lora(num_layers=1), nvme=disk_folder, commit_every=1)
        given = {"engine": engine, "rows": rows, "torch": torch}
        given |= {name: pytest.importorskip(name) for name in ("transformers", "accelerate")}
        exec(compile(snippet, "guide", "exec"), given)
        assert engine.step_number == engine.step_meter.num_steps == 3
        engine.close()
        assert number == 2 or (tmp_path / "run" / "checkpoint-3" / "optimizer.pt").exists()
        assert number != 1 or is_complete(tmp_path / "run" / "checkpoint-3" / "engine")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
