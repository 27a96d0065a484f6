"""The nf4 section of native.py: decode and encode against memcpy of the output and against bitsandbytes.

With double quantization, in billions of elements per second. memcpy copies as many bytes as a decode
writes. bitsandbytes' decoder is its public function with its CPU kernels, on its own threads. Contenders
are interleaved, ratios are taken within a round. The output is always the same memory, and such as the
runtime decodes into: an arena's, of huge pages.

Whether a decode should write around the caches is decided by the product that follows: both together are
timed in both forms, for the lengths of `PRODUCT_TOKENS`, with as much other memory touched in between as a
layer has.

Alone: python benchmarks/native_nf4.py [--json FILE]
"""

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import _offload_rt_native as native
import rounds
import torch

from offload_rt.memory.arena import Arena
from offload_rt.quantized import codec
from offload_rt.quantized.nf4_layout import nf4_layout
from offload_rt.quantized.nf4_torch import sections_of

SHAPES = ((4096, 4096), (2048, 5632))
NUM_THREADS = (1, 2)
PRODUCT_TOKENS = (512, 2048)
BETWEEN_BYTES = 64 << 20
REPEATS = 3
"""Calls per recorded value, for those that take milliseconds."""

try:
    import bitsandbytes.functional as bitsandbytes
except ImportError:  # optional: the speeds stand without it
    bitsandbytes = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nf4-dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])


def giga_elements_per_second(num_elements: int, repeats: int, work: Callable[[], Any]) -> Callable[[], float]:
    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        return repeats * num_elements / (time.perf_counter() - begin) / 1e9

    return measure


def with_torch_threads(num_threads: int, work: Callable[[], Any]) -> Callable[[], None]:
    def run_with() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        work()
        torch.set_num_threads(before)

    return run_with


def decode_contenders(weight: torch.Tensor) -> dict[str, Callable[[], float]]:
    num_elements = weight.numel()
    blob = codec.encode(weight)
    sections = [section.numpy() for section in sections_of(blob, nf4_layout(num_elements))]
    out = output_for(weight)
    out_array = (out if out.dtype == torch.float32 else out.view(torch.uint16)).view(-1).numpy()
    dtype = str(weight.dtype).removeprefix("torch.")
    contenders: dict[str, Callable[[], float]] = {}
    for num_threads in NUM_THREADS:
        copy = with_torch_threads(num_threads, lambda: out.copy_(weight))
        contenders[f"memcpy x{num_threads}"] = giga_elements_per_second(num_elements, REPEATS, copy)
        for isa in native.kernel_isas():
            for stream in (False, True):

                def work(isa: str = isa, num_threads: int = num_threads, stream: bool = stream) -> None:
                    native.nf4_decode(
                        *sections,
                        out_array,
                        dtype,
                        isa=isa,
                        num_threads=num_threads,
                        streaming_stores=stream,
                    )

                name = f"{isa} x{num_threads}" + (" streaming" if stream else "")
                contenders[name] = giga_elements_per_second(num_elements, REPEATS, work)
    contenders["codec.decode_into"] = giga_elements_per_second(
        num_elements, REPEATS, lambda: codec.decode_into(blob, out)
    )
    contenders["codec.decode_into, through the caches"] = giga_elements_per_second(
        num_elements, REPEATS, lambda: codec.decode_into(blob, out, streaming_stores=False)
    )
    rows, columns = weight.shape
    turned = torch.empty(columns, rows, dtype=weight.dtype)
    contenders["codec.decode_transposed_into"] = giga_elements_per_second(
        num_elements, 1, lambda: codec.decode_transposed_into(blob, rows, columns, turned)
    )
    contenders["torch twin"] = giga_elements_per_second(
        num_elements, 1, lambda: codec.decode_into(blob, out, backend="torch")
    )
    if bitsandbytes is not None:
        packed, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        contenders["bitsandbytes"] = giga_elements_per_second(
            num_elements, 1, lambda: bitsandbytes.dequantize_4bit(packed, state)
        )
    return contenders


def output_for(weight: torch.Tensor) -> torch.Tensor:
    """Memory as the runtime decodes into."""
    return Arena("decoded weights", weight.nbytes).acquire(weight.nbytes, "weight").tensor(weight.dtype, weight.shape)


