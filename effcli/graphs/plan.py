"""What a plan asks of a network read as a graph, and what such a network consists of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from effcli import importers
from effcli.formats import Dense, Packing, Quantized
from effcli.graphs.backward import classes_for
from effcli.graphs.coupling import coupled
from effcli.graphs.editing import edited
from effcli.graphs.graph import Facts, Graph, macs
from effcli.graphs.integer import IntegerNetwork, Linear, Weighted, is_integer
from effcli.graphs.integer_plan import plan_integer
from effcli.graphs.ledger import table_rows
from effcli.inputs.options import Calibration
from effcli.layers.contract import AttachPass, CutPass, Needs, NetworkPass, ParameterPass, TrainPass
from effcli.layers.cutting import offer
from effcli.layers.layer import LayerSite
from effcli.layers.selection import Choice, Layered, needs_of
from effcli.reports.units import count, size
from effcli.run.plan import FLOAT, Effort, Inspection, Row, forwards
from effcli.run.recipe import PassStep

_DENSE = Dense(torch.float32)
# Forwards that take as long as a backward.
_BACKWARD = 2
# Numbers that the optimizer keeps of each that it trains.
_MOMENTS = 2


class PlannedGraph:
    """See `effcli.run.plan.Planned`. calibration: of the recipe, whose inputs go through the network."""

    counted: ClassVar[tuple[str, float]] = ("GFLOP", 1e9)
    at_a_time: ClassVar[str] = ""

    def __init__(self, graph: Graph, calibration: Calibration) -> None:
        self._graph = graph
        self._calibration = calibration
        held = {site.name: graph.held(site) for site in graph.sites()}
        self._formats: dict[str, Packing] = {
            name: weight.format if isinstance(weight, Quantized) else _DENSE for name, weight in held.items()
        }
        # Bytes of the layers that no step has taken.
        self._stored = {name: weight.nbytes for name, weight in held.items()}
        # The layers whose columns the last step that cuts may remove.
        self._readers: list[LayerSite] = []
        # With the modules that the steps so far leave.
        self._current = graph
        # The rows and the bytes of the integer network, once it is one.
        self._integer: tuple[list[Row], int] | None = None

    @property
    def weights(self) -> int:
        return self._graph.weights()

    def layered(self, step: PassStep) -> Layered:
        return edited(self._graph, step) if isinstance(step.config, ParameterPass) else self._graph

    def take(self, step: PassStep, choices: Mapping[str, Choice]) -> None:
        if isinstance(step.config, CutPass):
            offered = offer(step.name, step.config, coupled(self._current), choices)
            self._readers = [site for group in offered.groups for _, site in offered.readers(group)]
            if offered.needs.gradients:
                classes_for("gradients need a loss", self._graph, "use a pass that needs no gradients")
        for name, choice in choices.items():
            self._formats[name] = choice.leaves(self._formats[name], _DENSE)
            if choice.config is not None:
                self._stored.pop(name, None)
        if isinstance(step.config, NetworkPass):
            # Whether a batch norm stays depends on which layers are compressed by then, whatever their weights.
            known: dict[str, Any] = {name: None for name, format in self._formats.items() if not format.floating}
            chosen = {name: choice.config for name, choice in choices.items() if choice.config is not None}
            self._current = step.config.planned(Graph(self._current.module, self._graph.facts, known), chosen)
            prepared = step.config.integer(self._current)
            if prepared is not None:
                self._integer = plan_integer(self._graph, prepared, self._formats)

    @property
    def nbytes(self) -> int:
        """Of all tensors that a checkpoint holds; what is no layer's weight stays as it is."""
        if self._integer is not None:
            return self._integer[1]
        sites = {site.parameter: site for site in self._graph.sites()}
        others: int = sum(
            tensor.nbytes
            for name, tensor in self._graph.module.state_dict().items()
            if name not in sites and not name.endswith(".num_batches_tracked")
        )
        return others + sum(map(self._nbytes, sites.values()))

    def _nbytes(self, site: LayerSite) -> int:
        known = self._stored.get(site.name)
        return self._formats[site.name].nbytes(site.shape, FLOAT) if known is None else known

    def rows(self, choices: Iterable[Choice]) -> list[Row]:
        if self._integer is not None:
            return self._integer[0]
        return [self._row(choice) for choice in choices] + list(map(Row.other, table_rows(self._graph)))

    def _row(self, choice: Choice) -> Row:
        format = str(self._formats[choice.site.name])
        return Row.of(choice.site, format, self._nbytes(choice.site), status=choice.planned, reason=choice.reason)

    def remarks(self, step: PassStep, name: str) -> list[str]:
        options = step.config
        if isinstance(options, AttachPass) and options.trains_weights and _norms(self._current) < _norms(self._graph):
            # ResNet-56 cut to half: 71.7 % after training without its batch norms, 86.5 % with them.
            return [f"{name}: batch norms keep a training stable, and `fold` took them away: put `fold` behind it"]
        return []

    @property
    def layout(self) -> str:
        if self._graph.facts.config is None:
            return ""
        beside = "--export safetensors:dequantize=true writes a classifier for transformers"
        if self._integer is not None:
            beside = "--export onnx writes what onnxruntime runs"
        return "\n".join(
            (
                "the output will load with effcli.load, not with transformers",
                "  why: it is a graph",
                f"  beside it: {beside}",
            )
        )

    def effort(self, step: PassStep, choices: Mapping[str, Choice]) -> Effort:
        options, samples = step.config, self._calibration.samples
        forward = sum(self.macs.values())
        operations, numbers, disk = 0.0, 2 * self.weights, 0
        if forwards(step, choices):
            operations = self._forwards(step, choices) * forward + self._gram(step, choices)
            numbers = self._passing(step)
        if isinstance(options, TrainPass):
            numbers, disk = max(numbers, self._training(options)), self._snapshots(options, choices)
        needs = needs_of([choices]).gradients
        if needs:
            operations += (1 + _BACKWARD) * forward
            # Of each weight, with a sum for the sample at hand.
            sums = (len(needs) + 1) * _numbers(choices)
            # Squares are of single inputs.
            batch = 1 if Needs.SQUARED_GRADIENTS in needs else self._calibration.batch_size
            backward = 2 * self.weights + _numbers(choices) + 2 * batch * self._every
            numbers = sums + max(numbers, backward)
        return Effort(2.0 * samples * operations, numbers * FLOAT, disk)

    @cached_property
    def macs(self) -> Mapping[str, int]:
        """Multiplications of one input, by layer."""
        return macs(self._graph)

    def _gram(self, step: PassStep, choices: Mapping[str, Choice]) -> float:
        """Multiplications of one input for the Gram matrices of its patches, as often as they are asked for."""
        restores = isinstance(step.config, CutPass) and step.config.restoring is not None
        times, total = (Needs.GRAM in step.needs) + restores - self._shares(step), 0.0
        sites = self._readers if isinstance(step.config, CutPass) else [choice.site for choice in choices.values()]
        for site in sites if times else ():
            # As many patches as the layer computes outputs of one channel.
            patches = self.macs[site.name] / max(site.rows * site.columns, 1)
            total += patches * site.groups * site.columns**2
        return times * total

    def _shares(self, step: PassStep) -> bool:
        """Whether a pass that cuts ranks channels and restores their readers by the same statistics."""
        restores = isinstance(step.config, CutPass) and step.config.restoring is not None
        return restores and Needs.GRAM | Needs.MEANS in step.needs and self._calibration.inputs == "original"

    def _forwards(self, step: PassStep, choices: Mapping[str, Choice]) -> float:
        """How many forwards of all calibration inputs a pass comes to."""
        options = step.config
        if not isinstance(options, TrainPass):
            return forwards(step, choices) - self._shares(step)
        samples = self._calibration.samples
        trained, measured = samples - options.held_out(samples), options.measured_on(samples) / samples
        per_epoch = options.per_epoch(samples, self._calibration.batch_size)
        epochs = options.total(per_epoch) / per_epoch
        steps = epochs * trained / samples * (1 + _BACKWARD + _teachers(options))
        return steps + measured * (math.ceil(epochs) + 1) * (1 + _teachers(options))

    def _passing(self, step: PassStep) -> int:
        """Numbers in memory: twice the weights, and for a batch the tensors alive at the busiest node.

        With a copy of the largest of these.
        """
        live, peak = self._live
        whole = Needs.DENSE in step.needs and not isinstance(step.config, TrainPass)
        whole |= self._calibration.inputs == "compressed"
        count = self._calibration.samples if whole else self._calibration.batch_size
        return 2 * self.weights + count * (2 * live + peak)

    def _training(self, options: TrainPass) -> int:
        """Numbers in memory: every tensor of a batch with its gradient, and of the weights a gradient and more.

        That is two moments of the optimizer, the best so far, and the networks that the training compares with.
        """
        batch = options.batch_size or self._calibration.batch_size
        return (6 + _teachers(options)) * self.weights + 2 * batch * self._every

    def _snapshots(self, options: TrainPass, choices: Mapping[str, Choice]) -> int:
        """Bytes on the disk of two snapshots, for one counts until the next is whole.

        Each holds what a step may change as it is and at its best, and the moments of what is trained: at most the
        weights of the layers, where it is something else that makes these.
        """
        state = self._graph.module.state_dict()
        parameters = {name for name, _ in self._graph.module.named_parameters()}
        buffers: int = sum(tensor.nbytes for name, tensor in state.items() if name not in parameters)
        kept = 2 if options.keep_best else 1
        return 2 * (kept * buffers + (kept + _MOMENTS) * _numbers(choices) * FLOAT)

    @cached_property
    def _live(self) -> tuple[int, int]:
        return _live_numbers(self._graph)

    @cached_property
    def _every(self) -> int:
        """Numbers of all tensors that one input makes."""
        shapes = self._graph.shapes()
        made = [node.name for node in self._graph.nodes if node.op not in ("get_attr", "output")]
        return sum(math.prod(shapes[name]) for name in made if name in shapes)


