"""Time x Ŵᵀ with Ŵ looked up in a table (NF4, k-means, binary, ternary) against dense products and bitsandbytes.

    python benchmarks/codebook_matmul.py                # on a GPU: Triton against cuBLAS bf16 and bitsandbytes' NF4
    python benchmarks/codebook_matmul.py --threads 1    # without one: the CPU route against torch, and bitsandbytes

Every result is checked against the reference. Weights rotate through more bytes than the caches hold, as the layers of
a model do. On the CPU all contenders take turns and the median counts; times of one thread are that thread's processor
time, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported

import torch
import torch.nn.functional as F
from affine_matmul import ROTATED_BYTES, SHAPES, gpu_ms, processor, table
from int8_matmul import in_turns, ratios
from torch import Tensor

from effcli.formats import Codebook, CodebookWeight, DoubleQuantized
from effcli.formats.codebook import fixed_table
from effcli.kernels.codebook_matmul import Coded, matmul, prepare, route_name

GPU_ROWS = [1, 4, 16, 64, 512]
CPU_ROWS = [1, 4, 16, 64]
FORMATS = [
    Codebook("nf4", 4, "group", 64, dtype=torch.bfloat16),
    Codebook("nf4", 4, "group", 64, double=True, dtype=torch.bfloat16),
    Codebook("kmeans", 4, "channel", dtype=torch.bfloat16),
    Codebook("kmeans", 3, "channel", dtype=torch.bfloat16),
    Codebook("kmeans", 4, "tensor", dtype=torch.bfloat16),
    Codebook("ternary", 2, "channel", dtype=torch.bfloat16),
    Codebook("binary", 1, "channel", dtype=torch.bfloat16),
]


def make_weight(shape: tuple[int, int], format: Codebook) -> CodebookWeight:
    blocks = format.blocks(shape)
    codes = torch.randint(0, 3 if format.kind == "ternary" else 2**format.bits, shape, dtype=torch.uint8)
    if format.learned:
        return CodebookWeight(format, codes, (torch.randn(blocks, 2**format.bits) * 0.02).sort(1).values.bfloat16())
    if format.double:
        numbers = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        scale = DoubleQuantized(numbers, torch.rand(math.ceil(blocks / 256)) * 0.01, torch.tensor(0.03))
        return CodebookWeight(format, codes, fixed_table(format.kind), scale)
    return CodebookWeight(format, codes, fixed_table(format.kind), torch.rand(blocks) * 0.05 + 0.01)


def check(y: Tensor, x: Tensor, weight: CodebookWeight, slack: float = 1) -> float:
    """Largest error relative to Σ |x| |w|; raises above the rounding of x's dtype."""
    dense = weight.dequantize(torch.float32).to(x.device).double()
    error = float(((y.double() - x.double() @ dense.T).abs() / (x.double().abs() @ dense.abs().T)).max())
    if error > slack * max(torch.finfo(x.dtype).eps, 1e-6):
        raise SystemExit(f"wrong result: error {error:.2e} for {weight.format}, {tuple(x.shape)}")
    return error


def bitsandbytes_nf4(
    shape: tuple[int, int], format: Codebook, copies: int, device: str, dtype: torch.dtype
) -> list[Any]:
    """Linear layers of bitsandbytes that hold as many NF4 weights; empty where it is not installed."""
    try:
        import bitsandbytes as bnb  # type: ignore[import-not-found]
    except ImportError:
        return []
    options = {"quant_type": "nf4", "compress_statistics": format.double}
    layers = []
    for _ in range(copies if format.kind == "nf4" else 0):
        layer = bnb.nn.Linear4bit(shape[1], shape[0], False, compute_dtype=dtype, **options)
        layer.weight = bnb.nn.Params4bit(torch.randn(shape).to(dtype), requires_grad=False, blocksize=64, **options)
        layers.append(layer.to(device))
    return layers


