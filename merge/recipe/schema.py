"""The words of a recipe: pydantic models, one class a mapping, and the JSON schema for editors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema

from merge import methods
from merge.ir.align import Missing
from merge.ir.reference import Reference, UnknownKey, parse_reference
from merge.recipe.learn_words import Learn, LearnEntry
from merge.recipe.strict import Strict
from merge.recipe.tune_words import DataEntry, RangeEntry, Tune, TuneEntry

__all__ = [
    "AdapterEntry",
    "AlignEntry",
    "ModelEntry",
    "ModuleEntry",
    "OutputEntry",
    "RecipeModel",
    "RepairEntry",
    "SliceEntry",
    "SourceEntry",
    "TokenEntry",
    "TokenizerEntry",
    "json_schema",
    "keys_at",
]

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
_PART = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"path": {"type": "string"}, "revision": {"type": ["string", "null"]}},
            "required": ["path"],
            "additionalProperties": False,
        },
    ]
}
_MODEL = {
    "description": "path[@revision][+adapter[@revision]], or the same as a mapping",
    "anyOf": [
        *_PART["anyOf"],
        {
            "type": "object",
            "properties": {
                "model": _PART,
                "lora": _PART,
                "override_architecture": {"type": ["string", "null"]},
            },
            "required": ["model"],
            "additionalProperties": False,
        },
    ],
}


def _nothing(value: object) -> object:
    """A key with nothing after it, such as ``parameters:``, is an empty mapping."""
    return {} if value is None else value


Parameters = Annotated[
    dict[str, Any],
    BeforeValidator(_nothing),
    WithJsonSchema({"type": ["object", "null"], "additionalProperties": _VALUE}),
]
Model = Annotated[Reference, BeforeValidator(parse_reference), WithJsonSchema(_MODEL)]


def _without_prefix(value: object) -> object:
    """``model:org/name``, as old recipes name the source of a tokenizer, is ``org/name``."""
    return value.removeprefix("model:") if isinstance(value, str) else value


TokenizerSource = Annotated[
    Reference,
    BeforeValidator(lambda v: parse_reference(_without_prefix(v))),
    WithJsonSchema({**_MODEL, "description": "union, base, or a model"}),
]
Ignored = Annotated[Any, WithJsonSchema({"deprecated": True})]
"""Keys that mergekit reads or read once, and that change nothing."""


def _layers(value: object) -> object:
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value):
        first, end = value
        if not 0 <= first < end:
            raise ValueError("expected [first, end] with 0 <= first < end")
        return (first, end)
    raise ValueError("expected two whole numbers: the first layer, and the one after the last")


LayerRange = Annotated[
    tuple[int, int],
    BeforeValidator(_layers),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
            "minItems": 2,
            "maxItems": 2,
            "description": "[first, end], without the layer at end",
        }
    ),
]


class AlignEntry(Strict):
    """How a model is brought into the coordinates of another before it is merged."""

    method: Literal["weight", "activation", "ste", "transport", "none"] = "weight"
    to: str | None = Field(None, min_length=1, description="base, or a model of the recipe")
    data: str | None = Field(None, description="a file, a folder of pictures, or module:function")
    symmetry: str | None = Field(None, description="a symmetry spec; else that of the model's type")
    keep: list[str] = Field(default_factory=list, description="groups that stay")
    signed: bool = Field(False, description="change signs too, where the symmetry allows it")
    rotate: list[Literal["values", "phases", "stream"]] = Field(
        default_factory=list, description="in heads, rotary planes, the residual stream"
    )
    by: Literal["weights", "activations"] | None = Field(None, description="for transport")
    regularisation: float | None = Field(None, ge=0, description="for transport; 0 is exact")
    marginals: Literal["uniform", "l1", "l2"] | None = Field(None, description="for transport")
    metric: Literal["squared", "euclidean", "cosine"] | None = Field(
        None, description="for transport"
    )
    features: Literal["both", "incoming"] | None = Field(None, description="for transport")
    sweeps: int | None = Field(None, ge=1, description="for transport, at most")
    residual: (
        Literal["mean", "no_resid", "only_resid", "weighted_scalar", "weighted_matrix"] | None
    ) = Field(None, description="for transport by activations")

    def transport(self) -> dict[str, Any]:
        """What is said of transport, by word."""
        words = ("by", "regularisation", "marginals", "metric", "features", "sweeps", "residual")
        return {w: v for w in words if (v := getattr(self, w)) is not None}


class RepairEntry(Strict):
    """Statistics of the result put right on data."""

    data: str = Field(description="a file, a folder of pictures, or module:function")
    weights: list[float] | None = Field(None, description="of the models' statistics, else equal")


def _alone(key: str) -> BeforeValidator:
    """A text stands for a mapping in which it is the value of ``key``."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _or_text(entry: type[Strict], **text: object) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [text, entry.model_json_schema(), {"type": "null"}]})