def product_contenders(weight: torch.Tensor) -> dict[str, Callable[[], float]]:
    """Seconds of a decode and the product that follows, on torch's threads, by length and by how it is written."""
    blob, out = codec.encode(weight), output_for(weight)
    rows, columns = weight.shape
    between = torch.zeros(BETWEEN_BYTES // 4)
    contenders: dict[str, Callable[[], float]] = {}
    for num_tokens in PRODUCT_TOKENS:
        inputs = torch.randn(num_tokens, columns, generator=torch.Generator().manual_seed(1)).to(weight.dtype)
        result = torch.empty(num_tokens, rows, dtype=weight.dtype)
        for how, streaming_stores in (("around the caches", True), ("through the caches", False)):

            def measure(
                streaming_stores: bool = streaming_stores,
                inputs: torch.Tensor = inputs,
                result: torch.Tensor = result,
            ) -> float:
                between.add_(1)
                begin = time.perf_counter()
                codec.decode_into(blob, out, streaming_stores=streaming_stores)
                torch.mm(inputs, out.t(), out=result)
                return time.perf_counter() - begin

            contenders[f"{num_tokens} tokens, {how}"] = measure
    return contenders


def compare_products(contenders: dict[str, Callable[[], float]], num_rounds: int) -> dict[str, Any]:
    """Seconds, and those around the caches over those through them."""
    seconds = rounds.interleave(contenders, num_rounds)
    compared: dict[str, Any] = {name: rounds.summary(values) for name, values in seconds.items()}
    for num_tokens in PRODUCT_TOKENS:
        around, through = (f"{num_tokens} tokens, {how} the caches" for how in ("around", "through"))
        compared[around]["over through the caches"] = rounds.ratio(seconds, around, through)
    return compared


def encode_contenders(weight: torch.Tensor) -> dict[str, Callable[[], float]]:
    num_elements = weight.numel()
    blob = codec.encode(weight)
    array = (weight if weight.dtype == torch.float32 else weight.view(torch.uint16)).view(-1).numpy()
    codes = torch.empty(num_elements // 2, dtype=torch.uint8).numpy()
    absmax = torch.empty(num_elements // 64).numpy()
    dtype = str(weight.dtype).removeprefix("torch.")
    contenders: dict[str, Callable[[], float]] = {}
    for num_threads in NUM_THREADS:
        for isa in native.kernel_isas():

            def work(isa: str = isa, num_threads: int = num_threads) -> None:
                native.nf4_encode(array, dtype, codes, absmax, isa=isa, num_threads=num_threads)

            contenders[f"{isa} x{num_threads}"] = giga_elements_per_second(num_elements, 1, work)
    # With the mean of the scales, their second quantization and the checks around them.
    contenders["codec.encode_into"] = giga_elements_per_second(num_elements, 1, lambda: codec.encode_into(weight, blob))
    if bitsandbytes is not None:
        contenders["bitsandbytes"] = giga_elements_per_second(
            num_elements,
            1,
            lambda: bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True),
        )
    return contenders


def compare(contenders: dict[str, Callable[[], float]], num_rounds: int) -> dict[str, Any]:
    """Speeds, and the ratios to memcpy on as many threads and to bitsandbytes."""
    speeds = rounds.interleave(contenders, num_rounds)
    compared: dict[str, Any] = {name: rounds.summary(values) for name, values in speeds.items()}
    for name in speeds:
        threads = next((word for word in name.split() if word.startswith("x")), "x2")
        for reference in (f"memcpy {threads}", "bitsandbytes"):
            if reference in speeds and name != reference:
                compared[name][f"over {reference}"] = rounds.ratio(speeds, name, reference)
    return compared


def print_rows(rows: dict[str, Any], *, unit: str = "Gelem/s", scale: float = 1.0) -> None:
    for name, row in rows.items():
        ratios = [f"{key} {value['median']:.2f}" for key, value in row.items() if key.startswith("over")]
        spread = f"[{scale * row['min']:.3f}, {scale * row['max']:.3f}]"
        print(f"  {name:38} {scale * row['median']:8.3f} {unit} {spread:18} {'   '.join(ratios)}")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints, and returns the nf4 section."""
    num_rounds = max(arguments.rounds, 7)
    dtype = getattr(torch, arguments.nf4_dtype)
    results: dict[str, Any] = {
        "configuration": {
            "rounds": num_rounds,
            "dtype": arguments.nf4_dtype,
            "torch": torch.__version__,
            "torch_threads": torch.get_num_threads(),
            "backend": codec.backend(),
            "bitsandbytes": None if bitsandbytes is None else version("bitsandbytes"),
        }
    }
    for shape in SHAPES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        key = "x".join(map(str, shape))
        results[key] = {}
        for kind, contenders_of in (("decode", decode_contenders), ("encode", encode_contenders)):
            print(f"{kind} {key} {arguments.nf4_dtype}")
            results[key][kind] = compare(contenders_of(weight), num_rounds)
            print_rows(results[key][kind])
        print(f"decode and product {key} {arguments.nf4_dtype}")
        results[key]["product"] = compare_products(product_contenders(weight), num_rounds)
        print_rows(results[key]["product"], unit="ms", scale=1e3)
    if bitsandbytes is None:
        print("bitsandbytes is not installed: speeds without that comparison")
    return results


if __name__ == "__main__":
    rounds.run_alone("nf4", __doc__, add_arguments, run)
