"""How people name a model: ``path[@revision][+adapter[@revision]]``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Reference", "UnknownKey", "parse_reference"]

_WHOLE = ("model", "lora", "override_architecture")
_HALF = ("path", "revision")


@dataclass(frozen=True, slots=True)
class Reference:
    """The name of a model. ``path`` is a folder, a file, a Hub id or a stage of the recipe.

    text: as it was written, where it was written as one text. A path may itself hold ``@`` and
    ``+``: what exists under the whole text goes before what its parts say.
    architecture: goes before ``architectures`` in the model's config.json.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    architecture: str | None = None
    text: str | None = None

    def __str__(self) -> str:
        if self.text is not None:
            return self.text
        at = f"@{self.revision}" if self.revision else ""
        plus = f"+{self.adapter}" if self.adapter else ""
        plus_at = f"@{self.adapter_revision}" if self.adapter_revision else ""
        return f"{self.path}{at}{plus}{plus_at}"


class UnknownKey(ValueError):
    """A key that a mapping does not have; ``place``: below the mapping, the key itself last."""

    def __init__(self, place: tuple[str, ...], known: Iterable[str]) -> None:
        self.place, self.known = place, tuple(known)
        super().__init__(f"unknown key {place[-1]!r}")


def parse_reference(value: object) -> Reference:
    """A reference from text, or from mergekit's mapping; ValueError says what is wrong with it.

    The mapping is ``{model: {path, revision}, lora: {path, revision}, override_architecture}``;
    its parts may be text, and ``{path, revision}`` alone is a model.

    >>> parse_reference("org/base@v2+org/lora").adapter
    'org/lora'
    """
    if isinstance(value, Reference):
        return value
    if isinstance(value, str):
        return _from_text(value)
    if not isinstance(value, dict):
        raise ValueError("a model is named by text or a mapping")
    if "model" not in value and "path" in value:
        path, revision = _part(value)
        return Reference(path, revision)
    _check_keys(value, _WHOLE if "model" in value else (*_WHOLE, *_HALF))
    if "model" not in value:
        raise ValueError("expected model, and optionally lora and override_architecture")
    path, revision = _part(value["model"], "model")
    adapter, adapter_revision = None, None
    if value.get("lora") is not None:
        adapter, adapter_revision = _part(value["lora"], "lora")
    architecture = value.get("override_architecture")
    if architecture is not None and not (isinstance(architecture, str) and architecture):
        raise ValueError("override_architecture is not text")
    return Reference(path, revision, adapter, adapter_revision, architecture)


def _check_keys(value: Mapping[str, object], known: tuple[str, ...], *above: str) -> None:
    for key in value:
        if key not in known:
            raise UnknownKey((*above, key), known)


def _from_text(text: str) -> Reference:
    if not text.strip():
        raise ValueError("the name of a model is empty")
    halves = text.split("+")
    parts = [half.split("@") for half in halves]
    if len(halves) > 2 or any(len(p) > 2 or not all(p) for p in parts):
        return Reference(text, text=text)  # none of ours, so it can only be a path
    path, revision = [*parts[0], None][:2]
    adapter, adapter_revision = [*parts[1], None][:2] if len(parts) > 1 else (None, None)
    return Reference(str(path), revision, adapter, adapter_revision, text=text)


def _part(value: object, *above: str) -> tuple[str, str | None]:
    """Path and revision of one half, written as text or as a mapping."""
    if isinstance(value, str) and value.strip():
        path, _, revision = value.partition("@")
        return (path, revision or None) if path else (value, None)
    if isinstance(value, dict):
        _check_keys(value, _HALF, *above)
        where, at = value.get("path"), value.get("revision")
        if isinstance(where, str) and where.strip() and (at is None or isinstance(at, str)):
            return where, at or None
    raise ValueError("expected a path, or path and revision")
