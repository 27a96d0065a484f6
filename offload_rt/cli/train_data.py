"""What `offload-rt train` is given by name: files of model, data and adapter, who they are, and the rows in them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from offload_rt.checkpoint.saved_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_kind
from offload_rt.cli.model_folder import LanguageModel, longest_row
from offload_rt.config import adapter_folder
from offload_rt.training.batches import Batches
from offload_rt.training.data import DataReport, load_examples
from offload_rt.training.data_files import data_files
from offload_rt.training.identity import file_digest, model_digest, place_and_content


@dataclass(frozen=True, kw_only=True)
class TrainingFiles:
    """Where it all is."""

    model: Path
    data: Sequence[Path]
    held_out: Sequence[Path] | None
    adapters: Path | str | None
    """The folder of a saved adapter, which goes on training, or what new ones are like; None with --full."""

    @classmethod
    def find(cls, arguments: argparse.Namespace, model_folder: Path) -> TrainingFiles:
        """Raises `ConfigError` for what is not there."""
        saved = None if arguments.full else adapter_folder(arguments.adapters)
        if saved is not None:
            adapter_kind(saved)
        return cls(
            model=model_folder,
            data=data_files(arguments.data),
            held_out=None if arguments.eval_data is None else data_files(arguments.eval_data),
            adapters=saved or arguments.adapters,
        )

    def settings(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """What a run is begun with, by place and content: the same content in another place is the same as `before`."""
        settings: dict[str, Any] = place_and_content(
            "model", os.path.realpath(self.model), model_digest(self.model), before
        )
        if all(path.is_file() for path in self.data):  # a pipe is read once; its examples are compared on going on
            places, contents = ", ".join(map(os.path.realpath, self.data)), "-".join(map(file_digest, self.data))
            settings |= place_and_content("data", places, contents, before)
        if not isinstance(self.adapters, Path):
            return settings | {"adapters": self.adapters}
        content = "-".join(file_digest(self.adapters / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
        return settings | place_and_content("adapters", os.path.realpath(self.adapters), content, before)


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """The examples, as a model takes them."""

    seq_len: int
    """As it was asked for; else of the longest example."""
    batches: Batches
    report: DataReport
    held_out: Batches | None
    held_out_report: DataReport | None

    @classmethod
    def read(cls, arguments: argparse.Namespace, files: TrainingFiles, model: LanguageModel) -> TrainingRows:
        """Raises `DataError` with file and line for anything that cannot be used."""
        load = partial(
            load_examples,
            tokenizer=model.tokenizer,
            too_long=arguments.too_long,
            prompts="raw" if arguments.raw_prompts else "template",
        )
        examples, report = load(files.data, seq_len=arguments.seq_len or longest_row(model.module))
        # Memory is planned for the longest row there is, not for one that never comes.
        seq_len = arguments.seq_len if arguments.seq_len is not None else max(map(len, examples))
        batches_of = partial(
            Batches,
            batch_size=arguments.batch_size,
            seq_len=seq_len,
            seed=arguments.seed,
            packing=arguments.packing,
            pad_token_id=model.pad_token_id,
        )
        batches, held_out, held_out_report = batches_of(examples), None, None
        if files.held_out is not None:
            held_out_examples, held_out_report = load(files.held_out, seq_len=seq_len)
            held_out = batches_of(held_out_examples)
        return cls(seq_len=seq_len, batches=batches, report=report, held_out=held_out, held_out_report=held_out_report)
