"""A model that is loaded already, as files that a run reads: what `compress` is given in place of a path."""

from __future__ import annotations

import copy
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effcli.errors import RecipeError, UnsupportedError, foreign, writing
from effcli.importers.exported import FILE_NAME, write_exported
from effcli.platform.huggingface import check_causal, quiet_transformers, restoring_verbosity
from effcli.run.recipe import Recipe
from effcli.run.workplace import Workplace, check_output, resolved

# Of a language model so much is in memory a second time while it is written.
_SHARD = "500MB"
_CLASSIFIER = "ForImageClassification"


@contextmanager
def on_disk(model: nn.Module, recipe: Recipe, tokenizer: Any, overwrite: bool) -> Iterator[Path]:
    """The folder of a loaded model, beside the output of `recipe`, as long as the run needs it.

    tokenizer: of a language model, None for that of the place which the model was loaded from. A module that is not of
    transformers needs the shape of an input in the recipe. The name of the folder tells the model from others by its
    weights, so that the same call goes on with unfinished work. `UnsupportedError` says what cannot be taken. The model
    stays as it is.
    """
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model: a {type(model).__name__} is no model",
            "give a path, a Hub id, a model of transformers or a torch.nn.Module",
        )
    output = resolved(recipe.target.absolute())
    check_output(output, overwrite)
    # What torch.compile wraps.
    model = getattr(model, "_orig_mod", model)
    name = type(model).__name__
    _check(model)
    prefix = f".{output.name}.effcli-input-"
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f"{prefix}draft-", dir=output.parent))
    try:
        with writing(output):
            (draft / name).mkdir()
            digest = _write(model, draft / name, tokenizer, recipe.shape)
        folder = output.parent / f"{prefix}{digest[:16]}"
        made = not folder.exists()
        if made:
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    done = False
    try:
        yield folder / name
        done = True
    finally:
        if done:
            for each in output.parent.glob(f"{prefix}*"):
                shutil.rmtree(each, ignore_errors=True)
        elif made and not Workplace(output).folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def _check(model: nn.Module) -> None:
    """Refuse what no file could be written of."""
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedError("the model has adapters beside its weights", "merge them: model.merge_and_unload()")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedError("the model is quantized already", "load the one that it was made from")
    tensors = (*model.named_parameters(), *model.named_buffers())
    absent = next((name for name, tensor in tensors if tensor.is_meta), None)
    if absent is not None:
        raise UnsupportedError(
            f"{absent} is not in memory: it is on the device meta, or offloaded",
            "load the model whole, or give its path",
        )


def _write(model: nn.Module, folder: Path, tokenizer: Any, shape: tuple[int, ...] | None) -> str:
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        _write_pretrained(model, folder, tokenizer)
        return _digest(folder)
    if tokenizer is not None:
        raise RecipeError(f"tokenizer: {type(model).__name__} is no model of transformers", "leave it out")
    if shape is None:
        raise UnsupportedError(
            f"the shape of an input of {type(model).__name__} is unknown",
            "give an input, example=torch.zeros(1, 3, 32, 32), or its shape, shape=(3, 32, 32)",
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if dtype is not None:
        kind = str(dtype).removeprefix("torch.")
        raise UnsupportedError(f"{type(model).__name__} has weights of {kind}", "give it in float32: model.float()")
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).cpu()
    return write_exported(model, shape, folder / FILE_NAME)


def _write_pretrained(model: Any, folder: Path, tokenizer: Any) -> None:
    """Write a model of transformers as its own `save_pretrained` does, with what prepares its inputs."""
    name, config = type(model).__name__, model.config
    classifier = name.endswith(_CLASSIFIER)
    if not classifier:
        check_causal(Path("the model"), {**config.to_dict(), "architectures": [name]})
    with restoring_verbosity():
        quiet_transformers()
        prepares = _preparing(config.name_or_path, tokenizer, classifier)
        # Both are set by `save_pretrained`.
        kept = {key: getattr(config, key, None) for key in ("dtype", "architectures")}
        try:
            with foreign(lambda cause: UnsupportedError(f"transformers cannot write {name}: {cause}", "give its path")):
                model.save_pretrained(folder, max_shard_size=_SHARD)
                if prepares is not None:
                    prepares.save_pretrained(folder)
        finally:
            for key, value in kept.items():
                setattr(config, key, value)


def _preparing(source: str, tokenizer: Any, classifier: bool) -> Any:
    """The tokenizer of a language model, or the image processor of a classifier, None where that has none."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if tokenizer is not None:
        if not hasattr(tokenizer, "save_pretrained"):
            raise RecipeError(
                f"tokenizer: a {type(tokenizer).__name__} cannot be saved",
                "give a tokenizer of transformers, as AutoTokenizer.from_pretrained makes it",
            )
        return tokenizer
    automatic: Any = AutoImageProcessor if classifier else AutoTokenizer
    try:
        if source:
            return automatic.from_pretrained(source)
    except Exception as error:  # whatever transformers says of a place that has none
        reason: Exception | None = error
    else:
        reason = None
    if classifier:
        return None
    where = f"there is none at {source}" if source else "the model was not loaded from a path"
    raise UnsupportedError(f"the tokenizer is unknown: {where}", "give it: tokenizer=tokenizer") from reason


def shape_of(example: Tensor) -> tuple[int, ...]:
    """The shape of one input of a batch, float (n, ...), without the batch axis."""
    if not isinstance(example, Tensor) or example.dim() == 0:
        raise RecipeError(f"example: a {type(example).__name__} is no batch of inputs", "give a tensor (1, ...)")
    if not example.is_floating_point():
        kind = str(example.dtype).removeprefix("torch.")
        raise UnsupportedError(f"example: the network takes inputs of {kind}", "a graph takes floating-point numbers")
    return tuple(example.shape[1:])


def _digest(folder: Path) -> str:
    """The digest of all that is in the files of a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            found.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return found.hexdigest()


__all__ = ["on_disk", "shape_of"]
