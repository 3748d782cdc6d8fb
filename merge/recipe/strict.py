"""The base of all words of a recipe: no unknown keys, no conversions, nothing changes later."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Strict"]


class Strict(BaseModel):
    """A mapping of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
