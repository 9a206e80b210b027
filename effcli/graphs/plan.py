"""What a recipe would do to a network read as a graph, and what such a network consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effcli import importers
from effcli.formats import Packing
from effcli.graphs.graph import Facts, Graph, macs
from effcli.graphs.integer import IntegerNetwork, Linear, Weighted, is_integer
from effcli.graphs.integer_plan import plan_integer
from effcli.graphs.ledger import table_rows
from effcli.inputs.options import Calibration
from effcli.layers.contract import Change, Needs, NetworkPass, Pass, TrainPass
from effcli.layers.layer import LayerSite
from effcli.layers.selection import Choice, choose
from effcli.reports.report import LedgerRow
from effcli.reports.units import size
from effcli.run.plan import BASE_MEMORY, Inspection, Plan, Row, kept_remarks, size_remark
from effcli.run.recipe import Recipe

_FLOAT = 4


def make(recipe: Recipe, graph: Graph) -> Plan:
    """The plan of a recipe, its defaults filled in; raises what a run would raise over its patterns and sizes."""
    formats = {name: weight.format for name, weight in graph.stored.items()}
    before = _total(graph, formats)
    work = macs(graph)
    rows: list[Row] = []
    remarks: list[str] = []
    operations, integers, current = 0.0, None, graph
    for number, step in enumerate(recipe.passes):
        name = f"{number + 1}. {step.name}" if len(recipe.passes) > 1 else ""
        choices = choose(graph, step)
        for choice in choices.values():
            format = None if choice.config is None else choice.config.result
            if format is not None:
                formats[choice.site.name] = format
            if Change.INTEGER not in step.config.changes:
                rows.append(_row(choice.site, formats, name, choice.planned, choice.reason))
        if Change.INTEGER not in step.config.changes:
            rows += [_table(row, name) for row in table_rows(graph)]
        remarks += kept_remarks(name or step.name, choices.values())
        if isinstance(step.config, NetworkPass):
            # Whether a batch norm stays depends on which layers are compressed by then, whatever their weights.
            known: dict[str, Any] = dict.fromkeys(formats)
            chosen = {layer: choice.config for layer, choice in choices.items() if choice.config is not None}
            current = step.config.planned(Graph(current.module, graph.facts, known), chosen)
            prepared = step.config.integer(current)
            if prepared is not None:
                found, integers = plan_integer(graph, prepared, formats, name)
                rows += found
        if step.needs:
            times = _forwards(step.config, recipe.calibration)
            operations += 2.0 * recipe.calibration.samples * times * _forward_and_gram(choices, work, step.config)
    after = _total(graph, formats) if integers is None else integers
    memory = _memory(graph, recipe)
    first = [
        size_remark(before, after),
        f"memory: about {size(memory)} at the peak",
    ]
    if operations:
        what = (
            "forwards, gradients" if any(isinstance(step.config, TrainPass) for step in recipe.passes) else "forwards"
        )
        first.append(f"arithmetic: {operations / 1e9:.1f} GFLOP of {what} and Gram matrices, then the searches")
    return Plan(
        model=recipe.model,
        rows=tuple(rows),
        remarks=(*first, *remarks),
        weights=graph.weights(),
        input_bytes=before,
        output_bytes=after,
        memory_bytes=memory,
        operations=operations,
    )


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
    formats = {name: weight.format for name, weight in graph.stored.items()}
    work = macs(graph)
    rows = [_row(site, formats).model_copy(update={"macs": work[site.name]}) for site in graph.sites()]
    rows += [_table(row).model_copy(update={"status": "", "reason": ""}) for row in table_rows(graph)]
    what = f"{graph.facts.origin}: {graph.weights():,} weights"
    return _inspection(model, rows, what, graph.facts, _total(graph, formats), graph.weights())


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
    count = sum(math.prod(row.shape) for row in rows)
    what = f"integer network of {len(network.program.steps)} operations: {count:,} weights"
    return _inspection(model, rows, what, network.facts, sum(row.nbytes for row in rows), count)


def _inspection(model: str, rows: list[Row], what: str, facts: Facts, nbytes: int, count: int) -> Inspection:
    work, shape = sum(row.macs or 0 for row in rows), " x ".join(map(str, facts.shape))
    bits = 8 * nbytes / max(count, 1)
    remarks = (
        f"{what}, {work:,} multiplications for an input of {shape}",
        f"{size(nbytes)} of weights, {bits:.2f} bits per weight",
    )
    return Inspection(
        model=model, rows=tuple(rows), remarks=remarks, nbytes=nbytes, weights=count, bits_per_weight=bits
    )


def _row(site: LayerSite, formats: Mapping[str, Packing], step: str = "", status: str = "", reason: str = "") -> Row:
    format = formats.get(site.name)
    nbytes = _nbytes(site, format)
    return Row.of(site, str(format) if format else "float32", nbytes, step=step, status=status, reason=reason)


def _table(row: LedgerRow, step: str = "") -> Row:
    """A matrix that is no layer and stays as it is, such as an embedding."""
    fields = row.model_dump(include={"name", "kind", "shape", "format", "bits_per_weight", "nbytes", "reason"})
    return Row(step=step, status="keep", **fields)


def _nbytes(site: LayerSite, format: Packing | None) -> int:
    return format.nbytes(site.shape, _FLOAT) if format else site.rows * site.columns * _FLOAT


def _total(graph: Graph, formats: Mapping[str, Packing]) -> int:
    """Bytes of all tensors that a checkpoint holds; what is no layer's weight stays as it is."""
    sites = {site.parameter: site for site in graph.sites()}
    others: int = sum(
        tensor.nbytes
        for name, tensor in graph.module.state_dict().items()
        if name not in sites and not name.endswith(".num_batches_tracked")
    )
    return others + sum(_nbytes(site, formats.get(site.name)) for site in sites.values())


