"""auto-round in its own environment. options: format, and keywords of `AutoRound` (bits, group_size, sym, iters, lr).

It is handed the same windows in batches of its own size, 8. Its kernel for a CPU unpacks the weights anew for every
window, so each layer is unpacked once (`child.densified`) and the network evaluated with the dense weights.
"""

from __future__ import annotations

from typing import Any

import child

BATCH = 8


def compress(job: child.Job, clock: child.Clock) -> None:
    from auto_round import AutoRound

    options = dict(job.options)
    form = options.pop("format", "auto_round")
    model = job.stock_model()
    windows = list(job.calibration_windows().split(BATCH))
    with clock:
        tuner = AutoRound(
            model,
            job.tokenizer(),
            dataset=windows,
            nsamples=job.samples,
            seqlen=job.length,
            batch_size=BATCH,
            device_map="cpu",
            **options,
        )
        tuner.quantize()
    tuner.save_quantized(job.output, format=form)


def load(job: child.Job) -> Any:
    model = job.stock_model(job.output, device_map="cpu")
    return child.densified(model, lambda layer: hasattr(layer, "qweight"), job.torch_dtype).to(job.torch_dtype)


if __name__ == "__main__":
    child.main(compress, load)
