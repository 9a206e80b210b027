"""Models by name: the samples that ship with the package, local directories, and ids on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

from effcli.errors import CheckpointError, did_you_mean
from effcli.importers import is_factory

_FOLDER = Path(__file__).parents[1] / "data"
SAMPLES = {"sample:lm": _FOLDER / "lm", "sample:cnn": _FOLDER / "cnn"}
CALIBRATION_TEXT = _FOLDER / "lm" / "calibration.txt"
EVALUATION_TEXT = _FOLDER / "lm" / "evaluation.txt"
# What stands before the class of a model that was given in Python: its files are gone when the run is done.
OBJECT = "python-object://"


def resolve(model: str, revision: str | None = None) -> Path:
    """The directory or file of `model`: `sample:NAME`, a local path, or a Hub id, downloaded or from the cache."""
    if model.startswith("sample:"):
        if model not in SAMPLES:
            raise CheckpointError(f"there is no {model}", did_you_mean(model, SAMPLES))
        return SAMPLES[model]
    if model.startswith(OBJECT):
        raise CheckpointError(
            f"{model}: the model was given in Python as a {model.removeprefix(OBJECT)}, and no file holds it",
            "give it to `effcli.compress` again, or save it and name its folder: --set model=FOLDER",
        )
    path = Path(model).expanduser()
    if path.exists():
        return path
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_local:
        raise CheckpointError(
            f"{model} does not exist",
            "give a directory, a .pt2 or .onnx file, a Hub id like org/name, sample:lm or sample:cnn",
        )
    return _download(model, revision)


def locate(model: str, revision: str | None = None) -> str | Path:
    """The directory or file of `model` as `resolve` finds it; `package.module:function` stays as it is."""
    if not is_factory(model) or Path(model).exists():
        return resolve(model, revision)
    package = model.partition(":")[0].partition(".")[0]
    if difflib.get_close_matches(model, SAMPLES) and importlib.util.find_spec(package) is None:
        raise CheckpointError(f"there is no {model}", did_you_mean(model, SAMPLES))
    return model


def at_hand(model: str, revision: str | None = None) -> Path | None:
    """The directory or file of `model` where it is on this machine, None where it would have to be downloaded."""
    try:
        path = Path(model).expanduser()
        return resolve(model) if model.startswith("sample:") or path.exists() else _download(model, revision, True)
    except (CheckpointError, OSError, RuntimeError):
        return None


def _download(model: str, revision: str | None, local: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "*.pt2", "*.onnx"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=local))
    except HFValidationError as error:
        raise CheckpointError(f"{model} is neither a directory nor a Hub id", str(error).splitlines()[0]) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model} is no local directory, and the Hub did not give it: {str(error).splitlines()[0]}",
            "check the name and the network, log in with `hf auth login`, or give a local directory",
        ) from error
