"""A recipe file as checked stages, with line and column for every word that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from merge import methods
from merge.errors import MergeError, RecipeError, nearest
from merge.ir.dtypes import parse_dtype
from merge.recipe import schema
from merge.recipe.document import Document, read_documents, read_text
from merge.recipe.schema import RecipeModel

__all__ = ["Recipe", "Stage", "parse_recipe", "read_recipe"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One document of a recipe: all its words are known, and each has a place."""

    model: RecipeModel
    document: Document
    ignored: tuple[str, ...] = ()  # unknown keys, when they are let pass
    lenient: bool = False

    @property
    def name(self) -> str | None:
        """By which other stages use this one."""
        return self.model.name


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe file. Its ``final`` stage is the result; the others are there to be used by it."""

    stages: tuple[Stage, ...]
    final: Stage
    source: str
    settings: tuple[str, ...] = ()  # key=value, from the command line

    @property
    def text(self) -> str:
        """The recipe's text as written, with a comment for each setting that overrode it."""
        notes = "".join(f"# overridden when it was run: {s}\n" for s in self.settings)
        return notes + self.source


def read_recipe(path: str | Path, *, lenient: bool = False, settings: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file; RecipeError with line and column for what is wrong in it.

    lenient: unknown keys are ignored and listed in the result instead, and of duplicate keys the
    last counts. settings: texts such as ``parameters.t=0.3`` or ``models.0.parameters.weight=0.2``
    that override values of the final stage; ``NAME:parameters.t=0.3`` of another.
    """
    return parse_recipe(read_text(Path(path)), str(path), lenient=lenient, settings=settings)


def parse_recipe(
    text: str, name: str = "recipe", *, lenient: bool = False, settings: Sequence[str] = ()
) -> Recipe:
    """The recipe in a YAML text of one or more documents."""
    documents = read_documents(text, name, last_wins=lenient)
    if not documents:
        raise _not_a_recipe(Document(name, None, {}))
    for document in documents:
        if not isinstance(document.data, dict):
            raise _not_a_recipe(document)
    final = _final(documents)
    wanted = [_addressed(setting, documents, final) for setting in settings]
    stages = tuple(
        _stage(document, [s for d, s in wanted if d is document], lenient) for document in documents
    )
    return Recipe(stages, stages[documents.index(final)], text, tuple(settings))


def _not_a_recipe(document: Document) -> RecipeError:
    line, _ = min(document.positions.values(), default=(1, 1))
    return RecipeError(
        "a recipe is a mapping of keys",
        recipe=document.name,
        line=line,
        column=1,
        found=type(document.data).__name__,
        expected="merge_method: ..., models: ...",
    )


def _final(documents: Sequence[Document]) -> Document:
    """The document that is the result: the one without a name, else the last."""
    names: dict[str, Document] = {}
    unnamed = [d for d in documents if d.data.get("name") is None]
    if len(unnamed) > 1:
        raise unnamed[1].error(
            "two documents of the recipe have no name",
            min(unnamed[1].positions, key=len, default=()),
            expected="a name for each stage but the last, which is the result",
            do="give the stage a name, and use that name as a model in the other",
        )
    for document in documents:
        name = document.data.get("name")
        if name is not None and names.setdefault(str(name), document) is not document:
            raise document.error(f"two stages are called {name!r}", ("name",), key="name")
    return unnamed[0] if unnamed else documents[-1]


def _addressed(
    setting: str, documents: Sequence[Document], final: Document
) -> tuple[Document, str]:
    """The document that a setting is for, and the setting without its address."""
    name, colon, rest = setting.partition(":")
    if colon and "=" not in name:
        for document in documents:
            if document.data.get("name") == name:
                return document, rest
    return final, setting


def _stage(document: Document, settings: Sequence[str], lenient: bool) -> Stage:
    data, ignored = document.data, list(document.repeated)
    for setting in settings:
        data = _override(data, setting)
    while True:
        try:
            model = RecipeModel.model_validate(data)
            break
        except ValidationError as error:
            # an unknown key is often a known one misspelt, which is then missing: say the former
            first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
            if not lenient or first["type"] != "extra_forbidden":
                raise _explain(first, document) from None
            data = _without(data, first["loc"])
            ignored.append(f"line {document.where(first['loc'])['line']}: {first['loc'][-1]!r}")
    _check_parts(model, document)
    _check_words(model, document)
    return Stage(model, document, tuple(ignored), lenient)


def _check_parts(model: RecipeModel, document: Document) -> None:
    """Each recipe, and each module of one, says in one way what it is made of."""
    parts = ("models", "slices", "modules")
    _exactly_one(model, parts, document, ())
    for name, module in (model.modules or {}).items():
        _exactly_one(module, parts[:2], document, ("modules", name))
    if model.tokenizer is not None and model.tokenizer_source is not None:
        raise document.error(
            "both tokenizer and tokenizer_source are given",
            ("tokenizer_source",),
            key="tokenizer_source",
            do="keep tokenizer, and write the other as its source",
        )


def _exactly_one(
    model: BaseModel, parts: Sequence[str], document: Document, place: tuple[str, ...]
) -> None:
    given = [part for part in parts if getattr(model, part) is not None]
    if not given:
        raise document.error(
            f"the key 'models' is missing{' here' if place else ''}",
            (*place, "models"),
            key="models",
            expected=f"one of {', '.join(parts)}",
        )
    if len(given) > 1:
        raise document.error(
            f"both {given[0]} and {given[1]} are given",
            (*place, given[1]),
            key=given[1],
            expected=f"one of {', '.join(parts)}",
        )


def _check_words(model: RecipeModel, document: Document) -> None:
    """Methods and dtypes are known."""
    for key, check in (
        ("merge_method", methods.get),
        ("dtype", parse_dtype),
        ("out_dtype", parse_dtype),
    ):
        value = getattr(model, key)
        if value is not None:
            try:
                check(value)
            except MergeError as error:
                raise error.at(**document.where((key,)), key=key) from None


def _override(data: Any, setting: str) -> Any:
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
        if not head.isdigit() or int(head) >= len(data):
            raise RecipeError(
                "a setting names no item of the recipe",
                found=repr(setting),
                expected=f"a number from 0 to {len(data) - 1} in place of {head!r}",
            )
        return [_put(v, rest, value, setting) if i == int(head) else v for i, v in enumerate(data)]
    inside = data if isinstance(data, dict) else {}
    return {**inside, head: _put(inside.get(head), rest, value, setting)}


def _without(data: Any, place: tuple[str | int, ...]) -> Any:
    """A copy of ``data`` without what stands at ``place``."""
    head, *rest = place
    if isinstance(data, list):
        return [_without(v, tuple(rest)) if i == head else v for i, v in enumerate(data)]
    if not rest:
        return {k: v for k, v in data.items() if k != head}
    return {k: _without(v, tuple(rest)) if k == head else v for k, v in data.items()}


def _explain(detail: Any, document: Document) -> RecipeError:
    """pydantic's first complaint in our words."""
    place = tuple(p for p in detail["loc"])
    key = next((str(p) for p in reversed(place) if isinstance(p, str)), None)
    if detail["type"] == "extra_forbidden":
        known = _fields_at(place)
        near = nearest(str(place[-1]), known)
        return document.error(
            f"unknown key {key!r}",
            place,
            key=key,
            expected=f"one of {', '.join(known)}",
            do=f"did you mean {near!r}?" if near else None,
        )
    if detail["type"] == "missing":
        return document.error(f"the key {key!r} is missing", place[:-1], key=key)
    said = detail["msg"].removeprefix("Value error, ")
    return document.error(
        f"the value of {key!r} is wrong: {said[0].lower()}{said[1:]}",
        place,
        key=key,
        found=repr(detail["input"])[:200],
    )


_INSIDE: dict[str, type[BaseModel]] = {
    "models": schema.ModelEntry,
    "slices": schema.SliceEntry,
    "sources": schema.SourceEntry,
    "modules": schema.ModuleEntry,
    "tokenizer": schema.TokenizerEntry,
    "tokens": schema.TokenEntry,
    "source": schema.TokenSource,
}


def _fields_at(place: tuple[str | int, ...]) -> list[str]:
    """The keys that may stand where the unknown last one of ``place`` stands."""
    above = [p for p in place[:-1] if p in _INSIDE]
    model = _INSIDE[str(above[-1])] if above else RecipeModel
    return list(model.model_fields)
