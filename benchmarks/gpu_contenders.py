"""Who takes part in the steps of gpu.py: each holds a Llama of the same shape and values, and does one step at a time.

plain        transformers + peft, bf16, all in device memory, every layer recomputed
bnb          the same, linears of layers in bitsandbytes' NF4
fsdp2        the same model in bf16 under FSDP2 with `CPUOffloadPolicy`: one process, parameters in HOST
full_plain   all parameters train: bf16 weights, fp32 masters and moments, all in device memory
full_fsdp2   the same under FSDP2: fp32 parameters in HOST, bf16 on the device, AdamW on the CPU
others       the engine; see gpu.py
"""

import atexit
import os
import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from offload_rt._engine import Engine
from offload_rt.profiling import calibrate
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.placement import Tier

LEARNING_RATE = 1e-4
SIZES = calibrate.Sizes(seconds=0.2, matrix=8192, copy_bytes=256 << 20)
SMALL = calibrate.Sizes(seconds=0.0, passes=2, matrix=256, attention_tokens=64, copy_bytes=1 << 20, elements=1 << 16)
"""Where no number counts."""
Batch = dict[str, torch.Tensor]


def llama(shape: list[int]) -> nn.Module:
    """A Llama with random weights in RAM. They repeat every million: random numbers for billions would take minutes."""
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, vocab_size=vocabulary, max_position_embeddings=8192,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    pattern = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if "norm" in name:
            flat.fill_(1)
            continue
        whole = flat.numel() // pattern.numel() * pattern.numel()
        flat[:whole].view(-1, pattern.numel()).copy_(pattern.expand(whole // pattern.numel(), -1))
        flat[whole:] = pattern[: flat.numel() - whole]
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were on meta
    model.config.use_cache = False
    return model.train()


def with_adapters(model: nn.Module) -> nn.Module:
    """LoRA of rank 16 on every linear; nothing else trains."""
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    return adapted.train()


def recomputed(model: nn.Module) -> nn.Module:
    """Every layer is run again in backward, by transformers' own means."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Contender:
    """Plain PyTorch around `model`."""

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)

    def step(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def report(self) -> dict[str, Any]:
        return {}

    def summary(self) -> list[str]:
        return []

    def close(self) -> None:
        """Gives back what outlives the process's memory."""


class Plain(Contender):
    """See `plain` and `bnb`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        model = llama(settings["shape"])
        if settings["kind"] == "bnb":
            to_nf4(model.model.layers)
        model = recomputed(with_adapters(model).to(settings["device"]))
        super().__init__(model, trainable(model))


def to_nf4(layers: nn.Module) -> None:
    """Puts bitsandbytes' linears in the places of torch's. They quantize when they are moved to their device."""
    import bitsandbytes

    for parent in list(layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                linear = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                    compress_statistics=True, device="meta",
                )  # fmt: skip
                linear.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear
                )
                setattr(parent, name, linear)


class FullPlain(Contender):
    """See `full_plain`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        model = recomputed(llama(settings["shape"]).to(settings["device"]))
        self.weights = list(model.parameters())
        self.masters = [nn.Parameter(weight.detach().float()) for weight in self.weights]
        super().__init__(model, self.masters)

    def update(self) -> None:
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        super().update()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights, strict=True):
                weight.copy_(master)


class Fsdp2(Contender):
    """See `fsdp2` and `full_fsdp2`. On a CPU, by gloo, both ends are RAM: that shows only that it runs."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        device, full = settings["device"], settings["kind"] == "full_fsdp2"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no network is needed to talk to oneself
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        on_gpu = device == "cuda"
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=distributed.HashStore(), rank=0, world_size=1,
            device_id=torch.device("cuda", 0) if on_gpu else None,
        )  # fmt: skip
        model = llama(settings["shape"])
        layers = model.model.layers
        model = recomputed(model.float() if full else with_adapters(model))
        precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if full else {}
        how = {
            "mesh": init_device_mesh(device, (1,)),
            "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu),
            "mp_policy": MixedPrecisionPolicy(**precision),
        }
        for part in (*layers, model):
            fully_shard(part, **how)
        super().__init__(model, trainable(model))

    def close(self) -> None:
        torch.distributed.destroy_process_group()


class Ours(Contender):
    """The engine: all layers in slots (`resident`, in 4 bits, and `unoffloaded`, in bf16 as plain has them), or
    streamed through the plan's; adapters train, or all parameters
    (`full`), half of whose updates are the GPU's (`full_device`). By the fixed rule, or the optimiser (`optimised`) for
    this GPU's rates, which are measured before.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        kind, shape = settings["kind"], settings["shape"]
        on_gpu, full = settings["device"] == "cuda", kind.startswith("full")
        options = RuntimeOptions(
            num_slots=shape[2] if kind in ("resident", "unoffloaded") else None,
            activations=swapping(settings["tokens"]) if kind == "swap" else None,
            device_share=0.5 if kind == "full_device" and on_gpu else None,
            fill=False,  # layers stream, and are computed again, however much memory there is
        )
        plan = "optimise" if kind == "optimised" else "auto"
        if kind == "optimised":
            measure_rates(settings["device"], SMALL if settings["smoke"] else SIZES)
        model = llama(shape)
        self.engine = Engine(
            model if full else with_adapters(model),
            bits=None if full or kind == "unoffloaded" else 4,
            batch_size=1,
            seq_len=settings["tokens"],
            lr=LEARNING_RATE,
            device=settings["device"],
            device_memory=settings["device_memory"] if on_gpu else None,
            host_memory=None if on_gpu else "1GiB",
            nvme=settings["nvme"] if kind == "nvme" else None,
            plan=plan,
            options=options,
        )

    def step(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.engine(**batch).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def report(self) -> dict[str, Any]:
        return self.engine.report()

    def summary(self) -> list[str]:
        return self.engine.summary().splitlines()

    def close(self) -> None:
        self.engine.close()


def measure_rates(device: str, sizes: calibrate.Sizes) -> None:
    """As `offload-rt calibrate` does, in less time; remembered for this process alone."""
    cache = tempfile.TemporaryDirectory()
    atexit.register(cache.cleanup)
    os.environ["OFFLOAD_RT_CACHE"] = cache.name
    known = calibrate.identity(device, ())
    calibrate.keep(calibrate.cache_name(known), known, calibrate.measure(device, (), sizes))


def swapping(tokens: int) -> ActivationPolicy:
    """Four chunks of tokens: what half of them saves is swapped to HOST, that of the others computed again."""
    actions = [(Action.SWAP, Tier.HOST), (Action.RECOMPUTE, None)] * 2
    return ActivationPolicy(chunks=tuple(Chunk(num_tokens=tokens // 4, action=a, tier=tier) for a, tier in actions))


KINDS = {"plain": Plain, "bnb": Plain, "fsdp2": Fsdp2, "full_plain": FullPlain, "full_fsdp2": Fsdp2}
"""Those that are not ours."""


def contender(settings: dict[str, Any]) -> Contender:
    """Made as `settings` say. Blocks; its model is in place then."""
    return KINDS.get(settings["kind"], Ours)(settings)
