"""How each layer is stored at the end of a run, and what its bits per weight are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from effcli.reports import units

if TYPE_CHECKING:
    from effcli.reports.report import LedgerRow, Stage

# How the format of a layer begins of which a mask keeps some weights.
_SPARSE = "sparse"


def final_rows(stages: Sequence[Stage]) -> dict[str, LedgerRow]:
    """How each layer is stored at the end. A layer that the last pass left alone keeps an earlier pass's error."""
    found: dict[str, LedgerRow] = {}
    for stage in stages:
        for row in stage.ledger:
            before = found.get(row.name)
            if row.status == "kept" and before is not None and before.status in ("compressed", "changed"):
                errors = {"output_error": before.output_error, "weight_error": before.weight_error}
                row = row.model_copy(update={**errors, "status": before.status})
            found[row.name] = row
    return found


def bits_line(stages: Sequence[Stage]) -> str:
    """What the bits per weight of the last stage are made of; empty where nothing is compressed.

    '5.17 bits per weight: 42 layers at 4.31 (int4 g64 asym, with scales and zero points), lm_head at 16.0 (not
    compressed)'.
    """
    rows = final_rows(stages).values()
    compressed = [row for row in rows if row.status == "compressed" or row.format.startswith(_SPARSE)]
    if not compressed:
        return ""
    formats = list(dict.fromkeys(row.format for row in compressed))
    layers = f"{units.count(len(compressed), 'layer')} at {units.bits(_mean(compressed))}"
    parts = [f"{layers} ({formats[0] if len(formats) == 1 else 'several formats'}, {_beside(formats)})"]
    kept = sorted((row for row in rows if row not in compressed and row.nbytes), key=lambda row: -row.nbytes)
    if kept:
        more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
        parts.append(f"{kept[0].name}{more} at {units.bits(_mean(kept))} (not compressed)")
    return f"{units.bits(stages[-1].bits_per_weight)} bits per weight: {', '.join(parts)}"


def zeros_line(stages: Sequence[Stage]) -> str:
    """How many weights are 0 at the end: 'zeros: 50.0% of 107,000 weights'; empty where no layer is sparse."""
    last = stages[-1]
    sparse = any(row.format.startswith(_SPARSE) for row in final_rows(stages).values())
    if not sparse or last.nonzeros is None or not last.weights:
        return ""
    return f"zeros: {units.fraction(1 - last.nonzeros / last.weights)} of {last.weights:,} weights"


def _beside(formats: Sequence[str]) -> str:
    """What is stored beside the codes."""
    words = {word for format in formats for word in format.split()}
    parts = []
    if words & {"sym", "asym"}:
        parts.append("scales and zero points" if "asym" in words else "scales")
    if _SPARSE in words:
        parts.append("the places of what is kept")
    return f"with {' and '.join(parts) or 'all that is stored beside the codes'}"


def _mean(rows: Sequence[LedgerRow]) -> float:
    """Bits per weight of several layers together."""
    weights = sum(math.prod(row.shape) for row in rows)
    return 8 * sum(row.nbytes for row in rows) / max(weights, 1)


__all__ = ["bits_line", "final_rows", "zeros_line"]
