"""What quantizing each layer of a network read as a graph alone costs.

`gram` needs one forward of the calibration inputs, `fisher` a forward and a backward. The loss is that of classes drawn
from the network's own predictions; of a network that is no classifier, whose outputs count as normally distributed,
the gradient is normal noise of the outputs' own size. `loss` puts one quantized layer at a time into the network and
compares its outputs with the original's: KL(original ‖ this) of a classifier, else the relative squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from effcli.contract import Scope
from effcli.graphs.graph import Graph, class_count
from effcli.graphs.sweep import GraphWork
from effcli.probe import Cost, Probe, SquaredGradients, Trial
from effcli.reports.sensitivity import Way
from effcli.selection import Choice
from effcli.swept import Progress, check_tensor

Batches = Callable[[], Iterator[Tensor]]
_SEED = 0


def layer_costs(
    source: Path,
    module: ModuleType,
    variants: Sequence[Mapping[str, Choice]],
    batches: Batches,
    way: Way,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Cost]]:
    """The cost of each layer that `variants` choose, one mapping by name for each variant.

    module: the pass; variants: every layer with its options; batches: the calibration inputs, float32 (n, *shape), anew
    on each call.
    """
    graph = Graph.read(source)
    for name, tensor in graph.module.state_dict().items():
        check_tensor(tensor, name)
    gradients = _squared_gradients(graph, variants[0], batches) if way == "fisher" else {}
    found = []
    for number, choices in enumerate(variants):
        progress(number, len(variants))
        trials = _trials(Graph.read(source), module, choices, batches)
        divergences = _divergences(graph, trials, batches) if way == "loss" else {}
        costs = {}
        for name, trial in trials.items():
            cost = trial.output_error
            if way == "fisher":
                cost = trial.cost(gradients[name].mean * gradients[name].tokens) / _count(batches)
            costs[name] = Cost(trial.output_error, divergences.get(name, cost))
        found.append(costs)
    progress(len(variants), len(variants))
    return found


def _count(batches: Batches) -> int:
    return sum(len(batch) for batch in batches())


def _trials(graph: Graph, module: ModuleType, choices: Mapping[str, Choice], batches: Batches) -> dict[str, Trial]:
    """What becomes of every layer, with the options of one variant."""
    probe = Probe(module, keep_weights=True)
    work = GraphWork(graph, cast(ModuleType, probe), choices)
    probe.factors = lambda name: (work.divided.get(name), work.multiplied.get(name))
    with torch.no_grad():
        seen = work.observe(batches())
        if module.Config.scope is Scope.GROUP:
            seen = work.scale(seen)
        for name in work.taken:
            work.compress(name, seen.pop(name))
    return probe.trials


def _divergences(graph: Graph, trials: Mapping[str, Trial], batches: Batches) -> dict[str, float]:
    """How far the outputs move with each trial's weight in its layer, all other layers as they are."""
    classifier = class_count(graph) is not None
    sums = dict.fromkeys(trials, 0.0)
    whole = 0.0
    for batch in batches():
        original = graph.run(batch)
        whole += len(batch) if classifier else float(original.double().square().sum())
        for name, trial in trials.items():
            weight: Tensor = graph.layer(name).weight  # type: ignore[assignment]
            before = weight.detach().clone()
            assert trial.weight is not None
            with torch.no_grad():
                weight.copy_(trial.weight.reshape(weight.shape))
                sums[name] += _divergence(original, graph.run(batch), classifier)
                weight.copy_(before)
    return {name: max(0.0, total / whole) if whole > 0 else 0.0 for name, total in sums.items()}


def _divergence(original: Tensor, other: Tensor, classifier: bool) -> float:
    """Sum over inputs of KL(original ‖ other) for logits (n, classes), else of the squared difference."""
    if not classifier:
        return float((original.double() - other.double()).square().sum())
    mine, others = original.double().log_softmax(1), other.double().log_softmax(1)
    return float((mine.exp() * (mine - others)).sum())


def _squared_gradients(graph: Graph, choices: Mapping[str, Choice], batches: Batches) -> dict[str, SquaredGradients]:
    """Squared gradients of the loss at the outputs of every chosen layer, in one forward and backward."""
    names = [name for name, choice in choices.items() if choice.config is not None]
    sums = {name: SquaredGradients(choices[name].site.rows) for name in names}
    classifier = class_count(graph) is not None
    generator = torch.Generator().manual_seed(_SEED)

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # The first layers depend on nothing that has a gradient.
            output = output if output.requires_grad else output.detach().requires_grad_()
            # Output channels last, as the rows of a linear stand.
            axis = -1 if isinstance(module, nn.Linear) else 1
            output.register_hook(lambda gradient: sums[name].add(gradient.movedim(axis, -1)))  # type: ignore[no-untyped-call]
            return output

        return hook

    handles = [graph.layer(name).register_forward_hook(watch(name)) for name in names]
    try:
        for batch in batches():
            with torch.enable_grad():
                outputs = graph.module(batch)
            values = outputs.detach()
            if classifier:
                pull = values.softmax(1)
                drawn = torch.multinomial(pull, 1, generator=generator)
                pull = pull.scatter_add(1, drawn, torch.full_like(drawn, -1, dtype=pull.dtype))
            else:
                # Chosen so that half the squared projection is, on average, the relative squared error.
                size = values.flatten(1).square().sum(1).mean().clamp(min=torch.finfo(values.dtype).tiny)
                pull = torch.randn(values.shape, generator=generator) * (2 / size).sqrt()
            outputs.backward(pull)
    finally:
        for handle in handles:
            handle.remove()
    return sums


__all__ = ["layer_costs"]
