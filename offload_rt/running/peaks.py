"""The most that there was in each tier while an engine was made, stepped, saved and resumed, beside what was planned.

    ingest   it is made: the store is built or found, arenas are mapped, state begins
    step     forward, backward and update, with commits; and whatever the caller does between
    save     save_checkpoint, save_pretrained
    resume   load_checkpoint

Memory that is managed is arenas', to the byte: a tier's own, and those beside them that nobody has reserved, which take
the place of what the plan leaves to PyTorch's allocator (see [Note: every arena] in `mapped`; another engine's, made
meanwhile in the same process, count here too). Making an engine takes buffers of known size for a moment: within the
budget they are planned, and nobody is warned of them. What state is saved and loaded through is reserved all the time,
but for what a step's activations leave free then, where memory is one tier. On NVME it is the lengths of files:
weights, state and scratch; commits of adapters, checkpoints (with what they replace, which is there until they are
whole) and records have rows of their own. What the allocator took is the process's resident memory less its base and
the arenas: the kernel's mark where that rose, otherwise what was seen between layers and when a phase began or ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload_rt.memory import mapped
from offload_rt.memory.heap import HeapGuard
from offload_rt.memory.process_memory import peak_resident_bytes, resident_bytes
from offload_rt.running.comparison import MANAGED_FILES, PHASES
from offload_rt.storage.drives import PROBE_BYTES
from offload_rt.storage.store import STAGING_BYTES, store_folders
from offload_rt.tiering.tiers import TierAccount, Tiers
from offload_rt.wiring.runtime import Runtime
from planners.errors import format_bytes
from planners.plans.plan import Tier

logger = logging.getLogger("offload_rt")

INGEST, STEP, SAVE, RESUME = PHASES
FILES = {"weights.bin": "weights", "state.bin": "state"}
"""What a tier's capacity is for, by the file that it is in; scratch files have no name."""
PASSING_BYTES = {
    "drive probe": PROBE_BYTES,
    "ingest staging": 2 * STAGING_BYTES,
    "pieces of weights": STAGING_BYTES,
}
"""What making an engine takes of HOST for a moment, at most: planned beside what lasts, where the budget has room."""
PROFILE = "profile"
"""What names of arenas begin with in which a layer is timed, before there are any of DEVICE's, in whose place they are.
They pass, too, as far as its budget has room.
"""


@dataclass
class MemoryPeak:
    """Of a tier's arenas in a phase, in bytes."""

    num_bytes: int = 0
    beside: dict[str, int] = field(default_factory=dict)
    """By name, what of it nobody had reserved."""
    leased: dict[str, int] = field(default_factory=dict)
    """By arena, the most under lease."""


