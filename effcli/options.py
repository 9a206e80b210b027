"""The base of everything that a user can set: in a recipe, on the command line, from Python."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Options are frozen and know their keys: a misspelt one is an error, not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


__all__ = ["Options"]
