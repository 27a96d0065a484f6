"""`save_pretrained` of a managed model: the adapter as peft writes it, or the whole model as transformers does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from offload_rt.checkpoint.adapters import save_adapters
from offload_rt.checkpoint.export import MAX_SHARD_BYTES, save_model
from offload_rt.checkpoint.tensor_groups import copies_of, tensor_groups
from offload_rt.config import parse_bytes
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.layers.access import Access
from offload_rt.layers.block import Block

Blocks = Sequence[tuple[Block, Access]]


def save_pretrained(
    model: nn.Module,
    blocks: Blocks | None,
    folder: Path,
    *,
    max_shard_bytes: int | str | None,
    began_from: Path | None,
    before_weights_are_read: Callable[[], None],
) -> None:
    """Writes the adapter of `model`, or all of it, in shards of `max_shard_bytes` (5 GB unless given). Blocks.

    `blocks` give the weights that are absent between uses; None where the engine is closed, and nobody can.
    `began_from` is the checkpoint that they came from, which is not overwritten. `before_weights_are_read` is called
    before a whole model is.
    """
    if hasattr(model, "peft_config"):
        if max_shard_bytes is not None:
            raise ConfigError("max_shard_bytes: an adapter is one file; leave it None")
        save_adapters(model, folder, lambda absent: _at_rest(absent, blocks))
        return
    limit = MAX_SHARD_BYTES if max_shard_bytes is None else parse_bytes(max_shard_bytes, field="max_shard_bytes")
    if blocks is None:
        raise OffloadError("the engine is closed: the model's weights are not in memory any more")
    if began_from is not None and folder.exists() and began_from.exists():
        source = began_from if began_from.is_dir() else began_from.parent
        if folder.samefile(source):
            raise ConfigError(f"save_pretrained: {folder} is what this run began from; give another folder")
    before_weights_are_read()
    save_model(model, tensor_groups(model, blocks), folder, max_shard_bytes=limit)


def _at_rest(absent: Mapping[str, nn.Parameter], blocks: Blocks | None) -> dict[str, Tensor]:
    if absent and blocks is None:
        raise OffloadError(f"the engine is closed: {next(iter(absent))} is not in memory any more")
    return copies_of(absent, blocks or ())
