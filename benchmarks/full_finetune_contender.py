"""One contender of full_finetune.py: holds its model and does what it is told, see contender_process.py. Besides:

    trace -> see full_finetune_trace.py

All train the same bf16 weights with fp32 masters and AdamW on fp32 moments, and clip by the norm of all gradients.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging as python_logging
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from contender_process import Missing, forget_peak, measured, serve, status_bytes
from transformers import AutoConfig, LlamaForCausalLM

LEARNING_RATE = 1e-4
BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.01


def model_in_memory(settings: dict[str, Any]) -> LlamaForCausalLM:
    """The model with its weights, in training mode; every layer is recomputed unless `recompute=0`.

    Not in DeepSpeed with parameters on NVMe: its prefetcher fails on a parameter that backward uses twice.
    """
    model = LlamaForCausalLM.from_pretrained(settings["checkpoint"], dtype=torch.bfloat16, device_map="cpu").train()
    if settings["switches"].get("recompute", "1") == "1" and settings["kind"] != "zero3_nvme":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


class Torch:
    """Plain torch: weights, masters, moments and gradients in memory, fused AdamW over the masters."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.model = model_in_memory(settings)
        self.weights = list(self.model.parameters())
        self.masters = [torch.nn.Parameter(weight.detach().float()) for weight in self.weights]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.max_grad_norm = settings["max_grad_norm"]
        self.num_clipped = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)
        self.num_clipped += float(norm) > self.max_grad_norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)

    def report(self) -> dict[str, Any]:
        return {"num_clipped": self.num_clipped}

    def close(self) -> None:
        pass


class Ours:
    """offload_rt: all in memory; with a drive as `ours_tiers`; with weights and state on it as `ours_nvme`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from offload_rt._engine import Engine
        from offload_rt.wiring.runtime_options import RuntimeOptions
        from planners.errors import PlanInfeasible
        from planners.plans.activations import Action, ActivationPolicy, Chunk
        from planners.plans.placement import UpdateMode
        from planners.plans.plan import Tier

        switches = dict(settings["switches"])
        read: dict[str, Any] = {
            "num_slots": int, "piece_elements": int, "head_chunk_tokens": int, "update_mode": UpdateMode,
            "serial_updates": lambda text: text == "1", "stream_edges": lambda text: text == "1",
        }  # fmt: skip
        options = {key: read[key](switches[key]) for key in read.keys() & switches.keys()}
        if switches.get("recompute") == "0":
            chunk = Chunk(num_tokens=settings["tokens"], action=Action.KEEP)
            options["activations"] = ActivationPolicy(chunks=(chunk,))
        arguments: dict[str, Any] = {}
        if settings["kind"] != "ours":
            nvme = Path(settings["store"])
            shutil.rmtree(nvme, ignore_errors=True)  # of a run that was killed
            nvme.mkdir(parents=True)
            arguments["nvme"] = nvme
        if settings["kind"] == "ours_nvme":
            options["rest"] = Tier.NVME
        arguments |= {key: switches[key] for key in ("device_memory", "host_memory") if key in switches}
        if "commit_every" in switches:
            arguments["commit_every"] = int(switches["commit_every"])
        with torch.device("meta"):
            model = LlamaForCausalLM(AutoConfig.from_pretrained(settings["checkpoint"])).to(torch.bfloat16)
        try:
            self.engine = Engine(
                model.train(), checkpoint=settings["checkpoint"], seq_len=settings["tokens"],
                batch_size=settings["batch_size"], max_grad_norm=settings["max_grad_norm"],
                optimizer=lambda parameters: torch.optim.AdamW(
                    parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
                ),
                options=RuntimeOptions(**options), **arguments,
            )  # fmt: skip
        except PlanInfeasible as error:
            raise Missing(str(error)) from None
        self.store = arguments.get("nvme")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.engine(input_ids=ids, labels=ids).loss

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def update(self) -> None:
        self.engine.step()

    def report(self) -> dict[str, Any]:
        report = self.engine.report()
        return {
            "report": report,
            "summary": self.engine.summary().splitlines(),
            "planned_bytes": report["managed_bytes"],
            "num_clipped": report["training"]["num_clipped"],
        }

    def close(self) -> None:
        self.engine.close()
        if self.store is not None:
            shutil.rmtree(self.store)


class Zero3:
    """DeepSpeed ZeRO-3 on its CPU accelerator, parameters and optimizer offloaded to CPU memory or to NVMe."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import deepspeed
        from deepspeed.ops.op_builder import AsyncIOBuilder

        python_logging.getLogger("DeepSpeed").setLevel(python_logging.WARNING)
        on_nvme = settings["kind"] == "zero3_nvme"
        if on_nvme and not AsyncIOBuilder().is_compatible(verbose=False):
            raise Missing("DeepSpeed's async_io cannot be built: libaio and its header (libaio-dev) are not found")
        model = model_in_memory(settings)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        self.store = None
        if on_nvme:
            self.store = Path(settings["store"])
            self.store.mkdir(parents=True, exist_ok=True)
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=self._config(settings, model)
        )

    def _config(self, settings: dict[str, Any], model: LlamaForCausalLM) -> dict[str, Any]:
        """DeepSpeed's defaults, but for parameters on NVMe: a buffer holds one, of any size, and by default it keeps
        and fetches ahead as if there was no end of them. Here a layer stays, and half of one is fetched ahead.
        """
        switches = settings["switches"]
        place: dict[str, Any] = {"device": "cpu"}
        if self.store is not None:
            place = {"device": "nvme", "nvme_path": str(self.store)}
        largest = max(parameter.numel() for parameter in model.parameters())
        layer = list(model.model.layers[0].parameters())
        layer_elements = sum(parameter.numel() for parameter in layer)
        of_parameters = {}
        if self.store is not None:
            num_buffers = int(switches.get("buffer_count", 2 * len(layer) + 4))
            of_parameters = {"buffer_size": largest, "buffer_count": num_buffers, "max_in_cpu": 0}
        of_optimizer: dict[str, Any] = {}
        if self.store is not None and switches.get("pipeline") == "1":
            # one group of states is read, one stepped and one written; each state takes a buffer
            of_optimizer = {"pipeline_read": True, "pipeline_write": True, "buffer_count": 12}
        zero: dict[str, Any] = {
            "stage": 3,
            "offload_param": {**place, **of_parameters},
            "offload_optimizer": {**place, **of_optimizer},
        }
        if self.store is not None:
            zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = layer_elements
            zero["stage3_prefetch_bucket_size"] = layer_elements // 2
        if "sub_group_size" in switches:
            zero["sub_group_size"] = int(float(switches["sub_group_size"]))
        return {
            "train_micro_batch_size_per_gpu": settings["batch_size"],
            "gradient_clipping": settings["max_grad_norm"],
            "bf16": {"enabled": True},
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": 1e-8, "weight_decay": WEIGHT_DECAY},
            },
            "zero_optimization": zero,
            "aio": {"block_size": 1 << 20, "queue_depth": 32, "single_submit": False, "overlap_events": True},
            "steps_per_print": 1 << 30,
        }

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.engine(input_ids=ids, labels=ids).loss

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def update(self) -> None:
        self.engine.step()

    def report(self) -> dict[str, Any]:
        import deepspeed

        norm = self.engine.get_global_grad_norm()
        return {"deepspeed": deepspeed.__version__, "grad_norm": None if norm is None else float(norm)}

    def close(self) -> None:
        if self.store is not None:
            shutil.rmtree(self.store, ignore_errors=True)


