"""Bias correction: compressed weights shift the mean of every channel; the bias takes the shift back.

E[y] - E[ỹ] of each output channel, y of the network before its weights were compressed and ỹ of this one, both on the
calibration inputs, is added to the bias (arXiv:1906.04721, section 4.2, the empirical form). Layers are corrected in
the order in which they run, so that each sees the inputs that the corrections before it lead to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from effcli.errors import DataError, NumericsError
from effcli.graphs.graph import Graph, calls
from effcli.graphs.walk import Walk, stream
from effcli.layers.contract import Needs, NetworkPass, Observed, Transformed


class BiasCorrection(NetworkPass):
    """A `bias_correction` step."""

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | Needs.DENSE

    def transform(self, graph: Graph, seen: Observed) -> Transformed:
        """Correct the biases of the chosen layers of `graph`, in place."""
        dense = seen.before_compression("bias_correction")
        remarks: list[str] = []
        layers: dict[str, str] = {}
        for name in seen.chosen:
            reason = _obstacle(graph, dense, name)
            if reason:
                remarks.append(f"{name} stays as it is: {reason}")
            else:
                layers[_biased(graph, name)] = name
        measured = {name: _biased(dense, name) for name in layers.values()}
        means = channel_means(dense, set(measured.values()), seen.batches())
        notes: dict[str, dict[str, Any]] = {}
        walk = Walk(graph, seen.batches())
        for node in walk:
            own = str(node.target)
            if node.op != "call_module" or own not in layers:
                continue
            name, module = layers[own], graph.layer(own)
            shift = (means[measured[name]] - _mean(walk.outputs(node), _axis(module), name)).float()
            bias = module.bias
            graph.set_bias(own, bias + shift if isinstance(bias, Tensor) else shift)
            notes[name] = {"largest_shift": round(float(shift.abs().max()), 6)}
            if own != name:
                notes[name]["corrected_in"] = own
        return Transformed(graph, notes, remarks=tuple(remarks))


def channel_means(graph: Graph, names: set[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """The mean of every output channel of the modules `names`, float64 (channels,), in one forward over the batches."""
    found: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in names}

    def look(node: fx.Node, inputs: Any, value: Any) -> None:
        name = str(node.target)
        if node.op == "call_module" and name in found:
            found[name].append(_sum(value, _axis(graph.layer(name))))

    stream(graph, batches, look)
    return {name: _joined(sums, name) for name, sums in found.items()}


def _obstacle(graph: Graph, reference: Graph, name: str) -> str:
    """Why layer `name` cannot be compared with the reference's; empty when it can."""
    here, there = len(list(calls(graph, name))), len(list(calls(reference, name)))
    if here != 1:
        return f"it is called {here} times"
    if there != 1:
        return "the network before compression has no such layer"
    own, its = _biased(graph, name), _biased(reference, name)
    if own in graph.facts.rescaled and its not in reference.facts.rescaled:
        return "an earlier step rescaled its channels, so their means are not those of the original network"
    return ""


def _biased(graph: Graph, name: str) -> str:
    """The module whose bias takes the correction: a batch norm that alone reads the layer, else the layer itself."""
    (node,) = calls(graph, name)
    users = list(node.users)
    norm = graph.module_of(users[0]) if len(users) == 1 else None
    if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.bias is not None:
        behind = str(users[0].target)
        return behind if len(list(calls(graph, behind))) == 1 else name
    return name


def _axis(module: nn.Module) -> int:
    """The axis of a module's output that holds its channels."""
    return -1 if isinstance(module, nn.Linear) else 1


def _mean(values: Iterable[Tensor], axis: int, name: str) -> Tensor:
    return _joined([_sum(value, axis) for value in values], name)


def _sum(value: Tensor, axis: int) -> tuple[Tensor, int]:
    """The sum over all axes but one, float64, and how many numbers went into each."""
    moved = value.movedim(axis, 0).flatten(1)
    return moved.sum(1, dtype=torch.float64), moved.shape[1]


def _joined(sums: Sequence[tuple[Tensor, int]], name: str) -> Tensor:
    """The mean of what `_sum` gave for several values of one module."""
    count = sum(number for _, number in sums)
    if not count:
        raise DataError(f"no calibration input reached {name}", "give calibration data")
    mean = torch.stack([total for total, _ in sums]).sum(0) / count
    if not bool(torch.isfinite(mean).all()):
        raise NumericsError(f"the outputs of {name} are NaN or infinite on the calibration data", "check the network")
    return mean


__all__ = ["BiasCorrection", "channel_means"]