class Peaks:
    """Of one engine, from before it is made until `close`. Reads and phases from one thread; arenas from any."""

    def __init__(self) -> None:
        self._watch = mapped.Watch()
        self._lock = threading.Lock()
        self._live: dict[mapped.Mapping, Tier] = {}
        self._accounts: dict[int, TierAccount] = {}
        """By id, those of the plan in effect, and of plans before it with memory that somebody still sees."""
        self._lasting: dict[Tier, int] = {}
        """The most of `_lasting_bytes` of plans before that in effect."""
        self._phase = INGEST
        self._memory: dict[tuple[str, Tier], MemoryPeak] = {}
        self._allocator: dict[str, int] = {}
        self._files: dict[str, dict[str, int]] = {}
        self._warned: set[tuple[str, str]] = set()
        self._high_water = peak_resident_bytes()
        self._runtime: Runtime | None = None
        self._base_bytes = 0

    def follow(self, runtime: Runtime, base_bytes: int) -> None:
        """The engine is made of `runtime` from now on, and steps. base_bytes: resident before there was an engine."""
        for tier in self._lasting.keys() | {account.tier for account in self._accounts.values()}:
            self._lasting[tier] = self._most_bytes(tier)
        self._runtime, self._base_bytes = runtime, base_bytes
        self._accounts |= {id(account): account for account in runtime.tiers.accounts.values()}
        self._end_phase()
        held = [mapping.account for mapping in self._live] + [*runtime.tiers.accounts.values()]
        self._accounts = {id(account): account for account in held if isinstance(account, TierAccount)}
        self._begin_phase(STEP)

    @contextmanager
    def phase(self, name: str, folder: Path | None = None) -> Iterator[None]:
        """What is done inside is `name`. folder: where it writes a copy, in place of what is there."""
        replaced = 0 if folder is None or self._is_ours(folder) else _folder_bytes(folder)
        self._end_phase()
        self._begin_phase(name)
        try:
            yield
        finally:
            if folder is not None and not self._is_ours(folder):
                self._note_files(name, {"checkpoint": replaced + _folder_bytes(folder)})
            self._end_phase()
            self._begin_phase(STEP)

    def close(self) -> None:
        self._watch.close()

    def report(self) -> dict[str, Any]:
        """By tier: what is planned to last, and to pass while the engine is made; by phase what there was; what exceeds
        a plan under `over`. Bytes.
        """
        runtime = self._runtime
        if runtime is None:
            return {}
        self._end_phase()
        self._begin_phase(self._phase)
        found: dict[str, Any] = {}
        over: list[dict[str, Any]] = []
        for tier, account in runtime.tiers.accounts.items():
            phases: dict[str, Any]
            if tier is Tier.NVME:
                phases = {name: dict(self._files[name]) for name in PHASES if name in self._files}
                most = {name: sum(sizes.get(one, 0) for one in MANAGED_FILES) for name, sizes in phases.items()}
            else:
                peaks = {name: self._memory[name, tier] for name in PHASES if (name, tier) in self._memory}
                phases = {
                    name: {"bytes": peak.num_bytes, "beside": peak.beside, "leased": peak.leased}
                    for name, peak in peaks.items()
                }
                most = {name: peak.num_bytes for name, peak in peaks.items()}
            if not phases:
                continue
            found[tier.value] = {
                "planned_bytes": account.used_bytes, "passing_bytes": self._passing_bytes(account),
                "budget_bytes": account.capacity_bytes, "phases": phases,
            }  # fmt: skip
            more = {name: size - self._planned_bytes(account, name) for name, size in most.items()}
            over += [{"tier": tier.value, "phase": name, "bytes": size} for name, size in more.items() if size > 0]
        memory = [account for tier, account in runtime.tiers.accounts.items() if tier is not Tier.NVME]
        found["allocator"] = {
            "planned_bytes": sum(account.used_bytes - account.arena_bytes for account in memory),
            "phases": dict(self._allocator),
        }
        return {**found, "over": over}

    def _planned_bytes(self, account: TierAccount, phase: str) -> int:
        """Of what lasts; in `INGEST` of what passes, and in `SAVE` of what was booked for as long as that took."""
        passing = {INGEST: self._passing_bytes(account), SAVE: account.most_passing_bytes}
        return self._lasting_bytes(account) + passing.get(phase, 0)

    def _lasting_bytes(self, account: TierAccount) -> int:
        """By the plan that is in effect, or the one before it that had most, or a change between them: peaks are those
        of all of them.
        """
        return max(self._most_bytes(account.tier), account.used_bytes, account.most_changing_bytes)

    def _most_bytes(self, tier: Tier) -> int:
        accounts = [each for each in self._accounts.values() if each.tier is tier]
        most = (max(each.used_bytes, each.most_changing_bytes) for each in accounts)
        return max(self._lasting.get(tier, 0), *most, 0)

    def _passing_bytes(self, account: TierAccount) -> int:
        """Of `PASSING_BYTES` and a profile, what there was when most was mapped; no more than the budget has left."""
        peak = self._memory.get((INGEST, account.tier), MemoryPeak())
        passing = sum(
            size if _is_of_profile(name) else min(size, PASSING_BYTES.get(name, 0))
            for name, size in peak.beside.items()
        )
        if account.capacity_bytes is None:
            return passing
        return max(0, min(passing, account.capacity_bytes - self._lasting_bytes(account)))

    def _begin_phase(self, name: str) -> None:
        self._phase = name
        for arena in self._arenas():
            arena.restart_peak()
        self._note_live()
        self._note_resident()

    def _end_phase(self) -> None:
        """Takes down what came since it began."""
        name = self._phase
        self._fold()
        for account in self._accounts.values():
            peak = self._memory.setdefault((name, account.tier), MemoryPeak())
            for arena in filter(None, (each() for each in account.arenas)):
                peak.leased[arena.name] = max(peak.leased.get(arena.name, 0), arena.peak_bytes)
        self._note_resident()
        self._note_files(name, self._lengths())
        self._warn()

    def _arenas(self) -> Iterable[Any]:
        return filter(None, (each() for account in self._accounts.values() for each in account.arenas))

    def _fold(self) -> None:
        """Takes in what was mapped and given back since the last time, in its order."""
        with self._lock:
            while self._watch.changes:
                mapping, is_mapped = self._watch.changes.popleft()
                tier = self._tier_of(mapping)
                if tier is None:
                    continue
                if is_mapped:
                    self._live[mapping] = tier
                    self._note_live()
                else:
                    self._live.pop(mapping, None)

    def _tier_of(self, mapping: mapped.Mapping) -> Tier | None:
        """None where it is another engine's."""
        if mapping.account is None:
            tiers: Tiers | None = None if self._runtime is None else self._runtime.tiers
            of = Tier.DEVICE if _is_of_profile(mapping.name) else Tier.HOST
            return None if tiers is None else tiers.account(of).tier
        account = self._accounts.get(id(mapping.account))
        return None if account is None else account.tier

    def _note_live(self) -> None:
        for tier in {*self._live.values()}:
            live = [mapping for mapping, of in self._live.items() if of is tier]
            num_bytes = sum(mapping.num_bytes for mapping in live)
            peak = self._memory.setdefault((self._phase, tier), MemoryPeak())
            if num_bytes > peak.num_bytes:
                peak.num_bytes, peak.beside = num_bytes, {}
                for mapping in live:
                    if mapping.account is None:
                        peak.beside[mapping.name] = peak.beside.get(mapping.name, 0) + mapping.num_bytes

    def _note_resident(self) -> None:
        """What the allocator has taken, as far as it is known now."""
        if self._runtime is None:
            return
        heap: HeapGuard = self._runtime.heap
        high_water = peak_resident_bytes()
        seen = max(resident_bytes(), heap.seen_bytes, high_water if high_water > self._high_water else 0)
        self._high_water, heap.seen_bytes = high_water, 0
        memory = [account for tier, account in self._runtime.tiers.accounts.items() if tier is not Tier.NVME]
        taken = seen - self._base_bytes - sum(account.arena_bytes for account in memory)
        self._allocator[self._phase] = max(0, taken, self._allocator.get(self._phase, 0))

    def _note_files(self, phase: str, lengths: Mapping[str, int]) -> None:
        found = self._files.setdefault(phase, {})
        for name, num_bytes in lengths.items():
            if num_bytes:
                found[name] = max(found.get(name, 0), num_bytes)

    def _folders(self) -> list[Path]:
        """The engine's own on its drives."""
        if self._runtime is None:
            return []
        workload = self._runtime.made_of.workload
        keys = [workload.key] if workload.frozen else []
        keys += [workload.training.key] if workload.training is not None else []
        drives = workload.config.nvme
        if not drives or not all(drive.path.is_dir() for drive in drives):  # they may be gone after `close`
            return []
        return [folder for key in keys for folder in store_folders(drives, key)]

    def _is_ours(self, folder: Path) -> bool:
        return any(ours.resolve() in (folder.resolve(), *folder.resolve().parents) for ours in self._folders())

    def _lengths(self) -> dict[str, int]:
        """Of files now, by what they are for: those in the engine's folders, and those that only it sees."""
        found: dict[str, int] = {}
        folders = self._folders()
        for folder in folders:
            for path, num_bytes in _files(folder):
                at_rest = path.parent == folder
                name = FILES.get(path.name, "records") if at_rest else "commit"
                found[name] = found.get(name, 0) + num_bytes
        if self._runtime is not None and self._runtime.scratch is not None:
            found["scratch"] = self._runtime.scratch.file_bytes()
        return found

    def _warn(self) -> None:
        """Says once what exceeds the plan."""
        if self._runtime is None:
            return
        for tier in (Tier.DEVICE, Tier.HOST):
            peak = self._memory.get((self._phase, tier))
            planned = self._planned_bytes(self._runtime.tiers.accounts[tier], self._phase)
            if peak is None or peak.num_bytes <= planned or (self._phase, tier.value) in self._warned:
                continue
            self._warned.add((self._phase, tier.value))
            beside = ", ".join(f"{name} {format_bytes(size)}" for name, size in peak.beside.items())
            logger.warning(
                "%s: arenas took %s of %s memory, %s are planned; not reserved: %s", self._phase,
                format_bytes(peak.num_bytes), tier.value, format_bytes(planned), beside or "nothing",
            )  # fmt: skip


def _is_of_profile(name: str) -> bool:
    return name.split(",")[0] == PROFILE


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                yield path, path.stat().st_size
        except OSError:  # it went meanwhile
            continue


def _folder_bytes(folder: Path) -> int:
    return sum(num_bytes for _, num_bytes in _files(folder)) if folder.is_dir() else 0
