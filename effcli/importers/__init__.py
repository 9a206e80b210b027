"""Reading networks into a `Graph`: exported graphs, ONNX files, Hugging Face image classifiers, Python factories.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import CheckpointError, EffcliError, UnsupportedError, first_line
from effcli.files.documents import read_object

if TYPE_CHECKING:
    from effcli.graphs.graph import Graph
    from effcli.inputs.preprocess import Preprocess

_FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_SUFFIXES = ".pt2", ".onnx"
_EXPORTED = "model.pt2"
_CLASSIFIER = "ForImageClassification"


def recognises(model: str | Path) -> bool:
    """Whether this model is or becomes a graph, and not a causal language model; an integer network is one too."""
    path = Path(model).expanduser()
    if path.is_dir():
        config = _config(path)
        return _own_kind(config) is not None or (path / _EXPORTED).is_file() or _is_classifier(config)
    return path.suffix in _SUFFIXES or (not path.exists() and is_factory(model))


def is_factory(model: str | Path) -> bool:
    """Whether `model` names a Python function, as `package.module:function`."""
    return not str(model).startswith("sample:") and _FACTORY.fullmatch(str(model)) is not None


def read(
    model: str | Path,
    *,
    weights: Path | None = None,
    shape: tuple[int, ...] | None = None,
    preprocess: Preprocess | None = None,
    trust_remote_code: bool = False,
) -> Graph:
    """Read a network from

    - a `.pt2` file of `torch.export.save`, or a directory with `model.pt2`;
    - an `.onnx` file;
    - the directory of a Hugging Face image classifier;
    - `package.module:function`, which returns a module or a module and an example input. weights: a safetensors file
      that has all its tensors and no other;
    - a directory that `Graph.save` wrote.

    shape: of one input, without the batch axis, where the model leaves it open. preprocess: what turns pixels into
    inputs, in place of what `preprocessor_config.json` beside the network says. The names of the classes are taken from
    `config.json`.
    Raises `CheckpointError`, or `UnsupportedError` for what a graph cannot hold.
    """
    path = Path(model).expanduser()
    factory = not path.exists() and is_factory(model)
    if weights is not None and not factory:
        raise UnsupportedError(
            f"{model} brings its own weights, and {weights} was given too", "weights are for package.module:function"
        )
    if factory:
        from effcli.importers.factory import read_factory

        graph = read_factory(str(model), weights, shape)
    elif path.is_dir():
        graph = _read_folder(path, shape, preprocess, trust_remote_code)
    elif not path.exists():
        raise CheckpointError(f"{model} does not exist", "give a .pt2 or .onnx file, a directory, or module:function")
    else:
        graph = _with_facts(_read_file(path), path.parent, preprocess)
    if preprocess is not None:
        graph.facts = graph.facts.model_copy(update={"preprocess": preprocess})
    if shape is not None and shape != graph.facts.shape:
        raise UnsupportedError(
            f"{model} takes inputs of shape {graph.facts.shape}, not {shape}", "leave the shape out, or export it anew"
        )
    return graph


def _read_folder(
    path: Path, shape: tuple[int, ...] | None, preprocess: Preprocess | None, trust_remote_code: bool
) -> Graph:
    config = _config(path)
    kind = _own_kind(config)
    if kind == "graph":
        from effcli.graphs.graph import Graph

        return Graph.read(path)
    if kind is not None:
        raise CheckpointError(f"{path} is an integer network already", "start from the network it was made from")
    if (path / _EXPORTED).is_file():
        return _with_facts(_read_file(path / _EXPORTED), path, preprocess)
    if _is_classifier(config):
        from effcli.importers.classifier import read_classifier

        return read_classifier(path, shape, preprocess, trust_remote_code)
    raise CheckpointError(
        f"{path} holds no {_EXPORTED}, no graph of effcli, and no image classifier",
        "give a directory with model.pt2, or with the config.json of a network ...ForImageClassification",
    )


def _read_file(path: Path) -> Graph:
    """The network in a file; whatever a library raises over it is the file's fault, and said as that."""
    try:
        return _read_suffix(path)
    except (EffcliError, MemoryError):
        raise
    except Exception as error:  # of onnx, torch, zipfile and zlib, which share no base
        raise CheckpointError(
            f"{path} is damaged or holds what effcli cannot read: {type(error).__name__}: {first_line(error)}",
            "export the network again",
        ) from error


def _read_suffix(path: Path) -> Graph:
    if path.suffix == ".pt2":
        from effcli.importers.exported import read_exported

        return read_exported(path)
    if path.suffix == ".onnx":
        from effcli.importers.onnx import read_onnx

        return read_onnx(path)
    raise CheckpointError(
        f"{path} is neither a .pt2 nor an .onnx file",
        "pickled checkpoints are not executed: export the network, or give module:function and safetensors weights",
    )


def _with_facts(graph: Graph, folder: Path, preprocess: Preprocess | None) -> Graph:
    """The graph with what the files beside it say of pixels, unless that is given, and of classes."""
    from effcli.graphs.graph import class_names
    from effcli.inputs.preprocess import Preprocess

    found: dict[str, Any] = {
        "preprocess": preprocess or Preprocess.read(folder),
        "classes": class_names(_config(folder)),
    }
    known = {key: value for key, value in found.items() if value is not None}
    graph.facts = graph.facts.model_copy(update=known)
    return graph


def _config(folder: Path) -> dict[str, Any]:
    """`config.json` of a directory, empty without one that is an object: whoever needs it reads it again, and says."""
    try:
        return read_object(folder / "config.json")
    except CheckpointError:
        return {}


def _own_kind(config: dict[str, Any]) -> str | None:
    """'graph' or 'integer' for a checkpoint in effcli's own layout that is one, None for any other."""
    own = config.get("effcli")
    kind = own.get("kind") if config.get("model_type") == "effcli" and isinstance(own, dict) else None
    return kind if kind in ("graph", "integer") else None


def _is_classifier(config: dict[str, Any]) -> bool:
    """Whether a config is that of an image classifier: by its class, else by what its model type is for."""
    architectures = config.get("architectures")
    if architectures:
        # One that is no list is for whoever reads the whole config to refuse.
        return isinstance(architectures, list) and any(str(name).endswith(_CLASSIFIER) for name in architectures)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        # timm's own config names the network only.
        return "architecture" in config and "pretrained_cfg" in config
    if model_type == "effcli":
        return False
    from transformers.models.auto import modeling_auto

    tasks = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return model_type in tasks and model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


__all__ = ["is_factory", "read", "recognises"]
