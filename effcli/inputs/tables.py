"""Rows of parquet files that hold text: one dictionary each, as of a line of JSON."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from effcli.errors import DataError, UserError, foreign
from effcli.inputs import published

SUFFIX = ".parquet"
_AGAIN = "get the file again"


def holds_questions(file: Path) -> bool:
    """Whether a parquet file has the columns of questions; False when it cannot be read, too."""
    try:
        names = set(_open(file).schema_arrow.names)
    except UserError:
        return False
    return published.holds_questions(names)


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a file with its name; `DataError` for a file that cannot be read."""
    table = _open(file)
    number = 0
    with _damage_of(file):
        for batch in table.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row


def _open(file: Path) -> Any:
    if not file.is_file():
        raise DataError(f"there is no file {file}", "check the path")
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError("pyarrow is not installed", "pip install 'effcli[datasets]'") from None
    with _damage_of(file):
        return parquet.ParquetFile(file)


def _damage_of(file: Path) -> AbstractContextManager[None]:
    return foreign(lambda cause: DataError(f"{file} is no parquet file that can be read: {cause}", _AGAIN))
