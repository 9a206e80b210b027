"""Whole blocks of a language model, and the network without some of them.

A config says the number of blocks, and in lists what single ones are: an entry for each block, or the numbers of those
that are special. Both are shortened. The network that the new config describes is built without memory, and compared:
it must have the blocks that stay, called as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effcli.errors import EffcliError, UnsupportedError, UserError
from effcli.files.checkpoint import write_shard
from effcli.files.layout import own_config, write_checkpoint
from effcli.language.calls import alike, kind_of
from effcli.language.skeleton import Skeleton, with_widths
from effcli.language.stream import Stream
from effcli.language.weights import Weights, open_weights
from effcli.layers.coupling import Cut, Depth
from effcli.layers.selection import Choice
from effcli.platform import memory

# What modules call their own number.
_OWN_NUMBER = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
# Tokens that are enough to see how blocks are called.
_TOKENS = 8


def depth(weights: Weights, choices: Mapping[str, Choice]) -> Depth:
    """The blocks of a network as one group; those with a layer that is left alone must stay.

    Its reason says why no block can go: its config cannot say fewer. That is tried with the first block that may go.
    """
    skeleton = weights.skeleton
    fixed = {}
    for k in range(len(skeleton.blocks)):
        kept = next(
            (choices[site.name] for site in skeleton.block_layers(k) if choices[site.name].config is None), None
        )
        if kept is not None:
            fixed[k] = f"{kept.site.name} is left alone ({kept.reason})"
    count = len(skeleton.blocks)
    first = next((k for k in range(count) if k not in fixed), None)
    reason = "there is only one" if count < 2 else ""
    if not reason and first is not None:
        try:
            described(weights, [k for k in range(count) if k != first])
        except EffcliError as error:
            reason = error.cause
    return Depth(skeleton.block_path, 0 if reason else count, (), reason, fixed)


def described(weights: Weights, kept: Sequence[int]) -> dict[str, Any]:
    """`config.json` of the network that has the blocks `kept` alone, in their order.

    Raises `UnsupportedError` where no config says so.
    """
    skeleton, own = weights.skeleton, weights.network_config()
    text = skeleton.config.get_text_config()
    key = (getattr(text, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers")
    count = len(skeleton.blocks)
    if getattr(text, key, None) != count:
        raise UnsupportedError(
            f"{type(skeleton.model).__name__} has {count} blocks, and its config says no such number in {key}",
            "use a pass that takes channels",
        )
    said = own.get("text_config") if isinstance(own.get("text_config"), dict) else own
    assert isinstance(said, dict)
    lists = {name: _shortened(name, value, kept, count) for name, value in said.items() if isinstance(value, list)}
    config = with_widths(own, {**lists, key: len(kept)})
    widths = {j: skeleton.widths[k] for j, k in enumerate(kept) if k in skeleton.widths}
    try:
        built = Skeleton(weights.checkpoint.path, config, skeleton.trust_remote_code, widths)
    except EffcliError as error:
        raise UnsupportedError(f"its config cannot say {len(kept)} blocks: {error.cause}", "remove others") from error
    _check_same(weights, Weights(weights.checkpoint, built, weights.device), kept)
    return own_config(config, {}, widths) if widths else config


def _shortened(name: str, value: list[Any], kept: Sequence[int], count: int) -> list[Any]:
    """A list of a config for the blocks that stay: of an entry for each, or of the numbers of some."""
    numbers = all(type(k) is int and 0 <= k < count for k in value)
    # Flags, one for each block, are numbers as well.
    if numbers and len(value) != count and name.endswith(("_layers", "_indices", "_idx", "_ids")):
        return [j for j, k in enumerate(kept) if k in value]
    return [value[k] for k in kept] if len(value) == count and "token" not in name else value


def _check_same(before: Weights, after: Weights, kept: Sequence[int]) -> None:
    """Raise `UnsupportedError` unless the blocks of `after` are those that stay of `before`, called as they were."""
    first, second = before.skeleton, after.skeleton

    def refuse(k: int, j: int, what: str) -> None:
        raise UnsupportedError(
            f"{first.block_names[k]} would be another one as {second.block_names[j]}: {what}",
            "`ignore` its layers, so that the blocks before it stay",
        )

    ids = torch.arange(_TOKENS).unsqueeze(0)
    calls = []
    for weights in (before, after):
        with Stream(weights) as stream:
            calls.append(stream.enter(ids)[1])
    for j, k in enumerate(kept):
        if kind_of(first.blocks[k]) != kind_of(second.blocks[j]):
            refuse(k, j, "it has other parameters")
        differ = _traits(first.blocks[k]).items() ^ _traits(second.blocks[j]).items()
        if differ:
            refuse(k, j, f"its {min(name for name, _ in differ)} follows its number")
        if not alike([calls[0][k]], [calls[1][j]]):
            refuse(k, j, "it would be called with other arguments")


def _traits(block: nn.Module) -> dict[str, Any]:
    """The plain values that the modules of a block hold, but for their own number."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and name not in _OWN_NUMBER
    }


def cut_blocks(source: Path, target: Path, cut: Cut, work: Path, trust_remote_code: bool = False) -> None:
    """Write the checkpoint `source` without some of its blocks into `target`, a directory that exists.

    cut: of its `depth`; work: a folder for what is unfinished. The blocks that stay are numbered anew. Raises
    `UserError` for a checkpoint that is compressed, `UnsupportedError` where no config says what is left.
    """
    weights = open_weights(source, trust_remote_code)
    skeleton, carried = weights.skeleton, weights.carried()
    stored = next(iter({**weights.stored, **weights.foreign}.items()), None)
    if stored is not None:
        raise UserError(f"{stored[0]} is stored as {stored[1].format}", "remove blocks before compressing")
    kept = cut.kept.nonzero().flatten().tolist()
    config = described(weights, kept)
    names = [name for name in skeleton.outer_parameters() if name not in weights.left_out()]
    groups = [{name: name for name in names}]
    for j, k in enumerate(kept):
        old, new = skeleton.block_names[k], skeleton.block_names[j]
        groups.append({new + name.removeprefix(old): name for name in skeleton.block_parameters(k)})
    parts = []
    for number, keys in enumerate(groups):
        part = work / f"cut-{number:05d}.safetensors"
        write_shard(part, {name: weights.parameter(key) for name, key in keys.items()})
        parts.append(part)
        memory.trim()
    write_checkpoint(source, target, parts, config, carried, weights.file_names())
    for part in parts:
        part.unlink()


__all__ = ["cut_blocks", "depth", "described"]
