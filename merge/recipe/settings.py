"""Values of a recipe that are overridden from outside, and keys that are left out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge.errors import RecipeError, hint
from merge.recipe.document import Document, read_documents

__all__ = ["addressed", "override", "without"]


def addressed(setting: str, documents: Sequence[Document], final: Document) -> tuple[Document, str]:
    """The document that a setting is for, and the setting without its address.

    ``NAME:key=value`` is for the stage of that name, ``key=value`` for the result.
    """
    names = {str(d.data["name"]): d for d in documents if d.data.get("name") is not None}
    for name, document in names.items():
        if setting.startswith(f"{name}:"):
            return document, setting.removeprefix(f"{name}:")
    name, colon, _ = setting.partition("=")[0].partition(":")
    if colon:
        raise RecipeError(
            f"a setting is for stage {name!r}, which there is not",
            recipe=final.name,
            found=repr(setting),
            expected=f"one of {', '.join(names)}" if names else "key=value: no stage has a name",
            do=hint(name, names),
        )
    return final, setting


def override(data: Any, setting: str) -> Any:
    """A copy of ``data`` with one ``key.key=value`` set; the value is read as YAML."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise RecipeError("a setting is not KEY=VALUE", found=repr(setting))
    read = read_documents(text, f"--set {setting}")
    return _put(data, path.split("."), read[0].data if read else None, setting)


def _put(data: Any, keys: list[str], value: Any, setting: str) -> Any:
    if not keys:
        return value
    head, *rest = keys
    if isinstance(data, list):
        if not head.isdecimal() or int(head) >= len(data):
            raise RecipeError(
                "a setting names no item of the recipe",
                found=repr(setting),
                expected=f"a number from 0 to {len(data) - 1} in place of {head!r}",
            )
        return [_put(v, rest, value, setting) if i == int(head) else v for i, v in enumerate(data)]
    inside = data if isinstance(data, dict) else {}
    return {**inside, head: _put(inside.get(head), rest, value, setting)}


def without(data: Any, place: tuple[str | int, ...]) -> Any:
    """A copy of ``data`` without what stands at ``place``."""
    head, *rest = place
    if isinstance(data, list):
        return [without(v, tuple(rest)) if i == head else v for i, v in enumerate(data)]
    if not rest:
        return {k: v for k, v in data.items() if k != head}
    return {k: without(v, tuple(rest)) if k == head else v for k, v in data.items()}
