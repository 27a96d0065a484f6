"""The demo from end to end on a tiny Llama: every step happens, and the table says what was counted."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("peft")
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SOURCE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SOURCE / "examples"))

from aiw_task import best_fixed_rule, is_held_out, is_right, make_examples, mcnemar_exact, puzzle  # noqa: E402
from demo_table import checks  # noqa: E402

TAGS = ["<pad>", "<end>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NUM_LAYERS = 5


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, and a tokenizer with one token a character."""
    folder = tmp_path_factory.mktemp("model")
    words = [*TAGS, *string.printable]
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    core = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = Split("", "isolated")
    core.add_special_tokens(TAGS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_the_quick_demo_streams_trains_and_leaves_an_adapter_that_plain_peft_agrees_with(
    model_folder: Path, tmp_path: Path
) -> None:
    ran = subprocess.run(
        [
            sys.executable, SOURCE / "examples" / "smollm2_qlora.py", "--quick", "--model", model_folder,
            "--work", tmp_path / "work", "--device-memory", "100MiB", "--json", tmp_path / "facts.json",
        ],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stderr == ""  # a newcomer sees no library's warnings
    facts = json.loads((tmp_path / "facts.json").read_text())
    engine, steps = facts["engine"], facts["engine"]["steps"]
    assert steps == 3 and facts["accuracy"]["num_questions"] == 12
    assert engine["layers_at_a_time"] == 3 and engine["num_layers"] == engine["layers_on_nvme"] == NUM_LAYERS
    # Forward and backward read every layer, less those that are still in a slot at either turn.
    fewest, most = 2 * steps * (NUM_LAYERS - 3), 2 * steps * NUM_LAYERS
    assert fewest <= engine["fetches"] <= most and engine["prefetch_misses"] == 0
    assert engine["bytes_read"] == engine["fetches"] * engine["layer_bytes"]
    assert engine["bytes_written"] == 0
    assert facts["same_outputs"]["same_logits"] and facts["same_outputs"]["same_tokens"]
    assert facts["same_outputs"]["num_prompts"] == 12 and facts["same_outputs"]["largest_difference"] == 0
    for run in (engine, facts["plain"], facts["plain_recompute"]):
        assert run["phases"]["training"]["peak_bytes"] > 0 and run["base_bytes"] > 100 << 20
    assert facts["plain"]["losses"] == facts["plain_recompute"]["losses"]
    assert facts["checks"] and all(facts["checks"].values())
    adapter = Path(facts["adapter"])
    assert {path.name for path in adapter.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    for name in (*facts["checks"], "before", "after", "peak memory", "tokens/s", "waited for reads"):
        assert name in ran.stdout, name

    broken: dict[str, Any] = json.loads(json.dumps({**facts, "quick": False}))
    assert not checks(broken)["clear gain (p < 0.001)"]
    broken["engine"] |= {"layers_at_a_time": 4, "bytes_written": 1, "bytes_read": engine["layer_bytes"] * most + 1}
    broken["same_outputs"]["same_logits"] = False
    assert sum(not holds for holds in checks(broken).values()) >= 5


def test_the_task_is_imported_in_silence_where_nothing_compiled_is_kept(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE / "examples"), "PYTHONPYCACHEPREFIX": str(tmp_path)}
    command = [sys.executable, "-c", "import aiw_task"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_no_held_out_puzzle_is_trained_on_under_any_seed() -> None:
    held_out = {puzzle(example["prompt"]) for example in make_examples("test", 160, 0)}
    assert len(held_out) == 160
    for seed in (1, 2, 3):
        trained = make_examples("train", 400, seed)
        assert len({example["prompt"] for example in trained}) == 400
        assert not held_out & {puzzle(example["prompt"]) for example in trained}
        assert not any(is_held_out(example["prompt"]) for example in trained)


def test_names_are_left_out_of_a_puzzle_and_numbers_are_not() -> None:
    question = "Mary has 18 brothers and she also has 6 sisters. How many sisters does Mary's brother have?"
    assert puzzle(question) == puzzle(question.replace("Mary", "Susan"))
    assert puzzle(question) != puzzle(question.replace("18", "17"))


def test_the_scorer_takes_the_answer_and_nothing_else() -> None:
    [example] = make_examples("test", 1, 0)
    answer = example["completion"]
    assert is_right(example, answer) and is_right(example, f" {answer}\n")
    assert not is_right(example, f"{answer}{answer}") and not is_right(example, "") and not is_right(example, "many")
    name, right = best_fixed_rule(make_examples("test", 40, 0))
    assert name == "second number + 1" and 0.5 < sum(right) / 40 < 0.95


def test_mcnemar_counts_discordant_pairs_only() -> None:
    assert mcnemar_exact([False] * 5, [False] * 5) == 1.0
    assert mcnemar_exact([False] * 10 + [True] * 90, [True] * 100) == pytest.approx(2 / 2**10)
    assert mcnemar_exact([True, False, True], [False, True, True]) == 1.0
    with pytest.raises(ValueError):
        mcnemar_exact([True], [])
