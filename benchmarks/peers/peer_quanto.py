"""optimum-quanto in its own environment. options: weights and, if activations are to be int8, activations.

quanto picks the group size of 4-bit weights itself: 128, lowered in steps of 32 to what divides the inputs. Its int8
activations have one static scale a tensor, calibrated, and none a token. It has no type of 3 bits.
"""

from __future__ import annotations

from typing import Any

import child
import torch


def compress(job: child.Job, clock: child.Clock) -> None:
    from optimum import quanto

    weights = getattr(quanto, job.options["weights"])
    activations = getattr(quanto, job.options["activations"]) if "activations" in job.options else None
    model = job.stock_model()
    windows = job.calibration_windows() if activations is not None else ()
    with clock:
        quanto.quantize(model, weights=weights, activations=activations, exclude="lm_head")
        if activations is not None:
            with torch.no_grad(), quanto.Calibration():
                for window in windows:
                    model(input_ids=window[None], use_cache=False)
        quanto.freeze(model)
    quanto.QuantizedModelForCausalLM(model).save_pretrained(job.output)


def load(job: child.Job) -> Any:
    from optimum import quanto

    return quanto.QuantizedModelForCausalLM.from_pretrained(job.output)


if __name__ == "__main__":
    child.main(compress, load)
