"""What the three RTX 4090 demos share: a dry run, a smoke run, and the run itself.

    python examples/rtx4090_qlora_70b.py --dry-run [--html FILE]     plans and draws it: no GPU, no weights, no torch
    python examples/rtx4090_qlora_70b.py --smoke                     the same steps with a tiny model, on the CPU
    python examples/rtx4090_qlora_70b.py --model DIR --data FILE.jsonl --nvme DIR --out DIR [OPTIONS OF train]

The run is `offload-rt train` with the settings of the demo; what is given behind them overrides them. The dry run is
`offload-rt plan` with the same batches and budgets.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from offload_rt.cli.main import main as offload_rt

MACHINE = ["--gpu", "rtx4090", "--nvme", "2TB@7.0r/5.0w"]
"""24 GB of device memory, one PCIe 4.0 SSD."""
BUDGETS = ["--device-memory", "22GiB", "--host-memory", "56GiB"]
"""Of a machine with 64 GB of RAM: what is left beside the desktop, the CUDA context and the operating system."""
CLIPS = ["--clip"]
"""As `train` does unless it is told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One demo: `job` are options that `offload-rt plan` and `train` share, `plan` and `settings` more of either,
    `smoke` those for a tiny model, with budgets that cannot hold one of this width: its layers are spread over all
    tiers.
    """

    doc: str
    model: str
    """Which `plan` knows by name."""
    job: list[str]
    plan: list[str] = field(default_factory=list)
    settings: list[str]
    smoke: list[str]
    smoke_width: int = 256


def run(demo: Demo, arguments: list[str] | None = None) -> int:
    """The exit code of what was asked for, as `offload-rt` gives it."""
    parser = argparse.ArgumentParser(description=demo.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dry-run", action="store_true", help="the plan's page; no GPU, no weights")
    kind.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--html", help="with --dry-run: the plan as one page")
    options, rest = parser.parse_known_args(arguments)
    if options.dry_run:
        html = ["--html", options.html] if options.html else []
        what = ["--model", demo.model, *demo.job, *CLIPS, *demo.plan]
        return offload_rt(["plan", *what, *MACHINE, *BUDGETS, *html, *rest])
    if options.smoke:
        with tempfile.TemporaryDirectory(prefix="offload_rt-smoke-") as folder:
            job = tiny_job(Path(folder), demo.smoke_width)
            return offload_rt(["train", *job, "--device", "cpu", *demo.job, *demo.settings, *demo.smoke, *rest])
    return offload_rt(["train", "--device", "cuda", *BUDGETS, *demo.job, *demo.settings, *rest])


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
