"""The model and the tokenizer in a folder, as transformers makes them: without weights, and without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload_rt.errors import ConfigError

MODEL_FILES = ("config.json",)
TOKENIZER_FILES = ("tokenizer.json", "*.model", "tokenizer.model.*", "vocab.*", "*.tiktoken", "tekken.json")
"""One of them has a tokenizer's vocabulary, unless its words are bytes."""
MIN_WORDS = 2
"""Of a tokenizer that can say anything: what transformers makes of no files has up to one, T5's mark of a space."""
_BAD_VALUES = (LookupError, AttributeError, TypeError, ArithmeticError, AssertionError, RuntimeError)
"""What transformers ends in where a configuration has values that nobody has looked at."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal one, and its tokenizer."""

    tokenizer: Any
    module: Any
    """On the meta device, with the configuration that it trains with."""
    settings_at_rest: Mapping[str, Any]
    """What its configuration says when it does not train."""

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's, or of another token that no loss is taken of."""
        own = self.tokenizer.pad_token_id
        return (own if own is not None else self.tokenizer.eos_token_id) or 0

    def save(self, save_pretrained: Callable[[Path], object], folder: Path) -> None:
        """Saves what was trained of it by `save_pretrained`, with its configuration at rest, and the tokenizer."""
        while_training = set_values(self.module.config, **self.settings_at_rest)
        try:
            save_pretrained(folder)
        finally:
            set_values(self.module.config, **while_training)
        self.tokenizer.save_pretrained(folder)


def find_model(text: str) -> Path:
    if not text:  # a shell's variable that is not set; as a path it is the current folder
        raise ConfigError("--model: the name of the folder is empty")
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--model: {text} is not a folder; download the model first, nothing is fetched here")
    for name in MODEL_FILES:
        if not (folder / name).is_file():
            raise ConfigError(f"--model: {folder} has no {name}")
    return folder


def _load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    Judged by what is loaded: transformers makes a tokenizer without words of a folder that lacks its files, and one of
    bytes needs none. Left unsaid, each of the user's texts would become unknown tokens, or none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        wrong = "it has no words" if len(words) < MIN_WORDS else ""
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        wrong = str(error)
    if not wrong:
        return tokenizer
    if not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        raise ConfigError(f"--model: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy its files there")
    raise ConfigError(f"--model: {folder}: its tokenizer cannot be loaded: {wrong}")


def load_transformers(folder: Path) -> LanguageModel:
    """The model in `folder`. No downloads."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"train needs transformers ({error}); pip install 'offload-rt[hf]'") from error
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model: {folder}: {error}") from error
    except _BAD_VALUES as error:
        raise ConfigError(f"--model: {folder}: its config.json is wrong ({error!r})") from error
    tokenizer = _load_tokenizer(folder)
    # A key-value cache would keep every layer's keys and values for a generation that does not happen.
    before = set_values(config, use_cache=False, output_router_logits=False)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.bfloat16)
    except ValueError as error:
        # transformers goes on with the names of all causal language models that it knows.
        raise ConfigError(f"--model: {folder}: {str(error).partition(chr(10))[0]}") from error
    except _BAD_VALUES as error:
        raise ConfigError(f"--model: {folder}: its config.json is wrong ({error!r})") from error
    return LanguageModel(tokenizer=tokenizer, module=model, settings_at_rest=before)


def set_values(config: Any, **values: Any) -> dict[str, Any]:
    """Sets what `config` has of `values`; returns what was there before."""
    before = {name: getattr(config, name) for name in values if hasattr(config, name)}
    for name in before:
        setattr(config, name, values[name])
    return before


def longest_row(model: Any) -> int:
    """What the model was made for, in tokens."""
    return _num_positions(model) or 4096


def _num_positions(model: Any) -> int | None:
    return getattr(model.config, "max_position_embeddings", None) or None


def check_length(model: Any, seq_len: int) -> str:
    """What to warn of where rows are to be so long; empty where nothing is. ConfigError where the model has no
    positions for them: those that are learned end, in a table with a row or two more (OPT), others go on.
    """
    most = _num_positions(model)
    if most is None or seq_len <= most:
        return ""
    for name, module in model.named_modules():
        is_table = isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
        if is_table and most <= module.num_embeddings <= most + 2:
            raise ConfigError(f"--seq-len: {seq_len} tokens a row; the model has learned {most} positions ({name})")
    return f"--seq-len: {seq_len} tokens a row, the model was made for {most} (max_position_embeddings)"
