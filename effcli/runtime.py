"""`effcli.load`: a checkpoint as a module that runs.

A language model comes as a transformers model whose compressed layers run packed. A network read as a graph comes as a
module of a batch of inputs, with dequantized weights; an integer network as one that computes in integers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.run import detect

if TYPE_CHECKING:
    import torch


def load(
    model: str | Path, *, device: str | torch.device = "cpu", trust_remote_code: bool = False, packed: bool = True
) -> Any:
    """Load a dense or compressed checkpoint, in the standard layout or effcli's own, as a module that runs.

    model: an output of `compress`, or whatever `compress` takes as a path.
    device: where it runs; an integer network runs on the CPU alone.
    trust_remote_code: run Python code that came with the model.
    packed: False gives a dense language model with the dequantized weights, the reference that packed kernels are held
        against.

    A language model is one of transformers: token ids int64 (batch, length) to logits (batch, length, vocabulary). A
    network read as a graph takes float32 (batch, ...) and gives float32.

    Raises `CheckpointError` for a checkpoint that is missing, damaged or incomplete, `UnsupportedError` for one that
    this version cannot read.
    """
    return detect.find(str(model)).load(device, trust_remote_code, packed)
