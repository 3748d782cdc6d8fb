"""The words of ``learn:`` in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from merge.recipe.strict import Strict
from merge.recipe.tune_words import Data

__all__ = ["Learn", "LearnEntry"]


def _groups(value: object) -> object:
    """``{pattern: name}`` as a list of pairs."""
    return [[k, v] for k, v in value.items()] if isinstance(value, Mapping) else value


def _several(value: object) -> object:
    """One word as a list of it."""
    return [value] if isinstance(value, str) else value


class LearnEntry(Strict):
    """How the coefficients of a stage are learned; what is left out is the preset's."""

    data: Data = Field(None, description="of each model's task, by the model's name")
    coefficients: str | None = Field(None, min_length=1, description="a file, in the place of data")
    tasks: str | None = Field(
        None, min_length=1, description="with coefficients: the folder of tensors of tasks' own"
    )
    preset: str | None = Field(None, description="such as adamerging or spectral_gates")
    granularity: str | None = Field(
        None,
        description="scalar, task, group, layer, tensor, row, partition:M, singular, singular+row",
    )
    groups: Annotated[list[list[str]] | None, BeforeValidator(_groups)] = Field(
        None, description="patterns of tensors to the names of their groups"
    )
    prepare: str | None = Field(None, description="of differences: none, ties:d, tsv, cart, dare:p")
    init: float | dict[str, float] | Literal["tuned", "uniform", "recipe"] | None = Field(
        None, description="where they start; by default the recipe's own values"
    )
    link: str | None = Field(None, description="identity, clamp, sigmoid or softmax")
    bounds: list[float] | None = Field(None, min_length=2, max_length=2)
    depth_smooth: int | None = Field(None, ge=2, description="knots that layers share")
    learn_base: bool | None = None
    freeze: list[str] | None = Field(None, description="patterns of tensors that stay")
    dead: str | None = Field(None, description="of tensors without gradient: init, zero, average")
    objective: str | dict[str, Any] | None = Field(
        None, description="a name, {kind: name, ...options}, or module:function"
    )
    optimiser: str | None = Field(None, description="adam, adamw or sgd")
    rate: float | None = Field(None, ge=0)
    decay: float | None = Field(None, ge=0)
    steps: int | None = Field(None, ge=0)
    schedule: str | None = Field(None, description="of the rate: constant, linear or cosine")
    clip: float | None = Field(None, gt=0, description="largest norm of a step's gradient")
    batch: int | None = Field(None, ge=1, description="examples of each task in a step")
    pull: float | None = Field(None, ge=0, description="towards the start")
    lp: Literal[1, 2] | None = Field(None, description="norm of coefficients, added to the loss")
    lp_weight: float | None = Field(None, ge=0)
    temperature: bool | None = Field(None, description="of scores, learned for each task")
    every: int | None = Field(None, ge=1, description="steps between scores on validation data")
    patience: int | None = Field(None, ge=1, description="scores without gain before it stops")
    holdout: float | None = Field(None, ge=0, lt=1, description="where a task has no validate")
    candidates: list[str] | None = None
    scales: list[float] | None = Field(None, description="of task arithmetic among the candidates")
    memory: str | None = Field(None, description="resident, stream, int8 or lowrank:R")
    rebuild: int | None = Field(None, ge=1)
    buffers: str | None = Field(None, description="base, mean or recalibrate")
    free: Annotated[list[str] | None, BeforeValidator(_several)] = Field(
        None, description="layers that each task learns for itself; * is all that is not merged"
    )
    free_rate: float | None = Field(
        None, ge=0, description="the rate of what tasks have of their own"
    )
    surgery: str | None = Field(None, description="the layer behind which tasks get a correction")
    surgery_rank: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, description="else the recipe's")

    @property
    def how(self) -> dict[str, Any]:
        """The settings that are given, for `merge.learn`."""
        apart = {"data", "coefficients", "tasks", "preset", "init", "objective"}
        return {k: v for k, v in self.model_dump(exclude=apart).items() if v is not None}


Learn = Annotated[
    LearnEntry | None,
    WithJsonSchema({"anyOf": [LearnEntry.model_json_schema(by_alias=True), {"type": "null"}]}),
]
