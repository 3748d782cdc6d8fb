"""The smoke check as an option of commands that end with a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from merge.smoke import Smoke, require_transformers, smoke

__all__ = ["Checked", "smoke_check"]


class Checked(tuple[Smoke, ...]):
    """The check of a result, and that of the model it is compared with; empty without --smoke."""

    @property
    def ok(self) -> bool:
        return all(found.ok for found in self[:1])

    def to_json(self) -> dict[str, Any]:
        """The checks by the options that asked for them."""
        keys = ("smoke", "smoke_against")
        return {key: found.to_json() for key, found in zip(keys, self, strict=False)}

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def smoke_check(wanted: bool, against: Path | None) -> Callable[[Path], Checked]:
    """What to call with the finished folder; refuses at once what could not be checked then."""
    if against is not None and not wanted:
        raise click.UsageError("--smoke-against is of use with --smoke only")
    if not wanted:
        return lambda _out: Checked()
    require_transformers()
    return lambda out: Checked(smoke(path) for path in (out, against) if path is not None)
