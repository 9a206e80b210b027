"""What runs inside a tool's own environment: one job read, one compression timed, one perplexity measured.

    python peer_TOOL.py compress|evaluate JOB

JOB is a JSON object with the fields of `Job`. The file that `report` names becomes a JSON object: `seconds` of the
compression, or `perplexity`; or, with exit code 1, `error`, the type and the last line of the exception.

This file and the peer_*.py beside it import nothing of effcli (peer_effcli.py excepted), so that every tool is handed
the same tokens and judged by the same loop.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """One tool, one format. samples and windows count stretches of `length` tokens; options are the tool's own."""

    checkpoint: str
    output: str
    report: str
    calibration: str
    evaluation: str
    samples: int
    length: int
    windows: int
    dtype: str
    options: dict[str, Any]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def calibration_windows(self) -> Tensor:
        """Token ids int64 (samples, length): the text tokenized whole, its first windows without overlap."""
        return self._windows(self.calibration, self.samples)

    def evaluation_windows(self) -> Tensor:
        """Token ids int64 (windows, length), cut like those for calibration."""
        return self._windows(self.evaluation, self.windows)

    def _windows(self, file: str, count: int) -> Tensor:
        ids = self.tokenizer()(Path(file).read_text(encoding="utf-8"), verbose=False).input_ids
        if len(ids) < count * self.length:
            raise ValueError(f"{file} has {len(ids)} tokens, not {count * self.length}")
        return torch.tensor(ids[: count * self.length]).view(count, self.length)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.checkpoint)

    def stock_model(self, folder: str | None = None, **arguments: Any) -> Any:
        """The checkpoint, or what lies in `folder`, by transformers' own loader, in the job's dtype."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder or self.checkpoint, dtype=self.torch_dtype, **arguments)


class Clock:
    """Wall-clock seconds spent inside `with clock:`."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start


def densified(model: Any, quantized: Callable[[torch.nn.Module], bool], dtype: torch.dtype) -> Any:
    """model with a dense float32 linear for each layer that `quantized` names: what it multiplies inputs of dtype with.

    Each layer is asked once, with the identity (in, in) for its input.
    """
    layers = {name: layer for name, layer in model.named_modules() if quantized(layer)}
    if not layers:
        raise ValueError("nothing was quantized")
    with torch.no_grad():
        for name, layer in layers.items():
            # Some spell it infeatures.
            width = getattr(layer, "in_features", None) or layer.infeatures
            outputs = layer(torch.eye(width, dtype=dtype)).float()
            dense = torch.nn.Linear(width, outputs.shape[1], bias=layer.bias is not None)
            if layer.bias is not None:
                dense.bias.copy_(layer.bias)
                outputs -= dense.bias
            dense.weight.copy_(outputs.t())
            model.set_submodule(name, dense)
    return model


def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first of windows (count, length).

    The model runs one window at a time; its logits are converted to float32, the sum is kept in double precision.
    """
    model.eval()
    total = 0.0
    # Not in inference mode: optimum-quanto's tensors refuse it.
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def main(compress: Callable[[Job, Clock], None], load: Callable[[Job], Any]) -> None:
    """Carry out the command line. compress writes job.output; load returns what it wrote as a model that runs."""
    action, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    # Some tools write logs into the folder where they run.
    os.chdir(Path(job.output).parent)
    # In a file, for the tools print on both streams, some while the process ends.
    report: dict[str, Any] = {}
    try:
        if action == "compress":
            clock = Clock()
            compress(job, clock)
            report["seconds"] = clock.seconds
        else:
            model = load(job)
            report["perplexity"] = perplexity(model, job.evaluation_windows())
    except Exception as error:  # whatever the tool says is its result
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        report["error"] = f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
    Path(job.report).write_text(json.dumps(report), encoding="utf-8")
    sys.exit("error" in report)
