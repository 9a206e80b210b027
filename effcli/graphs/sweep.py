"""One pass over a network read as a graph: observe in one forward, compress layer by layer, write.

What `sweep` is to language models. A graph is small enough to be in memory whole; its activations are not, so that the
inputs are seen batch by batch, as sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from effcli.errors import DataError
from effcli.graphs.backward import gradients
from effcli.graphs.coupling import coupled, cut
from effcli.graphs.cutting import look_at
from effcli.graphs.editing import edit_graph
from effcli.graphs.graph import Graph
from effcli.graphs.integer import IntegerNetwork
from effcli.graphs.ledger import GraphCosts, beside_batch_norm, dense, integer_rows, table_rows, whole_rows
from effcli.graphs.open_graph import OpenGraph
from effcli.layers.contract import CutPass, Needs, NetworkPass, Observed, ParameterPass, ScalingPass, Transformed
from effcli.layers.coupling import Cut
from effcli.layers.cutting import decide, offer, rows
from effcli.layers.engine import LayerEngine, Seen, with_gradients
from effcli.layers.layer import LayerSite
from effcli.layers.network import Held
from effcli.layers.restoring import restoring
from effcli.layers.result import PassResult, Progress, check_tensor, worst
from effcli.layers.returned import Asked
from effcli.layers.selection import Choice, choose, needs_of
from effcli.layers.statistics import Gradients
from effcli.layers.survey import Survey

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep

CPU = torch.device("cpu")

Batches = Callable[[], Iterator[Tensor]]
# With labels int64 (n,), None without.
Labelled = Callable[[], Iterator[tuple[Tensor, Tensor | None]]]


def graph_sweep(
    source: Path,
    target: Path,
    step: PassStep,
    batches: Batches | None = None,
    inputs: Literal["original", "compressed"] = "original",
    reference: Path | None = None,
    progress: Progress = lambda done, total: None,
    labelled: Labelled | None = None,
    device: torch.device = CPU,
) -> PassResult:
    """Carry out `step` on the graph in `source` and write a checkpoint into `target`, a directory that exists.

    batches: the calibration inputs, float32 (n, *shape), anew on each call; inputs: whether a layer sees what the
    original layers before it return or, walking all batches through the graph node by node, the compressed ones;
    reference: the checkpoint before weights were first compressed, for passes that compare with it; `source` itself
    where none were; labelled: the same batches with their labels, for passes that ask for gradients, which are those of
    the network as it is before this pass; device: where passes over layers compute, and the graph runs for them. The
    target is a graph, or an integer network where the pass makes one.
    """
    graph = Graph.read(source)
    for name, tensor in graph.module.state_dict().items():
        check_tensor(tensor, name)
    if isinstance(step.config, ParameterPass):
        return edit_graph(graph, target, step)
    choices = choose(graph, step)
    if not step.needs:
        batches = None
    elif batches is None:
        raise DataError(f"{step.name} looks at the inputs of the layers", "give calibration data")
    if isinstance(step.config, CutPass):
        return _cut(graph.to(device), target, step, choices, batches, inputs, labelled, progress)
    if isinstance(step.config, NetworkPass):
        progress(0, len(choices))
        dense = reference if Needs.DENSE in step.needs and reference != source else None
        result = _transform(graph, target, step.name, step.config, choices, batches, dense)
        progress(len(choices), len(choices))
        return result
    unlabelled = batches or (lambda: iter(()))
    given = labelled or (lambda: ((batch, None) for batch in unlabelled()))
    engine = _compress(graph.to(device), choices, batches, inputs, given, progress)
    graph.save(target)
    result = PassResult([*map(engine.row, choices), *table_rows(graph)], engine.histograms)
    result.histograms = worst(result)
    return result


def _compress(
    graph: Graph,
    choices: Mapping[str, Choice],
    batches: Batches | None,
    inputs: Literal["original", "compressed"],
    labelled: Labelled,
    progress: Progress = lambda done, total: None,
    known: Mapping[str, Seen] | None = None,
) -> LayerEngine:
    """Hand every layer that is taken to its pass; returns the engine, which has the ledger.

    known: statistics of the inputs of layers as they are, by name, which need not be gathered again.
    """
    home, survey = OpenGraph(graph, needs_of([choices])), Survey(choices)
    needs = home.needs | survey.needs
    found: dict[str, Gradients] = {}
    if needs.gradients and batches is not None:
        taken = (choice.site for choice in choices.values() if choice.config is not None)
        found = gradients(graph, taken, labelled(), needs)
    if survey:
        choices = _surveyed(graph, choices, survey, batches, found)
    engine = LayerEngine(home, choices)
    reaching = _seen(home, engine, batches if home.needs else None, inputs, found, known or {})
    for number, (name, seen) in enumerate(reaching):
        progress(number, len(engine.taken))
        engine.compress(name, seen)
    progress(len(engine.taken), len(engine.taken))
    return engine


def _surveyed(
    graph: Graph,
    choices: Mapping[str, Choice],
    survey: Survey,
    batches: Batches | None,
    gradients: Mapping[str, Gradients],
) -> Mapping[str, Choice]:
    """The choices of every layer after a look at all of them; gradients: of the weights, where they are asked for."""
    home = OpenGraph(graph, survey.needs)
    names = [name for name in choices if name in survey]
    seen = home.observe(names, batches()) if survey.needs.observes and batches is not None else {}
    for name in names:
        survey.look(home.read(choices[name].site), with_gradients(seen.get(name, ()), gradients.get(name)))
    return survey.chosen(survey.end())


def _seen(
    home: OpenGraph,
    engine: LayerEngine,
    batches: Batches | None,
    inputs: Literal["original", "compressed"],
    gradients: Mapping[str, Gradients],
    known: Mapping[str, Seen],
) -> Iterator[tuple[str, Seen]]:
    """The layers that `engine` takes, one after the other and each once for all before it, with what reaches them.

    gradients: of the weights, where they are asked for; known: see `_compress`.
    """
    if batches is None:
        yield from ((name, ()) for name in engine.taken)
        return
    scales = any(isinstance(engine.options(name), ScalingPass) for name in engine.taken)
    found: Mapping[str, Seen] = {}
    if inputs == "original" and all(name in known for name in engine.taken):
        found = {name: known[name] for name in engine.taken}
    elif inputs == "original" or scales:
        found = home.observe(engine.taken, batches())
    seen = engine.scale({name: with_gradients(own, gradients.get(name)) for name, own in found.items()})
    del found
    if inputs == "original":
        yield from ((name, seen.pop(name)) for name in engine.taken)
        return
    seen.clear()
    engine.explain(filter(home.repeated, engine.taken), "it runs more than once; its inputs were those of the first")
    for name, own in home.walk(engine.taken, batches()):
        slopes, columns = gradients.get(name), engine.folded(name)
        # What reaches the layer stands divided by folded factors by now, and its gradients do not.
        yield name, with_gradients(own, slopes.scaled(1 / columns) if slopes and columns is not None else slopes)


def _cut(
    graph: Graph,
    target: Path,
    step: PassStep,
    choices: Mapping[str, Choice],
    batches: Batches | None,
    inputs: Literal["original", "compressed"],
    labelled: Labelled | None,
    progress: Progress,
) -> PassResult:
    """Carry out a pass that removes channels."""
    name, options = step.name, step.config
    assert isinstance(options, CutPass)
    progress(0, 1)
    offered = offer(name, options, coupled(graph), choices)
    gathered: dict[str, Seen] = {}
    seen = look_at(graph, offered, batches or (lambda: ()), labelled or (lambda: ()), gathered)
    decided = decide(options, offered, seen)
    before, restored, cuts = graph.sites(), [], list(decided.cuts)
    restore = restoring(step, before, offered, decided.cuts)
    if restore is not None:
        known = gathered if restore.needs in offered.needs.statistics else {}
        engine = _compress(graph, choose(graph, restore), batches, inputs, lambda: iter(()), known=known)
        restored = [engine.row(name) for name in engine.taken]
        # The biases that layers were given go with the same positions.
        groups = {group.name: group for group in coupled(graph)}
        cuts = [Cut(groups[one.coupled.name], one.kept) for one in cuts]
    cut(graph, cuts)
    graph.save(target)
    costs = GraphCosts(graph)

    def held(site: LayerSite) -> Held:
        return costs.held(site.name, graph.held(site))

    made = rows(before, graph.sites(), choices, held, cuts, restored)
    progress(1, 1)
    return PassResult([*made, *table_rows(graph)], remarks=list(decided.remarks))


def _transform(
    graph: Graph,
    target: Path,
    name: str,
    options: NetworkPass,
    choices: Mapping[str, Choice],
    batches: Batches | None,
    original: Path | None,
) -> PassResult:
    """Carry out a pass that takes the graph as a whole."""
    before = {name: dense(graph, choice.site).clone() for name, choice in choices.items()}
    chosen = {name: choice.config for name, choice in choices.items() if choice.config is not None}
    observed = Observed(dense=None if original is None else Graph.read(original), chosen=chosen)
    if batches is not None:
        observed = dataclasses.replace(observed, batches=batches)
    costs = GraphCosts(graph)
    compressed = set(graph.stored)
    normed = {name for name in choices if beside_batch_norm(graph, name)}
    made = _transformed(options, graph, observed)
    network = made.network
    network.save(target)
    result = PassResult(remarks=list(made.remarks), activations=list(made.activations))
    if isinstance(network, IntegerNetwork):
        rounded = {name: None if name in normed else weight for name, weight in before.items()}
        result.ledger = integer_rows(network, rounded, choices, costs, made.notes, result)
    else:
        result.ledger = whole_rows(network, choices, before, compressed, made.notes, result)
    result.histograms = worst(result)
    return result


def _transformed(options: NetworkPass, graph: Graph, seen: Observed) -> Transformed:
    """What a pass made of a graph; `PluginError` for anything else."""
    asked = Asked(options, "transform")
    made = asked.expect(options.transform(graph, seen), Transformed, "a `Transformed`")
    asked.expect(made.network, Graph | IntegerNetwork, "one with a graph or an integer network")
    for layer, notes in asked.expect(made.notes, Mapping, "notes by layer").items():
        Asked(options, "transform", layer).check_notes(notes)
    if isinstance(made.network, Graph):
        for name, tensor in made.network.module.state_dict().items():
            if tensor.is_floating_point():
                Asked(options, "transform", name).check_finite(tensor)
    return made


__all__ = ["graph_sweep"]
