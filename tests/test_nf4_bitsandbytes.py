"""NF4 against bitsandbytes: the same bytes, the same weights, and its checkpoints converted without loss.

Where bitsandbytes' CPU decoder is at fault the tests say so, and hold us to what it should give.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_rt.errors import CheckpointError
from offload_rt.quantized import codec
from offload_rt.quantized.nf4_layout import NF4_TABLE, dynamic_map, nf4_layout
from offload_rt.quantized.nf4_torch import sections_of
from offload_rt.quantized.prequantized import UnsupportedQuantization, from_bitsandbytes

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 63, 64, 65, 66, 4095, 4096, 4097, 16384, 16385, 100_003, 2_200_001)
same_map = pytest.mark.skipif(
    functional.create_dynamic_map().tolist() != list(dynamic_map()),
    reason="torch.linspace rounds differently on this processor, so bitsandbytes' map is another",
)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """bitsandbytes compiles its fallback for odd shapes; that takes seconds and changes nothing."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weights_of(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64) ** 3 * scale
    values.view(-1)[64:128] = 0
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def quantize(weight: Tensor, **options: Any) -> tuple[Tensor, Any]:
    arguments = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True, **options}
    packed, state = functional.quantize_4bit(weight, **arguments)
    return packed, state


def checkpoint_of(packed: Tensor, state: Any) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds, sorted into the three arguments of `from_bitsandbytes`."""
    stored = state.as_dict(packed=True)
    (key,) = (key for key in stored if key.startswith("quant_state.bitsandbytes__"))
    description = json.loads(bytes(stored.pop(key).tolist()))
    return [packed], stored, description


def test_the_tables_are_bitsandbytes() -> None:
    assert list(NF4_TABLE) == functional.get_4bit_type("nf4", device="cpu").tolist()
    # Equal but for the last bit of what linspace gives; see [Note: the map travels with the tensor].
    torch.testing.assert_close(torch.tensor(dynamic_map()), functional.create_dynamic_map(), rtol=2.4e-7, atol=0.0)


@same_map
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-37, 1e-40, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encode_gives_bitsandbytes_bytes(dtype: torch.dtype, scale: float, backend: codec.Backend) -> None:
    for num_elements in SIZES if scale == 0.02 else SIZES[:-1]:
        weight = weights_of((num_elements,), dtype, scale)
        packed, state = quantize(weight)
        sections = sections_of(codec.encode(weight, backend=backend), nf4_layout(num_elements))
        assert torch.equal(sections.codes, packed.view(-1))
        assert torch.equal(sections.absmax, state.absmax)
        assert torch.equal(sections.nested_absmax, state.state2.absmax)
        assert sections.nested_offset.item() == state.offset.item()
        assert torch.equal(sections.nested_map, state.state2.code)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("num_elements", [64, 16])
def test_weights_at_midpoints_give_bitsandbytes_codes(num_elements: int, backend: codec.Backend) -> None:
    """So near to ties that it shows which blocks divide by their absmax and which multiply by its inverse."""
    table = torch.tensor(NF4_TABLE)
    unit = torch.cat([torch.ones(1), (table[:-1] + table[1:]) / 2]).repeat(num_elements // 16)
    for absmax in torch.linspace(0.5, 1.5, 50).tolist():
        packed, _ = quantize(unit * absmax)
        codes = sections_of(codec.encode(unit * absmax, backend=backend), nf4_layout(num_elements)).codes
        assert torch.equal(codes, packed.view(-1))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (63,), (65,), (4097,), (64, 64), (100, 1600), (7, 33), (3, 5, 128)], ids=str)
def test_converted_weights_decode_as_bitsandbytes_decodes(
    shape: tuple[int, ...], dtype: torch.dtype, backend: codec.Backend
) -> None:
    packed, state = quantize(weights_of(shape, dtype))
    slabs, parts, description = checkpoint_of(packed, state)
    assert description["shape"] == list(shape)
    blob = from_bitsandbytes(slabs, parts, description, name="x")
    decoded = codec.decode(blob, shape, dtype, backend=backend)
    assert torch.equal(decoded, functional.dequantize_4bit(packed, state).view(shape))


@same_map
def test_a_converted_weight_has_the_bytes_of_an_encoded_one() -> None:
    weight = weights_of((300, 301), torch.bfloat16)
    packed, state = quantize(weight)
    slabs, parts, description = checkpoint_of(packed, state)
    slabs = list(torch.split(slabs[0].view(-1), 1000))
    assert torch.equal(from_bitsandbytes(slabs, parts, description, name="x"), codec.encode(weight))


def test_codes_stored_as_another_dtype_are_converted() -> None:
    weight = weights_of((64, 64), torch.bfloat16)
    expected = from_bitsandbytes(*checkpoint_of(*quantize(weight)), name="x")
    stored = checkpoint_of(*quantize(weight, quant_storage=torch.bfloat16))
    assert stored[0][0].dtype == torch.bfloat16
    assert torch.equal(from_bitsandbytes(*stored, name="x"), expected)


@pytest.mark.parametrize("entry", [-1.0, -0.9929687976837158])
def test_a_foreign_nested_map_is_kept(entry: float) -> None:
    """Earlier releases of bitsandbytes left -1.0 in the map's first entry when they quantized on a CPU."""
    packed, state = quantize(weights_of((64, 640), torch.float32))
    state.state2.code = state.state2.code.clone()
    state.state2.code[0] = entry
    state.absmax[5] = 0
    blob = from_bitsandbytes(*checkpoint_of(packed, state), name="x")
    decoded = codec.decode(blob, (64, 640), torch.float32)
    assert torch.equal(decoded, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("row", [48, 80])
def test_rows_that_cut_quant_blocks_decode_like_one_flat_row(row: int) -> None:
    """bitsandbytes 0.50 with AVX-512 looks the absmax up by `row // 64`, wrong for rows like these."""
    weight = weights_of((64, row), torch.float32)
    packed, state = quantize(weight.view(-1))
    flat = functional.dequantize_4bit(packed, state).view(64, row)
    assert torch.equal(codec.decode(codec.encode(weight), (64, row), torch.float32), flat)


def test_bfloat16_denormals_are_kept() -> None:
    """bitsandbytes 0.50 with AVX512-BF16 flushes them to zero; its float32 result, rounded, keeps them."""
    weight = weights_of((4096,), torch.float32, 1e-38)
    packed, state = quantize(weight)
    expected = functional.dequantize_4bit(packed, state).view(-1).to(torch.bfloat16)
    smallest_normal = torch.finfo(torch.bfloat16).smallest_normal
    assert ((expected != 0) & (expected.abs() < smallest_normal)).any()
    for backend in ("torch", "auto"):
        assert torch.equal(codec.decode(codec.encode(weight), (4096,), torch.bfloat16, backend=backend), expected)


# Single quantization: float32 scales, exact in a blob while there are at most 256 different ones.


def test_plain_scales_that_fit_are_converted_exactly() -> None:
    weight = weights_of((256, 64), torch.float16)
    packed, state = quantize(weight, compress_statistics=False)
    blob = from_bitsandbytes(*checkpoint_of(packed, state), name="x")
    assert torch.equal(codec.decode(blob, (256, 64), torch.float16), functional.dequantize_4bit(packed, state))


def test_plain_scales_that_do_not_fit_are_refused() -> None:
    stored = checkpoint_of(*quantize(weights_of((400, 64), torch.float32), compress_statistics=False))
    with pytest.raises(UnsupportedQuantization, match="x: .*400 different scales do not fit 256"):
        from_bitsandbytes(*stored, name="x")


# Errors.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quant_type": "fp4"}, "quant_type is 'fp4', only 'nf4'"),
        ({"blocksize": 128}, "blocksize is 128, only 64"),
    ],
)
def test_other_quantizations_are_refused(options: dict[str, Any], message: str) -> None:
    stored = checkpoint_of(*quantize(weights_of((64, 64), torch.float32), **options))
    with pytest.raises(UnsupportedQuantization, match=message):
        from_bitsandbytes(*stored, name="x")


