"""Plain values and tensors as bytes, and the random number generators as such values."""

from __future__ import annotations

import io
import logging
import pickle
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from offload_rt.errors import CheckpointError

logger = logging.getLogger("offload_rt")


def pack_values(values: Mapping[str, Any], *, of: str) -> bytes:
    """Plain values and tensors as bytes, read back once: what could not be loaded is refused now, naming `of`."""
    packed = io.BytesIO()
    try:
        torch.save(dict(values), packed)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{of}: something tracked cannot be saved: {error}") from None
    try:
        unpack_values(packed.getvalue())
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].splitlines()[0]
        raise CheckpointError(
            f"{of}: something tracked has a state_dict that is not plain values and tensors: {reason}"
        ) from None
    return packed.getvalue()


def unpack_values(packed: bytes) -> dict[str, Any]:
    """What `pack_values` packed, tensors in the CPU's memory. Executes nothing that the bytes say."""
    values: dict[str, Any] = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    return values


def rng_state() -> dict[str, Any]:
    """Of torch, Python and numpy, as plain values."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Puts what `rng_state` gave back. Warns of GPUs that were there then and are not now."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    gpus = state.get("cuda", [])  # none where a CPU wrote it, or this version's predecessor
    num_here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, gpu in enumerate(gpus[:num_here]):
        torch.cuda.set_rng_state(gpu, index)
    if len(gpus) > num_here:
        logger.warning(
            "random numbers of %d GPUs do not go on: the checkpoint was written where there were %d, here are %d",
            len(gpus) - num_here, len(gpus), num_here,
        )  # fmt: skip
