"""gptqmodel in its own environment. options: keywords of `QuantizeConfig` (bits, group_size, quant_method, format).

Its loader asks for two workers of a pool that has half as many as there are cores, so on two cores it stops with
"Virtual pool 'model_loader:cpu' requests 2 workers but parent 'cpu' only has 1". Its own variable for that is set here.
Its torch kernels refuse float32 and unpack the weights anew for every window. So the result is loaded in float16, every
layer is asked once, with the identity for its input, what it multiplies with, and the network then runs on these dense
weights in the job's dtype.
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
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseQuantLinear)}
    assert layers, "nothing was quantized"
    with torch.no_grad():
        for name, layer in layers.items():
            dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            outputs = layer(torch.eye(layer.in_features, dtype=torch.float16)).float()
            if layer.bias is not None:
                dense.bias.copy_(layer.bias)
                outputs -= dense.bias
            dense.weight.copy_(outputs.t())
            model.set_submodule(name, dense)
    return model.to(job.torch_dtype)


if __name__ == "__main__":
    child.main(compress, load)
