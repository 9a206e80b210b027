"""The base of everything that a user can set: in a recipe, on the command line, from Python; and of every record."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Options are frozen and know their keys: a misspelt one is an error, not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Record(Options):
    """A part of a report. An infinite perplexity is a finding: JSON must not turn it into "not measured"."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


__all__ = ["Options", "Record"]
