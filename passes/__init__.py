"""The passes by name. Explicit, so that listing them imports neither torch nor the passes themselves.

Other packages add theirs through the entry points `effcli.passes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from effcli.errors import RecipeError, did_you_mean
from effcli.platform import registry
from effcli.platform.registry import Entry, Registry

if TYPE_CHECKING:
    from effcli.layers.contract import Pass

PASSES: dict[str, Entry] = {
    "linear": Entry(
        "effcli.passes.quantize.linear:Linear",
        "Round weights to the nearest of 2^bits evenly spaced values.",
    ),
    "awq": Entry(
        "effcli.passes.quantize.awq:AWQ",
        "Scale channels by their activations, clip, then round (arXiv:2306.00978).",
    ),
    "smoothquant": Entry(
        "effcli.passes.quantize.smoothquant:SmoothQuant",
        "Scale channels so that activations round well to int8 (arXiv:2211.10438).",
    ),
    "kmeans": Entry(
        "effcli.passes.quantize.kmeans:KMeans",
        "Let weights share the entries of a table (arXiv:1510.00149).",
    ),
    "centroids": Entry(
        "effcli.passes.train.centroids:Centroids",
        "Train the tables of `kmeans` to restore the outputs (arXiv:1510.00149).",
    ),
    "finetune": Entry(
        "effcli.passes.train.finetune:FineTune",
        "Train the weights towards labels, or towards the original network's outputs.",
    ),
    "bitfit": Entry(
        "effcli.passes.train.bitfit:BitFit",
        "Train the biases of layers alone (arXiv:2106.10199).",
    ),
    "nf4": Entry(
        "effcli.passes.quantize.nf4:NF4",
        "Round blocks of weights to quantiles of a normal distribution (arXiv:2305.14314).",
    ),
    "binary": Entry(
        "effcli.passes.quantize.binary:Binary",
        "Keep the signs of the weights and a scale (arXiv:1603.05279).",
    ),
    "ternary": Entry(
        "effcli.passes.quantize.ternary:Ternary",
        "Round weights to -1, 0 and 1 times a scale (arXiv:1605.04711).",
    ),
    "gptq": Entry(
        "effcli.passes.quantize.gptq:GPTQ",
        "Round columns in turn, the rest makes up for the error (arXiv:2210.17323).",
    ),
    "fold": Entry(
        "effcli.passes.quantize.fold:Fold",
        "Fold batch norms into the layers beside them (arXiv:1712.05877).",
    ),
    "equalize": Entry(
        "effcli.passes.quantize.equalize:Equalize",
        "Even out weight ranges across neighbouring layers (arXiv:1906.04721).",
    ),
    "adaround": Entry(
        "effcli.passes.quantize.adaround:AdaRound",
        "Learn whether each weight rounds up or down (arXiv:2004.10568).",
    ),
    "bias_correction": Entry(
        "effcli.passes.quantize.bias_correction:BiasCorrection",
        "Undo the mean error of every channel in the biases (arXiv:1906.04721).",
    ),
    "lora": Entry(
        "effcli.passes.adapt.lora:Lora",
        "Train an adapter of low rank beside the weights, packed or dense (arXiv:2106.09685).",
    ),
    "merge": Entry(
        "effcli.passes.adapt.merge:Merge",
        "Merge a LoRA adapter, or one of its kin, into the weights (arXiv:2106.09685).",
    ),
    "channels": Entry(
        "effcli.passes.prune.channels:Channels",
        "Remove whole channels, heads, feed-forward widths and experts (arXiv:2301.12900).",
    ),
    "blocks": Entry(
        "effcli.passes.prune.blocks:Blocks",
        "Remove the blocks of a language model that turn its states least (arXiv:2403.03853).",
    ),
    "auto": Entry(
        "effcli.passes.search.auto:Auto",
        "Choose the bits, the sparsity or the ratio of every layer under a budget, for another pass.",
    ),
    "magnitude": Entry(
        "effcli.passes.prune.magnitude:Magnitude",
        "Remove the smallest weights (arXiv:1506.02626).",
    ),
    "wanda": Entry(
        "effcli.passes.prune.wanda:Wanda",
        "Remove weights by their magnitude and the norm of their input (arXiv:2306.11695).",
    ),
    "taylor": Entry(
        "effcli.passes.prune.taylor:Taylor",
        "Remove the weights that change the loss least, to first order (arXiv:1906.10771).",
    ),
    "sparsegpt": Entry(
        "effcli.passes.prune.sparsegpt:SparseGPT",
        "Remove weights in turn, the rest makes up for the error (arXiv:2301.00774).",
    ),
    "alps": Entry(
        "effcli.passes.prune.alps:ALPS",
        "Choose by ADMM which weights stay, then fit them (arXiv:2406.07831).",
    ),
    "gradual": Entry(
        "effcli.passes.prune.gradual:Gradual",
        "Remove the smallest weights in rounds and train the others (arXiv:1710.01878).",
    ),
    "int8": Entry(
        "effcli.passes.quantize.int8:Int8",
        "Quantize weights and activations to an integer network (arXiv:1712.05877).",
    ),
}

REGISTRY: Registry[Pass] = Registry(
    "pass",
    registry.PASSES,
    tuple(f"effcli.layers.contract:{kind}Pass" for kind in ("Layer", "Network", "Cut", "Train", "Search", "Parameter")),
    PASSES,
)


# The folders of the passes, in the order in which they are listed.
FAMILIES = ("quantize", "prune", "train", "adapt", "search")


def families() -> dict[str, dict[str, Entry]]:
    """All passes by the folder that they stand in; those of other packages, if there are any, last under no name."""
    found: dict[str, dict[str, Entry]] = {family: {} for family in (*FAMILIES, "")}
    for name, entry in REGISTRY.known().items():
        folder = entry.place.removeprefix("effcli.passes.").partition(".")[0]
        found[folder if folder in FAMILIES and not entry.package else ""][name] = entry
    return {family: own for family, own in found.items() if own}


def load(name: str) -> type[Pass]:
    """The class of the pass `name`; `RecipeError` with the nearest names when there is none."""
    if REGISTRY.find(name) is None:
        raise RecipeError(f"there is no pass {name!r}", did_you_mean(name, REGISTRY.known()))
    return REGISTRY.load(name)


__all__ = ["FAMILIES", "PASSES", "REGISTRY", "families", "load"]
