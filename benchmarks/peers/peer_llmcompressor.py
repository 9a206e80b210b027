"""llmcompressor in its own environment.

options: method (awq, gptq, smoothquant, sparsegpt, wanda); bits, group_size and pinning, or sparsity and structure. awq
and gptq store groups of asymmetric weights; smoothquant is SmoothQuant 0.8, then GPTQ with the preset W8A8. With
pinning false `IntermediatesCache.pin_memory` does nothing: the released AWQ pins its cached activations for copies to
an accelerator also where there is none, and torch refuses.
"""

from __future__ import annotations

from typing import Any

import child
import torch


def recipe(options: dict[str, Any]) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if options["method"] in ("sparsegpt", "wanda"):
        from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

        kind = SparseGPTModifier if options["method"] == "sparsegpt" else WandaPruningModifier
        return [kind(sparsity=options["sparsity"], mask_structure=options["structure"], ignore=["lm_head"])]
    if options["method"] == "smoothquant":
        smooth = SmoothQuantModifier(smoothing_strength=0.8)
        return [smooth, GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    weights = QuantizationArgs(
        num_bits=options["bits"], type="int", symmetric=False, strategy="group", group_size=options["group_size"]
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if options["method"] == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


def compress(job: child.Job, clock: child.Clock) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not job.options.get("pinning", True):
        IntermediatesCache.pin_memory = lambda *arguments, **options: None
    model = job.stock_model()
    windows = job.calibration_windows()
    columns = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    with clock:
        oneshot(
            model=model,
            dataset=Dataset.from_dict(columns),
            recipe=recipe(job.options),
            max_seq_length=job.length,
            num_calibration_samples=job.samples,
            shuffle_calibration_samples=False,
        )
    model.save_pretrained(job.output, save_compressed=True)


def load(job: child.Job) -> Any:
    return job.stock_model(job.output)


if __name__ == "__main__":
    child.main(compress, load)
