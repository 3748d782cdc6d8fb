"""A merge method is a decorated pure function; its signature is its schema.

Two forms, told apart by what the function returns::

    @method(space="delta")
    def task_arithmetic(*, weight: PerModel[float]) -> Coefficients: ...

returns one coefficient an operand: the method is a linear combination, and the engine streams it;
with a `measured` argument the coefficients may depend on the tensor's inner products. ::

    @method(space="delta", measure=trims)
    def ties(deltas: Operands, *, weight: PerModel[float], measured: Trims) -> Tensor: ...

computes one tile of the output from the operands' tiles. A second positional argument takes the
tiles of a statistic of each model, as Fisher information is; with `statistic` it is one of a
layer's inputs, whole and in a shape of its own, which some tensors have and others do not. Keyword
parameters become recipe keys (a trailing underscore is dropped, so ``lambda_`` is ``lambda``). Four
keywords are filled in and are never recipe keys: ``count`` (of operands), ``measured`` (what the
measuring pass returned), ``start`` (flat index of the tile's first element) and ``draw`` (random
bits).

Where some tensors or some settings want another computation, it is registered as a variant::

    @ties.when(lambda shape, parameters, vocabulary: len(shape) < 2)
    def _vectors(...): ...

This file must not import torch: `merge methods`, `merge plan` and every recipe error read it.
"""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from merge.errors import RecipeError, hint

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

