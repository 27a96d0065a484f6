"""What each chunk of a batch does in a block: its share of the work, in which order, what it keeps, swaps, redoes.

[Note: order of chunks]
The runtime takes all chunks of a sequence to attention and comes back from there with the last one first; most of what
is saved is made on the way back, and wanted in the reverse order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from planners.plans.placement import ClassPlan, Cuts
from planners.problems.cost import ClassCost, held_up_seconds, num_chunks
from planners.problems.problem import Problem

MAX_SIMULATED_CHUNKS = 4
"""Chunks beyond are simulated in groups: their time is one operation. Their memory is for `arenas` to say."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a chunk does of what its block saves, of all batches that go together. Bytes, and seconds."""

    kept: float
    host: float
    nvme: float
    put_away_seconds: float
    """For which swapping keeps it from computing in forward."""
    again_seconds: float
    """The same of backward, with computing again; but for attention."""


class ChunkWork:
    """Of one plan, whose classes are placed as `placed` says and cost what `costs` says."""

    def __init__(self, problem: Problem, cuts: Cuts, placed: Sequence[ClassPlan], costs: Sequence[ClassCost]) -> None:
        self.problem, self.workload = problem, problem.workload
        self.placed, self.costs = placed, costs
        self.num_chunks = min(num_chunks(problem, cuts), MAX_SIMULATED_CHUNKS)
        self._made: dict[tuple[int, int], Chunk] = {}

    def of(self, c: int, k: int) -> Chunk:
        """What chunk `k` does in a block of class `c` besides computing; made once for all blocks of a class."""
        if (c, k) not in self._made:
            self._made[c, k] = self._make(c, self._tokens(c, k))
        return self._made[c, k]

    def _make(self, c: int, tokens: list[tuple[float, float, float, float]]) -> Chunk:
        saved, cost, seq_len = self.workload.classes[c].saved, self.costs[c], self.workload.seq_len
        sizes = [one.bytes_per_token * self.workload.pass_rows for one in saved]
        of_tokens = list(zip(sizes, tokens, strict=True))
        held_up = [
            sum(held_up_seconds(cost, j, phase, nvme, host) for j, (_, nvme, host, _) in enumerate(tokens))
            for phase in (0, 1)
        ]
        again = sum(
            seconds * redone
            for one, seconds, (redone, *_) in zip(saved, cost.recompute_seconds, tokens, strict=True)
            if not one.is_attention
        )
        return Chunk(
            kept=sum(each * part[3] for each, part in of_tokens),
            host=sum(each * part[2] for each, part in of_tokens),
            nvme=sum(each * part[1] for each, part in of_tokens),
            put_away_seconds=held_up[0] / seq_len,
            again_seconds=(held_up[1] + again) / seq_len,
        )

    def _tokens(self, c: int, k: int) -> list[tuple[float, float, float, float]]:
        """Of each saved tensor of a class, how many of a sequence's tokens chunk `k` computes again, has on NVMe, in
        HOST, keeps: its part of each, or where chunks are treated whole, what of each range lies in it.
        """
        found = []
        seq_len, n = self.workload.seq_len, self.num_chunks
        for split in self.placed[c].tokens:
            parts = (split.recompute_tokens, split.nvme_tokens, split.host_tokens, split.device_tokens)
            if self.problem.capabilities.token_shares:
                again, nvme, host, kept = (part / n for part in parts)
            else:
                ends = list(itertools.accumulate(parts, initial=0))
                low, high = k * seq_len / n, (k + 1) * seq_len / n
                again, nvme, host, kept = (
                    max(0.0, min(high, end) - max(low, begin)) for begin, end in itertools.pairwise(ends)
                )
            found.append((again, nvme, host, kept))
        return found

    def order(self) -> Sequence[int]:
        """Chunks in the order of forward; backward takes them in the reverse one.

        Those that are treated whole end with the first: [Note: order of chunks].
        """
        own = range(self.num_chunks)
        return own if self.problem.capabilities.token_shares else own[::-1]

    def share(self, chunk: int) -> tuple[float, float]:
        """A chunk's share of the token-wise work, and of causal attention: later chunks look back further."""
        n = self.num_chunks
        one_sequence = self.workload.batch_size == 1
        return 1 / n, (2 * chunk + 1) / n**2 if one_sequence else 1 / n
