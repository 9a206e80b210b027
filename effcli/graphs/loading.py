"""Networks read as graphs, and integer networks, as modules that run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from effcli import importers
from effcli.errors import UnsupportedError
from effcli.graphs import executor
from effcli.graphs.integer import IntegerNetwork, is_integer


class IntegerModule(nn.Module):
    """An integer network: float32 inputs (n, *shape) are quantized, outputs float32 dequantized."""

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.from_numpy(executor.run_float(self.network, inputs.detach().numpy()))


def load(source: str | Path, device: str | torch.device, trust_remote_code: bool) -> nn.Module:
    """The network at `source`, a path or `package.module:function`; one of integers runs on the CPU."""
    if isinstance(source, Path) and is_integer(source):
        if torch.device(device).type != "cpu":
            raise UnsupportedError("an integer network runs on the CPU", "leave out device, or export it to onnx")
        return IntegerModule(IntegerNetwork.read(source))
    return importers.read(source, trust_remote_code=trust_remote_code).module.to(device)


__all__ = ["IntegerModule", "load"]
