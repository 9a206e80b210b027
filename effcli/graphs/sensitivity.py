"""What changing each layer of a network read as a graph alone costs.

`gram` needs one forward of the calibration inputs, `fisher` two and a backward. The loss is that of
classes drawn from the network's own predictions, and an input is one sample of its slope; of a network that is no
classifier, whose outputs count as normally distributed, the gradient is normal noise of the outputs' own size. `loss`
puts one changed layer at a time into the network and compares its outputs with the original's: KL(original ‖ this) of
a classifier, else the relative squared error.

A pass that fits weights to inputs errs less on those inputs than on others. It is given every second input, and
`fisher` and `loss` look at the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effcli.graphs.backward import gradients
from effcli.graphs.coupling import coupled
from effcli.graphs.cutting import look_at
from effcli.graphs.graph import Graph, class_count, macs
from effcli.graphs.open_graph import OpenGraph
from effcli.inputs.images import Inputs
from effcli.layers.contract import Members, Needs
from effcli.layers.coupling import Coupled
from effcli.layers.cutting import Offered
from effcli.layers.engine import LayerEngine, with_gradients
from effcli.layers.result import Progress, check_tensor
from effcli.layers.selection import Choice, choose, needs_of
from effcli.layers.statistics import Gradients
from effcli.platform.rehearsal import few
from effcli.reports.sensitivity import Unit, Way
from effcli.search.costs import Cost, Probe, Trial, steadied
from effcli.search.journal import SearchJournal

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep

Batches = Callable[[], Iterator[Tensor]]
Labelled = Callable[[], Iterator[tuple[Tensor, Tensor | None]]]
_SEED = 0


def layer_costs(
    source: Path,
    variants: Sequence[Mapping[str, Choice]],
    batches: Batches,
    way: Way,
    progress: Progress = lambda done, total: None,
    journal: SearchJournal | None = None,
    labelled: Labelled | None = None,
) -> list[dict[str, Cost]]:
    """The cost of each layer that `variants` choose, one mapping by name for each variant.

    variants: every layer with its options; batches: the calibration inputs, float32 (n, *shape), anew
    on each call; journal: what an earlier try has found already, by variant, or of all at once where `way` is fisher;
    labelled: the same batches with their labels, for passes that ask for gradients.
    """
    graph = Graph.read(source)
    for name, tensor in graph.module.state_dict().items():
        check_tensor(tensor, name)
    given = measured = batches
    needs, taught = needs_of(variants), labelled or partial(_unlabelled, batches)
    if way != "gram" and needs and _several(batches):
        given, measured = (partial(_inputs_of, partial(_every_second, taught, first)) for first in (0, 1))
        taught = partial(_every_second, taught, 0)
    slopes: dict[str, Gradients] = {}
    if needs.gradients:
        taken = (choice.site for choice in variants[0].values() if choice.config is not None)
        slopes = gradients(graph, taken, taught(), needs)

    # A layer with the options of a variant is a step; what trials do to the outputs is measured in one.
    layers = sum(choice.config is not None for choice in variants[0].values())
    total = len(variants) * layers + {"gram": 0, "fisher": 1, "loss": len(variants)}[way]
    done = 0

    def tick(steps: int = 1) -> None:
        nonlocal done
        done += steps
        progress(done, total)

    def tried(number: int) -> dict[str, Trial]:
        tick(0)
        return _trials(Graph.read(source), variants[number], given, slopes, tick)

    def priced(number: int) -> list[dict[str, Cost]]:
        trials = tried(number)
        if way == "gram":
            return [{name: trial.costing(trial.output_error) for name, trial in trials.items()}]
        costs = [_costs(trials, _divergences(graph, trials, measured))]
        tick()
        return costs

    def predicted() -> list[dict[str, Cost]]:
        trials = [tried(number) for number in range(len(variants))]
        found, samples = _predictions(graph, trials, measured)
        return steadied([_costs(made, own) for made, own in zip(trials, found, strict=True)], 2 / max(samples, 1))

    if way == "fisher":
        costs = _once(journal, "fisher", len(variants), predicted)
    else:
        numbers = range(len(variants))
        costs = [_once(journal, f"variant-{number}", 1, partial(priced, number))[0] for number in numbers]
    progress(total, total)
    return costs


def _once(
    journal: SearchJournal | None, name: str, variants: int, price: Callable[[], list[dict[str, Cost]]]
) -> list[dict[str, Cost]]:
    """The costs that the journal has under `name`, else what `price` finds, which is recorded there."""
    found = None if journal is None else journal.costs(name, variants)
    if found is not None:
        return list(found)
    costs = price()
    if journal is not None:
        journal.record_costs(name, costs)
    return costs


class PricedGraph:
    """See `effcli.run.network.Priced`."""

    def __init__(self, source: Path, data: Inputs, batch_size: int) -> None:
        self._graph = Graph.read(source)
        self.unit: Unit = "nats" if class_count(self._graph) is not None else "relative squared error"
        self.weights = self._graph.weights()
        self.samples = self.inputs = len(data)
        self.remarks = data.remarks
        self._source = source
        self._data = data
        self._batch_size = batch_size
        self.macs: Mapping[str, int] = macs(self._graph)

    def choose(self, step: PassStep) -> dict[str, Choice]:
        return choose(self._graph, step)

    def itemsize(self, choice: Choice) -> int:
        return 4

    def coupled(self) -> Sequence[Coupled]:
        return coupled(self._graph)

    def look_at(self, offered: Offered, folder: Path) -> Members:
        return look_at(self._graph, offered, self._batches, self._labelled)

    def extent(self, parameter: str) -> tuple[int, int]:
        found = self._graph.module.state_dict()[parameter]
        return found.numel(), found.nbytes

    def _labelled(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        count = -(-len(self._data) // self._batch_size)
        return few(self._data.batches(self._batch_size), count)

    def _batches(self) -> Iterator[Tensor]:
        return (inputs for inputs, _ in self._labelled())

    def costs(
        self,
        variants: Sequence[Mapping[str, Choice]],
        way: Way,
        work: Path,
        progress: Progress,
        journal: SearchJournal | None,
    ) -> list[dict[str, Cost]]:
        return layer_costs(self._source, variants, self._batches, way, progress, journal, self._labelled)


def _costs(trials: Mapping[str, Trial], costs: Mapping[str, float]) -> dict[str, Cost]:
    return {name: trial.costing(costs[name]) for name, trial in trials.items()}


def _several(batches: Batches) -> bool:
    return sum(len(batch) for batch in islice(batches(), 2)) > 1


def _unlabelled(batches: Batches) -> Iterator[tuple[Tensor, Tensor | None]]:
    return ((inputs, None) for inputs in batches())


def _inputs_of(labelled: Labelled) -> Iterator[Tensor]:
    return (inputs for inputs, _ in labelled())


def _every_second(labelled: Labelled, first: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Every second input from number `first` on, in batches as they come."""
    before = 0
    for inputs, labels in labelled():
        part = slice((first - before) % 2, None, 2)
        before += len(inputs)
        if len(inputs[part]):
            yield inputs[part], None if labels is None else labels[part]


