"""Fine-tuning of shared weights: train the tables of `kmeans` layers, codes fixed (arXiv:1510.00149, section 3.3).

The gradient of an entry is the sum of the gradients of the weights that share it. What is minimised is the squared
difference between the outputs of this network and those of the network before its weights were compressed, on the
calibration inputs: it takes no labels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from effcli.errors import DataError, NumericsError, UserError
from effcli.formats import CodebookWeight
from effcli.graphs.graph import Graph
from effcli.layers.contract import Needs, NetworkPass, Observed, Transformed
from effcli.passes._tables import ascending


class Centroids(NetworkPass):
    """A `centroids` step."""

    epochs: int = Field(5, ge=1, description="Times that all calibration inputs are seen; the best one's tables stay.")
    learning_rate: float = Field(
        3e-3, gt=0, description="Of Adam (arXiv:1412.6980), as a share of the mean magnitude of a layer's weights."
    )

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS | Needs.DENSE

    def transform(self, graph: Graph, seen: Observed) -> Transformed:
        """Tune the tables of the chosen layers of `graph`, in place, unless no epoch lowers the error."""
        dense = seen.before_compression("centroids")
        layers, remarks = _layers(graph, seen)
        if not layers:
            raise UserError("centroids finds no layer with a table to train", "put it after a `kmeans` step")
        teaching = _Teaching(graph, dense, seen, layers)
        before = least = teaching.error()
        best: list[Tensor] | None = None
        for _ in teaching.epochs(self):
            error = teaching.error()
            if error < least:
                least, best = error, [entries.detach().clone() for entries in teaching.entries]
        if best is None:
            kept = f"the tables stay as they are: {self.epochs} epochs at {self.learning_rate} lower no error"
            return Transformed(graph, remarks=(*remarks, kept))
        notes = {}
        for name, entries in zip(layers, best, strict=True):
            weight = layers[name]
            moved = float((entries - weight.table.float()).norm() / weight.table.float().norm())
            table, codes = ascending(entries.to(weight.table.dtype), weight.codes)
            graph.set_weight(name, dataclasses.replace(weight, table=table, codes=codes))
            notes[name] = {"moved": round(moved, 6)}
        told = f"{before:.3g} before training the tables, {least:.3g} after"
        told = f"error of the outputs on the calibration inputs: {told}"
        return Transformed(graph, notes, remarks=(*remarks, told))


def _layers(graph: Graph, seen: Observed) -> tuple[dict[str, CodebookWeight], list[str]]:
    """The layers with a table that may change, and why the other chosen ones stay as they are."""
    layers, remarks = {}, []
    for name in seen.chosen:
        weight = graph.stored.get(name)
        if isinstance(weight, CodebookWeight) and weight.format.learned:
            if weight.codes.numel():
                layers[name] = weight
        else:
            remarks.append(f"{name} stays as it is: it has no table of shared weights")
    return layers, remarks


class _Teaching:
    """The tables of a graph as they are trained. entries: float32, like the table of each layer."""

    def __init__(self, graph: Graph, reference: Graph, seen: Observed, layers: dict[str, CodebookWeight]) -> None:
        self._graph, self._reference, self._batches = graph, reference, seen.batches
        self._layers = layers
        self.entries = [weight.table.float().clone() for weight in layers.values()]
        # An entry at 0 is that of pruned weights.
        self._free = [entries != 0 for entries in self.entries]
        self._index = [weight.codes.reshape(len(weight.table), -1).long() for weight in layers.values()]
        # Batches, and Σ y² of one, which the first look at the error finds out.
        self._steps, self._energy = 0, 0.0

    def error(self) -> float:
        """Σ (y - ŷ)² / Σ y² over the calibration inputs."""
        total, energy, batches, count = 0.0, 0.0, 0, 0
        with torch.no_grad():
            weights = self._weights()
            for inputs, wanted in self._pairs():
                total += float((self._outputs(weights, inputs) - wanted).square().sum(dtype=torch.float64))
                energy += float(wanted.square().sum(dtype=torch.float64))
                batches, count = batches + 1, count + len(inputs)
        if not count:
            raise DataError("no calibration input reached the network", "give calibration data that is not empty")
        if not math.isfinite(total + energy):
            raise NumericsError("the outputs are NaN or infinite on the calibration data", "check the network")
        self._steps, self._energy = batches, energy / batches
        return total / energy if energy > 0 else total

    def epochs(self, config: Centroids) -> Iterator[None]:
        """Train, and pause after every epoch. Steps shrink to nothing, along a cosine."""
        units = [float(entries.abs().mean()) for entries in self.entries]
        for entries in self.entries:
            entries.requires_grad_()
        groups = [
            {"params": [entries], "lr": config.learning_rate * unit}
            for entries, unit in zip(self.entries, units, strict=True)
        ]
        optimizer = torch.optim.Adam(groups, eps=torch.finfo(torch.float32).tiny)
        steps = config.epochs * self._steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
        for _ in range(config.epochs):
            for inputs, wanted in self._pairs():
                optimizer.zero_grad()
                loss = (self._outputs(self._weights(), inputs) - wanted).square().sum() / max(self._energy, 1e-30)
                loss.backward()  # type: ignore[no-untyped-call]
                for entries, free in zip(self.entries, self._free, strict=True):
                    assert entries.grad is not None
                    entries.grad.mul_(free)
                optimizer.step()
                schedule.step()
            yield

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs, and the outputs of the network before its weights were compressed."""
        for inputs in self._batches():
            with torch.no_grad():
                wanted = self._reference.module(inputs)
            yield inputs, wanted

    def _weights(self) -> dict[str, Tensor]:
        """The weights of the tuned layers by parameter, as functions of the entries."""
        found = {}
        for (name, weight), entries, index in zip(self._layers.items(), self.entries, self._index, strict=True):
            dense = entries.gather(1, index).view_as(weight.codes)
            if weight.input_scale is not None:
                dense = dense / weight.input_scale.float()
            parameter: Tensor = self._graph.layer(name).weight  # type: ignore[assignment]
            found[f"{name}.weight"] = dense.view_as(parameter)
        return found

    def _outputs(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self._graph.module, weights, (inputs,))
        return outputs


__all__ = ["Centroids"]
