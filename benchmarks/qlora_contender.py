"""One contender of qlora.py: holds its model and does what it is told, see contender_process.py. Besides:

breakdown -> see qlora_trace.py
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contender_process import forget_peak, measured, serve, status_bytes
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, BitsAndBytesConfig, LlamaForCausalLM, logging

LEARNING_RATE = 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class InMemory:
    """transformers + peft, with bf16 weights or bitsandbytes' NF4 ones; every layer is recomputed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        quantization = None
        if settings["kind"] == "bnb":
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        base = LlamaForCausalLM.from_pretrained(
            settings["checkpoint"], dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu"
        )
        self.model = get_peft_model(base, LoraConfig(r=settings["rank"], target_modules=TARGETS))
        self.model.enable_input_require_grads()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)

    def step(self, ids: torch.Tensor) -> float:
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def report(self) -> dict[str, Any]:
        return {}


class Ours:
    """offload_rt, the model on meta, its weights streamed from NVMe."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from offload_rt._engine import Engine
        from offload_rt.quantized import codec
        from offload_rt.wiring.runtime_options import RuntimeOptions
        from planners.plans.activations import Action, ActivationPolicy, Chunk
        from planners.plans.plan import DecodeScope, Tier

        def one_chunk(action: str) -> ActivationPolicy:
            tier = Tier.NVME if action == "swap" else None
            return ActivationPolicy(chunks=(Chunk(num_tokens=settings["tokens"], action=Action(action), tier=tier),))

        switches = {name: value for name, value in settings["switches"].items() if name != "trim"}
        arguments: dict[str, Any] = {}
        if switches.pop("fused", None):
            arguments["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
        else:
            arguments["lr"] = LEARNING_RATE
        if "device_memory" in switches:
            arguments["device_memory"] = switches.pop("device_memory")
        num_threads = switches.pop("decode_threads", None)
        if num_threads is not None:
            codec.thread_count = lambda requested: int(num_threads)
        read = {
            "decode_scope": DecodeScope,
            "num_slots": int,
            "placed_bytes": int,
            "stream_edges": lambda text: text == "1",
        }
        read["activations"] = one_chunk
        options = RuntimeOptions(**{name: read[name](value) for name, value in switches.items()})
        nvme = Path(settings["store"])
        nvme.mkdir(parents=True, exist_ok=True)
        config = AutoConfig.from_pretrained(settings["checkpoint"])
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        self.engine = Engine(
            model,
            checkpoint=settings["checkpoint"],
            bits=4,
            adapters=LoraConfig(r=settings["rank"], target_modules=TARGETS),
            nvme=nvme,
            seq_len=settings["tokens"],
            options=options,
            **arguments,
        )
        self.model = self.engine.model.train()

    def step(self, ids: torch.Tensor) -> float:
        loss = self.engine(input_ids=ids, labels=ids).loss
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())

    def report(self) -> dict[str, Any]:
        return {"report": self.engine.report(), "summary": self.engine.summary().splitlines()}


class Server:
    """Answers requests about one contender."""

    def __init__(self, settings: dict[str, Any], base_bytes: int) -> None:
        self.settings = settings
        self.base_bytes = base_bytes
        self.contender: InMemory | Ours | None = None

    def _step(self) -> float:
        if self.contender is None:
            raise RuntimeError("step before build")
        return self.contender.step(self.ids)

    def build(self) -> dict[str, Any]:
        torch.manual_seed(0)
        begin = time.perf_counter()
        self.contender = (Ours if self.settings["kind"] == "ours" else InMemory)(self.settings)
        if "trim" in self.settings["switches"]:
            trim = ctypes.CDLL(None).malloc_trim
            norm = self.contender.model.get_base_model().model.norm
            norm.register_forward_pre_hook(lambda *_: trim(0) and None)
        seconds = time.perf_counter() - begin
        vocabulary = self.contender.model.get_input_embeddings().num_embeddings
        self.ids = torch.randint(
            0, vocabulary, (1, self.settings["tokens"]), generator=torch.Generator().manual_seed(1)
        )
        reply = {"seconds": seconds, "peak_bytes": status_bytes("VmHWM") - self.base_bytes}
        forget_peak()
        return reply

    def step(self) -> dict[str, Any]:
        return measured(self._step)

    def memory(self) -> dict[str, Any]:
        """Of the steps so far: the profiled one comes after this."""
        if self.contender is None:
            raise RuntimeError("memory before build")
        return {
            "base_bytes": self.base_bytes,
            "peak_bytes": status_bytes("VmHWM") - self.base_bytes,
            "resident_bytes": status_bytes("VmRSS") - self.base_bytes,
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            **self.contender.report(),
        }

    def breakdown(self) -> dict[str, Any]:
        import qlora_trace

        engine = self.contender.engine if isinstance(self.contender, Ours) else None
        optimizer = engine.optimizer if engine is not None else getattr(self.contender, "optimizer", None)
        model = self.contender.model if self.contender is not None else None
        return qlora_trace.breakdown(model, optimizer, engine, self._step)

    def close(self) -> None:
        if isinstance(self.contender, Ours):
            self.contender.engine.close()


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = json.loads(sys.argv[1])
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    if settings["kind"] == "bnb":
        import bitsandbytes  # noqa: F401 - belongs to the imports, whose memory is not counted
    if settings["kind"] == "ours":
        import offload_rt._engine  # noqa: F401
    serve(Server)


if __name__ == "__main__":
    main()
