"""Gradients of the weights of a network read as a graph: of the cross-entropy with the labels of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from effcli.errors import DataError, UnsupportedError
from effcli.graphs.graph import Graph, class_count
from effcli.layers.input_rounding import straight_through
from effcli.layers.layer import LayerSite
from effcli.layers.statistics import Gradients, Needs


def gradients(
    graph: Graph, sites: Iterable[LayerSite], batches: Iterable[tuple[Tensor, Tensor | None]], needs: Needs
) -> dict[str, Gradients]:
    """What `needs` asks for of the gradients of the layers `sites`, by name. A sample is one input.

    batches: inputs float32 (n, *shape) with labels int64 (n,). They pass where inputs are rounded, as if they were
    not. Raises `UnsupportedError` for a network that is no classifier, `DataError` without labels, or with labels that
    are no classes.
    """
    classes = classes_for("gradients need a loss", graph, "use a pass that needs no gradients")
    sites = list(sites)
    found = {site.name: Gradients(site.shape, needs, graph.device) for site in sites}
    weights: list[Tensor] = [graph.layer(site.name).weight for site in sites]  # type: ignore[misc]
    single = Needs.SQUARED_GRADIENTS in needs
    held = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for given, targets in batches:
            labels = check_labels("gradients are of the loss of labelled inputs", targets, classes).to(graph.device)
            inputs = given.to(graph.device)
            # Squares are of single inputs.
            size = 1 if single else max(len(inputs), 1)
            for part, own in zip(torch.split(inputs, size), torch.split(labels, size), strict=True):
                with torch.enable_grad(), straight_through(graph.module):
                    loss = functional.cross_entropy(graph.module(part), own, reduction="sum")
                    made = torch.autograd.grad(loss, weights, allow_unused=True)
                _add(found, sites, made, len(part))
    finally:
        for weight, before in zip(weights, held, strict=True):
            weight.requires_grad_(before)
    for name, own_sums in found.items():
        own_sums.check_finite(name)
    return found


def _add(
    found: Mapping[str, Gradients], sites: Iterable[LayerSite], made: Iterable[Tensor | None], samples: int
) -> None:
    for site, gradient in zip(sites, made, strict=True):
        if gradient is not None:
            found[site.name].add_gradient(site.view(gradient.contiguous()))
        found[site.name].end_sample(samples)


def classes_for(use: str, graph: Graph, remedy: str) -> int:
    """How many classes the network tells apart; use: what they are for, a clause.

    Raises `UnsupportedError`, with this remedy, for a network that is no classifier.
    """
    classes = class_count(graph)
    if classes is None:
        raise UnsupportedError(f"{use}, and the network's output is no vector of one number for each class", remedy)
    return classes


def check_labels(use: str, labels: Tensor | None, classes: int) -> Tensor:
    """The labels, int64 (n,), if they are classes of the network; use: what they are for, a clause.

    Raises `DataError` without labels, and for one that is no class.
    """
    if labels is None:
        raise DataError(
            f"{use}, and the calibration data has no labels",
            "give labelled inputs: --calib DATA with one folder per class, or an array or a column of class numbers",
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"the labels of the calibration data go from {int(labels.min())} to {int(labels.max())}, and the network "
            f"has the classes 0 to {classes - 1}",
            "number the classes from 0, as the network was trained, and leave out what has no class",
        )
    return labels


__all__ = ["check_labels", "classes_for", "gradients"]