def _trials(
    graph: Graph,
    choices: Mapping[str, Choice],
    batches: Batches,
    slopes: Mapping[str, Gradients],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Trial]:
    """What becomes of every layer, with the options of one variant.

    slopes: gradients of the weights, where they are asked for; tick: called for each layer.
    """
    probe = Probe(keep_weights=True)
    home = OpenGraph(graph, needs_of([choices]) | Needs.GRAM)
    engine = LayerEngine(home, choices, probe.apply)
    probe.factors = home.factors.of
    with torch.no_grad():
        observed = home.observe(engine.taken, batches())
        seen = engine.scale({name: with_gradients(own, slopes.get(name)) for name, own in observed.items()})
        for name in engine.taken:
            engine.compress(name, seen.pop(name))
            tick()
    return probe.stored(engine.row)


def _divergences(graph: Graph, trials: Mapping[str, Trial], batches: Batches) -> dict[str, float]:
    """How far the outputs move with each trial's weight in its layer, all other layers as they are."""
    classifier = class_count(graph) is not None
    sums = dict.fromkeys(trials, 0.0)
    whole = 0.0
    for batch in batches():
        original = graph.run(batch)
        whole += len(batch) if classifier else float(original.double().square().sum())
        for name, trial in trials.items():
            with _with_trial(graph.layer(name), trial):
                sums[name] += _divergence(original, graph.run(batch), classifier)
    # Outputs that are all 0 do not move relative to anything.
    return {name: 0.0 if whole == 0 else total / whole for name, total in sums.items()}


