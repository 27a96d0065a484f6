"""The demo's task: "Alice in Wonderland" sibling and friend puzzles of reasoning_gym, with an exact scorer.

    Mary has 18 brothers and she also has 6 sisters. How many sisters does Mary's brother have?    7

What a model has to learn is that the boy has all the sisters and Mary besides (asked for brothers, he is not his own),
whatever else the sentence counts. A question's *puzzle* is its form and its two numbers, names left out. A hash of the
puzzle decides on which side of the split it falls: no held-out puzzle is trained on, under any seed or other names.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

with warnings.catch_warnings():
    # One of reasoning_gym's requirements warns of its syntax wherever it is compiled.
    warnings.simplefilter("ignore", SyntaxWarning)
    import reasoning_gym
    from reasoning_gym.logic.aiw import TaskType

SYSTEM = "Reply with the answer only."
MAX_NEW_TOKENS = 4  # two digits, end of turn, one to spare
MAX_ENTITIES = 20
HELD_OUT_SHARE = 0.2


@cache
def _dataset(seed: int, size: int) -> Any:
    return reasoning_gym.create_dataset(
        "aiw",
        task_types=[TaskType.SIBLINGS, TaskType.FRIENDS],
        task_type_weights=[0.5, 0.5],
        max_entities=MAX_ENTITIES,
        seed=seed,
        size=size,
    )


def puzzle(question: str) -> str:
    """The question without its names; "Mary's brother" and "John's brother" stay different forms."""
    who = question.split(" has ", 1)[0]
    text = re.sub(rf"\b{who}\b", "SHE", question)
    return re.sub(r"\b[A-Z][a-z]+(?='s|, a male friend)", "HE", text)


def is_held_out(question: str) -> bool:
    digest = hashlib.sha256(puzzle(question).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def make_examples(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` examples of "train" (no question twice) or "test" (no puzzle twice)."""
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    examples: list[dict[str, Any]] = []
    seen: set[str] = set()
    # reasoning_gym draws item i from Random(seed + i): neighbouring seeds would share all but a few items.
    start = seed * 1_000_003 + (0 if split == "train" else 500_000)
    for entry in _dataset(start, 12 * count + 400):
        question = entry["question"]
        key = question if split == "train" else puzzle(question)
        if key in seen or is_held_out(question) != (split == "test"):
            continue
        seen.add(key)
        examples.append({"prompt": question, "completion": str(entry["answer"]), "entry": entry})
        if len(examples) == count:
            return examples
    raise ValueError(f"only {len(examples)} different {split} examples, {count} wanted")


def messages(example: dict[str, Any], *, with_answer: bool) -> list[dict[str, str]]:
    """The example as a chat."""
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": example["prompt"]}]
    return turns + [{"role": "assistant", "content": example["completion"]}] if with_answer else turns


def is_right(example: dict[str, Any], text: str) -> bool:
    """reasoning_gym's own scorer on the whole answer: right or wrong, no partial credit."""
    return bool(_dataset(0, 1).score_answer(text.strip(), example["entry"]) == 1.0)


def first_number(text: str) -> str:
    """The first number in the text, so that a model is not failed for its format alone; empty without one."""
    found = re.search(r"\d+", text)
    return found.group() if found else ""


def best_fixed_rule(examples: Sequence[dict[str, Any]]) -> tuple[str, list[bool]]:
    """What a reader who ignores the words could get: the best of "n-th number in the question, plus k".

    It is chosen by the very examples that it is scored on, which favours it.
    """
    rules = {}
    for place, name in enumerate(("first", "second")):
        for added in (0, 1, 2):
            guesses = [str(int(re.findall(r"\d+", e["prompt"])[place]) + added) for e in examples]
            rules[f"{name} number + {added}"] = [is_right(e, g) for e, g in zip(examples, guesses, strict=True)]
    return max(rules.items(), key=lambda rule: sum(rule[1]))


def mcnemar_exact(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact McNemar p-value of paired outcomes."""
    pairs = list(zip(before, after, strict=True))
    won = sum(b and not a for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))
