"""Refuses data-parallel wrappers around a model that an engine manages, where they first look at it.

DistributedDataParallel and FullyShardedDataParallel broadcast, shard and flatten parameters that are not there, and
end in errors about strides; DataParallel would copy placeholders to other GPUs; DeepSpeed has a schedule of its own.
All of them begin by asking the model for its parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from offload_rt.errors import ConfigError
from offload_rt.guards.conversions import Guard

_WRAPPERS = {
    "torch.nn.parallel.distributed": "DistributedDataParallel",
    "torch.nn.parallel.data_parallel": "DataParallel",
    "torch.distributed.fsdp": "FullyShardedDataParallel",
    "torch.distributed._composable": "fully_shard",
    "deepspeed": "DeepSpeed",
}
"""What asks, by the module that does."""
_TORCHS_OWN = nn.Module.__module__


class WrapperGuard(Guard):
    """Stands before `named_parameters`, which everybody asks, of some modules and all within them, until `remove`."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for inner in {inner for module in modules for inner in module.modules()}:
            self.guard(inner, "named_parameters", _guarded(inner))


def _guarded(module: nn.Module) -> Callable[..., Any]:
    ask = module.named_parameters

    def guarded(_: nn.Module, *arguments: Any, **options: Any) -> Any:
        _check_asking(_asking())
        return ask(*arguments, **options)

    return MethodType(guarded, module)  # the compiler looks for a method of any module in sight


def _asking() -> str:
    """The name of the Python module that asks, behind torch's own `parameters` and its like."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") == _TORCHS_OWN:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", ""))


def _check_asking(name: str) -> None:
    for folder, wrapper in _WRAPPERS.items():
        if name == folder or name.startswith(folder + "."):
            what_to_do = "Start one process (no torchrun, no `accelerate launch` with several)"
            if wrapper == "DataParallel":
                what_to_do = "A Trainer does so where it sees several GPUs: start Python with CUDA_VISIBLE_DEVICES=0"
            raise ConfigError(
                f"{wrapper}: a model that an engine manages trains in one process, on one device; its weights rest "
                f"elsewhere and cannot be spread. {what_to_do}, and use engine.model itself"
            )
