"""Train models that are far larger than the memory they train in, on one machine.

    engine = offload_rt.engine(model, bits=4, adapters=LoraConfig(...), device_memory="6GiB", nvme="/mnt/ssd")

Names are resolved on first use, so that `import offload_rt` costs nothing and the planner's commands need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload_rt._engine import Engine as Engine
    from offload_rt._engine import engine as engine

__version__ = "0.1.0"
__all__ = ["Engine", "Plan", "engine"]


def __getattr__(name: str) -> Any:
    import importlib

    homes = {"engine": "offload_rt._engine", "Engine": "offload_rt._engine", "Plan": "planners.plans.plan"}
    if name not in homes:
        raise AttributeError(f"module 'offload_rt' has no attribute {name!r}")
    value = getattr(importlib.import_module(homes[name]), name)
    globals()[name] = value
    return value
