"""What does a linear with adapters hold in memory when its base is NF4? The example of torchtune's documentation.

    python benchmarks/nf4_memory.py [--width 512] [--rank 8]

A float32 linear of 512 × 512 without bias, with the two float32 matrices of a LoRA adapter of rank 8, holds 1,081,344
bytes, and 177,152 when its base is torchtune's NF4, which quantizes its scales too: figures of torchtune's. Counted
here are all parameters and buffers of the module that `effcli.load` puts in the linear's place after an `nf4` step,
and the adapter. Goal: with double quantization at most torchtune's figure.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from _common import machine, table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import effcli

LAYER = "model.layers.0.self_attn.q_proj"
# Bytes with the adapter, by base.
TORCHTUNE = {"float32": 1_081_344, "nf4, double": 177_152}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=512, help="inputs and outputs of the linear; a multiple of 64")
    parser.add_argument("--rank", type=int, default=8, help="of the adapter")
    options = parser.parse_args()
    width, rank = options.width, options.rank
    adapter = 2 * torch.float32.itemsize * rank * width
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        write(source, width)
        for name, step in (("float32", None), ("nf4", "nf4"), ("nf4, double", "nf4:double=true")):
            folder = source if step is None else Path(scratch) / name
            if step is not None:
                effcli.compress(source, step, folder, evaluate=False)
            base = held(effcli.load(folder).get_submodule(LAYER))
            known = TORCHTUNE.get(name) if (width, rank) == (512, 8) else None
            rows.append([name, f"{base:,}", f"{base + adapter:,}", "-" if known is None else f"{known:,}"])
    print(table(["base", "bytes of the base", "with the adapter", "torchtune"], rows))
    print(machine())


def write(folder: Path, width: int) -> None:
    """A network of random weights whose query projection is (width, width)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        max_position_embeddings=64,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def held(module: nn.Module) -> int:
    """Bytes of all tensors of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


if __name__ == "__main__":
    main()
