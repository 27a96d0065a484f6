"""Models that another library has quantized in memory are refused by name: placement would change their numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offload_rt
from offload_rt.errors import UnsupportedModule
from offload_rt.guards.quantized import check_not_quantized
from tests.conftest import build_plain

WIDTH = 64


class InBuffers(nn.Module):
    """As GPTQ's and AWQ's linears are: 4 bits a weight, eight to an int32, and nothing of it a parameter."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.in_features = self.out_features = WIDTH
        self.register_buffer("qweight", torch.zeros(WIDTH // 8, WIDTH, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, WIDTH))
        if bias:
            self.bias = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)


class MoreThanItsBytes(torch.Tensor):
    """As torchao's tensors are."""


class OwnParameter(nn.Parameter):
    """As bitsandbytes' are."""


class Masked(nn.Linear):
    """A plain linear with as many integers beside its weight."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("kept", torch.ones(WIDTH, WIDTH, dtype=torch.uint8))


def linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(WIDTH, WIDTH)
    made.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    return made


def model_with(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), module)])})


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (InBuffers(bias=False), "its weight is in buffers"),
        (InBuffers(bias=True), "its weight is in buffers"),
        (linear(torch.zeros(WIDTH, WIDTH, dtype=torch.float8_e4m3fn)), "weight is torch.float8_e4m3fn, which has its"),
        (linear(OwnParameter(torch.zeros(WIDTH, WIDTH))), "weight is a OwnParameter, which is more than its bytes"),
        (
            linear(torch.zeros(WIDTH, WIDTH).as_subclass(MoreThanItsBytes)),
            "weight is a MoreThanItsBytes, which is more than its bytes",
        ),
    ],
)
def test_what_cannot_be_moved_as_its_bytes_is_named(module: nn.Module, words: str) -> None:
    with pytest.raises(UnsupportedModule, match=rf"^layers\.0\.1 \(.*the first of 1 .*{words}.*bits=4"):
        check_not_quantized(model_with(module))


def test_plain_weights_are_no_quantized_ones_whatever_lies_beside_them() -> None:
    check_not_quantized(model_with(Masked()))
    check_not_quantized(build_plain())
    with torch.device("meta"):
        check_not_quantized(nn.ModuleList([nn.Linear(4, 4), nn.LazyLinear(4)]))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_an_engine_refuses_linears_of_bitsandbytes(kind: str, bits: int | None) -> None:
    modules = pytest.importorskip("bitsandbytes").nn
    made = modules.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False) if "8" in kind else modules.Linear4bit(64, 64)
    model = model_with(made.requires_grad_(False))
    with pytest.raises(UnsupportedModule, match=rf"^layers\.0\.1 \({kind}\), .*is read as it is"):
        offload_rt.engine(model, bits=bits, device="cpu", device_memory="100MiB")
    assert model["layers"][0][1] is made
