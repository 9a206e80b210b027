"""gptqmodel in its own environment. options: keywords of `QuantizeConfig` (bits, group_size, quant_method, format).

Its loader asks for two workers of a pool that has half as many as there are cores, so on two cores it stops with
"Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1". Its own variable for that is set here.
Its torch kernels refuse float32 and unpack the weights anew for every window. So the result is loaded in float16, each
layer is unpacked once (`child.densified`), and the network evaluated with the dense weights in the job's dtype.
"""

from __future__ import annotations

import os
from typing import Any

import child
import torch


def compress(job: child.Job, clock: child.Clock) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(**job.options)
    model = GPTQModel.load(job.checkpoint, config, device="cpu", dtype=job.torch_dtype)
    windows = job.calibration_windows()
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    with clock:
        model.quantize(samples, batch_size=1, backend=BACKEND.TORCH)
    model.save(job.output)


def load(job: child.Job) -> Any:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    model = GPTQModel.load(job.output, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    return child.densified(model, lambda layer: isinstance(layer, BaseQuantLinear), torch.float16).to(job.torch_dtype)


if __name__ == "__main__":
    child.main(compress, load)
