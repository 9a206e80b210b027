"""A forward pass over many batches with one block of the network in memory at a time.

All batches go through block 0, then all through block 1; the hidden states between two blocks lie in one file that is
overwritten in place. The logits are computed from the last ones, a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from effcli.language.spool import Spool
from effcli.language.stream import Stream
from effcli.platform import memory
from effcli.platform.rehearsal import counted, few

TOKENS_PER_BATCH = 2048
# float32 numbers of one chunk of logits: 16 MiB, of which computing a divergence holds five.
_LOGITS = 1 << 22


def last_hidden(
    stream: Stream, batches: Sequence[Tensor], file: Path, tick: Callable[[], None] = lambda: None
) -> Spool:
    """Hidden states (batch, length, ...) behind the last block, of every batch of token ids (batch, length).

    Right padding is exact for causal networks: no position sees a later one. `file` is written anew. tick: called each
    time that a batch has gone through a block.
    """
    skeleton, weights = stream.skeleton, stream.weights
    file.unlink(missing_ok=True)
    spool: Spool | None = None
    for k in few(range(len(batches))):
        hidden, _ = stream.enter(batches[k])
        if spool is None:
            shapes = [(*each.shape, *hidden.shape[2:]) for each in batches]
            spool = Spool(file, shapes, hidden.dtype, weights.device)
            spool.reserve()
        spool.write(k, hidden)
    if spool is None:
        return Spool(file, [], skeleton.dtype, weights.device)
    for k, block in enumerate(skeleton.blocks):
        name = skeleton.block_names[k]
        with counted(name):
            with weights.opened(block, name + ".", skeleton.block_parameters(k)), torch.inference_mode():
                for number in few(range(len(batches))):
                    spool.write(number, stream.through(k, spool.read(number), stream.call(k, batches[number])))
                    tick()
            memory.trim()
    return spool


def logits(stream: Stream, hidden: Tensor) -> Tensor:
    """Logits (n, vocabulary) of hidden states (n, hidden) behind the last block; the stream holds the head.

    What follows the blocks treats every position alone, so any positions may stand side by side.
    """
    ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64)
    return stream.leave(ids, hidden.unsqueeze(0))[0]


def chunks(count: int, vocabulary: int, longest: int) -> Iterator[slice]:
    """Slices of `count` positions, so few that their logits stay small, and never more than `longest`."""
    step = max(1, min(longest, _LOGITS // vocabulary))
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))