def inspect(
    model: str,
    source: str | Path,
    weights: Path | None = None,
    trust_remote_code: bool = False,
    shape: tuple[int, ...] | None = None,
) -> Inspection:
    """What a network consists of that is or becomes a graph; `source` is where `model` was found."""
    if isinstance(source, Path) and is_integer(source):
        return _inspect_integer(model, IntegerNetwork.read(source))
    graph = importers.read(source, weights=weights, shape=shape, trust_remote_code=trust_remote_code)
    network = PlannedGraph(graph, Calibration())
    rows = [
        row.model_copy(update={"macs": network.macs.get(row.name)})
        for row in network.rows(Choice(site, None) for site in graph.sites())
    ]
    what = f"{graph.facts.origin}: {count(graph.weights(), 'weight')}"
    return _inspection(model, rows, what, graph.facts, network.nbytes, graph.weights())


def _inspect_integer(model: str, network: IntegerNetwork) -> Inspection:
    rows = []
    for step in network.program.steps:
        if isinstance(step, Weighted):
            weight, table = network.array(step, "weight"), network.codebook(step)
            outputs = math.prod(network.program.values[step.output].shape)
            rows.append(
                Row(
                    name=step.layer,
                    kind="linear" if isinstance(step, Linear) else "conv",
                    shape=(len(weight), weight[0].size),
                    format=f"{'int' if table is None else 'kmeans'}{step.weight_bits} integer",
                    bits_per_weight=step.weight_bits,
                    nbytes=math.ceil(weight.size * step.weight_bits / 8) + (0 if table is None else table.nbytes),
                    macs=outputs * weight[0].size,
                )
            )
    weights = sum(math.prod(row.shape) for row in rows)
    operations = count(len(network.program.steps), "operation")
    what = f"integer network of {operations}: {count(weights, 'weight')}"
    return _inspection(model, rows, what, network.facts, sum(row.nbytes for row in rows), weights)


