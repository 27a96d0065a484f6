"""JSON lines to token sequences: chat template, what is learned, truncation.

A line is an object with exactly one of these forms; other keys are ignored:

    {"messages": [{"role": ..., "content": ...}, ...]}    learned: every assistant turn, but those of "weight": 0
    {"prompt": ..., "completion": ...}                    learned: the completion (or both lists of messages)
    {"text": ...}                                         learned: everything

What is learned is found by rendering the conversation up to each turn and comparing: a template that does
not render a shorter conversation as the beginning of a longer one is an error, never a wrong mask; and so is
one that leaves out messages, calls of tools or their descriptions. This is not a data loader: files of a size
that fits in memory as token ids (4 bytes each), no streaming from elsewhere. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from offload_rt.errors import ConfigError, DataError, nearest
from offload_rt.training.data_files import read_json_lines

IGNORED_LABEL = -100
"""What torch's cross entropy leaves out."""
_ADDED = "x"
"""What is put behind a text to see whether a template has a place for it."""
_LONG_TEXT = 64
"""Letters; shorter ones are often in another message too, as a number that a tool answers."""
MAX_MERGED_TOKENS = 4
"""A tokenizer may merge characters across the end of a prompt; merging further back than this is an error."""

_FORMS = ("messages", "prompt and completion", "text")
_KEYS = (("messages",), ("prompt", "completion"), ("text",))


@dataclass(frozen=True)
class Example:
    """One training sequence of T tokens, already cut to the longest allowed."""

    input_ids: NDArray[np.int32]
    """Shape (T,)."""
    labels: NDArray[np.int32]
    """Shape (T,): the token where it is learned, -100 elsewhere; not shifted."""
    line: int
    """Of the file that it came from, counted from 1."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What reading files came to; nothing that was cut or left out is missing from it."""

    num_examples: int
    num_tokens: int
    num_learned_tokens: int
    longest: int
    """Tokens of the longest line, before truncation."""
    num_truncated: int
    """Lines that were cut, the dropped ones included."""
    num_cut_tokens: int
    """Tokens that were cut from them."""
    dropped_lines: tuple[str, ...]
    """Lines with nothing left to learn after truncation, as name of the file and number."""
    num_merged: int
    """Prompts whose last token merged with the first of what is learned; the merged token is learned."""

    def __str__(self) -> str:
        text = f"{self.num_examples} examples, {self.num_tokens} tokens"
        text += f", {self.num_learned_tokens} of them learned, longest line {self.longest}"
        if self.num_truncated:
            text += f"; {self.num_truncated} truncated ({self.num_cut_tokens} tokens cut)"
        if self.dropped_lines:
            shown = ", ".join(self.dropped_lines[:5]) + (", ..." if len(self.dropped_lines) > 5 else "")
            text += f"; {len(self.dropped_lines)} dropped, nothing to learn was left ({shown})"
        if self.num_merged:
            text += f"; {self.num_merged} prompts end inside a token of what follows"
        return text


def load_examples(
    paths: str | Path | Sequence[Path],
    tokenizer: Any,
    *,
    seq_len: int,
    too_long: str = "truncate",
    prompts: str = "template",
) -> tuple[list[Example], DataReport]:
    """Reads a JSONL file, or several, one behind the other. Raises `DataError` with file and line for anything that
    cannot be used.

    `tokenizer` is a transformers tokenizer. `too_long`: "truncate" (cut on the right, counted) or "error".
    `prompts`: "template" puts prompt and completion through the chat template where the tokenizer has one,
    "raw" joins them as they are and ends with the end-of-sequence token.
    """
    for field, value, allowed in (
        ("too_long", too_long, ("truncate", "error")),
        ("prompts", prompts, ("template", "raw")),
    ):
        if value not in allowed:
            raise ConfigError(f"{field}: {value!r}; {nearest(value, allowed)}")
    if seq_len < 2:
        raise ConfigError(f"seq_len: must be at least 2, got {seq_len}")
    encoder = _Encoder(tokenizer, raw_prompts=prompts == "raw")
    examples: list[Example] = []
    dropped: list[str] = []
    longest = num_truncated = num_cut_tokens = 0
    for path, line, record in _records([Path(paths)] if isinstance(paths, (str, Path)) else paths):
        try:
            ids, labels = encoder.encode(record)
        except _BadLine as error:
            raise DataError(f"{path}:{line}: {error}") from error.__cause__
        longest = max(longest, len(ids))
        if not _num_learned(labels):
            raise DataError(f"{path}:{line}: nothing to learn: what is learned has no tokens")
        if len(ids) > seq_len:
            if too_long == "error":
                raise DataError(f"{path}:{line}: {len(ids)} tokens, more than seq_len={seq_len}; raise it, or truncate")
            num_truncated += 1
            num_cut_tokens += len(ids) - seq_len
            ids, labels = ids[:seq_len], labels[:seq_len]
            if not _num_learned(labels):
                dropped.append(f"{path.name}:{line}")
                continue
        examples.append(Example(np.asarray(ids, np.int32), np.asarray(labels, np.int32), line))
    if not examples:
        raise DataError(
            f"{path}: nothing left to learn in any of {len(dropped)} lines after truncation to "
            f"seq_len={seq_len} tokens (the longest has {longest}); raise seq_len"
        )
    report = DataReport(
        num_examples=len(examples),
        num_tokens=sum(map(len, examples)),
        num_learned_tokens=sum(_num_learned(example.labels.tolist()) for example in examples),
        longest=longest,
        num_truncated=num_truncated,
        num_cut_tokens=num_cut_tokens,
        dropped_lines=tuple(dropped),
        num_merged=encoder.num_merged,
    )
    return examples, report


