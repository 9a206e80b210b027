"""hqq in its own environment. options: bits, group_size. It needs no calibration.

The result is a pickle of torch (qmodel.pt); the loaded model dequantizes each layer's weight when the layer runs.
"""

from __future__ import annotations

from typing import Any

import child


def compress(job: child.Job, clock: child.Clock) -> None:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = job.stock_model()
    config = BaseQuantizeConfig(nbits=job.options["bits"], group_size=job.options["group_size"])
    with clock:
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=job.torch_dtype, device="cpu")
    AutoHQQHFModel.save_quantized(model, job.output)


def load(job: child.Job) -> Any:
    from hqq.models.hf.base import AutoHQQHFModel

    return AutoHQQHFModel.from_quantized(job.output, compute_dtype=job.torch_dtype, device="cpu")


if __name__ == "__main__":
    child.main(compress, load)