def gpu() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, µs\n")
    rows = []
    for shape in SHAPES:
        copies = max(2, ROTATED_BYTES // (2 * math.prod(shape)))
        dense = [torch.randn(shape, device="cuda").bfloat16() for _ in range(copies)]
        for format in FORMATS:
            weight = make_weight(shape, format)
            packed = [prepare(weight, "cuda") for _ in range(max(2, ROTATED_BYTES // prepare(weight).nbytes))]
            other = bitsandbytes_nf4(shape, format, len(packed), "cuda", torch.bfloat16)
            for count in GPU_ROWS:
                x = torch.randn(count, shape[1], device="cuda").bfloat16()
                check(matmul(x, packed[0]), x, weight, slack=1.5)
                times = {"effcli": gpu_ms([partial(matmul, x, one) for one in packed])}
                times["cuBLAS bf16"] = gpu_ms([partial(F.linear, x, one) for one in dense])
                times["bitsandbytes"] = gpu_ms([partial(layer, x) for layer in other]) if other else math.nan
                micro = {name: 1000 * ms for name, ms in times.items()}
                kernel = route_name(packed[0], count, x.dtype)
                rows.append([f"{shape[0]} × {shape[1]}", str(format), str(count), kernel, *ratios(micro, "effcli")])
            del packed, other
        del dense
    table(["out × in", "format", "rows", "kernel", "effcli", "cuBLAS bf16 (×)", "bitsandbytes (×)"], rows)


def interpreted() -> None:
    print("No GPU: the Triton kernel is checked in Triton's interpreter on small shapes, not timed.\n")
    rows = []
    for format in FORMATS:
        for count, out, columns in ((1, 70, 384), (41, 401, 1271)):
            weight = make_weight((out, columns), format)
            x = torch.randn(count, columns).bfloat16()
            # The interpreter cuts float32 down to bf16 where a GPU rounds: twice the error.
            error = check(Coded.build(weight, torch.device("cpu")).multiply_triton(x), x, weight, slack=2)
            rows.append([str(format), f"({count}, {out}, {columns})", f"{error:.1e}"])
    table(["format", "(rows, out, in)", "largest error / Σ abs(x) abs(w)"], rows)


def cpu(rounds: int, dtype: torch.dtype) -> None:
    shape = SHAPES[0]
    print(
        f"{processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{shape[0]} × {shape[1]}, inputs {str(dtype).removeprefix('torch.')}, median ms of {rounds} rounds\n"
    )
    dense = [torch.randn(shape) for _ in range(2)]
    half = [one.bfloat16() for one in dense]
    rows = []
    for format in FORMATS:
        weight = make_weight(shape, format)
        packed = [prepare(weight) for _ in range(4)]
        other = bitsandbytes_nf4(shape, format, 2, "cpu", dtype)
        for count in CPU_ROWS:
            x = torch.randn(count, shape[1]).to(dtype)
            check(matmul(x, packed[0]), x, weight)
            calls: dict[str, Sequence[Callable[[], object]]] = {
                "effcli": [partial(matmul, x, one) for one in packed],
                "float32": [partial(F.linear, x.float(), one) for one in dense],
                "bf16": [partial(F.linear, x.bfloat16(), one) for one in half],
                "bitsandbytes": [partial(layer, x) for layer in other],
            }
            times = in_turns({name: copies for name, copies in calls.items() if copies}, rounds)
            times.setdefault("bitsandbytes", math.nan)
            bits = 8 * packed[0].nbytes / math.prod(shape)
            rows.append(
                [
                    str(format),
                    f"{bits:.2f}",
                    str(count),
                    *(cell.replace("nan (nan)", "-") for cell in ratios(times, "effcli")),
                ]
            )
    table(["format", "bits in memory", "rows", "effcli", "float32 (×)", "bf16 (×)", "bitsandbytes (×)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="on the CPU; default 5")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the inputs, on the CPU"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        if torch.cuda.is_available():
            gpu()
            return
        torch.set_num_threads(options.threads)
        interpreted()
        cpu(options.rounds, getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
