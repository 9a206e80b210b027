"""Time x Ŵᵀ with a packed Ŵ against dense products, and check every shape against the reference.

    python benchmarks/affine_matmul.py                      # on a GPU: Triton against cuBLAS, torch's int4, the floor
    python benchmarks/affine_matmul.py --threads 1          # without one: the CPU routes; the launcher's table
    python benchmarks/affine_matmul.py --threads 1 --model  # 8 layers of Llama's shapes, prefill and decode

Weights rotate through more bytes than the caches hold, as the layers of a model do. CPU times of one thread are that
thread's processor time, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported

import torch
import torch.nn.functional as F
from torch import Tensor

from effcli.formats import Affine, AffineWeight
from effcli.kernels.affine_matmul import Bytes, Nibbles, Packed, Words, matmul, prepare, route_name
from effcli.language.caching import cache_name

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]
GPU_ROWS = [1, 4, 16, 64, 512]
CPU_ROWS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256]
ROTATED_BYTES = 256 * 2**20


def make_weight(shape: tuple[int, int], format: Affine, dtype: torch.dtype = torch.bfloat16) -> AffineWeight:
    scales = format.scale_shape(shape)
    codes = torch.randint(0, 2**format.bits, shape, dtype=torch.uint8)
    scale = (torch.rand(scales) * 0.01 + 0.002).to(dtype)
    zero = None if format.symmetric else torch.randint(0, 2**format.bits, scales, dtype=torch.uint8)
    return AffineWeight(format, codes, scale, zero)


def check(y: Tensor, x: Tensor, weight: AffineWeight, slack: float = 1) -> float:
    """Largest error relative to Σ |x| |w|; raises above bf16's rounding."""
    dense = weight.dequantize(torch.float32).to(x.device)
    x, y = x.float(), y.float()
    error = float(((y - x @ dense.T).abs() / (x.abs() @ dense.abs().T)).max())
    if error > slack * 2**-8:
        raise SystemExit(f"wrong result: error {error:.2e} for {weight.format}, {tuple(x.shape)}")
    return error


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def gpu_ms(calls: list[Callable[[], object]], repeats: int = 5) -> float:
    """Milliseconds of one call: the best of `repeats` passes over `calls`, each replayed as one CUDA graph."""
    for call in calls[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = math.inf
    for _ in range(repeats):
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / len(calls))
    return best