Align = Annotated[
    AlignEntry | None,
    _alone("method"),
    _or_text(AlignEntry, enum=["weight", "activation", "ste", "transport", "none"]),
]
Repair = Annotated[RepairEntry | None, _alone("data"), _or_text(RepairEntry, type="string")]


class ModelEntry(Strict):
    """One input model and its own parameters."""

    model: Model
    align: Align = Field(None, description="goes before the recipe's")
    parameters: Parameters = Field(default_factory=dict)
    statistics: Model | None = Field(None, description="of each weight, for methods such as fisher")
    layer_range: Ignored = None


class SourceEntry(Strict):
    """Some layers of a model, and their own parameters."""

    model: Model
    align: Align = Field(None, description="goes before the recipe's")
    layer_range: LayerRange
    parameters: Parameters = Field(default_factory=dict)
    statistics: Model | None = Field(None, description="of each weight, for methods such as fisher")


class SliceEntry(Strict):
    """The next layers of the result, merged from equally many layers of each source."""

    sources: list[SourceEntry] = Field(min_length=1)
    base_model: Model | None = Field(None, description="goes before the recipe's")
    parameters: Parameters = Field(default_factory=dict)
    residual_weight: Ignored = None


class ModuleEntry(Strict):
    """A part of the model, such as its encoder, merged from models or from slices."""

    models: list[ModelEntry] | None = Field(None, min_length=1)
    slices: list[SliceEntry] | None = Field(None, min_length=1)
    parameters: Parameters = Field(default_factory=dict)


class TokenSource(Strict):
    """Where the embedding of a token comes from: a token of a model, or nowhere."""

    kind: Literal["model_token", "zero"]
    model: Model | None = None
    token: str | None = None
    token_id: int | None = Field(None, ge=0)


def _token_source(value: object) -> object:
    if not isinstance(value, dict) or not value.keys() - {"path", "revision", "model", "lora"}:
        return value if value is None else parse_reference(value)
    for key in value:
        if key not in TokenSource.model_fields:
            raise UnknownKey((key,), TokenSource.model_fields)
    try:
        source = TokenSource.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]}: {first['msg']}") from None
    if source.kind == "model_token" and (
        source.model is None or (source.token is None) == (source.token_id is None)
    ):
        raise ValueError("a model_token needs model, and either token or token_id")
    return source


class TokenEntry(Strict):
    """One token of the result's vocabulary."""

    source: Annotated[
        TokenSource | Reference | None,
        BeforeValidator(_token_source),
        WithJsonSchema({"description": "a model, {kind: zero} or {kind: model_token, ...}"}),
    ] = None
    force: bool = Field(False, description="give every model this embedding, also its own tokens")


class TokenizerEntry(Strict):
    """The vocabulary of the result."""

    source: TokenizerSource = Field(parse_reference("union"), description="union, base or a model")
    tokens: Annotated[dict[str, TokenEntry], BeforeValidator(_nothing)] = Field(
        default_factory=dict
    )
    pad_to_multiple_of: int | None = Field(None, ge=1)


class AdapterEntry(Strict):
    """The result as a PEFT adapter over base_model."""

    rank: int | None = Field(None, ge=1, description="at most, for a matrix")
    energy: float | None = Field(
        None, gt=0, le=1, description="share of the squares of all matrices that is kept at least"
    )
    embeddings: Literal["full", "lora", "skip"] | None = Field(
        None, description="changed embeddings: stored whole, as factors, or not"
    )
    include: list[str] = Field(default_factory=list, description="regular expressions of modules")
    exclude: list[str] = Field(default_factory=list, description="regular expressions of modules")


def _adapter(value: object) -> object:
    """``adapter`` alone, or with nothing after it, keeps everything."""
    if value == "adapter":
        return {"adapter": {}}
    if isinstance(value, dict) and "adapter" in value and value["adapter"] is None:
        return {**value, "adapter": {}}
    return value


