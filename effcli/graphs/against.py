"""Hold a compressed graph or integer network against the graph that it was made from: its tensors and its outputs.

What may differ follows from the ledger of the run where there is one. A layer that no pass took is equal bit for bit;
one that was compressed lies no further off than the error that the ledger gives, unless a scale was folded into it. A
pass over the whole network, which `fold` is, measures no error of single layers and may replace any tensor: then only
the outputs tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effcli.graphs.graph import Graph, class_count
from effcli.layers.result import ratio
from effcli.platform.steps import each, expect
from effcli.reports.against import Against, Moved
from effcli.reports.report import LedgerRow, Stage
from effcli.reports.units import count

# What sums in another order add to a measured error.
_SLACK = 1e-4


def compare(before: Graph, after: Graph, source: str, stages: Sequence[Stage]) -> Against:
    """The tensors of `after` next to those of `before`, which it was made from; source: the name of that.

    stages: of the run between the two; empty where nothing is known of it. What must be equal and what may have moved
    is read from them.
    """
    taken: dict[str, list[LedgerRow]] = {}
    for row in (row for stage in stages for row in stage.ledger if row.status != "kept"):
        taken.setdefault(row.name, []).append(row)
    whole = any(row.weight_error is None for rows in taken.values() for row in rows)
    if not taken or whole:
        return Against(input=source)
    # A count that only training reads is not stored.
    tensors, others = (
        {key: tensor for key, tensor in graph.module.state_dict().items() if not key.endswith("num_batches_tracked")}
        for graph in (before, after)
    )
    if tensors.keys() != others.keys():
        names = sorted(tensors.keys() ^ others.keys())
        return Against(input=source, problem=f"{count(len(names), 'tensor')} lost or new, such as {names[0]}")
    layers = {site.parameter: site.name for site in before.sites()}
    scaled = {str(row.notes["folded_into"]) for rows in taken.values() for row in rows if "folded_into" in row.notes}
    counts = {"equal": 0, "compressed": 0, "changed": 0}
    expect(len(tensors))
    for key in each(tensors):
        tensor = tensors[key]
        name = layers.get(key, key.rpartition(".")[0])
        rows = taken.get(name, []) if key in layers else []
        same = tensor.shape == others[key].shape and torch.equal(tensor, others[key])
        # A bias is divided with the rows of its layer.
        if same:
            counts["compressed" if name in after.stored and key in layers else "equal"] += 1
        elif not rows and name not in scaled:
            return Against(input=source, problem=f"{key} was altered, which no pass was to touch")
        elif rows and not _within(tensor, others[key], rows, name in scaled):
            return Against(input=source, problem=f"{key} lies further from the input than the ledger says")
        else:
            counts["compressed" if name in after.stored and key in layers else "changed"] += 1
    return Against(input=source, **counts)


def moved(before: Graph, expected: Tensor, outputs: Tensor, inputs: str) -> Moved:
    """How far `outputs` (n, ...) of a network lie from those of the graph `before`, `expected`, of the same shape.

    inputs: what they were made of, in words.
    """
    classes = class_count(before) is not None
    return Moved.of(outputs.float(), expected.float(), inputs, "logits" if classes else "outputs", classes)


def _within(before: Tensor, after: Tensor, rows: Sequence[LedgerRow], scaled: bool) -> bool:
    """Whether a weight moved by no more than its passes said: their errors add up as lengths do, by the triangle."""
    if before.shape != after.shape:
        return False
    if scaled or any("folded_into" in row.notes for row in rows):
        return True
    reach = 1.0
    for row in rows:
        assert row.weight_error is not None
        reach *= 1 + row.weight_error**0.5
    error = ratio(float((before - after).square().sum()), float(before.square().sum()))
    return error <= (reach - 1) ** 2 * 1.02 + _SLACK


__all__ = ["compare", "moved"]