def gpu(bits: int) -> None:
    name = torch.cuda.get_device_name()
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / gpu_ms([lambda: target.copy_(source)] * 10) / 1e6
    print(f"{name}, torch {torch.__version__}, int{bits} g128 asym, copies run at {bandwidth:.0f} GB/s\n")
    rows = []
    for shape in SHAPES:
        format = Affine(bits, "group", 128)
        weight = make_weight(shape, format)
        packed = prepare(weight, "cuda")
        copies = max(2, ROTATED_BYTES // packed.nbytes)
        many = [prepare(weight, "cuda") for _ in range(copies)]
        dense = [
            torch.randn(shape, device="cuda").bfloat16() for _ in range(max(2, ROTATED_BYTES // (2 * math.prod(shape))))
        ]
        own = torch_int4(weight, copies) if bits == 4 else None
        for count in GPU_ROWS:
            x = torch.randn(count, shape[1], device="cuda").bfloat16()
            check(matmul(x, packed), x, weight, slack=1.5)
            ours = gpu_ms([partial(matmul, x, one) for one in many])
            cublas = gpu_ms([partial(F.linear, x, one) for one in dense])
            int4 = gpu_ms([partial(own_int4, x, *one) for one in own]) if own else math.nan
            floor = (packed.nbytes + 2 * count * sum(shape)) / bandwidth / 1e6
            rows.append(
                [f"{shape[0]} × {shape[1]}", str(count), route_name(packed, count, x.dtype)]
                + [f"{1000 * ms:.1f}" for ms in (ours, cublas, int4, floor)]
                + [f"{cublas / ours:.2f}", f"{floor / ours:.0%}"]
            )
        del many, dense, own
    table(["out × in", "rows", "kernel", "µs", "cuBLAS bf16", "torch int4", "floor", "× bf16", "of floor"], rows)


def torch_int4(weight: AffineWeight, copies: int) -> list[tuple[Tensor, Tensor]]:
    """What torch's own int4 kernel for CUDA reads: packed codes, and (in / 128, out, 2) of scale and zero."""
    codes = weight.codes.cuda()
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    assert weight.zero is not None
    offset = (8 - weight.zero.float()) * weight.scale.float()
    both = torch.stack((weight.scale.float(), offset), -1).transpose(0, 1).bfloat16().contiguous().cuda()
    return [(packed.clone(), both.clone()) for _ in range(copies)]


def own_int4(x: Tensor, packed: Tensor, both: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, 128, both)
    return result


def interpreted() -> None:
    print("No GPU: the Triton kernels are checked in Triton's interpreter on small shapes, not timed.\n")
    rows = []
    for bits in (2, 3, 4, 8):
        for count, out, columns in ((1, 70, 384), (5, 48, 384), (41, 401, 1271)):
            format = Affine(bits, "channel" if columns % 128 else "group", 0 if columns % 128 else 128)
            weight = make_weight((out, columns), format)
            x = torch.randn(count, columns).bfloat16()
            # The interpreter cuts float32 down to bf16 where a GPU rounds: twice the error.
            error = check(Words.build(weight).multiply_triton(x), x, weight, slack=2)
            rows.append([str(format), f"({count}, {out}, {columns})", f"{error:.1e}"])
    table(["format", "(rows, out, in)", "largest error / Σ abs(x) abs(w)"], rows)


def cpu_ms(call: Callable[[], object], repeats: int = 5) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    best = math.inf
    for _ in range(repeats):
        begin = clock()
        call()
        best = min(best, clock() - begin)
    return 1000 * best


def processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} × {names[0] if names else platform.machine()}"


def all_linear(x: Tensor, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        F.linear(x, weight)


def few_and_many(packed: Packed, x: Tensor) -> tuple[float, float]:
    """Milliseconds through torch's packed kernel and through the tiles; the first NaN where it does not serve."""
    from effcli.kernels import affine_matmul

    tiles = cpu_ms(lambda: packed.multiply_tiles(x), 3)
    names = "INT4_ROWS", "INT8_ROWS", "INT8_GROUP_ROWS"
    before = {name: getattr(affine_matmul, name) for name in names}
    for name in names:
        setattr(affine_matmul, name, 10**9)
    few = math.nan
    if "pack," in route_name(packed, len(x), x.dtype) and len(x) <= 32:
        few = cpu_ms(lambda: packed.multiply(x), 3)
    for name, value in before.items():
        setattr(affine_matmul, name, value)
    return few, tiles


def cpu() -> None:
    print(f"{processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, 4096 × 4096, ms\n")
    shape = SHAPES[0]
    formats = [Affine(4, "group", 128), Affine(2, "group", 64), Affine(8, "channel", 0, True), Affine(6, "group", 128)]
    dense = [torch.randn(shape).bfloat16() for _ in range(4)]
    weights = [make_weight(shape, format) for format in formats]
    layouts = [prepare(weight) for weight in weights]
    assert all(isinstance(packed, (Nibbles, Bytes)) for packed in layouts)
    for packed in layouts:
        print(f"{packed.format}: {8 * packed.nbytes / math.prod(shape):.2f} bits a weight in memory")
    print()
    rows = []
    for count in CPU_ROWS:
        x = torch.randn(count, shape[1]).bfloat16()
        bf16 = cpu_ms(partial(all_linear, x, dense), 3) / len(dense)
        row = [str(count), f"{bf16:.2f}"]
        for packed, weight in zip(layouts, weights, strict=True):
            check(matmul(x, packed), x, weight)
            few, tiles = few_and_many(packed, x)
            row += [f"{few:.2f} / {tiles:.2f}".replace("nan", "-")]
        rows.append(row)
    table(["rows", "bf16", *(f"{format}: few / tiles" for format in formats)], rows)


def model() -> None:
    """Eight random layers of Llama's shapes: one token after 128, and 128 tokens, bf16 against 4 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from effcli.language.modules import QuantizedLinear

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=8, num_attention_heads=32, vocab_size=32000
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.no_grad():
        net = LlamaForCausalLM(config).eval()
        before = phases(net)
        for layer in net.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        shape = (child.out_features, child.in_features)
                        setattr(part, name, QuantizedLinear(make_weight(shape, Affine(4, "group", 128))))
        after = phases(net)
    print(f"{processor()}, {torch.get_num_threads()} thread(s): 8 layers, hidden 4096, int4 g128 asym\n")
    rows = [
        [name, f"{old:.1f}", f"{new:.1f}", f"{old / new:.2f}"]
        for name, old, new in zip(("prefill of 128 tokens", "one token"), before, after, strict=True)
    ]
    table(["", "bf16 ms", "4 bits ms", "×"], rows)


def phases(net: torch.nn.Module) -> tuple[float, float]:
    """Milliseconds of a prefill of 128 tokens and of one token after it, the head included."""
    tokens = torch.randint(0, 32000, (1, 128))
    prefill = cpu_ms(lambda: net(tokens, use_cache=True, logits_to_keep=1), 4)
    name = cache_name(net.forward)
    cache = {name: net(tokens, use_cache=True)[name]}

    # The cache grows by a token a call, for both alike.
    return prefill, cpu_ms(lambda: net(tokens[:, :1], use_cache=True, **cache), 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=range(2, 9), help="on a GPU; default 4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--model", action="store_true", help="time a whole model, on the CPU (6 GB)")
    options = parser.parse_args()
    torch.manual_seed(0)
    if torch.cuda.is_available():
        gpu(options.bits)
        return
    torch.set_num_threads(options.threads)
    if options.model:
        model()
        return
    interpreted()
    cpu()


if __name__ == "__main__":
    main()
