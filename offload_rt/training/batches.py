"""Token sequences to batches: a seeded order that can be resumed, padding or packing.

The order of an epoch depends on the seed and the epoch's number alone. It is shuffled, then examples of
similar length are put together (sorting inside windows of the shuffled order), then the batches are
shuffled.

    padded, batch of 2          packed, one row: examples end to end, no attention between them
    | a a a a a |               | a a a a a | b b b | c c . |   ids
    | b b b . . |               | 0 1 2 3 4 | 0 1 2 | 0 1 0 |   position_ids; padding is a document too

[Note: packed attention] transformers (5.x, `masking_utils`) tells documents apart by positions that
restart, and builds the block-diagonal mask for SDPA and eager attention itself, but only without an
attention mask and without a key-value cache: hence `use_cache=False` in a packed batch, and no mask. A
model that ignores this would mix the examples silently; `check_packing` finds out with two short forward
passes.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from offload_rt.errors import ConfigError, DataError
from offload_rt.training.data import IGNORED_LABEL, Example

Batch = dict[str, Any]
"""Keyword arguments of a causal language model: tensors of shape (batch, T), and `use_cache` when packed."""
WINDOW_BATCHES = 64
"""Sorting by length inside windows of this many batches: little padding, still a nearly random order."""


class Batches:
    """An endless iterator over batches. `state_dict` is the next one's place; keep it with `engine.track`."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        packing: bool = False,
        pad_token_id: int = 0,
        pad_to_multiple_of: int = 8,
    ) -> None:
        """`pad_to_multiple_of`: tokens a row. oneDNN keeps compiled kernels, megabytes, for every width it met."""
        if not examples:
            raise DataError("no examples to make batches of")
        if batch_size < 1:
            raise ConfigError(f"batch_size: must be at least 1, got {batch_size}")
        if pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of: must be at least 1, got {pad_to_multiple_of}")
        longest = max(map(len, examples))
        if longest > seq_len:
            raise DataError(f"an example has {longest} tokens, more than seq_len={seq_len}")
        self._examples = examples
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._seed = seed
        self._packing = packing
        self._pad_token_id = pad_token_id
        self._pad_to_multiple_of = pad_to_multiple_of
        checksum = 0
        for example in examples:
            checksum = zlib.crc32(example.labels.tobytes(), zlib.crc32(example.input_ids.tobytes(), checksum))
        self._fingerprint = {
            "examples": len(examples), "checksum": checksum, "batch_size": batch_size,
            "seq_len": seq_len, "seed": seed, "packing": packing, "pad_to_multiple_of": pad_to_multiple_of,
        }  # fmt: skip
        self.epoch = 0
        """Of the next batch, from 0."""
        self.position = 0
        """Batches of that epoch already given out."""
        self._order_of: tuple[int, list[list[list[int]]]] = (-1, [])

    def num_batches(self, epoch: int) -> int:
        """Batches in that epoch (packing makes them differ by a few)."""
        return len(self._order(epoch))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.position >= self.num_batches(self.epoch):
            self.epoch, self.position = self.epoch + 1, 0
        rows = self._order(self.epoch)[self.position]
        self.position += 1
        documents = [[self._examples[index] for index in row] for row in rows]
        if self._packing:
            return packed_batch(documents, pad_token_id=self._pad_token_id)
        examples = [row[0] for row in documents]
        multiple = self._pad_to_multiple_of
        width = min(self._seq_len, -(-max(map(len, examples)) // multiple) * multiple)
        return padded_batch(examples, pad_token_id=self._pad_token_id, width=width)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "data": dict(self._fingerprint)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; other data or settings are an error, not another order."""
        changed = [
            f"{key} was {state['data'].get(key)!r}, is {value!r}"
            for key, value in self._fingerprint.items()
            if state["data"].get(key) != value
        ]
        if changed:
            raise DataError(
                "the run cannot be resumed in the same order, its data, or what the tokenizer makes of it, changed: "
                f"{'; '.join(changed)}"
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def _order(self, epoch: int) -> list[list[list[int]]]:
        """Batches of rows of example numbers; a row that is not packed has one."""
        if self._order_of[0] != epoch:
            self._order_of = (epoch, self._make_order(epoch))
        return self._order_of[1]

    def _make_order(self, epoch: int) -> list[list[list[int]]]:
        rng = random.Random(f"{self._seed}/{epoch}")
        indices = list(range(len(self._examples)))
        rng.shuffle(indices)

        def tokens(row: list[int]) -> int:
            return sum(len(self._examples[index]) for index in row)

        rows = self._pack(indices) if self._packing else [[index] for index in indices]
        batches = []
        window = WINDOW_BATCHES * self._batch_size
        for start in range(0, len(rows), window):
            similar = sorted(rows[start : start + window], key=tokens, reverse=True)
            batches += [similar[at : at + self._batch_size] for at in range(0, len(similar), self._batch_size)]
        rng.shuffle(batches)
        if epoch == 0:
            # The largest comes first, so that what does not fit fails in the first minute.
            largest = max(range(len(batches)), key=lambda at: len(batches[at]) * max(map(tokens, batches[at])))
            batches[0], batches[largest] = batches[largest], batches[0]
        return batches

    def _pack(self, indices: list[int]) -> list[list[int]]:
        """Whole examples into rows of at most `seq_len` tokens: first fit, longest first, inside windows."""
        rows: list[list[int]] = []
        window = WINDOW_BATCHES * self._batch_size
        for start in range(0, len(indices), window):
            open_rows: list[tuple[list[int], int]] = []
            by_length = sorted(
                indices[start : start + window], key=lambda index: len(self._examples[index]), reverse=True
            )
            for index in by_length:
                length = len(self._examples[index])
                for at, (row, used) in enumerate(open_rows):
                    if used + length <= self._seq_len:
                        row.append(index)
                        open_rows[at] = (row, used + length)
                        break
                else:
                    open_rows.append(([index], length))
            rows += [row for row, _ in open_rows]
        return rows


def padded_batch(examples: Sequence[Example], *, pad_token_id: int, width: int) -> Batch:
    """`input_ids`, `attention_mask`, `labels`, each (batch, width), padded on the right."""
    ids = np.full((len(examples), width), pad_token_id, np.int64)
    labels = np.full((len(examples), width), IGNORED_LABEL, np.int64)
    mask = np.zeros((len(examples), width), np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = example.input_ids
        labels[row, : len(example)] = example.labels
        mask[row, : len(example)] = 1
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }


def packed_batch(rows: Sequence[Sequence[Example]], *, pad_token_id: int) -> Batch:
    """`input_ids`, `position_ids`, `labels`, each (batch, fullest row). See [Note: packed attention]."""
    width = max(sum(map(len, row)) for row in rows)
    ids = np.full((len(rows), width), pad_token_id, np.int64)
    labels = np.full((len(rows), width), IGNORED_LABEL, np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    for at, row in enumerate(rows):
        start = 0
        for example in row:
            end = start + len(example)
            ids[at, start:end] = example.input_ids
            # Its first token would be predicted from the document before it.
            labels[at, start + 1 : end] = example.labels[1:]
            positions[at, start:end] = np.arange(len(example))
            start = end
        positions[at, start:] = np.arange(width - start)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": torch.from_numpy(labels),
        "use_cache": False,
    }


def check_packing(forward: Callable[..., Any], *, vocab_size: int, seq_len: int) -> None:
    """Raises `ConfigError` if `forward(**batch).loss` of a document depends on the one packed before it.

    Two forward passes of at most 32 tokens where it does not; two more tell noise in a sum from mixing.
    """
    half = min(16, seq_len // 2)
    if half < 2 or vocab_size < 4:
        raise ConfigError(f"packing: seq_len={seq_len} has no room for two documents")

    def loss(first_token: int, *, apart: bool) -> float:
        document = (np.arange(half) * 7 + 3) % vocab_size
        before = np.full(half, first_token, np.int32)
        example = Example(document.astype(np.int32), document.astype(np.int32), 0)
        other = Example(before, np.full(half, IGNORED_LABEL, np.int32), 0)
        batch = packed_batch([[other, example]], pad_token_id=0)
        if not apart:
            batch["position_ids"] = torch.arange(2 * half)[None]
        with torch.no_grad():
            return float(forward(**batch).loss)

    packed = abs(loss(1, apart=True) - loss(2, apart=True))
    if packed == 0.0:
        return
    mixed = abs(loss(1, apart=False) - loss(2, apart=False))
    if packed > 0.01 * mixed:
        raise ConfigError(
            "packing: this model lets packed examples attend to each other "
            f"(changing one moved another's loss by {packed:.2g}); train without packing"
        )
