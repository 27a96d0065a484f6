"""What the three RTX 4090 demos share: a dry run, a smoke run, and the run itself.

    python examples/rtx4090_qlora_70b.py --dry-run [--html FILE]     plans and draws it: no GPU, no weights, no torch
    python examples/rtx4090_qlora_70b.py --smoke                     the same steps with a tiny model, on the CPU
    python examples/rtx4090_qlora_70b.py --model DIR --data FILE.jsonl --nvme DIR --out DIR [OPTIONS OF train]

The run is `offload-rt train` with the settings of the demo; what is given behind them overrides them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from offload_rt.cli.main import main as offload_rt

MACHINE = ["--gpu", "rtx4090", "--host-memory", "64GiB", "--nvme", "2TB@7.0r/5.0w"]
"""24 GB of device memory, 64 GB of RAM, one PCIe 4.0 SSD."""
BUDGETS = ["--device", "cuda", "--device-memory", "22GiB", "--host-memory", "56GiB"]
"""What is left beside the desktop, the CUDA context and the operating system."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One demo: `plan` are arguments of `offload-rt plan`, `settings` of `train`, `smoke` those for a tiny model, with
    budgets that cannot hold one of this width: its layers are spread over all tiers.
    """

    doc: str
    plan: list[str]
    settings: list[str]
    smoke: list[str]
    smoke_width: int = 256


def run(demo: Demo, arguments: list[str] | None = None) -> int:
    """The exit code of what was asked for, as `offload-rt` gives it."""
    parser = argparse.ArgumentParser(description=demo.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="the plan's page; no GPU, no weights")
    what.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--html", help="with --dry-run: the plan as one page")
    options, rest = parser.parse_known_args(arguments)
    if options.dry_run:
        html = ["--html", options.html] if options.html else []
        return offload_rt(["plan", *demo.plan, *MACHINE, *html, *rest])
    if options.smoke:
        with tempfile.TemporaryDirectory(prefix="offload_rt-smoke-") as folder:
            job = tiny_job(Path(folder), demo.smoke_width)
            return offload_rt(["train", *job, "--device", "cpu", *demo.settings, *demo.smoke, *rest])
    return offload_rt(["train", *BUDGETS, *demo.settings, *rest])


def tiny_job(folder: Path, width: int = 64) -> list[str]:
    """A Llama of twelve layers so wide, its tokenizer (a token a letter), and words to be spelt backwards."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = "abcdefgh"
    core = Tokenizer(WordLevel({word: at for at, word in enumerate(["<pad>", "<end>", *letters])}, unk_token="<pad>"))
    core.pre_tokenizer = Split("", "isolated")
    core.add_special_tokens(["<pad>", "<end>"])
    model = folder / "model"
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>").save_pretrained(model)
    config = LlamaConfig(
        vocab_size=16, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    words = [letters[i % 8 :] + letters[: i * 3 % 8] for i in range(32)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": word, "completion": word[::-1]}) + "\n" for word in words))
    (folder / "nvme").mkdir()
    return [
        "--model", str(model), "--data", str(data), "--nvme", str(folder / "nvme"), "--out", str(folder / "run"),
    ]  # fmt: skip