def _inspection(model: str, rows: list[Row], what: str, facts: Facts, nbytes: int, count: int) -> Inspection:
    work, shape = sum(row.macs or 0 for row in rows), " x ".join(map(str, facts.shape))
    bits = 8 * nbytes / max(count, 1)
    remarks = (
        f"{what}, {work:,} multiplications for an input of {shape}",
        f"{size(nbytes)} of weights, {bits:.2f} bits per weight",
    )
    return Inspection.of(model, rows, remarks, nbytes, count)


def _numbers(choices: Mapping[str, Choice]) -> int:
    """How many weights the layers have that are taken."""
    sites = [choice.site for choice in choices.values() if choice.config is not None]
    return sum(site.rows * site.columns for site in sites)


def _norms(graph: Graph) -> int:
    """How many batch norms a graph has."""
    return sum(name.endswith("running_mean") for name in graph.module.state_dict())


def _teachers(options: TrainPass) -> int:
    """How many networks a training compares with."""
    return sum(flag in options.needs for flag in (Needs.DENSE, Needs.ORIGINAL))


def _live_numbers(graph: Graph) -> tuple[int, int]:
    """Numbers alive at once at the busiest node for one input, and those of the largest tensor."""
    shapes = {name: math.prod(shape) for name, shape in graph.shapes().items()}
    nodes = graph.nodes
    last = {user: index for index, node in enumerate(nodes) for user in node.all_input_nodes}
    alive: dict[str, int] = {}
    most = 0
    for index, node in enumerate(nodes):
        alive[node.name] = shapes.get(node.name, 0)
        most = max(most, sum(alive.values()))
        for used in node.all_input_nodes:
            if last.get(used) == index:
                alive.pop(used.name, None)
    return most, max(shapes.values(), default=0)


__all__ = ["PlannedGraph", "inspect"]
