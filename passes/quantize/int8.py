"""Static int8: a network of integers alone, with ranges from calibration inputs (arXiv:1712.05877, arXiv:1806.08342).

Batch norms are folded, every activation gets the range that an observer chooses, weights one scale per output channel.
Rounded weights and activations shift the mean of a layer's outputs; bias correction (arXiv:1906.04721, section 4.2)
takes the shift out again, layer after layer, by running the integer network itself on calibration inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, fx, nn

from effcli.errors import DataError
from effcli.graphs import executor
from effcli.graphs.fusion import PROBABILITIES, covered, fuse, hoist_activations, probabilities
from effcli.graphs.graph import Graph, where
from effcli.graphs.integer import Array, IntegerNetwork, Weighted
from effcli.graphs.lowering import check, lower
from effcli.graphs.rewriting import count_padding, decompose_attention, select_before_permuting
from effcli.layers.contract import Change, Needs, NetworkPass, Observed, Transformed
from effcli.layers.ranges import Method, Observer, Range
from effcli.passes.quantize._fold import fold_batch_norms

# Inputs whose means correct the biases, and the bytes that one value of all of them may take.
_CORRECTING = 256
_BYTES = 1 << 26
# Inputs that the network carries, for exports to be compared on.
_PROBE = 16
# Inputs on which integers are compared with floating numbers, and the decibels below which a signal is lost.
_COMPARED = 4
_COLLAPSED = 10
# How many times wider than its numbers a tensor may become by what is filled in around them without a remark.
_FAR = 4


class Int8(NetworkPass):
    """An `int8` step, the last of a run: what it writes is no longer a network of floating-point layers."""

    rare: ClassVar[tuple[str, ...]] = ("percentile", "range")

    changes: ClassVar[Change] = Change.INTEGER

    observer: Method = Field(
        "least_squares",
        description="How the range of an activation is chosen; the input's is always all that was seen.",
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="Of the values below the upper end, for the observer `percentile`."
    )
    range: Literal["minmax", "least_squares"] = Field("minmax", description="How the range of the weights is chosen.")
    bias_correction: bool = Field(True, description="Undo the shift of each channel's mean in the biases.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for key in ("ignore", "layers"):
            if getattr(self, key):
                raise ValueError(f"{key} has no meaning here: a network of integers is one throughout")
        return self

    @property
    def needs(self) -> Needs:
        return Needs.INPUTS

    def integer(self, graph: Graph) -> Graph:
        """As a plan needs it, which lowers it with whatever ranges."""
        return prepare(graph)[0]

    def transform(self, graph: Graph, seen: Observed) -> Transformed:
        """The integer network of `graph`, with a note for each layer and the range of each activation."""
        prepared, remarks = prepare(graph)
        check(prepared)
        statistics = observe(prepared, seen.batches())
        return quantize(self, prepared, statistics, remarks)


def prepare(graph: Graph) -> tuple[Graph, tuple[str, ...]]:
    """A copy of `graph` as it will be lowered, batch norms folded, attention decomposed, and remarks."""
    prepared = graph.copy()
    _, remarks = fold_batch_norms(prepared)
    decompose_attention(prepared)
    count_padding(prepared)
    select_before_permuting(prepared)
    hoist_activations(prepared)
    return prepared, remarks


@dataclass
class Observations:
    """What one pass over the calibration inputs leaves.

    observers: by tensor, for one tensor of each group that shares a scale; inputs: the first inputs, float32
    (n, *shape); means: of the outputs of each layer's node on these inputs, float64 (out,).
    """

    observers: dict[str, Observer]
    inputs: Tensor
    means: dict[str, NDArray[np.float64]] = field(default_factory=dict)


def observe(graph: Graph, batches: Iterator[Tensor]) -> Observations:
    """Run `graph` on the calibration inputs and observe every tensor that needs a range. `DataError` without inputs."""
    fusion = fuse(graph)
    groups = {name: fusion.groups[name] for name in fusion.roots}
    observers = {group: Observer(name) for name, group in reversed(groups.items())}
    largest = max(math.prod(shape) for shape in graph.shapes().values())
    wanted = max(1, min(_CORRECTING, _BYTES // largest))
    sums: dict[str, Tensor] = {}
    kept: list[Tensor] = []
    left = wanted

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in groups:
                observers[groups[n.name]].add(value)
            module = graph.module_of(n)
            if left and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                axis = value.ndim - 1 if isinstance(module, nn.Linear) else 1
                others = [other for other in range(value.ndim) if other != axis]
                part = value[:left].double()
                numbers = part.numel() / part.shape[0] / part.shape[axis]
                sums[n.name] = sums.get(n.name, 0) + part.sum(others) / numbers
            return value

    watcher = Watcher(graph.module)
    # Errors name the node already.
    watcher.extra_traceback = False
    for batch in batches:
        if not len(batch):
            continue
        with torch.inference_mode():
            watcher.run(batch)
        kept.append(batch[:left].clone())
        left -= len(kept[-1])
    if not kept:
        raise DataError("there are no calibration inputs", "give the pass inputs of the network's own kind")
    inputs = torch.cat(kept)
    means = {name: (total / len(inputs)).numpy() for name, total in sums.items()}
    return Observations(observers, inputs, means)


def quantize(config: Int8, graph: Graph, statistics: Observations, remarks: tuple[str, ...] = ()) -> Transformed:
    """The integer network of a prepared `graph`."""
    ranges: dict[str, Range] = {}
    activations = []
    fusion = fuse(graph)
    inputs = fusion.groups[graph.input.name]
    for group, observer in statistics.observers.items():
        if group in fusion.grids:
            grid = fusion.grids[group]
            if grid == PROBABILITIES:
                # Twice what was seen, since other inputs may be more decided.
                grid = probabilities(fusion.covering(group, 0.0, 2 * observer.high)[1])
            ranges[group] = covered(grid)
            activations.append(observer.row(ranges[group], "demanded"))
            continue
        # What is clipped of the input no layer can restore, and pixels from 0 to 255 become codes without any error.
        method: Method = "minmax" if group == inputs else config.observer
        seen = observer.range_of(method, config.percentile)
        ranges[group] = fusion.covering(group, *seen)
        activations.append(observer.row(ranges[group], method))
        if _width(ranges[group]) > _FAR * _width(seen):
            filled = ", ".join(f"{fill:g}" for pad, fill in fusion.fills.items() if fusion.groups[pad.name] == group)
            remarks += (
                f"{observer.name} is padded with {filled}, far outside of {seen[0]:.4g} to {seen[1]:.4g} which it has: "
                "its codes cover both, so its own numbers are coarse",
            )
    lowered = lower(graph, ranges, config.range == "least_squares")
    notes = {layer: dict(note) for layer, note in lowered.notes.items()}
    if config.bias_correction:
        for layer, shift in correct_biases(lowered.network, statistics).items():
            notes[layer]["bias_shift"] = round(shift, 3)
    remarks += collapses(graph, lowered.network, statistics.inputs[:_COMPARED])
    lowered.network.probe = lowered.network.quantize(statistics.inputs[:_PROBE].numpy())
    return Transformed(lowered.network, notes, tuple(activations), (*remarks, *lowered.remarks))


def _width(found: Range) -> float:
    return found[1] - found[0]


def collapses(graph: Graph, network: IntegerNetwork, inputs: Tensor) -> tuple[str, ...]:
    """Remarks that name the steps which lose the signal that still reached them, on a few calibration inputs."""
    program = network.program
    codes = executor.run(network, network.quantize(inputs.numpy()), keep=True)
    decibels = {program.input: math.inf}

    class Comparer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            known = program.values.get(n.name)
            if known is not None and n.op != "get_attr" and tuple(value.shape) == codes[n.name].shape:
                found = (codes[n.name].astype(np.float64) - known.zero) * known.scale
                exact = value.double().numpy()
                # Padding with -inf, for which the lowest code stands.
                finite = np.isfinite(exact)
                exact, found = exact[finite], found[finite]
                error, signal = float(np.square(found - exact).sum()), float(np.square(exact).sum())
                decibels[n.name] = 10 * math.log10(signal / error) if error and signal else math.inf
            return value

    with torch.inference_mode():
        Comparer(graph.module).run(inputs)
    fusion = fuse(graph)
    # The node that computes, whose activation may give the tensor its name.
    nodes = {fusion.result(node).name: node for node in graph.nodes if node not in fusion.absorbed}
    remarks = []
    for step in program.steps:
        before = min((decibels[name] for name in step.inputs), default=math.inf)
        after = decibels.setdefault(step.output, before)
        if after < _COLLAPSED <= before:
            remarks.append(
                f"{where(nodes[step.output])} loses its signal in 8 bits: {after:.0f} dB of signal to noise are left "
                f"on calibration inputs, {before:.0f} dB reached it"
            )
    return tuple(remarks)


def correct_biases(network: IntegerNetwork, statistics: Observations) -> dict[str, float]:
    """Change the biases of `network`, in place, so that every channel has the mean it had; layer after layer.

    Returns the largest change of each layer in steps of its output.
    """
    program = network.program
    values = {program.input: network.quantize(statistics.inputs.numpy())}
    last = {name: index for index, step in enumerate(program.steps) for name in step.inputs}
    shifts: dict[str, float] = {}
    for index, step in enumerate(program.steps):
        if isinstance(step, Weighted) and step.name in statistics.means:
            shift = _correct(network, step, values[step.inputs[0]], statistics.means[step.name])
            shifts[step.layer] = max(shift, shifts.get(step.layer, 0.0))
        values[step.output] = executor.execute(network, step, values)
        for name in set(step.inputs):
            if last[name] == index:
                del values[name]
    return shifts


def _correct(network: IntegerNetwork, step: Weighted, codes: Array, mean: NDArray[np.float64]) -> float:
    """Correct one bias to the mean (out,) that the layer's outputs had; the largest change in steps of its output."""
    output = network.program.values[step.output]
    ratio = network.array(step, "multiplier") * 2.0 ** -network.array(step, "shift").astype(np.float64)
    found = executor.mean_accumulator(network, step, codes)
    change = mean / output.scale - found * ratio
    # A channel that the multiplier silences has nothing to be corrected.
    units = np.divide(change, ratio, out=np.zeros_like(change), where=ratio > 0)
    bias = network.array(step, "bias")
    limit = 2.0**30
    corrected = np.rint(np.clip(bias + units, -limit, limit))
    network.arrays[f"{step.name}.bias"] = corrected.astype(np.int32)
    return float(np.abs(change).max(initial=0))
