"""A recipe file as checked stages, with line and column for every word that is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from merge import methods
from merge.errors import MergeError, RecipeError, hint
from merge.ir.dtypes import parse_dtype
from merge.ir.reference import UnknownKey
from merge.recipe.document import Document, Place, read_documents, read_text, unknown_key
from merge.recipe.inputs import named_models
from merge.recipe.schema import RecipeModel, keys_at
from merge.recipe.settings import addressed, override, without

__all__ = ["Recipe", "Stage", "parse_recipe", "read_recipe"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One document of a recipe: all its words are known, and each has a place."""

    model: RecipeModel
    document: Document
    ignored: tuple[str, ...] = ()  # what is let pass in it, in words
    lenient: bool = False
    settings: tuple[str, ...] = ()  # values that were overridden

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
    wanted = [addressed(setting, documents, final) for setting in settings]
    stages = tuple(
        _stage(document, [s for d, s in wanted if d is document], lenient) for document in documents
    )
    _check_learned(stages)
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


def _check_learned(stages: Sequence[Stage]) -> None:
    """Data decides one thing in a recipe: what it learns, or what it tunes."""
    learned = [s for s in stages if s.model.learn is not None]
    tuned = [s for s in stages if s.model.tune is not None]
    if len(learned) > 1 or (learned and tuned):
        last = (tuned or learned)[-1]
        raise last.document.error(
            "coefficients are learned once in a recipe, and not in one that is tuned",
            ("tune",) if tuned else ("learn",),
            key="tune" if tuned else "learn",
            do="run the stages as recipes of their own",
        )


def _stage(document: Document, settings: Sequence[str], lenient: bool) -> Stage:
    data = document.data
    ignored = [f"line {n}: {key!r} is given again: the last counts" for key, n in document.repeated]
    for setting in settings:
        data = override(data, setting)
    while True:
        try:
            model = RecipeModel.model_validate(data)
            break
        except ValidationError as error:
            # an unknown key is often a known one misspelt, which is then missing: say the former
            first = min(error.errors(), key=lambda e: _unknown(e) is None)
            unknown = _unknown(first)
            if unknown is None or not lenient:
                raise _explain(first, document) from None
            data = without(data, unknown[0])
            line = document.where(unknown[0])["line"]
            ignored.append(f"line {line}: {unknown[0][-1]!r} is not known and is ignored")
    _check_parts(model, document)
    _check_words(model, document)
    _check_heads(model, document)
    return Stage(model, document, tuple(ignored), lenient, tuple(settings))


def _check_parts(model: RecipeModel, document: Document) -> None:
    """Each recipe, and each module of one, says in one way what it is made of."""
    parts = ("models", "slices", "modules")
    _exactly_one(model, parts, document, ())
    for name, module in (model.modules or {}).items():
        _exactly_one(module, parts[:2], document, ("modules", name))
    if model.scope is not None and model.models is None:
        raise document.error(
            "a scope is of whole models",
            ("scope",),
            key="scope",
            found="slices" if model.slices is not None else "modules",
            expected="models",
            do="write modules: with the part by its name, and models or slices in it",
        )
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


def _check_heads(model: RecipeModel, document: Document) -> None:
    """The rule for heads is a known word, or a model of the recipe."""
    models = dict.fromkeys(str(n.reference) for n in named_models(model))
    known = ["merge", "base", "drop", "keep", *models]
    if model.heads not in known:
        raise document.error(
            "the value of 'heads' names no model of the recipe",
            ("heads",),
            key="heads",
            found=repr(model.heads),
            expected=f"one of {', '.join(known)}",
            do=hint(model.heads, known),
        )


def _unknown(detail: Any) -> tuple[Place, Sequence[str]] | None:
    """Where the unknown key stands that pydantic complains of, and which there are; or None."""
    place = tuple(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return place, keys_at(place)
    inner = detail.get("ctx", {}).get("error")
    return ((*place, *inner.place), inner.known) if isinstance(inner, UnknownKey) else None


def _explain(detail: Any, document: Document) -> RecipeError:
    """pydantic's complaint in our words."""
    place = tuple(detail["loc"])
    unknown = _unknown(detail)
    if unknown is not None:
        place, known = unknown
        return unknown_key(document, place, known)
    key = next((str(p) for p in reversed(place) if isinstance(p, str)), None)
    if detail["type"] == "missing":
        return document.error(f"the key {key!r} is missing", place[:-1], key=key)
    said = detail["msg"].removeprefix("Value error, ")
    expected = do = None
    if detail["type"] == "literal_error":
        said, expected = "it is no known word", detail["ctx"]["expected"]
        do = hint(detail["input"], re.findall(r"'(\w+)'", expected))
    if detail["type"] == "model_type":
        said, expected = "it is no mapping of keys", f"keys: {', '.join(keys_at((*place, '')))}"
    return document.error(
        f"the value of {key!r} is wrong: {said[0].lower()}{said[1:]}",
        place,
        key=key,
        found=repr(detail["input"])[:200],
        expected=expected,
        do=do,
    )
