"""Write a Llama of any size with random weights, one block in memory at a time, with a tokenizer of 1024 tokens.

python benchmarks/_random_llama.py DIR --layers 32 --hidden 2048 --intermediate 5632 --heads 16
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from effcli.files.locate import SAMPLES

VOCABULARY = 1024
# Weights as small as trained ones: activations neither vanish nor overflow over many blocks.
SPREAD = 0.02


def write(folder: Path, layers: int, hidden: int, intermediate: int, heads: int) -> None:
    """A checkpoint in bfloat16 with one shard for each block and one for what stands outside the blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    total = 0

    def shard(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        tensors = {key: _tensor(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    square, wide = (hidden, hidden), (intermediate, hidden)
    linears = {f"self_attn.{key}_proj": square for key in "qkvo"}
    linears |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    for layer in range(layers):
        shapes = {f"model.layers.{layer}.{key}.weight": shape for key, shape in {**linears, **norms}.items()}
        shard(layer, shapes)
    embeddings = {"model.embed_tokens.weight": (VOCABULARY, hidden), "lm_head.weight": (VOCABULARY, hidden)}
    shard(layers, {**embeddings, "model.norm.weight": (hidden,)})
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SAMPLES["sample:lm"] / name, folder / name)


def _tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, SPREAD, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--intermediate", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True)
    options = parser.parse_args()
    write(options.folder, options.layers, options.hidden, options.intermediate, options.heads)


if __name__ == "__main__":
    main()