@contextmanager
@torch.no_grad()
def _with_trial(layer: nn.Module, trial: Trial) -> Iterator[None]:
    """A layer that has the weight and the bias of a trial in between."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor) and trial.weight is not None
    before = weight.detach().clone()
    weight.copy_(trial.weight.reshape(weight.shape))
    if trial.shift is not None:
        layer.bias = nn.Parameter(bias + trial.shift if isinstance(bias, Tensor) else trial.shift)
    yield
    weight.copy_(before)
    layer.bias = bias


def _divergence(original: Tensor, other: Tensor, classifier: bool) -> float:
    """Sum over inputs of KL(original ‖ other) for logits (n, classes), else of the squared difference."""
    if not classifier:
        return float((original.double() - other.double()).square().sum())
    mine, others = original.double().log_softmax(1), other.double().log_softmax(1)
    probability = mine.exp()
    # A class that the original rules out counts nothing, whatever the other thinks of it.
    return float(torch.where(probability > 0, probability * (mine - others), 0.0).sum())


def _predictions(
    graph: Graph, variants: Sequence[Mapping[str, Trial]], batches: Batches
) -> tuple[list[dict[str, float]], int]:
    """Half the mean squared slope of the loss along the error of each trial, by variant, and the number of inputs."""
    classifier = class_count(graph) is not None
    generator = torch.Generator().manual_seed(_SEED)
    errors = [{name: _error(graph, name, trial) for name, trial in trials.items()} for trials in variants]
    slopes: list[dict[str, Tensor]] = [{} for _ in variants]
    squares = [dict.fromkeys(trials, 0.0) for trials in variants]
    count = size = 0

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # The first layers depend on nothing that has a gradient.
            output = output if output.requires_grad else output.detach().requires_grad_()

            def pulled(gradient: Tensor) -> None:
                for layers, sums in zip(errors, slopes, strict=True):
                    with torch.no_grad():
                        slope = (gradient * layers[name](*args)).reshape(size, -1).sum(1, dtype=torch.float64)
                    sums[name] = sums[name] + slope if name in sums else slope

            output.register_hook(pulled)  # type: ignore[no-untyped-call]
            return output

        return hook

    handles = [graph.layer(name).register_forward_hook(watch(name)) for name in errors[0]]
    try:
        for batch in batches():
            size = len(batch)
            with torch.enable_grad():
                outputs = graph.module(batch)
            values = outputs.detach()
            if classifier:
                pull = values.softmax(1)
                drawn = torch.multinomial(pull, 1, generator=generator)
                pull = pull.scatter_add(1, drawn, torch.full_like(drawn, -1, dtype=pull.dtype))
            else:
                # Chosen so that half the squared projection is, on average, the relative squared error.
                energy = values.flatten(1).square().sum(1).mean().clamp(min=torch.finfo(values.dtype).tiny)
                pull = torch.randn(values.shape, generator=generator) * (2 / energy).sqrt()
            outputs.backward(pull)
            count += size
            for totals, sums in zip(squares, slopes, strict=True):
                for name, slope in sums.items():
                    totals[name] += float(slope.square().sum())
                sums.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [{name: 0.5 * total / max(count, 1) for name, total in totals.items()} for totals in squares], count


def _error(graph: Graph, name: str, trial: Trial) -> nn.Module:
    """A layer that computes how far a trial moves the outputs of layer `name`."""
    moved = copy.deepcopy(graph.layer(name)).requires_grad_(False)
    weight = moved.weight
    assert trial.weight is not None and isinstance(weight, Tensor)
    error = trial.weight.reshape(weight.shape) - weight
    for parameter in moved.parameters():
        parameter.zero_()
    weight.copy_(error)
    if trial.shift is not None:
        moved.bias = nn.Parameter(trial.shift, requires_grad=False)
    return moved


__all__ = ["PricedGraph", "layer_costs"]
