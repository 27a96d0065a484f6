"""What the tests of chunked layers share: tiny models of many architectures, run plain and by chunks, and compared."""

from __future__ import annotations

import copy
import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from offload_rt.layers.access import ResidentAccess
from offload_rt.layers.block import Block
from offload_rt.memory.arena import Arena
from offload_rt.quantized.decoder import Decoder
from offload_rt.tensor_spec import BlockSpec
from offload_rt.tiering.stash import HostStash
from offload_rt.tokenwise.layer import Tokenwise, TokenwiseLayer
from offload_rt.tokenwise.tiles import Places
from offload_rt.transfers.links import Links
from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.placement import Tier

VOCABULARY = 64
TOKENS = 20
ROWS = 2

# Beside the sizes in `_SIZES`; what each is here for.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 5},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "attn_implementation": "eager"},  # a softcap in attention
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {},  # attention and MLP in parallel, behind one norm
    "cohere2": {"sliding_window": 5},
    "phi": {},
    "phi3": {"pad_token_id": 0},  # queries, keys and values in one product
    "olmo2": {},
    "granite": {},
    "starcoder2": {},
    "stablelm": {},
    "glm": {"head_dim": 16, "pad_token_id": 0},
    "glm4_moe": {"head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
                 "first_k_dense_replace": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "deepseek_v3": {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
                    "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
                    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "exaone4": {"sliding_window": 5},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    "llama4_text": {"head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1,
                    "attention_chunk_size": 8, "pad_token_id": 0},
    "nemotron": {},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "attention_dropout": 0.0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "smollm3": {"pad_token_id": 0},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
                "attn_implementation": "eager"},  # sinks: parameters inside the attention call
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    "qwen3_next": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                   "shared_expert_intermediate_size": 32, "layer_types": ["full_attention"] * 2},
    "lfm2": {"layer_types": ["full_attention"] * 2},
}  # fmt: skip

REFUSED: dict[str, dict[str, Any]] = {
    "diffllama": {},  # two attention calls
    "qwen3_next": {**ARCHITECTURES["qwen3_next"], "layer_types": ["linear_attention"] * 2},
    "lfm2": {"layer_types": ["conv"] * 2},
}

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip


def build(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, sizes: dict[str, Any] | None = None, **changes: Any
) -> nn.Module:
    """A tiny causal language model, equal at every call, all of it training, without dropout unless asked for."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    given = {**_SIZES, **(ARCHITECTURES[architecture] if sizes is None else sizes), **changes}
    implementation = given.pop("attn_implementation", "sdpa")
    config = transformers.AutoConfig.for_model(architecture, **given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    model.config.use_cache = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            elif "bias" in name:
                parameter.normal_(std=0.05)
    return model.to(dtype).train()


def build_with_adapters(*, num_layers: int, hidden: int, most_tokens: int) -> nn.Module:
    """A small Llama in bf16 with adapters on all its linears, equal at every call."""
    peft = pytest.importorskip("peft")
    sizes = {"max_position_embeddings": most_tokens, "num_hidden_layers": num_layers, "hidden_size": hidden}
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model: nn.Module = peft.get_peft_model(build("llama", torch.bfloat16, **sizes), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers]
    return list(lists[0])


def policy(share: float, chunks: int, *, num_tokens: int = TOKENS, action: Action = Action.SWAP, **rest: Any) -> Any:
    """`share` of the tokens by `action`, the others computed again; in `chunks` chunks, with a cut at the share."""
    edges = {num_tokens * part // chunks for part in range(chunks + 1)}
    if chunks > 1:
        edges.add(round(share * num_tokens))
    cuts = [
        chunk(end - start, action if start < round(share * num_tokens) else Action.RECOMPUTE)
        for start, end in itertools.pairwise(sorted(edges))
    ]
    return ActivationPolicy(chunks=tuple(cuts), **rest)


def chunk(num_tokens: int, action: Action, tier: Tier = Tier.HOST) -> Chunk:
    """`tier` is for chunks that are swapped."""
    return Chunk(num_tokens=num_tokens, action=action, tier=tier if action is Action.SWAP else None)


def waiting_in(chosen: ActivationPolicy, *tiers: Tier) -> ActivationPolicy:
    """The policy with its chunks, where they are swapped, in these tiers by turns."""
    pairs = zip(chosen.chunks, itertools.cycle(tiers), strict=False)
    return replace(
        chosen, chunks=tuple(replace(one, tier=tier if one.action is Action.SWAP else None) for one, tier in pairs)
    )


def cut(model: nn.Module, chosen: ActivationPolicy, *, stash_bytes: int = 0) -> Tokenwise:
    """Runs the model's layers by chunks from now on. stash_bytes: HOST memory for what is put away."""
    stash = HostStash(Arena("stash", stash_bytes), Links()) if stash_bytes else None
    tokenwise = Tokenwise(Places(layer_inputs=stash, swapped={} if stash is None else {Tier.HOST: stash}))
    slot = Arena("slots", 4096).acquire(4096, "block")
    decoder = Decoder(Arena("decoded", 4096))
    for index, layer in enumerate(decoder_layers(model)):
        block = Block(f"layers.{index}", (layer,), BlockSpec(name=f"layers.{index}", tensors=()), (), decoder)
        TokenwiseLayer(layer, block, ResidentAccess(slot), policy=chosen, tokenwise=tokenwise).attach()
    return tokenwise


def batch(seed: int = 0, *, num_tokens: int = TOKENS, padded: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (ROWS, num_tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -num_tokens // 4 :] = 0
        mask[1, : num_tokens // 5] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one step, by name."""
    model.zero_grad()
    torch.manual_seed(11)
    loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def num_tensors(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """That there are in the process after one more step, with nothing left to collect."""
    step(model, inputs)
    gc.collect()
    return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())


def errors(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors by name. A gradient that is next to nothing counts against a hundredth of the largest."""
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    norms = {name: float(t.double().norm()) for name, t in truth.items()}
    floor = 0.01 * max(norms.values())
    return {
        name: float((found[name].double() - t.double()).norm()) / max(norms[name], floor) for name, t in truth.items()
    }


def in_fp64(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same step in fp64."""
    return step(copy.deepcopy(model).double(), inputs)