def _forward_and_gram(choices: Mapping[str, Choice], work: Mapping[str, int], options: Pass) -> float:
    """Multiplications of one input's forward, and of the Gram matrices of its patches for passes over layers."""
    total = float(sum(work.values()))
    if Needs.GRAM in options.needs:
        for choice in choices.values():
            site = choice.site
            # As many patches as the layer computes outputs of one channel.
            patches = work[site.name] / max(site.rows * site.columns, 1)
            total += patches * site.groups * site.columns**2
    return total


def _forwards(options: Pass, calibration: Calibration) -> float:
    """How many forwards of all calibration inputs a pass comes to; a backward is about two."""
    if not isinstance(options, TrainPass):
        return 1.0
    batch = (options.batch_size or calibration.batch_size) * options.accumulation
    per_epoch = math.ceil(calibration.samples / batch)
    epochs = options.total(per_epoch) / per_epoch
    return epochs * (3 + _teachers(options)) + (math.ceil(epochs) + 1) * (1 + _teachers(options))


def _teachers(options: TrainPass) -> int:
    """How many networks a training compares with."""
    return sum(flag in options.needs for flag in (Needs.DENSE, Needs.ORIGINAL))


def _memory(graph: Graph, recipe: Recipe) -> int:
    """Twice the weights, and for a batch the tensors alive at the busiest node, with a copy of the largest.

    A training keeps every tensor of a batch with its gradient, and of the weights a gradient, two moments of the
    optimizer, the best so far, and the networks that it compares with.
    """
    live, peak = _live_numbers(graph)
    weights, calibration = graph.weights(), recipe.calibration
    training = [step.config for step in recipe.passes if isinstance(step.config, TrainPass)]
    whole = any(Needs.DENSE in step.needs for step in recipe.passes if not isinstance(step.config, TrainPass))
    whole |= calibration.inputs == "compressed"
    count = calibration.samples if whole else calibration.batch_size
    needed = any(step.needs for step in recipe.passes)
    numbers = [2 * weights + (count * (2 * live + peak) if needed else 0)]
    shapes = graph.shapes() if training else {}
    made = [node.name for node in graph.nodes if node.op not in ("get_attr", "output")]
    every = sum(math.prod(shapes[name]) for name in made if name in shapes)
    for options in training:
        batch = options.batch_size or calibration.batch_size
        numbers.append((6 + _teachers(options)) * weights + 2 * batch * every)
    return BASE_MEMORY + max(numbers) * _FLOAT


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


__all__ = ["inspect", "make"]
