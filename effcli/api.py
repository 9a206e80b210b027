"""effcli from Python: the same runs as on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effcli.layers.contract import Pass
from effcli.reports.report import Report
from effcli.run import recipe as recipes

if TYPE_CHECKING:
    from effcli.run.listener import Listener


def compress(
    model: str | Path,
    passes: str | Sequence[str | dict[str, Any] | Pass],
    output: str | Path,
    *,
    overwrite: bool = False,
    listener: Listener | None = None,
    **keys: Any,
) -> Report:
    """Compress `model` with `passes` into the directory `output`, and return what was measured.

    model: a directory, a Hub id, or `sample:lm`. passes: `"awq:bits=4"`, `{"awq": {"bits": 4}}` or a pass's `Config`.
    keys: any other key of a recipe, e.g. `calibration={"data": "valid.txt"}`, `evaluate=False`, `seed=1`.
    """
    from effcli.platform.huggingface import restoring_verbosity
    from effcli.run import pipeline

    recipe = recipes.from_arguments(str(model), output=str(output), passes=passes, **keys)
    with restoring_verbosity():
        return pipeline.run(recipe, overwrite=overwrite, listener=listener)