KINDS = {"torch": Torch, "ours": Ours, "ours_nvme": Ours, "ours_tiers": Ours, "zero3_cpu": Zero3, "zero3_nvme": Zero3}


class Server:
    """Answers requests about one contender."""

    def __init__(self, settings: dict[str, Any], base_bytes: int) -> None:
        self.settings = settings
        self.base_bytes = base_bytes
        self.contender: Torch | Ours | Zero3 | None = None
        self.phases: dict[str, float] = {}

    def build(self) -> dict[str, Any]:
        kind = self.settings["kind"]
        if kind.startswith("zero3") and importlib.util.find_spec("deepspeed") is None:
            raise Missing("deepspeed is not installed; `pip install deepspeed` (its first start compiles for minutes)")
        torch.manual_seed(0)
        begin = time.perf_counter()
        self.contender = KINDS[kind](self.settings)
        seconds = time.perf_counter() - begin
        vocabulary = AutoConfig.from_pretrained(self.settings["checkpoint"]).vocab_size
        size = (self.settings["batch_size"], self.settings["tokens"])
        self.ids = torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(1))
        reply = {"seconds": seconds, "peak_bytes": status_bytes("VmHWM") - self.base_bytes}
        ctypes.CDLL(None).malloc_trim(0)  # what building left behind is not the steps'
        forget_peak()
        return reply

    def step(self) -> dict[str, Any]:
        return {**measured(self._step), "phases": self.phases}

    def memory(self) -> dict[str, Any]:
        """Of the steps so far."""
        return {
            "base_bytes": self.base_bytes,
            "peak_bytes": status_bytes("VmHWM") - self.base_bytes,
            "resident_bytes": status_bytes("VmRSS") - self.base_bytes,
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            **self._built().report(),
        }

    def trace(self) -> dict[str, Any]:
        import full_finetune_trace

        contender = self._built()
        if not isinstance(contender, Ours):
            raise TypeError(f"trace: {self.settings['kind']} cannot be traced")
        return full_finetune_trace.traced_step(contender.engine, self._step)

    def close(self) -> None:
        if self.contender is not None:
            self.contender.close()

    def _built(self) -> Torch | Ours | Zero3:
        if self.contender is None:
            raise RuntimeError("nothing is built yet")
        return self.contender

    def _step(self) -> float:
        contender = self._built()
        begin = time.perf_counter()
        loss = contender.forward(self.ids)
        forward = time.perf_counter()
        contender.backward(loss)
        backward = time.perf_counter()
        contender.update()
        end = time.perf_counter()
        self.phases = {"forward": forward - begin, "backward": backward - forward, "update": end - backward}
        return float(loss.detach())


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = json.loads(sys.argv[1])
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    if settings["kind"].startswith("ours"):
        import offload_rt._engine  # noqa: F401 - belongs to the imports, whose memory is not counted
    elif settings["kind"].startswith("zero3") and importlib.util.find_spec("deepspeed") is not None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401
    serve(Server)


if __name__ == "__main__":
    main()
