"""The passes by name. Explicit, so that listing them imports neither torch nor the passes themselves."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from effcli.errors import RecipeError, did_you_mean


class Entry(NamedTuple):
    """Where a pass lives, and one line about it."""

    module: str
    summary: str


PASSES: dict[str, Entry] = {
    "linear": Entry("effcli.passes.linear", "Round weights to the nearest of 2^bits evenly spaced values."),
    "awq": Entry("effcli.passes.awq", "Scale channels by their activations, clip, then round (arXiv:2306.00978)."),
    "smoothquant": Entry(
        "effcli.passes.smoothquant", "Scale channels so that activations round well to int8 (arXiv:2211.10438)."
    ),
    "kmeans": Entry("effcli.passes.kmeans", "Let weights share the entries of a table (arXiv:1510.00149)."),
    "centroids": Entry(
        "effcli.passes.centroids", "Train the tables of `kmeans` to restore the outputs (arXiv:1510.00149)."
    ),
    "nf4": Entry(
        "effcli.passes.nf4", "Round blocks of weights to quantiles of a normal distribution (arXiv:2305.14314)."
    ),
    "binary": Entry("effcli.passes.binary", "Keep the signs of the weights and a scale (arXiv:1603.05279)."),
    "ternary": Entry("effcli.passes.ternary", "Round weights to -1, 0 and 1 times a scale (arXiv:1605.04711)."),
    "gptq": Entry("effcli.passes.gptq", "Round columns in turn, the rest makes up for the error (arXiv:2210.17323)."),
    "fold": Entry("effcli.passes.fold", "Fold batch norms into the layers beside them (arXiv:1712.05877)."),
    "equalize": Entry(
        "effcli.passes.equalize", "Even out weight ranges across neighbouring layers (arXiv:1906.04721)."
    ),
    "adaround": Entry("effcli.passes.adaround", "Learn whether each weight rounds up or down (arXiv:2004.10568)."),
    "bias_correction": Entry(
        "effcli.passes.bias_correction", "Undo the mean error of every channel in the biases (arXiv:1906.04721)."
    ),
    "auto": Entry("effcli.passes.auto", "Choose the bits of every layer under a budget, for another pass."),
    "int8": Entry("effcli.passes.int8", "Quantize weights and activations to an integer network (arXiv:1712.05877)."),
}


def load(name: str) -> ModuleType:
    """The module of the pass `name`; `RecipeError` with the nearest names when there is none."""
    if name not in PASSES:
        raise RecipeError(f"there is no pass {name!r}", did_you_mean(name, PASSES))
    return import_module(PASSES[name].module)


__all__ = ["PASSES", "Entry", "load"]
