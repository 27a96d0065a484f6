"""What the native core is called with: tensors as arrays, and a number of threads."""

from __future__ import annotations

import torch
from torch import Tensor


def buffer_of(flat: Tensor) -> object:
    """The tensor's memory as a numpy array; 16-bit floats as uint16, because numpy has no bfloat16."""
    return (flat if flat.dtype == torch.float32 else flat.view(torch.uint16)).numpy()


def thread_count(num_threads: int | None) -> int:
    """`num_threads`, or torch's number for None. ValueError for less than one."""
    if num_threads is None:
        return torch.get_num_threads()
    if num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}, allowed: 1 or more")
    return num_threads