def _records(paths: Sequence[Path]) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Of all files, with file and line."""
    for path in paths:
        is_empty = True
        for line, record in read_json_lines(path):
            yield path, line, record
            is_empty = False
        if is_empty:
            raise DataError(f"{path}: no examples: the file is empty")


def _num_learned(labels: list[int]) -> int:
    """A model predicts a token from those before it, so the first is never learned."""
    return sum(label != IGNORED_LABEL for label in labels[1:])


class _BadLine(Exception):
    """What is wrong with a line; the caller knows which line."""


class _Encoder:
    """One tokenizer's way from a record to ids and labels; counts what it had to smooth over."""

    def __init__(self, tokenizer: Any, *, raw_prompts: bool) -> None:
        self._tokenizer = tokenizer
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._raw_prompts = raw_prompts or not self._has_template
        self.num_merged = 0

    def encode(self, record: dict[str, Any]) -> tuple[list[int], list[int]]:
        forms = [name for name, keys in zip(_FORMS, _KEYS, strict=True) if any(key in record for key in keys)]
        if not forms:
            found = ", ".join(map(repr, record)) or "nothing"
            raise _BadLine(f"needs 'messages', 'prompt' and 'completion', or 'text'; it has {found}")
        if len(forms) > 1:
            raise _BadLine(f"has {' as well as '.join(forms)}; give one of them")
        if forms[0] == "messages":
            messages = _checked_messages(record["messages"], field="messages")
            return self._encode_messages(messages, tools=record.get("tools"), learn_from=0)
        if forms[0] == "text":
            text = _checked_text(record, "text")
            ids = self._with_end(self._ids(text, special=True))
            return ids, list(ids)
        for key in ("prompt", "completion"):
            if key not in record:
                raise _BadLine(f"has no {key!r}; prompt and completion belong together")
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            before = _checked_messages(prompt, field="prompt")
            after = _checked_messages(completion, field="completion")
            return self._encode_messages(before + after, tools=record.get("tools"), learn_from=len(before))
        prompt, completion = _checked_text(record, "prompt"), _checked_text(record, "completion")
        if self._raw_prompts:
            ids = self._with_end(self._ids(prompt + completion, special=True))
            return ids, self._labels(ids, [(self._boundary(ids, prompt, special=True), len(ids))])
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return self._encode_messages(messages, tools=None, learn_from=1)

    def _encode_messages(
        self, messages: list[dict[str, Any]], *, tools: Any, learn_from: int
    ) -> tuple[list[int], list[int]]:
        if not self._has_template:
            raise _BadLine("is a conversation, and the tokenizer has no chat template; use 'text' or set a template")
        turns = [
            index
            for index in range(learn_from, len(messages))
            if messages[index]["role"] == "assistant" and messages[index].get("weight") != 0
        ]
        if not turns:
            raise _BadLine("has no assistant message to learn")
        if turns[0] == 0:
            raise _BadLine("begins with an assistant message; there is nothing that it answers")
        whole = self._render(messages, tools)
        ids = self._ids(whole, special=False)
        spans = []
        for index in turns:
            before = self._render(messages[:index], tools, add_generation_prompt=True)
            after = self._render(messages[: index + 1], tools)
            if not after.startswith(before) or not whole.startswith(after):
                raise _BadLine(
                    f"the chat template renders the messages up to number {index + 1} differently from the "
                    "beginning of the whole, so what to learn cannot be told; split it so that only its last "
                    "message is the assistant's, or use a template that does not rewrite earlier turns"
                )
            end = len(ids) if after == whole else self._boundary(ids, after, special=False, counted=False)
            spans.append((self._boundary(ids, before, special=False), end))
        self._check_nothing_left_out(messages, tools, whole, turns)
        return ids, self._labels(ids, spans)

    def _render(self, messages: list[dict[str, Any]], tools: Any, *, add_generation_prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise _BadLine(f"the chat template refuses it: {error}") from error
        return text

    def _check_nothing_left_out(
        self, messages: list[dict[str, Any]], tools: Any, whole: str, turns: Sequence[int]
    ) -> None:
        """Raises `_BadLine` where the template has no place for a part of what it was given: answers would be learned
        without what they answer, and calls of tools as silence.

        It has one for a text if what is put behind that is rendered too, whatever it makes of the text. The assistant's
        are asked for in learned turns (`turns`) alone: what templates drop of earlier ones, they drop on purpose.
        """

        def is_same(messages: list[dict[str, Any]], tools: Any = tools) -> bool:
            try:
                return self._render(messages, tools) == whole
            except _BadLine:
                return False  # the template asks for what is missing

        def with_one(index: int, message: dict[str, Any]) -> list[dict[str, Any]]:
            return [*messages[:index], message, *messages[index + 1 :]]

        missing = ["'tools'"] if tools and is_same(messages, None) else []
        for index, message in enumerate(messages):
            text, calls, where = message.get("content"), message.get("tool_calls"), f"message {index + 1}"
            if calls and is_same(with_one(index, {key: message[key] for key in message if key != "tool_calls"})):
                missing.append(f"'tool_calls' of {where}")
            if isinstance(text, str) and text.strip() and (message["role"] != "assistant" or index in turns):
                # What is long and there was hardly put there by another message; asking takes longer.
                is_there = len(text) > _LONG_TEXT and text.strip() in whole
                if not is_there and is_same(with_one(index, {**message, "content": f"{text}{_ADDED}"})):
                    missing.append(f"the text of {where} ({message['role']!r})")
        if missing:
            raise _BadLine(
                f"the chat template leaves out {', '.join(missing)}: nothing of it would reach the model; take a "
                f"template that knows it, or put it into the text"
            )

    def _ids(self, text: str, *, special: bool) -> list[int]:
        # verbose=False: a line beyond the tokenizer's own maximum is our business, not its warning's.
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return list(ids)

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _boundary(self, ids: Sequence[int], prefix: str, *, special: bool, counted: bool = True) -> int:
        """How many of `ids` belong to `prefix` alone. A token that reaches over its end does not."""
        prefix_ids = self._ids(prefix, special=special)
        end = self._tokenizer.eos_token_id
        if special and prefix_ids and prefix_ids[-1] == end:
            prefix_ids = prefix_ids[:-1]  # the tokenizer closes every text by itself
        common = 0
        for one, other in zip(prefix_ids, ids, strict=False):
            if one != other:
                break
            common += 1
        if len(prefix_ids) - common > MAX_MERGED_TOKENS:
            raise _BadLine(
                f"the tokenizer splits a prompt of {len(prefix_ids)} tokens otherwise if its answer follows "
                f"(from token {common} on), so what to learn cannot be told"
            )
        self.num_merged += counted and common < len(prefix_ids)
        return common

    @staticmethod
    def _labels(ids: list[int], spans: list[tuple[int, int]]) -> list[int]:
        labels = [IGNORED_LABEL] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        return labels


def _checked_text(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise _BadLine(f"{key!r} is {type(value).__name__}, expected text")
    if not value and key == "text":
        raise _BadLine(f"{key!r} is empty")
    return value


def _checked_messages(value: Any, *, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise _BadLine(f"{field!r} is {found}, expected a list of messages")
    for number, message in enumerate(value, start=1):
        where = f"message {number} of {field!r}"
        if not isinstance(message, dict):
            raise _BadLine(f"{where} is {type(message).__name__}, expected an object with 'role' and 'content'")
        if not isinstance(message.get("role"), str):
            raise _BadLine(f"{where} has no 'role'")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise _BadLine(f"{where} has no text in 'content'")
        if message.get("weight") not in (None, 0, 1):
            raise _BadLine(
                f"{where} has a 'weight' of {message['weight']!r}; 0 leaves it out of what is learned, 1 not"
            )
    return value
