"""bitsandbytes in its own environment. options: method (nf4, int8). It needs no calibration.

nf4 stores blocks of 64 weights with a float32 scale each; int8 is LLM.int8(), whose activations are int8 per token but
for outlier columns. Weights are quantized as transformers loads them, so the clock covers loading.
"""

from __future__ import annotations

from typing import Any

import child


def compress(job: child.Job, clock: child.Clock) -> None:
    from transformers import BitsAndBytesConfig

    if job.options["method"] == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=job.torch_dtype
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    with clock:
        model = job.stock_model(quantization_config=config, device_map="cpu")
    model.save_pretrained(job.output)


def load(job: child.Job) -> Any:
    return job.stock_model(job.output, device_map="cpu")


if __name__ == "__main__":
    child.main(compress, load)
