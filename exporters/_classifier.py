"""A graph as the Hugging Face image classifier that it was read from: config and image processor beside its weights."""

from __future__ import annotations

import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from effcli.errors import CheckpointError, MachineError, UnsupportedError, first_line
from effcli.exporters._obstacles import some
from effcli.files.checkpoint import write_text
from effcli.graphs.graph import Graph
from effcli.inputs.preprocess import FILE_NAME, Preprocess
from effcli.platform.huggingface import quiet_transformers, restoring_verbosity

_REMEDY = "export it with --to pt2 or --to onnx, which hold any graph"
_COMPARED = 4
# Largest ‖a - b‖ / ‖b‖ over all logits when only the order of sums differs.
_EXACT = 1e-3


def write_classifier(graph: Graph, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Write what makes the weights in `folder` a classifier, and load it: the finding, and what the user should know.

    Raises `UnsupportedError` when the network is no longer the one of its config, `MachineError` when what transformers
    loads computes something else.
    """
    config = dict(graph.facts.config or {})
    if "auto_map" in config:
        raise UnsupportedError(
            "the network's own Python code is not in a graph, so transformers cannot load it", _REMEDY
        )
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    remarks: tuple[str, ...] = ()
    if graph.facts.preprocess != Preprocess() and not _write_processor(graph, folder):
        remarks = (f"no image processor says what preprocess: does; copy the original's {FILE_NAME}",)
    with restoring_verbosity():
        quiet_transformers()
        network = _loaded(folder)
    inputs = torch.randn(_COMPARED, *graph.facts.shape, generator=torch.Generator().manual_seed(0))
    expected = graph.run(inputs)
    with torch.inference_mode():
        difference = network(pixel_values=inputs).logits - expected
    # Not finite is not below either.
    if not float(difference.norm()) <= _EXACT * float(expected.norm()):
        raise MachineError(
            f"transformers computes something else: {float(difference.abs().max()):.2g} off",
            "do not use this export, and report it with the network",
        )
    largest = f"{float(difference.abs().max()):.2g} of {float(expected.abs().max()):.2g}"
    return f"loaded by transformers {version('transformers')}: largest difference {largest}", remarks


def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForImageClassification

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network, info = AutoModelForImageClassification.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # whatever transformers says about the config and the weights
        raise UnsupportedError(f"transformers cannot load this network: {first_line(error)}", _REMEDY) from error
    kinds = (("missing_keys", "it lacks"), ("unexpected_keys", "unknown to it"), ("mismatched_keys", "of other shapes"))
    parts = [f"{what}: {some(sorted(map(str, info[kind])))}" for kind, what in kinds if info.get(kind)]
    if parts:
        raise UnsupportedError(
            f"after a pass such as `fold` this is no {network.config.model_type} of transformers: {'; '.join(parts)}",
            _REMEDY,
        )
    return network.eval()


def _write_processor(graph: Graph, folder: Path) -> bool:
    """Write the image processor that does what the graph's `preprocess` says; whether there is one."""
    wanted, channels = graph.facts.preprocess, graph.facts.shape[0]
    described: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": wanted.resize is not None,
        "do_center_crop": wanted.crop is not None,
        "do_rescale": wanted.scale != 1,
        "rescale_factor": wanted.scale,
        "do_normalize": (wanted.mean, wanted.std) != (0, 1),
        "image_mean": _per_channel(wanted.mean, channels),
        "image_std": _per_channel(wanted.std, channels),
    }
    if wanted.resize is not None:
        size = wanted.resize
        described["size"] = {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]}
        described["resample"] = int(Image.Resampling[wanted.resample.upper()])
    if wanted.crop is not None:
        described["crop_size"] = {"height": wanted.crop[0], "width": wanted.crop[1]}
    write_text(folder / FILE_NAME, json.dumps(described, indent=2, sort_keys=True) + "\n")
    try:
        found = Preprocess.read(folder)
    except (UnsupportedError, CheckpointError):
        found = None
    # What concerns arrays, and not images, has no place in it.
    kept = wanted.model_copy(update={"layout": "auto", "inputs": None, "labels": None})
    if kept.mode == ("rgb" if channels == 3 else "gray"):
        kept = kept.model_copy(update={"mode": "auto"})
    if found != kept:
        (folder / FILE_NAME).unlink()
    return found == kept


def _per_channel(value: float | tuple[float, ...], channels: int) -> list[float]:
    return [value] * channels if isinstance(value, float | int) else list(value)
