"""The loss on held-out data, of a model that trains: the same batches each time, and no trace in the training.

Rows are padded or packed as those of training, at most as long, and no more of them come at once, so that an evaluation
takes less memory than a step. The model is in eval mode and keeps no graph; what trains, gradients, random numbers,
buffers and modes of modules are as before afterwards. A step that was to be committed is committed first, by the first
call, as by that of the next step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from offload_rt.running.longest_step import model_unchanged
from offload_rt.training.batches import Batch, Batches
from offload_rt.training.data import IGNORED_LABEL
from offload_rt.training.display import format_seconds
from offload_rt.training.events import Events
from offload_rt.training.run_folder import EVAL_LOSS, RunFolder


class EvaluatedEngine(Protocol):
    """What an evaluation needs of `offload_rt.Engine`."""

    model: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


FORWARD_SHARE = 1 / 3
"""Of computing a micro-batch that trains: a backward pass computes twice what its forward does."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What one came to."""

    loss: float
    """The mean over all predicted tokens; NaN or infinite where the model's is."""
    tokens: int
    """That were predicted."""
    seconds: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss)


class Evaluation:
    """Of one engine, on all of `batches`' first epoch."""

    def __init__(self, engine: EvaluatedEngine, batches: Batches) -> None:
        """`batches` is this object's from now on."""
        self._engine = engine
        self._batches = batches
        self.data = f"{batches.state_dict()['data']['checksum']:08x}"
        """Tells one set of examples from another."""

    @property
    def num_batches(self) -> int:
        """Of an evaluation."""
        return self._batches.num_batches(0)

    def run(self, is_to_stop: Callable[[], object] = lambda: False) -> Evaluated | None:
        """Evaluates; None where `is_to_stop` said so between two batches. Blocks."""
        begin = time.monotonic()
        self._batches.epoch = self._batches.position = 0
        total, tokens = 0.0, 0
        with model_unchanged(self._engine.model), torch.no_grad():
            self._engine.model.eval()
            for _ in range(self.num_batches):
                if is_to_stop():
                    return None
                batch = next(self._batches)
                predicted = num_predicted(batch)
                if predicted:  # otherwise its loss is a mean of nothing
                    total += predicted * float(self._engine(**batch).loss)
                    tokens += predicted
        loss = total / tokens if tokens else math.nan
        return Evaluated(loss=loss, tokens=tokens, seconds=time.monotonic() - begin)


class Evaluations:
    """Those of one run: which are due, and where they are written."""

    def __init__(
        self,
        evaluation: Evaluation | None,
        folder: RunFolder,
        events: Events,
        say: Callable[[str], None],
        *,
        every: int | None,
        total_steps: int,
        is_to_stop: Callable[[], object],
        save_best: Callable[[Path], object] | None = None,
    ) -> None:
        """Without `evaluation` none is ever due. One is left out once `is_to_stop` says so. `save_best` saves what
        trains, whole, to a folder that may hold an older one; None where it is not kept.
        """
        self._evaluation = evaluation
        self._folder, self._events, self._say = folder, events, say
        self._every, self._total_steps = every, total_steps
        self._is_to_stop = is_to_stop
        self._save_best = save_best
        self.newest: Evaluated | None = None
        self.seconds = 0.0
        """Of all of them."""

    def behind(self, step: int) -> bool:
        """Evaluates behind the step that is done, where that is due and not in the run's folder yet; whether it did, if
        only in part. Blocks.
        """
        if self._evaluation is None or not self.is_missing(step):
            return False
        begin = time.monotonic()
        found = self._evaluation.run(self._is_to_stop)
        if found is None:
            self.seconds += time.monotonic() - begin
            self._say(f"step {step}: the evaluation was left out; --resume makes it")
            return True
        self.newest = found
        metrics = {
            "step": step, EVAL_LOSS: found.loss if found.is_finite else None, "eval_tokens": found.tokens,
            "eval_seconds": round(found.seconds, 6), "eval_data": self._evaluation.data, "time": round(time.time(), 3),
        }  # fmt: skip
        is_best = self._keep_best(found, metrics)
        self.seconds += time.monotonic() - begin
        self._folder.append_metrics(metrics)
        self._events.add(metrics, step)
        self._say(
            f"step {step}/{self._total_steps}  held-out loss {found.loss:.4f} over {found.tokens} tokens "
            f"({format_seconds(found.seconds)})" + (f", the lowest: {self._folder.best_folder}" if is_best else "")
        )
        return True

    def is_missing(self, step: int) -> bool:
        """Whether the one behind `step` is due and not in the run's folder."""
        if self._evaluation is None or step == 0 or self._num_due(step) == self._num_due(step + 1):
            return False
        data = self._evaluation.data
        return not any(line["step"] == step and line["eval_data"] == data for line in self._folder.evaluations())

    def _keep_best(self, found: Evaluated, metrics: Mapping[str, Any]) -> bool:
        """Saves what trains where its loss is the lowest of all with the same data; whether it did.

        Saved, then noted, then written to the metrics: a kill between two of them has the evaluation made again.
        """
        best = self._folder.best
        is_same = best is not None and best["eval_data"] == metrics["eval_data"]
        if self._save_best is None or not found.is_finite or (best and is_same and found.loss >= best[EVAL_LOSS]):
            return False
        self._save_best(self._folder.best_folder)
        self._folder.note_best(metrics)
        return True

    def seconds_from(self, step: int, *, seconds_of_batch: float) -> float:
        """What evaluations take that are due behind `step` and later steps. Before the first one is measured: by
        `seconds_of_batch`, which a micro-batch that trains takes.
        """
        if self._evaluation is None:
            return 0.0
        each = FORWARD_SHARE * seconds_of_batch * self._evaluation.num_batches
        return self._num_due(step) * (each if self.newest is None else self.newest.seconds)

    def _num_due(self, step: int) -> int:
        """Evaluations behind `step`, which is at least 1, and later steps."""
        if step > self._total_steps:
            return 0
        if self._every is None:
            return 1
        return -(-self._total_steps // self._every) - (step - 1) // self._every


def num_predicted(batch: Batch) -> int:
    """Tokens of which a causal model's loss is the mean: those with a label and one before them."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
