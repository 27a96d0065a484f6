"""Answers of a model to the task's questions: greedy, in left-padded batches. The model may be an engine's or plain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import aiw_task
import torch

BATCH_SIZE = 32


def prompt_ids(tokenizer: Any, example: dict[str, Any]) -> list[int]:
    """The chat up to where the model's answer begins."""
    chat = aiw_task.messages(example, with_answer=False)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answers(model: Any, tokenizer: Any, examples: Sequence[dict[str, Any]]) -> list[str]:
    """One answer for each example, in their order."""
    found = [""] * len(examples)
    for indices, batch in _prompt_batches(tokenizer, examples):
        for index, tokens in zip(indices, _generate(model, tokenizer, batch), strict=True):
            found[index] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return found


def sample_outputs(model: Any, tokenizer: Any, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What two models that ought to be the same are compared by: logits and greedy tokens for one batch."""
    _, batch = next(_prompt_batches(tokenizer, examples[:BATCH_SIZE]))
    with torch.no_grad():
        logits_BV = model(**batch, logits_to_keep=1).logits[:, -1]
    return {"logits": logits_BV.contiguous(), "tokens": _generate(model, tokenizer, batch).contiguous()}


def keep_head_input_contiguous(model: Any) -> None:
    """What the engine does by itself, for a plain model, so that both multiply alike."""
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))


def _prompt_batches(
    tokenizer: Any, examples: Sequence[dict[str, Any]]
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Places in `examples` and model inputs; prompts of similar length go together."""
    prompts = [prompt_ids(tokenizer, example) for example in examples]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), BATCH_SIZE):
        indices = order[start : start + BATCH_SIZE]
        width = max(len(prompts[index]) for index in indices)
        ids_BT = torch.full((len(indices), width), tokenizer.pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, index in enumerate(indices):
            ids_BT[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask_BT[row, width - len(prompts[index]) :] = 1
        yield indices, {"input_ids": ids_BT, "attention_mask": mask_BT}


def _generate(model: Any, tokenizer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The new tokens, one row a prompt."""
    with torch.no_grad():
        tokens_BT = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=aiw_task.MAX_NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokens_BT[:, batch["input_ids"].shape[1] :]
