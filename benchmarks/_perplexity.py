"""Perplexity of a checkpoint by the stock loader and a plain loop; nothing of effcli is imported.

    python benchmarks/_perplexity.py CHECKPOINT TEXT [--tokenizer CHECKPOINT] [--windows 20] [--length 512]

The whole text is tokenized; the first windows of it, without overlap, are predicted from their second token on.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="default: the checkpoint's own")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    config = AutoConfig.from_pretrained(options.checkpoint)
    storage = getattr(config, "quantization_config", None)
    restored = isinstance(storage, dict) and not storage.get("dequantize")
    if isinstance(storage, dict) and restored:
        # Asymmetric weights of compressed-tensors load only dequantized.
        config.quantization_config = {**storage, "dequantize": True}
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, config=config).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.checkpoint)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), verbose=False).input_ids
    count = options.windows * options.length
    if len(ids) < count:
        raise SystemExit(f"{options.text} has {len(ids)} tokens, not {count}")
    total = 0.0
    with torch.inference_mode():
        for number in range(options.windows):
            window = torch.tensor([ids[number * options.length : (number + 1) * options.length]])
            logits = model(input_ids=window, use_cache=False).logits.float()
            flat = logits[:, :-1].flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(flat, window[:, 1:].flatten(), reduction="sum"))
    predictions = options.windows * (options.length - 1)
    report = {
        "perplexity": math.exp(total / predictions),
        "dtype": str(model.dtype).removeprefix("torch."),
        "dequantize_added": restored,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
