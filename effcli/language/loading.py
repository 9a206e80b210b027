"""Language models, dense or compressed, as transformers models that run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from effcli.files import locate as samples
from effcli.files.layout import adapter_in
from effcli.language import peft_modules
from effcli.language.modules import QuantizedExperts, QuantizedLinear
from effcli.language.weights import Weights, open_weights, place
from effcli.layers.layer import LayerSite
from effcli.platform.huggingface import restoring_verbosity
from effcli.platform.rehearsal import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    packed: bool = True,
    dtype: str | None = None,
    base: bool = False,
) -> PreTrainedModel:
    """A checkpoint as a transformers model, with PEFT's modules where an adapter stands beside the weights.

    base: leave the adapter out. packed: False gives a dense model with the dequantized weights, the reference that
    packed kernels are held against. dtype: of what is dense and of the arithmetic, such as float32; the checkpoint's
    own unless given.
    """
    with restoring_verbosity():
        path = Path(samples.resolve(str(model)))
        network, adapter = _load(path, device, trust_remote_code, packed, dtype), adapter_in(path)
        return network if adapter is None or base else peft_modules.read(network, adapter)


def _load(
    path: Path, device: str | torch.device, trust_remote_code: bool, packed: bool, dtype: str | None
) -> PreTrainedModel:
    weights = open_weights(path, trust_remote_code, dtype, base=True)
    skeleton = weights.skeleton
    network = skeleton.model
    for name in skeleton.parameters():
        with counted(name):
            sites = weights.sites(name)
            if packed and any(site.name in weights.stored for site in sites):
                _replace(network, weights, name, sites, device, None if dtype is None else skeleton.dtype)
                continue
            value = weights.parameter(name)
            value = value.to(device, skeleton.dtype) if value.is_floating_point() else value.to(device)
            place(network, name, value)
    if skeleton.tied:
        network.tie_weights()  # type: ignore[operator]
    network.to(device)
    _take_generation_settings(network, path)
    return network.eval()


def _replace(
    network: nn.Module,
    weights: Weights,
    name: str,
    sites: list[LayerSite],
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Put a packed module where the dense weight `name` would stand; dtype: that it is to be seen in."""
    if sites[0].index is None:
        owner, _, own = sites[0].name.rpartition(".")
        dense = network.get_submodule(sites[0].name)
        bias = weights.parameter(f"{sites[0].name}.bias") if getattr(dense, "bias", None) is not None else None
        if bias is not None:
            bias = bias.to(weights.skeleton.dtype)
        packed = weights.packed(sites[0].name)
        assert packed is not None
        setattr(network.get_submodule(owner), own, QuantizedLinear(packed, bias, device, dtype))
        return
    owner, _, own = name.rpartition(".")
    module = network.get_submodule(owner)
    experts = [weights.packed(site.name) or weights.dense_matrix(site) for site in sites]
    del module._parameters[own]
    setattr(module, own, QuantizedExperts(experts, device, transposed=sites[0].transposed))


def _take_generation_settings(network: nn.Module, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(path)


__all__ = ["load"]