def test_contradictions_in_a_checkpoint_are_named() -> None:
    packed, state = quantize(weights_of((64, 640), torch.float32))

    def convert(
        slabs: list[Tensor] | None = None,
        changed_state: dict[str, Any] | None = None,
        **changed: Tensor | None,
    ) -> Tensor:
        stored_slabs, parts, description = checkpoint_of(packed, state)
        merged = {key: part for key, part in {**parts, **changed}.items() if part is not None}
        return from_bitsandbytes(slabs or stored_slabs, merged, {**description, **(changed_state or {})}, name="x")

    convert()
    with pytest.raises(CheckpointError, match="x: holds 20479 bytes of codes, its shape needs 20480"):
        convert(slabs=[packed[:-1]])
    with pytest.raises(CheckpointError, match="x: holds 20481 bytes"):
        convert(slabs=[packed, packed[:1]])
    with pytest.raises(CheckpointError, match="no shape"):
        convert(changed_state={"shape": None})
    with pytest.raises(CheckpointError, match="x.absmax is torch.uint8.639.*torch.uint8 of 640 items"):
        convert(absmax=state.absmax[:-1])
    with pytest.raises(CheckpointError, match="x.nested_quant_map is missing"):
        convert(nested_quant_map=None)
    with pytest.raises(CheckpointError, match="nested_offset is None"):
        convert(changed_state={"nested_offset": None})
    with pytest.raises(CheckpointError, match="not finite"):
        convert(changed_state={"nested_offset": float("nan")})
    with pytest.raises(UnsupportedQuantization, match="nested_blocksize is 128"):
        convert(changed_state={"nested_blocksize": 128})
    with pytest.raises(UnsupportedQuantization, match="4-bit map is not NF4's"):
        convert(quant_map=torch.linspace(-1, 1, 16))
