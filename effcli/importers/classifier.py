"""Hugging Face image classifiers: a directory with config.json and safetensors weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effcli.errors import CheckpointError, UnsupportedError
from effcli.files.checkpoint import DTYPES, Checkpoint
from effcli.graphs.graph import Graph, class_names
from effcli.importers._lower import in_float32
from effcli.importers._rules import lower
from effcli.importers._trace import first_line, trace_module
from effcli.inputs.preprocess import Preprocess
from effcli.platform.huggingface import load_network_config, quiet_transformers, restoring_verbosity

_TIMM = "timm_wrapper"


def read_classifier(
    path: Path,
    shape: tuple[int, ...] | None = None,
    preprocess: Preprocess | None = None,
    trust_remote_code: bool = False,
) -> Graph:
    """Read the classifier in the directory `path`; the graph's output are its logits, its layers have the file's names.

    preprocess: by default what the directory's image processor does. shape: of one input, without the batch axis; by
    default what that makes, or else the config says.
    Raises `CheckpointError` for damaged files, missing and unexpected tensors, `UnsupportedError` for what cannot run.
    """
    checkpoint = Checkpoint.open(path)
    preprocess = preprocess or Preprocess.read(path)
    with restoring_verbosity():
        quiet_transformers()
        network = _load(checkpoint, trust_remote_code)
        kind = network.config.model_type
        trace = trace_module(_Logits(network), shape or _input_shape(path, network.config, preprocess))
    named = {
        key: (_stored_name(checkpoint, network, name.removeprefix("network."), value), value)
        for key, (name, value) in trace.weights.items()
    }
    graph = lower(dataclasses.replace(trace, weights=named), f"transformers {kind}")
    graph.facts = graph.facts.model_copy(
        update={
            "config": checkpoint.config,
            "classes": class_names({"id2label": network.config.id2label}),
            "preprocess": preprocess or Preprocess(),
            "remarks": in_float32(DTYPES[entry.dtype] for entry in checkpoint.entries.values()),
        }
    )
    return graph


class _Logits(nn.Module):
    """A classifier as a function from pixels float32 (n, channels, height, width) to logits (n, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=pixels).logits
        return logits


def _load(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The network in float32 with all its weights."""
    from transformers import AutoModelForImageClassification

    path, config = checkpoint.path, dict(checkpoint.config)
    if "model_type" not in config and "architecture" in config:
        config["model_type"] = _TIMM
    if config.get("model_type") == _TIMM and importlib.util.find_spec("timm") is None:
        raise UnsupportedError(f"{path} is a network of timm, which is not installed", "pip install timm")
    if "quantization_config" in config:
        raise UnsupportedError(f"{path} is already quantized", "start from the original checkpoint")
    described = load_network_config(path, config, trust_remote_code)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network, info = AutoModelForImageClassification.from_pretrained(
                str(path),
                config=described,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # whatever transformers says about the config and the weights
        raise UnsupportedError(
            f"transformers cannot load {path} as an image classifier: {first_line(error)}",
            "config.json and the weights must be those of one network ...ForImageClassification",
        ) from error
    for found, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds what the network does not have:")):
        names = sorted(info[found])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{path} {what} {names[0]}{more}",
                "download or copy the checkpoint again",
            )
    return network.eval()


def _stored_name(checkpoint: Checkpoint, network: Any, name: str, value: Tensor) -> str:
    """A parameter's name in the file, where transformers and timm may call it otherwise than in the network."""
    from transformers.core_model_loading import revert_weight_conversion

    for candidate in (name, name.removeprefix("timm_model.")):
        if candidate in checkpoint.entries:
            return candidate
    found = list(revert_weight_conversion(network, {name: value}))
    return found[0] if len(found) == 1 and found[0] in checkpoint.entries else name


def _input_shape(path: Path, config: Any, preprocess: Preprocess | None) -> tuple[int, ...]:
    """Channels, height and width of what the image processor makes; without one as the config has them."""
    size = (preprocess.crop or preprocess.resize) if preprocess else None
    size = size or getattr(config, "image_size", None)
    timm = getattr(config, "pretrained_cfg", None) or {}
    if size is None and "input_size" in timm:
        return tuple(timm["input_size"])
    if not size:
        raise UnsupportedError(
            f"{path} says nothing of the size of its images",
            "name the shape, --set shape=[3,224,224], or put its preprocessor_config.json beside it",
        )
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width
