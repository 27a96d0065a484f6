"""The RTX 4090 demos: their plans are drawn without torch, and their steps run on the CPU with a tiny model."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from offload_rt.cli.main import Parser

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEMOS = ["qlora_70b", "long_context_8b", "full_finetune_13b"]
ASKED = ("full", "adapters", "bits", "seq_len", "batch_size", "accumulation_steps", "device_memory", "host_memory")
"""What `plan` and `train` call alike, and a dry run has to be about."""


def run(name, *arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else [str(EXAMPLES / f"rtx4090_{name}.py")]), *arguments]
    return subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.parametrize("name", DEMOS)
def test_a_dry_run_draws_a_plan_that_fits_without_torch(name, tmp_path):
    page, plan = tmp_path / "plan.html", tmp_path / "plan.json"
    code = (
        "import sys\nsys.argv[0] = 'demo'\nfrom rtx4090 import run\n"
        f"from rtx4090_{name} import DEMO\n"
        "code = run(DEMO)\nprint('torch' in sys.modules)\nsys.exit(code)"
    )
    flags = ["--dry-run", "--html", str(page), "--json", str(plan), "--policy", "greedy", "--no-advice"]
    done = run(name, *flags, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("False")
    assert "on rtx4090: 22 GiB device, 56 GiB host" in done.stdout
    assert "<svg" in page.read_text() or "<table" in page.read_text()
    assert json.loads(plan.read_text())


@pytest.mark.parametrize("name", DEMOS)
def test_a_dry_run_is_about_the_run(name, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    demo, calls = import_module(f"rtx4090_{name}").DEMO, []
    monkeypatch.setattr(import_module("rtx4090"), "offload_rt", lambda words: calls.append(words) or 0)
    files = ["--model", "folder", "--data", "rows.jsonl", "--nvme", "drive", "--out", "run"]
    assert [import_module("rtx4090").run(demo, words) for words in (["--dry-run"], files)] == [0, 0]
    (plan, dry), (train, real) = (
        (words[0], parsed(import_module(f"offload_rt.cli.{words[0]}"), words[1:])) for words in calls
    )
    assert (plan, train) == ("plan", "train")
    assert {key: getattr(dry, key) for key in ASKED} == {key: getattr(real, key) for key in ASKED}
    assert dry.clip is (real.max_grad_norm > 0) and real.device == "cuda"


def parsed(command, words):
    parser = Parser("demo", "")
    command.add_arguments(parser)
    return parser.parse(words)


@pytest.mark.parametrize("name", ["qlora_70b", pytest.param("long_context_8b", marks=pytest.mark.full)])
def test_a_smoke_run_trains_and_leaves_an_adapter(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    out = tmp_path / "kept"
    demo = import_module(f"rtx4090_{name}").DEMO
    assert import_module("rtx4090").run(demo, ["--smoke", "--out", str(out)]) == 0
    assert "finished at step 3" in capsys.readouterr().out
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 3 and all(line["bytes_read"] > 0 for line in metrics)


@pytest.mark.full
def test_a_smoke_run_of_full_fine_tuning_leaves_a_model_with_its_state_on_nvme(tmp_path):
    out = tmp_path / "kept"
    done = run("full_finetune_13b", "--smoke", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished at step 3" in done.stdout
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 3 and all(line["bytes_read"] > 0 for line in metrics)
    assert list(out.rglob("*.safetensors"))


@pytest.mark.full  # a process that imports everything
def test_a_run_without_a_gpu_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    sys.path.insert(0, str(EXAMPLES))
    try:
        from rtx4090 import tiny_job
    finally:
        sys.path.remove(str(EXAMPLES))
    assert tiny_job(tmp_path)[:2] == ["--model", str(model)]
    job = ["--model", str(model), "--data", str(data), "--nvme", str(tmp_path), "--out", str(tmp_path / "out")]
    done = run("qlora_70b", *job)
    assert done.returncode == 2
    assert "finds no GPU here" in done.stderr
