"""Time x Ŵᵀ with int8 weights and inputs rounded to int8, against dense and other integer products.

    python benchmarks/int8_matmul.py                # on a GPU: Triton against cuBLAS bf16 and int8, and bitsandbytes
    python benchmarks/int8_matmul.py --threads 1    # without one: the CPU route against torch's own, and bitsandbytes

Every result is checked against the reference. Weights rotate through more bytes than the caches hold, as the layers of
a model do. On the CPU all contenders take turns and the median counts; times of one thread are that thread's processor
time, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported

import torch
import torch.nn.functional as F
from affine_matmul import ROTATED_BYTES, SHAPES, gpu_ms, processor, table
from torch import Tensor

from effcli.formats import Affine, AffineWeight
from effcli.kernels.int8_matmul import Integers, matmul, prepare, quantize_tokens, reference, route_name

GPU_ROWS = [1, 4, 16, 64, 512, 2048]
CPU_ROWS = [1, 4, 16, 64, 256]


def make_weight(shape: tuple[int, int]) -> AffineWeight:
    """Normal weights, the largest of each row at the end of the range."""
    dense = torch.randn(shape) * 0.02
    scale = (dense.abs().amax(1, keepdim=True) / 127.5).bfloat16()
    codes = (dense / scale + 128).round().clamp(0, 255).to(torch.uint8)
    return AffineWeight(Affine(8, "channel", 0, True, "token"), codes, scale)


def error_of(y: Tensor, x: Tensor, weight: AffineWeight) -> float:
    """Largest difference from the reference, relative to the largest result."""
    exact = reference(x.cpu(), weight).double()
    return float((y.cpu().double() - exact).abs().max() / exact.abs().max())


def check(y: Tensor, x: Tensor, weight: AffineWeight) -> None:
    error = error_of(y, x, weight)
    if error > torch.finfo(x.dtype).eps:
        raise SystemExit(f"wrong result: error {error:.2e} for {tuple(x.shape)}")


def in_turns(calls: dict[str, Sequence[Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each contender's calls: one call of each a round, through its copies of the weight."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name, copies in calls.items():
            call = copies[number % len(copies)]
            begin = clock()
            call()
            if number >= 0:
                times[name].append(1000 * (clock() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def ratios(times: dict[str, float], own: str) -> list[str]:
    """A row of the table: milliseconds of all, and how many times as long the others take as `own`."""
    return [f"{times[own]:.2f}"] + [f"{ms:.2f} ({ms / times[own]:.2f})" for name, ms in times.items() if name != own]


def torch_dynamic(weight: AffineWeight, copies: int) -> list[Any]:
    """What torch's own dynamically quantized linear holds. Its inputs have one scale for all tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are to leave torch
        scales, zeros = weight.scale.double().view(-1), torch.zeros(weight.shape[0], dtype=torch.int64)
        quantized = torch.quantize_per_channel(weight.dequantize(torch.float32), scales, zeros, 0, torch.qint8)
        return [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(copies)]


def bitsandbytes_int8(weight: AffineWeight, copies: int, device: str) -> list[Any]:
    """Linear layers of bitsandbytes; empty where it is not installed."""
    try:
        import bitsandbytes as bnb  # type: ignore[import-not-found]
    except ImportError:
        return []
    layers = []
    for _ in range(copies):
        layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], False, has_fp16_weights=False, threshold=0.0)
        layer.weight = bnb.nn.Int8Params(weight.dequantize(torch.float16), has_fp16_weights=False, requires_grad=False)
        layers.append(layer.to(device))
    return layers


