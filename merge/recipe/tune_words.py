"""The words of ``tune:`` in a recipe, and those of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from merge.errors import RecipeError
from merge.learning.ranges import parse_range
from merge.recipe.strict import Strict

__all__ = ["Data", "DataEntry", "RangeEntry", "Tune", "TuneEntry"]


class DataEntry(Strict):
    """The data of one task."""

    path: str = Field(min_length=1, description="a file, a folder of pictures, or module:function")
    text: str | None = Field(None, description="the field with the text; two by a comma are a pair")
    label: str | None = Field(None, description="the field with the label")
    positive: str | None = Field(None, description="the field with a text that means the same")
    labels: list[str] | None = Field(None, description="classes in the order of their numbers")
    split: str | dict[str, float] | None = Field(None, description="a field, or shares of parts")
    adapt: str | None = Field(None, description="a file of its own for this part")
    train: str | None = Field(None, description="a file of its own for this part")
    validate_: str | None = Field(None, alias="validate", description="a file of its own")
    test: str | None = Field(None, description="a file of its own for this part")
    limit: int | None = Field(None, ge=1, description="most examples of a part")
    batch: int | None = Field(None, ge=1, description="examples at a time")
    tokens: int | None = Field(None, ge=2, description="most tokens of a text")
    seed: int | None = Field(None, ge=0, description="of division and order")
    model: str | None = Field(None, description="module:function, or the folder whose code runs")
    head: Literal["prototypes"] | None = Field(None, description="for models without a classifier")
    weight: float | None = Field(None, ge=0, description="of this task among several")

    @property
    def options(self) -> dict[str, Any]:
        """The options that are given, by their keys in a recipe."""
        return {k: v for k, v in self.model_dump(by_alias=True).items() if v is not None}


def _tasks(value: object) -> object:
    """One task's data, as text or mapping, or a mapping from tasks to theirs."""
    if value is None:
        return None
    if isinstance(value, str) or (isinstance(value, Mapping) and "path" in value):
        value = {"": value}
    if not isinstance(value, Mapping):
        return value
    return {k: {"path": v} if isinstance(v, str) else v for k, v in value.items()}


_ONE = {"anyOf": [{"type": "string"}, DataEntry.model_json_schema(by_alias=True)]}
Data = Annotated[
    dict[str, DataEntry] | None,
    BeforeValidator(_tasks),
    WithJsonSchema(
        {
            "description": "a path with options, a mapping, or such of several tasks by name",
            "anyOf": [*_ONE["anyOf"], {"type": "object", "additionalProperties": _ONE}],
        }
    ),
]


class RangeEntry(Strict):
    """What one parameter, or one number for each of several places, is tried with."""

    low: float | None = None
    high: float | None = None
    step: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=2, description="values at equal distances")
    values: list[float] | None = Field(None, min_length=1)
    log: bool = Field(False, description="spread by ratio")
    start: float | None = Field(None, description="tried first; else the recipe's own value")
    each: Literal["model", "slice", "source"] | None = Field(
        None, description="one number for each"
    )
    filters: list[str] | None = Field(
        None, min_length=1, description="one for tensors of each of these names, one for the rest"
    )
    knots: int | None = Field(None, ge=2, description="numbers over depth, interpolated between")
    every: int | None = Field(None, ge=1, description="one number for so many layers")


def _span(value: object) -> object:
    """``0:1:0.1`` or a list of values as the mapping that it stands for."""
    if not isinstance(value, str | list):
        if isinstance(value, Mapping):
            known = ("low", "high", "step", "steps", "values", "log")
            _read({k: value[k] for k in known if k in value})
        return value
    found = _read(value)
    if found.values:
        return {"values": list(found.values)}
    return {"low": found.low, "high": found.high, "step": found.step}


def _read(value: Any) -> Any:
    try:
        return parse_range(value)
    except RecipeError as error:
        raise ValueError(f"{error.what}; expected {error.expected}") from None


_RANGE = {"type": ["string", "array"], "description": "first:last, first:last:step, or values"}
Over = Annotated[
    RangeEntry,
    BeforeValidator(_span),
    WithJsonSchema({"anyOf": [_RANGE, RangeEntry.model_json_schema()]}),
]


class TuneEntry(Strict):
    """Which of the recipe's parameters are chosen by a score, and how."""

    over: dict[str, Over] = Field(min_length=1, description="keys, such as lambda, to their ranges")
    data: Data = Field(None, description="judged by, on the part validate")
    score: str | None = Field(None, min_length=1, description="a command that prints a number")
    minimize: bool = Field(False, description="lower is better, as printed by the command")
    metric: Literal["accuracy", "loss"] | None = Field(None, description="on data")
    method: Literal["grid", "golden", "optuna", "cmaes", "random"] | None = None
    trials: int | None = Field(None, ge=1, description="values to be tried, at most")
    population: int | None = Field(None, ge=2, description="of cmaes")
    sigma: float = Field(1 / 6, gt=0, description="of the first population, as share of each range")
    seed: int | None = Field(None, ge=0, description="of the search; else the recipe's")


Tune = Annotated[
    TuneEntry | None,
    WithJsonSchema({"anyOf": [TuneEntry.model_json_schema(by_alias=True), {"type": "null"}]}),
]
