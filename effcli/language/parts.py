"""The parts of a checkpoint that a pass leaves block by block, and how they become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effcli.files.checkpoint import Entry, write_shard
from effcli.files.layout import Stored, own_config, standard_config, untied, write_checkpoint
from effcli.language.journal import Journal
from effcli.language.ledger import carried_rows
from effcli.language.open_block import Part, PartRecord
from effcli.language.weights import Weights
from effcli.layers.result import PassResult, worst
from effcli.reports.units import count

# The part of what stands outside the blocks.
OUTSIDE = "outside"


def part_name(k: int) -> str:
    """The name of block k's part in the journal."""
    return f"block-{k:05d}"


def write_part(journal: Journal, name: str, part: Part) -> None:
    """Put a part on the disk, its record after its tensors."""
    write_shard(journal.part(name), part.tensors)
    journal.record(name, part.to_json())


def join(
    weights: Weights,
    journal: Journal,
    names: Sequence[str],
    target: Path,
    carried: Mapping[str, Entry],
    apart: bool = False,
) -> PassResult:
    """Join the parts into the target's shards, describe them in its config, and remove the journal.

    weights: of the checkpoint that the pass began with; carried: its tensors that the network does not use; apart:
    whether a head that was tied has a dense weight of its own now.
    """
    skeleton, result = weights.skeleton, PassResult()
    stored: dict[str, Stored] = {}
    copied: dict[str, str] = {}
    for name in names:
        part = journal.recall(PartRecord, name).read()
        result.ledger += part.ledger
        result.histograms += part.histograms
        result.remarks += [text for text in part.remarks if text not in result.remarks]
        stored.update(part.stored)
        copied.update(part.copied)
    result.histograms = worst(result)
    if weights.head_note:
        result.remarks.append(weights.head_note)
    if carried:
        result.ledger += carried_rows(carried)
        result.remarks.append(
            f"carried over as stored, unused by this network: {count(len(carried), 'tensor')}, such as "
            f"{next(iter(carried))}"
        )
        stored.update(weights.foreign)
    obstacles = weights.obstacles(stored)
    config = weights.network_config()
    if skeleton.tied and (apart or skeleton.head in stored):
        config = untied(config)
    if obstacles:
        first, reason = next(iter(obstacles.items()))
        result.remarks.append(
            f"written in effcli's own layout, which effcli.load reads and stock loaders refuse: "
            f"no place in the standard format for {count(len(obstacles), 'layer')}, such as {first} ({reason})"
        )
    own = bool(obstacles or skeleton.widths)
    described = own_config(config, stored, skeleton.widths) if own else _standard(weights, config, stored)
    parts = [journal.part(name) for name in names]
    # In the stock layout a tensor has the name that it has in the files.
    entries = weights.checkpoint.entries
    carried = {**carried, **{name if own else key: entries[key] for name, key in copied.items()}}
    write_checkpoint(weights.checkpoint.path, target, parts, described, carried, weights.file_names())
    journal.remove()
    return result


def _standard(weights: Weights, config: dict[str, Any], stored: dict[str, Stored]) -> dict[str, Any]:
    path, linears = weights.skeleton.text_path, [s.name for s in weights.skeleton.sites() if s.kind == "linear"]
    return standard_config(config, stored, linears, (weights.skeleton.block_path, path) if path else None)


__all__ = ["OUTSIDE", "join", "part_name", "write_part"]
