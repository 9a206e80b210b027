"""What a language model writes behind the beginnings of a text, so that people see what compression did to it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from effcli.inputs.tokens import Reader
from effcli.language.caching import cache_name
from effcli.platform.rehearsal import few
from effcli.reports.report import Continuation

# How many texts are continued, how many tokens of each are given, and how many are written.
TEXTS = 3
GIVEN = 16
WRITTEN = 32


def continuations(network: Any, windows: Sequence[Tensor], reader: Reader) -> tuple[Continuation, ...]:
    """The beginnings of the first few `windows` with what `network` writes behind them, by greedy decoding.

    windows: int64 (windows, length) each, at least 2 tokens long. Greedy decoding draws nothing at random: the same
    network writes the same text again.
    """
    found = []
    for window in [row for batch in windows for row in batch][:TEXTS]:
        given = window[: min(GIVEN, len(window) - 1)]
        count = WRITTEN if reader.longest is None else min(WRITTEN, reader.longest - len(given))
        written = greedy(network, given.unsqueeze(0), count)
        found.append(Continuation(prompt=reader.decode(given.tolist()), text=reader.decode(written)))
    return tuple(found)


def greedy(network: Any, ids: Tensor, count: int) -> list[int]:
    """At most `count` token ids, each the likeliest behind those before it; fewer where the network ends the text.

    ids: int64 (1, length), the prompt.
    """
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(network.forward).parameters:
        options["logits_to_keep"] = 1
    cache = cache_name(network.forward)
    ends = _ends(network)
    written: list[int] = []
    held: dict[str, Any] = {}
    with torch.inference_mode():
        token = ids.to(network.device)
        for _ in few(range(count)):
            out = network(input_ids=token, **held, **options)
            token = out.logits[:, -1:].argmax(dim=-1)
            if int(token) in ends:
                break
            written.append(int(token))
            held = {cache: getattr(out, cache)}
    return written


def _ends(network: Any) -> set[int]:
    """The tokens with which the network ends a text."""
    # Networks that transformers does not let generate have no such settings.
    end = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    return set(end) if isinstance(end, Iterable) else set() if end is None else {end}


__all__ = ["continuations", "greedy"]
