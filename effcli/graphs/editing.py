"""A pass over parameters, carried out on a network read as a graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from effcli.formats import Quantized
from effcli.graphs.graph import Graph
from effcli.graphs.ledger import GraphCosts, kept_row, table_rows
from effcli.layers.contract import ParameterPass
from effcli.layers.editing import Edited, change, renew, told
from effcli.layers.result import PassResult
from effcli.layers.selection import choose

if TYPE_CHECKING:
    from effcli.run.recipe import PassStep


def edited(graph: Graph, step: PassStep) -> Edited:
    """The graph as `step`, a pass over parameters, chooses from it; raises what the pass says of it."""
    return Edited(step, graph.sites(), graph.places())


def edit_graph(graph: Graph, target: Path, step: PassStep) -> PassResult:
    """Carry out `step`, a pass over parameters, on `graph`, which it changes, and write `target`."""
    config = step.config
    assert isinstance(config, ParameterPass)
    found = edited(graph, step)
    choices, costs, result = choose(found, step), GraphCosts(graph), PassResult()
    state = graph.module.state_dict()
    for name, edit in found.edits.items():
        if name not in choices:
            with torch.no_grad():
                change(name, edit, state[name])
    for name, choice in choices.items():
        site = choice.site
        if choice.config is None:
            result.ledger.append(kept_row(graph, site, costs, choice.reason))
            continue
        held = graph.held(site)
        packed = held if isinstance(held, Quantized) else None
        value = held.effective(torch.float32) if isinstance(held, Quantized) else held.clone()
        new = renew(config, site, found.edits[name], value, packed, torch.float32)
        if not config.keeps_zeros:
            graph.masks.pop(name, None)
            graph.stored.pop(name, None)
        graph.set_weight(name, new.weight)
        result.ledger.append(new.row(site, costs.held(name, new.weight)))
    graph.save(target)
    result.ledger += table_rows(graph)
    result.remarks += told(result.ledger)
    return result


__all__ = ["edit_graph", "edited"]