class OutputEntry(Strict):
    """What is written in the place of a whole model."""

    adapter: AdapterEntry


Output = Annotated[
    OutputEntry,
    BeforeValidator(_adapter),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "adapter"},
                {
                    "type": "object",
                    "properties": {
                        "adapter": {"anyOf": [AdapterEntry.model_json_schema(), {"type": "null"}]}
                    },
                    "required": ["adapter"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class RecipeModel(Strict):
    """A merge recipe, in mergekit's words."""

    merge_method: str = Field(description="see `merge methods`")
    name: str | None = Field(None, min_length=1, description="by which other documents use it")
    models: list[ModelEntry] | None = Field(None, min_length=1, description="whole models")
    slices: list[SliceEntry] | None = Field(None, min_length=1, description="layer by layer")
    modules: dict[str, ModuleEntry] | None = Field(None, min_length=1)
    base_model: Model | None = None
    align: Align = Field(None, description="bring all models into the base's coordinates first")
    repair: Repair = Field(None, description="put the result's statistics right on data")
    learn: Learn = Field(None, description="learn the models' coefficients from data")
    tune: Tune = Field(None, description="choose values of parameters by a score")
    parameters: Parameters = Field(default_factory=dict)
    dtype: str | None = Field(None, description="storage type of the result")
    out_dtype: str | None = Field(None, description="storage type of the result; before dtype")
    scope: str | None = Field(
        None, min_length=1, description="the part that is merged, such as text; the rest is copied"
    )
    missing: Missing = Field(
        "error", description="what becomes of a tensor that not every model has"
    )
    heads: str = Field(
        "merge", description="of tasks: merge, drop, keep, base, or the model whose heads are taken"
    )
    tokenizer_source: TokenizerSource | None = Field(None, description="union, base or a model")
    tokenizer: TokenizerEntry | None = None
    chat_template: str | None = Field(None, description="auto, a known name, or a template")
    seed: int = Field(0, ge=0, description="of random methods")
    save: str | None = Field(None, min_length=1, description="a folder to write this stage to, too")
    output: Output | None = Field(None, description="adapter, or {adapter: {rank, energy, ...}}")


_INSIDE: dict[tuple[type[BaseModel], str], type[BaseModel]] = {
    (RecipeModel, "models"): ModelEntry,
    (RecipeModel, "slices"): SliceEntry,
    (RecipeModel, "modules"): ModuleEntry,
    (RecipeModel, "tokenizer"): TokenizerEntry,
    (RecipeModel, "output"): OutputEntry,
    (OutputEntry, "adapter"): AdapterEntry,
    (ModuleEntry, "models"): ModelEntry,
    (ModuleEntry, "slices"): SliceEntry,
    (SliceEntry, "sources"): SourceEntry,
    (TokenizerEntry, "tokens"): TokenEntry,
    (RecipeModel, "align"): AlignEntry,
    (RecipeModel, "repair"): RepairEntry,
    (ModelEntry, "align"): AlignEntry,
    (SourceEntry, "align"): AlignEntry,
    (RecipeModel, "tune"): TuneEntry,
    (RecipeModel, "learn"): LearnEntry,
    (LearnEntry, "data"): DataEntry,
    (TuneEntry, "over"): RangeEntry,
    (TuneEntry, "data"): DataEntry,
}
_NAMED = {ModuleEntry, RangeEntry, TokenEntry}
"""What stands under names of the author's choice."""


def keys_at(place: Sequence[str | int]) -> list[str]:
    """The keys that may stand where the last one of ``place`` stands."""
    model: type[BaseModel] = RecipeModel
    chosen = False
    for part in place[:-1]:
        if chosen:
            chosen = False
        elif (model, str(part)) in _INSIDE:
            model = _INSIDE[model, str(part)]
            chosen = model in _NAMED
    return [field.alias or name for name, field in model.model_fields.items()]


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors: structure, methods, and each method's parameters."""
    schema = RecipeModel.model_json_schema()
    registry = methods.registry()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "hf-merge recipe"
    schema["properties"]["merge_method"]["enum"] = list(registry)
    schema["oneOf"] = [{"required": [part]} for part in ("models", "slices", "modules")]
    schema["allOf"] = [
        {
            "if": {"properties": {"merge_method": {"const": name}}, "required": ["merge_method"]},
            "then": {"properties": {"parameters": {"propertyNames": {"enum": list(m.parameters)}}}},
        }
        for name, m in registry.items()
    ]
    return schema