__all__ = [
    "Coefficients",
    "Method",
    "Operands",
    "ParameterSpec",
    "PerModel",
    "Range",
    "Tensor",
    "each",
    "method",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Value = float | int | bool | str | None
Coefficients = Sequence[float]
Operands = Sequence[Tensor]
Space = Literal["weight", "delta", "either"]
Local = Literal["element", "row", "tensor"]

_PER_MODEL = "per model"
PerModel = Annotated[Sequence[T], _PER_MODEL]
ENGINE_KEYWORDS = ("count", "measured", "start", "draw")
Condition = Callable[[tuple[int, ...], Mapping[str, Any], bool | None], bool]
"""Of a tensor's shape and a method's bound arguments."""
Scratch = Callable[[tuple[int, ...], int], int]
"""From a tensor's shape and the number of operands to elements of memory."""
Fits = Callable[[tuple[int, ...], tuple[int, ...]], None]
"""Of a weight's shape and that of its statistic: PlanError where they do not belong together."""


class _Each(tuple[T, ...]):
    """Marks a per-model default: one value that every operand gets."""


def each(value: T) -> Sequence[T]:
    """The default of a per-model parameter: ``value`` for every operand."""
    return _Each((value,))


@dataclass(frozen=True, slots=True)
class Range:
    """Allowed values, ends included unless ``open_low``."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "any finite number"
        low = "(" if self.open_low or self.low == -math.inf else "["
        high = ")" if self.high == math.inf else "]"
        return f"{low}{self.low:g}, {self.high:g}{high}"


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One recipe key of a method: its type, range, default, and whether each model has its own."""

    key: str
    argument: str
    type: type[float] | type[int] | type[bool] | type[str]
    per_model: bool
    range: Range
    default: Value
    required: bool

    def coerce(self, value: object) -> Value:
        """``value`` as this parameter's type; raises RecipeError when it does not fit.

        Recipes in the wild write 1.0 for true, "yes" for true and "1e-4" for 0.0001.
        """
        got = _convert(value, self.type)
        if got is None:
            raise RecipeError(
                f"parameter {self.key!r} needs {_TYPE_WORDS[self.type]}",
                key=self.key,
                found=repr(value),
                expected=f"{_TYPE_WORDS[self.type]} in {self.range}",
            )
        if self.type in (int, float) and not self._in_range(float(got)):
            raise RecipeError(
                f"parameter {self.key!r} is out of range",
                key=self.key,
                found=repr(value),
                expected=str(self.range),
            )
        return got

    def _in_range(self, number: float) -> bool:
        return math.isfinite(number) and number in self.range


_TYPE_WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
_TRUE, _FALSE = {"true", "yes", "on", "y"}, {"false", "no", "off", "n"}


def _convert(value: object, wanted: type) -> Value:
    if wanted is bool:
        if isinstance(value, str):
            word = value.lower()
            return True if word in _TRUE else False if word in _FALSE else None
        return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None
    if wanted is str:
        return value if isinstance(value, str) else None
    if not isinstance(value, bool | int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf  # which no range holds
    if wanted is int:
        return int(number) if number.is_integer() else None
    return number


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """A registered method: the function, and the facts that planning and the laws need."""

    name: str
    function: Callable[..., Any]
    space: Space
    inputs: tuple[int, int | None]
    base: Literal["required", "optional", "first operand", "donor"]
    local: Local
    measure: Callable[..., Any] | None
    coefficients: bool
    statistics: bool
    injected: frozenset[str]
    parameters: Mapping[str, ParameterSpec]
    symmetric: bool
    idempotent: bool
    random: bool
    scratch: Scratch | None = None
    walks: int = 1
    statistic: Fits | None = None
    variants: list[tuple[Condition, Method]] = field(default_factory=list)
    without: list[Method] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<method {self.name}>"

    @property
    def doc(self) -> str:
        """The docstring of the method's file, then of its function: paper, formula, recipe."""
        module = inspect.getmodule(self.function)
        parts = (inspect.getdoc(module) if module else None, inspect.getdoc(self.function))
        return "\n\n".join(p for p in parts if p)

    @property
    def paper(self) -> str:
        """The citation in the parentheses that end the first paragraph of the method's file, or ''.

        >>> from merge import methods
        >>> methods.get("ties").paper
        'Yadav et al. 2023, arXiv:2306.01708'
        """
        module = inspect.getmodule(self.function)
        first = (inspect.getdoc(module) or "").partition("\n\n")[0].replace("\n", " ")
        found = re.search(r"\(([^()]*\d{4}[^()]*)\)\W*$", first)
        return found[1] if found else ""

    @property
    def summary(self) -> str:
        """One line: what comes out."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def takes(self) -> frozenset[str]:
        """The arguments of the function that come from a recipe's parameters."""
        return frozenset(s.argument for s in self.parameters.values())

    def when(
        self,
        condition: Condition,
        *,
        local: Local = "element",
        measure: Callable[..., Any] | None = None,
    ) -> Callable[[F], F]:
        """Register another computation of this method for where ``condition`` holds.

        condition: of the tensor's shape, the bound arguments, and whether an axis of it counts
        tokens (None: not known); the first that holds counts. The function takes any of the
        method's parameters, and is left as it is.
        """

        def register(function: F) -> F:
            found = _read(function)
            variant = replace(
                self, local=local, measure=measure, function=function, **found, variants=[]
            )
            self.variants.append((condition, variant))
            return function

        return register

    def otherwise(self, function: F) -> F:
        """Register what computes tensors that have no statistic; it is left as it is."""
        found = replace(self, local="element", function=function, **_read(function))
        self.without.append(replace(found, variants=[], without=[]))
        return function

    @property
    def unknown(self) -> Method:
        """What computes a tensor that no model has a statistic of."""
        return self.without[0] if self.without else self

    def variant(
        self, shape: tuple[int, ...], arguments: Mapping[str, Any], vocabulary: bool | None = None
    ) -> Method:
        """What computes a tensor of this shape with these arguments: a variant, or the method.

        vocabulary: whether an axis of the tensor counts tokens; None where that is not known.
        """
        return next((m for holds, m in self.variants if holds(shape, arguments, vocabulary)), self)

    def parameter(self, key: str) -> ParameterSpec:
        """The schema of one recipe key; RecipeError with the nearest known key otherwise."""
        if key in self.parameters:
            return self.parameters[key]
        raise RecipeError(
            f"method {self.name!r} has no parameter {key!r}",
            key=key,
            expected=f"one of {', '.join(self.parameters)}" if self.parameters else "none",
            do=hint(key, self.parameters, f"see `merge methods {self.name}`"),
        )

    def check_inputs(self, count: int) -> None:
        """Raise RecipeError unless the method takes ``count`` operands."""
        low, high = self.inputs
        if count < low or (high is not None and count > high):
            want = f"exactly {low}" if low == high else f"at least {low}"
            want += f" and at most {high}" if high is not None and high > low else ""
            besides = self.base in ("required", "optional")
            noun = "models besides the base" if besides else "models"
            raise RecipeError(
                f"method {self.name!r} takes {want} {noun}",
                found=f"{count}",
                expected=want,
            )

    def bind(self, count: int, given: Mapping[str, object]) -> dict[str, Any]:
        """Arguments for ``count`` operands: checked, defaults filled in, per-model ones as tuples.

        A per-model parameter may be given once (all operands get it) or as a list, one value each.
        Keys are recipe keys; the result is keyed by the function's argument names.
        """
        for key in given:
            self.parameter(key)
        out: dict[str, Any] = {}
        for key, spec in self.parameters.items():
            if key not in given:
                if spec.required:
                    raise RecipeError(
                        f"method {self.name!r} needs parameter {key!r}",
                        key=key,
                        expected=f"{_TYPE_WORDS[spec.type]} in {spec.range}",
                    )
                out[spec.argument] = (spec.default,) * count if spec.per_model else spec.default
                continue
            value = given[key]
            if not spec.per_model:
                out[spec.argument] = spec.coerce(value)
            elif isinstance(value, list | tuple):
                if len(value) != count:
                    raise RecipeError(
                        f"parameter {key!r} needs one value a model",
                        key=key,
                        found=f"{len(value)} values",
                        expected=f"{count}",
                    )
                out[spec.argument] = tuple(spec.coerce(v) for v in value)
            else:
                out[spec.argument] = (spec.coerce(value),) * count
        return out


def method(
    *,
    space: Space,
    inputs: tuple[int, int | None] = (1, None),
    base: Literal["first operand", "donor"] = "donor",
    local: Local = "element",
    measure: Callable[..., Any] | None = None,
    symmetric: bool = True,
    idempotent: bool = True,
    random: bool = False,
    scratch: Scratch | None = None,
    walks: int = 1,
    statistic: Fits | None = None,
) -> Callable[[Callable[..., Any]], Method]:
    """Make a method of a pure function.

    space: ``weight``: operands are models. ``delta``: operands are differences to a base, the
        result is one too, and the base is added back. ``either``: ``delta`` where there is a base.
    inputs: fewest and most operands.
    base: for ``weight``: what a recipe's ``base_model`` is, the first operand or only the
        donor of config and tokenizer.
    local: which tile suffices: any run of elements, whole rows, or the whole tensor.
    measure: the measuring pass, ``measure(tiles, **parameters)``; see `merge.methods.core.measure`.
    symmetric: equal parameters make the order of models irrelevant (up to rounding).
    idempotent: merging copies of one model gives that model back (up to rounding).
    scratch: what the function holds besides a tile for each operand and six more; of the shape of
        a statistic, where it has one of its own.
    walks: how often the measuring pass goes over the whole tensor, for the plan to say.
    statistic: for statistics of inputs: checks that one belongs to a weight. Such methods say by
        `otherwise` what becomes of tensors without one.
    """

    def wrap(function: Callable[..., Any]) -> Method:
        return Method(
            name=function.__name__,
            function=function,
            space=space,
            inputs=inputs,
            base=_BASE.get(space, base),
            local=local,
            measure=measure,
            symmetric=symmetric,
            idempotent=idempotent,
            random=random,
            scratch=scratch,
            walks=walks,
            statistic=statistic,
            **_read(function),
        )

    return wrap


_BASE: Mapping[str, Any] = {"delta": "required", "either": "optional"}


def _read(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function's signature says about the method that it computes."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    keywords = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    specs = [_parameter(p, hints[p.name]) for p in keywords if p.name not in ENGINE_KEYWORDS]
    return {
        "coefficients": hints["return"] == Coefficients,
        "statistics": len(signature.parameters) - len(keywords) > 1,
        "injected": frozenset(p.name for p in keywords) & frozenset(ENGINE_KEYWORDS),
        "parameters": {s.key: s for s in specs},
    }


def _parameter(parameter: inspect.Parameter, hint: Any) -> ParameterSpec:
    metadata = getattr(hint, "__metadata__", ())
    inner = typing.get_args(hint)[0] if metadata else hint
    per_model = _PER_MODEL in metadata
    kind = typing.get_args(inner)[0] if per_model else inner
    required = parameter.default is inspect.Parameter.empty
    default = None if required else parameter.default
    if isinstance(default, _Each):
        default = default[0]
    return ParameterSpec(
        key=parameter.name.rstrip("_"),
        argument=parameter.name,
        type=kind,
        per_model=per_model,
        range=next((m for m in metadata if isinstance(m, Range)), Range()),
        default=default,
        required=required,
    )
