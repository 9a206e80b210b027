"""The base of everything that a user can set: in a recipe, on the command line, from Python; and of every record."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Options(BaseModel):
    """Options are frozen and know their keys: a misspelt one is an error, not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Record(Options):
    """A part of a report. An infinite perplexity is a finding: JSON must not turn it into "not measured"."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


def percent(value: Any) -> Any:
    """The number that 50% stands for; anything else as it is."""
    match = re.fullmatch(r"\s*([\d.]+)\s*%\s*", value) if isinstance(value, str) else None
    return float(match[1]) / 100 if match is not None and match[1].count(".") <= 1 else value


# A number that may be written as a percentage.
Share = Annotated[float, BeforeValidator(percent, json_schema_input_type=float | str)]


__all__ = ["Options", "Record", "Share"]
