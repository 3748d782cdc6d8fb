"""The recipe as a checked value: pydantic models, errors with line and column, JSON schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from merge import methods
from merge.errors import MergeError, RecipeError, nearest
from merge.ir.dtypes import parse_dtype
from merge.recipe.document import Document, read_document, read_text

__all__ = ["ModelEntry", "Recipe", "RecipeModel", "json_schema", "parse_recipe", "read_recipe"]

_SCALAR = {"type": ["number", "boolean", "string", "null"]}
_GRADIENT = {"anyOf": [_SCALAR, {"type": "array", "items": _SCALAR}]}
_FILTER = {
    "type": "object",
    "properties": {"filter": {"type": ["string", "null"]}, "value": _GRADIENT},
    "required": ["value"],
    "additionalProperties": False,
}
_VALUE = {
    "description": "a number, a gradient over depth, or a list of {filter, value}",
    "anyOf": [_SCALAR, _FILTER, {"type": "array", "items": {"anyOf": [_SCALAR, _FILTER]}}],
}

Parameters = Annotated[
    dict[str, Any],
    BeforeValidator(lambda v: {} if v is None else v),  # `parameters:` with nothing
    WithJsonSchema({"type": ["object", "null"], "additionalProperties": _VALUE}),
]


def _reference(value: object) -> object:
    """A model reference: text, or mergekit's mapping form of a plain path."""
    if isinstance(value, dict) and set(value) == {"model"}:
        value = value["model"]
    if isinstance(value, dict) and set(value) == {"path"}:
        value = value["path"]
    return value


Reference = Annotated[
    str,
    BeforeValidator(_reference),
    WithJsonSchema({"type": "string", "description": "a folder or a .safetensors file"}),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelEntry(_Strict):
    """One input model and its own parameters."""

    model: Reference
    parameters: Parameters = Field(default_factory=dict)


class RecipeModel(_Strict):
    """A merge recipe, in mergekit's words."""

    merge_method: str = Field(description="see `merge methods`")
    models: list[ModelEntry] = Field(min_length=1)
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: str | None = Field(None, description="storage type of the result")
    out_dtype: str | None = Field(None, description="storage type of the result; before dtype")
    seed: int = Field(0, ge=0, description="of random methods")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe whose words are all known, with the document that says where each stands."""

    model: RecipeModel
    document: Document
    ignored: tuple[str, ...] = ()  # unknown keys, when they are let pass
    settings: tuple[str, ...] = ()  # key=value, from the command line
    lenient: bool = False

    @property
    def text(self) -> str:
        """The recipe's text as written, with a comment for each setting that overrode it."""
        notes = "".join(f"# overridden when it was run: {s}\n" for s in self.settings)
        return notes + self.document.text


def read_recipe(path: str | Path, *, lenient: bool = False, settings: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file; RecipeError with line and column for what is wrong in it.

    lenient: unknown keys are ignored and listed in the result instead. settings: texts such as
    ``parameters.t=0.3`` or ``models.0.parameters.weight=0.2`` that override values.
    """
    return parse_recipe(read_text(Path(path)), str(path), lenient=lenient, settings=settings)


def parse_recipe(
    text: str, name: str = "recipe", *, lenient: bool = False, settings: Sequence[str] = ()
) -> Recipe:
    """The recipe in a YAML text."""
    document = read_document(text, name)
    if not isinstance(document.data, dict):
        raise RecipeError(
            "a recipe is a mapping of keys",
            recipe=name,
            line=1,
            column=1,
            found=type(document.data).__name__,
            expected="merge_method: ..., models: ...",
        )
    data, ignored = document.data, []
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
    return Recipe(model, document, tuple(ignored), tuple(settings), lenient)


def _override(data: Any, setting: str) -> Any:
    """A copy of ``data`` with one ``key.key=value`` set; the value is read as YAML."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise RecipeError("a setting is not KEY=VALUE", found=repr(setting))
    return _put(data, path.split("."), read_document(text, f"--set {setting}").data, setting)


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


_LATER = {
    "slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "name"
}  # fmt: skip


def _explain(detail: Any, document: Document) -> RecipeError:
    """pydantic's first complaint in our words."""
    place = tuple(p for p in detail["loc"])
    key = next((str(p) for p in reversed(place) if isinstance(p, str)), None)
    if detail["type"] == "extra_forbidden":
        known = _fields_at(place)
        near = nearest(str(place[-1]), known)
        if place[-1] in _LATER and len(place) == 1:
            return document.error(f"recipe key {key!r} is not supported yet", place, key=key)
        return document.error(
            f"unknown key {key!r}",
            place,
            key=key,
            expected=f"one of {', '.join(known)}",
            do=f"did you mean {near!r}?" if near else None,
        )
    if detail["type"] == "missing":
        return document.error(f"the key {key!r} is missing", place[:-1], key=key)
    return document.error(
        f"the value of {key!r} is wrong: {detail['msg'][0].lower()}{detail['msg'][1:]}",
        place,
        key=key,
        found=repr(detail["input"])[:200],
    )


def _fields_at(place: tuple[str | int, ...]) -> list[str]:
    model = ModelEntry if place[0] == "models" else RecipeModel
    return list(model.model_fields)


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors: structure, methods, and each method's parameters."""
    schema = RecipeModel.model_json_schema()
    registry = methods.registry()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "hf-merge recipe"
    schema["properties"]["merge_method"]["enum"] = list(registry)
    schema["allOf"] = [
        {
            "if": {"properties": {"merge_method": {"const": name}}, "required": ["merge_method"]},
            "then": {"properties": {"parameters": {"propertyNames": {"enum": list(m.parameters)}}}},
        }
        for name, m in registry.items()
    ]
    return schema
