"""What a run saves besides what trains: whatever a caller tracks (schedulers, the place in the data), and its cuts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from offload_rt.errors import ConfigError
from offload_rt.plans.cuts import cuts_to_json, warn_of_other_cuts
from planners.rule.streaming_problem import Cuts


class Tracked:
    """By name, whatever has `state_dict` and `load_state_dict`. Holds what it is given."""

    def __init__(self) -> None:
        self._tracked: dict[str, Any] = {}

    def add(self, name: str, tracked: Any) -> None:
        """Tracks it from now on. Raises `ConfigError` for what has no state."""
        if not hasattr(tracked, "state_dict") or not hasattr(tracked, "load_state_dict"):
            raise ConfigError(f"track: {name!r} has no state_dict and load_state_dict")
        self._tracked[name] = tracked

    def values(self, cuts: Cuts) -> dict[str, Any]:
        """What is saved of a run with these `cuts`."""
        tracked = {name: each.state_dict() for name, each in self._tracked.items()}
        return {"tracked": tracked, "cuts": cuts_to_json(cuts)}

    def with_schedulers(self, values: dict[str, Any]) -> dict[str, Any]:
        """`values` of a step that has returned, with schedulers as they are now: loops step them behind it.

        Nothing else: who draws the next batch before its forward has moved on in the data. What a caller changes behind
        a step is in the next one's commit.
        """
        schedulers = {
            name: tracked.state_dict()
            for name, tracked in self._tracked.items()
            if isinstance(tracked, torch.optim.lr_scheduler.LRScheduler)
        }
        return {**values, "tracked": {**values["tracked"], **schedulers}}

    def check(self, folder: str | Path, values: Mapping[str, Any], cuts: Cuts) -> None:
        """Raises `ConfigError` where `values` that `folder` holds are of other things; warns of other cuts."""
        odd = sorted(set(values["tracked"]) ^ set(self._tracked))
        if odd:
            raise ConfigError(f"load_checkpoint: {folder} and this run track different things: {', '.join(odd)}")
        warn_of_other_cuts(values.get("cuts"), cuts, of=str(folder))

    def load(self, values: Mapping[str, Any]) -> None:
        """Gives everything tracked the state that it has in `values`, which were checked."""
        for name, state in values["tracked"].items():
            self._tracked[name].load_state_dict(state)
