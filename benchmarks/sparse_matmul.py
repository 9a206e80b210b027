"""Time x Ŵᵀ with Ŵ sparse against the dense product, at several shares of kept weights.

    python benchmarks/sparse_matmul.py                # on a GPU: the 2:4 kernel against cuBLAS bf16
    python benchmarks/sparse_matmul.py --threads 1    # without one: compressed rows against torch's dense float32

Every result is checked against the reference. On the CPU both take turns and the median counts; times of one thread are
that thread's processor time, which a busy machine disturbs least. A ratio above 1 says how many times as long the dense
product takes: `ROWS_DENSITY`, `ROWS_WEIGHTS` and `ROWS` of kernels/sparse_matmul.py come from this table.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
import torch.nn.functional as F
from affine_matmul import GPU_ROWS, ROTATED_BYTES, gpu_ms, processor, table
from affine_matmul import SHAPES as GPU_SHAPES
from int8_matmul import in_turns, ratios
from torch import Tensor

from effcli.formats import Affine, AffineWeight, Bitmask, Dense, DenseWeight, NOfM, Sparse, SparseWeight
from effcli.kernels.sparse_matmul import Pairs, Rows, matmul

SHAPES = [(300, 784), (576, 1536), (1536, 576), (4096, 4096)]
DENSITIES = [0.5, 0.3, 0.2, 0.1, 0.05]
CPU_ROWS = [1, 4, 16, 64]


def two_of_four(shape: tuple[int, int]) -> Tensor:
    """A random 2:4 mask."""
    places = torch.rand(math.prod(shape) // 4, 4).argsort(1)
    return (places < 2).view(shape)


def check(y: Tensor, x: Tensor, weight: SparseWeight) -> None:
    dense = weight.dequantize(torch.float32).to(x.device).double()
    error = float(((y.double() - x.double() @ dense.T).abs() / (x.double().abs() @ dense.abs().T + 1e-30)).max())
    if error > 1.5 * max(torch.finfo(x.dtype).eps, 1e-6):
        raise SystemExit(f"wrong result: error {error:.2e} for {tuple(x.shape)}")


def gpu() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, µs\n")
    rows = []
    for shape in GPU_SHAPES:
        dense = [
            torch.randn(shape, device="cuda").bfloat16() for _ in range(max(2, ROTATED_BYTES // (2 * math.prod(shape))))
        ]
        affine = Affine(4, "group", 128)
        codes, scales = torch.randint(0, 16, shape, dtype=torch.uint8), affine.scale_shape(shape)
        scale, zero = (torch.rand(scales) * 0.01).bfloat16(), torch.randint(0, 16, scales, dtype=torch.uint8)
        numbers = {
            "bf16": DenseWeight(Dense(torch.bfloat16), torch.randn(shape).bfloat16()),
            "int4": AffineWeight(affine, codes, scale, zero),
        }
        for name, values in numbers.items():
            weight = SparseWeight(Sparse(NOfM(2, 4), values.format), values, two_of_four(shape))
            first = Pairs.build(weight, torch.device("cuda"))
            packed = [first] + [Pairs.build(weight, torch.device("cuda")) for _ in range(ROTATED_BYTES // first.nbytes)]
            for count in GPU_ROWS:
                x = torch.randn(count, shape[1], device="cuda").bfloat16()
                check(matmul(x, first), x, weight)
                times = {"effcli": gpu_ms([partial(matmul, x, one) for one in packed])}
                times["cuBLAS bf16"] = gpu_ms([partial(F.linear, x, one) for one in dense])
                micro = {key: 1000 * ms for key, ms in times.items()}
                rows.append([f"{shape[0]} × {shape[1]}", name, str(count), *ratios(micro, "effcli")])
    table(["out × in", "2:4 of", "rows", "effcli", "cuBLAS bf16 (×)"], rows)


def cpu(rounds: int) -> None:
    print(
        f"{processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, median ms of {rounds} rounds\n"
    )
    rows = []
    for shape in SHAPES:
        dense = [torch.randn(shape) for _ in range(2)]
        for density in DENSITIES:
            format = Sparse(Bitmask(), Dense(torch.float32))
            weight = SparseWeight(format, DenseWeight(Dense(torch.float32), dense[0]), torch.rand(shape) < density)
            packed = [Rows.build(weight) for _ in range(2)]
            for count in CPU_ROWS:
                x = torch.randn(count, shape[1])
                check(matmul(x, packed[0]), x, weight)
                calls = {
                    "compressed rows": [partial(matmul, x, one) for one in packed],
                    "dense": [partial(F.linear, x, one) for one in dense],
                }
                times = in_turns(calls, rounds)
                rows.append(
                    [f"{shape[0]} × {shape[1]}", f"{density:.0%}", str(count), *ratios(times, "compressed rows")]
                )
    table(["out × in", "kept", "rows", "compressed rows", "dense float32 (×)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if torch.cuda.is_available():
        gpu()
        return
    torch.set_num_threads(options.threads)
    cpu(options.rounds)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
