"""effcli from Python: the same runs as on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.errors import RecipeError
from effcli.layers.contract import Pass
from effcli.reports.printed import PrintedReport
from effcli.reports.screen import Screen
from effcli.reports.text import Console
from effcli.run import recipe as recipes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from effcli.run.forecast import Forecast
    from effcli.run.listener import Listener


def compress(
    model: str | Path | nn.Module,
    passes: str | Sequence[str | dict[str, Any] | Pass],
    output: str | Path,
    *,
    tokenizer: Any = None,
    example: Tensor | None = None,
    overwrite: bool = False,
    predict: bool = False,
    listener: Listener | None = None,
    **keys: Any,
) -> PrintedReport:
    """Compress `model` with `passes` into the directory `output`, and return what was measured.

    model: a directory, a `.pt2` or `.onnx` file, a Hub id, `sample:lm` or `sample:cnn`; or a model that is loaded: a
        causal language model or an image classifier of transformers, or any `torch.nn.Module` that takes one tensor.
        A loaded model stays as it is. It is written to a folder beside `output`, which is removed when the run is
        done; the same call with the same weights goes on with a run that was interrupted. `recipe.yaml` cannot name
        it, so re-running that needs `--set model=FOLDER`.
    passes: one or several, in order: `"awq:bits=4"`, `{"awq": {"bits": 4}}`, or a pass itself, `AWQ(bits=4)`.
    output: the directory to write; `effcli.load` and the commands take it.
    tokenizer: of a loaded language model; by default that of the place which the model was loaded from.
    example: a batch of inputs of a loaded module, float (n, ...), of which only the shape counts; the key `shape`, of
        one input without the batch axis, says the same.
    overwrite: replace an `output` that effcli wrote.
    predict: rehearse the run first, so that the report has the time that was expected of each phase.
    listener: whom the run tells how it goes; see `Listener`. Without one, a notebook shows what the command line shows,
        and a script shows nothing.
    keys: any other key of a recipe, e.g. `calibration={"data": "valid.txt"}`, `evaluate=False`, `seed=1`.

    Raises the classes of `EffcliError`, each with its `cause` and its `remedy`: `RecipeError` for an unknown pass,
    option or key, `CheckpointError` and `UnsupportedError` for a model that cannot be read, `DataError` for calibration
    or evaluation data, `OutputError` for an `output` that exists or does not fit on the disk.
    """
    from effcli.platform.huggingface import restoring_verbosity

    if isinstance(model, str | Path):
        for name, given in (("tokenizer", tokenizer), ("example", example)):
            if given is not None:
                raise RecipeError(f"{name}: {model} is read from its files", "leave it out, or give a loaded model")
        recipe = recipes.from_arguments(str(model), output=str(output), passes=passes, **keys)
        with restoring_verbosity():
            return _run(recipe, overwrite, predict, listener)

    from effcli.files.locate import OBJECT
    from effcli.run import loaded

    if example is not None:
        keys["shape"] = loaded.shape_of(example)
    # Known before anything is written.
    recipe = recipes.from_arguments(type(model).__name__, output=str(output), passes=passes, **keys)
    with restoring_verbosity(), loaded.on_disk(model, recipe, tokenizer, overwrite) as folder:
        recipe = recipe.model_copy(update={"model": str(folder)})
        return _run(recipe, overwrite, predict, listener, f"{OBJECT}{folder.name}")


def _run(
    recipe: recipes.Recipe, overwrite: bool, predict: bool, listener: Listener | None, called: str = ""
) -> PrintedReport:
    from effcli.run import pipeline, rehearse

    forecast = None
    if predict:
        pipeline.check(recipe, overwrite)
        forecast = rehearse.predict(recipe)
    with _watched(recipe, listener, forecast) as told:
        report = pipeline.run(recipe, overwrite=overwrite, listener=told, forecast=forecast, called=called)
        return PrintedReport.of(report)


def _watched(
    recipe: recipes.Recipe, listener: Listener | None, forecast: Forecast | None = None
) -> AbstractContextManager[Listener | None]:
    """Who listens to a run."""
    if listener is None and Console(stderr=True).is_jupyter:
        return Screen(recipe, forecast=forecast)
    return nullcontext(listener)


__all__ = ["compress"]
