"""A language model with a few of its blocks, on which a rehearsal does what a run does with all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effcli.errors import UnsupportedError
from effcli.files.checkpoint import STOCK_STEM, assemble, copy_companions, write_text
from effcli.files.layout import SHARD_BYTES, is_own
from effcli.language.calls import kind_of
from effcli.language.skeleton import Skeleton
from effcli.language.weights import open_weights

_WHOLE = "leave predictions out"


def write(source: Path, target: Path, trust_remote_code: bool = False) -> dict[str, float]:
    """Write the first blocks of the network in `source`, with all that stands outside of them, to the folder `target`.

    Returns how many blocks each stands for, by its name. Raises `UnsupportedError` where the config of the network does
    not say how many blocks it has, or where blocks have widths of their own.
    """
    weights = open_weights(source, trust_remote_code)
    skeleton = weights.skeleton
    if is_own(weights.checkpoint.config):
        raise UnsupportedError(f"{source} is in effcli's own layout, which says more of each block", _WHOLE)
    kinds = [kind_of(block) for block in skeleton.blocks]
    shares = shares_of(kinds)
    target.mkdir(parents=True)
    copy_companions(source, target)
    assemble((), target, STOCK_STEM, SHARD_BYTES, weights.of_blocks(len(shares)))
    renamed = getattr(skeleton.config.get_text_config(), "attribute_map", {})
    key = renamed.get("num_hidden_layers", "num_hidden_layers")
    config = shortened(weights.checkpoint.config, key, len(kinds), len(shares))
    write_text(target / "config.json", json.dumps(config))
    found = len(Skeleton(target, config, trust_remote_code).blocks)
    if found != len(shares):
        raise UnsupportedError(f"{source} does not say in {key} how many blocks it has", _WHOLE)
    return dict(zip(skeleton.block_names, shares, strict=False))


def shares_of(kinds: Sequence[str]) -> list[float]:
    """How many blocks each of the first ones stands for: at least two blocks, and one of each kind.

    The first of its kind stands for itself alone where there is another one, for it may take longer than those behind
    it.
    """
    count = max(kinds.index(kind) + 1 for kind in set(kinds))
    first = kinds[: max(count, min(2, len(kinds)))]
    here, all_of = Counter(first), Counter(kinds)
    shares, seen = [], set()
    for kind in first:
        alone = kind not in seen and here[kind] > 1
        others = here[kind] - 1 if here[kind] > 1 else 1
        rest = all_of[kind] - (1 if here[kind] > 1 else 0)
        shares.append(1.0 if alone else rest / others)
        seen.add(kind)
    return shares


def shortened(config: Mapping[str, Any], key: str, count: int, few: int) -> dict[str, Any]:
    """A config whose `key` says `few` blocks and not `count`, and whose lists of one entry for each block are as long.

    What is a mapping, as the part for the text of a network with other parts, is shortened likewise.
    """
    short: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and name != "quantization_config":
            short[name] = shortened(value, key, count, few)
        elif isinstance(value, list) and len(value) == count:
            short[name] = value[:few]
        else:
            short[name] = few if name == key and value == count else value
    return short


__all__ = ["shares_of", "shortened", "write"]
