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
    """Load a dense or compressed checkpoint, in the standard layout or effcli's own.

    packed: False gives a dense model with the dequantized weights, the reference that packed kernels are held against.
    Raises `CheckpointError` for a checkpoint that is damaged or incomplete.
    """
    return detect.find(str(model)).load(device, trust_remote_code, packed)
