"""Saved models: read safetensors as streams, lay them against a model, ingest them, resume from them."""

from offload_rt.checkpoint.mapping import BnbTensors as BnbTensors
from offload_rt.checkpoint.mapping import Mapping as Mapping
from offload_rt.checkpoint.mapping import map_checkpoint as map_checkpoint
from offload_rt.checkpoint.safetensors_header import TensorEntry as TensorEntry
from offload_rt.checkpoint.safetensors_reader import Checkpoint as Checkpoint
from offload_rt.checkpoint.safetensors_reader import open_checkpoint as open_checkpoint
from offload_rt.checkpoint.sources import TensorSource as TensorSource
