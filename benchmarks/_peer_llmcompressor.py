"""llmcompressor's AWQ on one checkpoint, as its documentation says; runs in llmcompressor's own environment.

    python _peer_llmcompressor.py CHECKPOINT OUT TEXT --bits 4 --group-size 64 [--without-pinning]

The calibration windows are those of `effcli compress`: the text tokenized whole, its first windows without overlap.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--without-pinning", action="store_true", help="what a machine without an accelerator needs")
    options = parser.parse_args()
    if options.without_pinning:
        # The grid search pins the cached activations for copies to a GPU, also where there is none, and torch refuses.
        IntermediatesCache.pin_memory = _leave_where_it_is
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    text = options.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids[: options.samples * options.length])
    windows = ids.view(options.samples, options.length)
    columns = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    weights = QuantizationArgs(
        num_bits=options.bits, type="int", symmetric=False, strategy="group", group_size=options.group_size
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(columns),
        recipe=[AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])],
        max_seq_length=options.length,
        num_calibration_samples=options.samples,
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(options.output, save_compressed=True)
    tokenizer.save_pretrained(options.output)


def _leave_where_it_is(*arguments: Any, **options: Any) -> None:
    pass


if __name__ == "__main__":
    main()