def gpu() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, int8 weights, inputs int8 per token, µs\n")
    rows = []
    for shape in SHAPES:
        weight = make_weight(shape)
        packed = [prepare(weight, "cuda") for _ in range(max(2, ROTATED_BYTES // math.prod(shape)))]
        dense = [
            torch.randn(shape, device="cuda").bfloat16() for _ in range(max(2, ROTATED_BYTES // (2 * math.prod(shape))))
        ]
        other = bitsandbytes_int8(weight, len(packed), "cuda")
        for count in GPU_ROWS:
            x = torch.randn(count, shape[1], device="cuda").bfloat16()
            check(matmul(x, packed[0]), x, weight)
            times = {"effcli": gpu_ms([partial(matmul, x, one) for one in packed])}
            times["cuBLAS bf16"] = gpu_ms([partial(F.linear, x, one) for one in dense])
            # cuBLAS takes more than 16 rows only; neither rounding nor rescaling is in its time.
            codes = quantize_tokens(x)[0].to(torch.int8)
            codes = F.pad(codes, (0, 0, 0, max(0, 32 - count)))
            times["cuBLAS int8, product alone"] = gpu_ms([partial(torch._int_mm, codes, one.codes.T) for one in packed])
            if other:
                half = x.half()
                times["bitsandbytes"] = gpu_ms([partial(layer, half) for layer in other])
            micro = {name: 1000 * ms for name, ms in times.items()}
            rows.append(
                [
                    f"{shape[0]} × {shape[1]}",
                    str(count),
                    route_name(packed[0], count, x.dtype),
                    *ratios(micro, "effcli"),
                ]
            )
        del packed, dense, other
    names = [f"{name} (×)" for name in times if name != "effcli"]
    table(["out × in", "rows", "kernel", "effcli", *names], rows)


def interpreted() -> None:
    print("No GPU: the Triton kernels are checked in Triton's interpreter on small shapes, not timed.\n")
    for count, out, columns in ((1, 70, 384), (41, 401, 1271)):
        weight = make_weight((out, columns))
        x = torch.randn(count, columns).bfloat16()
        packed = Integers.build(weight, torch.device("cpu"))
        if not torch.equal(packed.multiply_triton(x), packed.multiply(x)):
            raise SystemExit(f"Triton and the CPU differ for {(count, out, columns)}")
        print(f"({count}, {out}, {columns}): the same bits as the CPU route")
    print()


def cpu(rounds: int) -> None:
    shape = SHAPES[0]
    print(
        f"{processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{shape[0]} × {shape[1]}, median ms of {rounds} rounds\n"
    )
    weight = make_weight(shape)
    packed = [prepare(weight) for _ in range(4)]
    dense = [torch.randn(shape) for _ in range(2)]
    half = [one.bfloat16() for one in dense]
    dynamic = torch_dynamic(weight, 4)
    other = bitsandbytes_int8(weight, 4, "cpu")
    rows, errors = [], {}
    for count in CPU_ROWS:
        x = torch.randn(count, shape[1])
        narrow = x.bfloat16()
        codes = quantize_tokens(x)[0].to(torch.int8)
        for inputs in (x, narrow):
            check(matmul(inputs, packed[0]), inputs, weight)
        calls: dict[str, Sequence[Callable[[], object]]] = {
            "effcli": [partial(matmul, x, one) for one in packed],
            "float32": [partial(F.linear, x, one) for one in dense],
            "bf16": [partial(F.linear, narrow, one) for one in half],
            "_int_mm, product alone": [partial(torch._int_mm, codes, one.codes.T) for one in packed],
            "torch.ao dynamic": [partial(torch.ops.quantized.linear_dynamic, x, one, False) for one in dynamic],
        }
        errors["torch.ao dynamic"] = error_of(torch.ops.quantized.linear_dynamic(x, dynamic[0], False), x, weight)
        if other:
            calls["bitsandbytes"] = [partial(layer, narrow) for layer in other]
            errors["bitsandbytes"] = error_of(other[0](narrow), narrow, weight)
        times = in_turns(calls, rounds)
        rows.append([str(count), *ratios(times, "effcli")])
    print(f"effcli's kernel: {route_name(packed[0], 1, torch.float32)}")
    for name, error in errors.items():
        print(f"{name}: largest difference from the reference, of the largest result: {error:.1e}")
    print()
    table(["rows", "effcli", *(f"{name} (×)" for name in times if name != "effcli")], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--rounds", type=int, default=7, help="on the CPU; default 7")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        if torch.cuda.is_available():
            gpu()
            return
        torch.set_num_threads(options.threads)
        interpreted()
        cpu(options.rounds)


if __name__ == "__main__":
    main()
