"""adapter_config.json as checked data: what kind an adapter is of, each module's rank and scale.

Patterns over modules are PEFT's: a regular expression that the end of a module's path matches, the
first one counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from merge.errors import SourceError

__all__ = ["AdapterConfig", "read_config"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What adapter_config.json says. What only other kinds than LoRA have is in ``data``.

    file: where it stands, for errors. kind: ``LORA`` and so on. base, revision: the model that the
    adapter was trained on. saved: modules that are replaced whole. transposed: the weights are
    stored as (in, out). tokens: rows of embeddings that are replaced, by the end of the module's
    path, '' for the input embedding. parameters: tensors that are no module's weight, such as
    stacks of experts. replication: spans of layers that follow one another in the adapter's model.
    """

    file: str
    kind: str
    data: Mapping[str, Any] = field(repr=False)
    base: str | None = None
    revision: str | None = None
    task: str | None = None
    rank: int = 8
    alpha: float = 8.0
    stabilised: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    transposed: bool = False
    dora: bool = False
    saved: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    replication: tuple[tuple[int, int], ...] = ()
    stays_tied: bool = False

    def rank_of(self, module: str) -> int:
        """The rank of the module at the path ``module``."""
        return _first(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product B A of a module is multiplied by: alpha / r, or alpha / sqrt(r).

        The root is rank-stabilised LoRA (Kalajdzievski 2023).
        """
        rank = self.rank_of(module)
        alpha = _first(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.stabilised else alpha / rank

    def saves(self, module: str) -> bool:
        """Whether the module is one that the adapter replaces whole."""
        return any(f".{module}.".find(f".{name}.") >= 0 for name in self.saved)


def read_config(data: Mapping[str, Any], file: str) -> AdapterConfig:
    """The checked config; SourceError names file and key of what is wrong."""
    keys = _Keys(data, file)
    kind = keys.get("peft_type", _text, None)
    if kind is None:
        raise SourceError(
            "an adapter's config does not say of which kind it is",
            file=file,
            key="peft_type",
            found=", ".join(map(str, data))[:200] or "no keys",
            expected="peft_type, such as LORA",
        )
    kind = kind.upper()
    config = AdapterConfig(
        file,
        kind,
        data,
        base=keys.get("base_model_name_or_path", _text, None) or None,
        revision=keys.get("revision", _text, None),
        task=keys.get("task_type", _text, None),
        saved=keys.get("modules_to_save", _texts, ()),
        transposed=keys.get("fan_in_fan_out", _flag, False),
    )
    if kind == "TRAINABLE_TOKENS":
        indices = keys.get("token_indices", _numbers, ())
        where = keys.get("target_modules", _texts, ())
        return replace(config, tokens=dict.fromkeys(where or ("",), indices))
    if kind != "LORA":
        return config
    return replace(
        config,
        rank=keys.get("r", _rank, 8),
        alpha=keys.get("lora_alpha", _number, 8.0),
        stabilised=keys.get("use_rslora", _flag, False),
        ranks=keys.get("rank_pattern", _patterns(_rank), {}),
        alphas=keys.get("alpha_pattern", _patterns(_number), {}),
        dora=keys.get("use_dora", _flag, False),
        tokens=keys.get("trainable_token_indices", _tokens, {}),
        parameters=keys.get("target_parameters", _texts, ()),
        replication=keys.get("layer_replication", _spans, ()),
        stays_tied=keys.get("ensure_weight_tying", _flag, False),
    )


def _first(patterns: Mapping[str, T], module: str, default: T) -> T:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


@dataclass(frozen=True, slots=True)
class _Keys:
    data: Mapping[str, Any]
    file: str

    def get(self, key: str, check: Callable[[Any], T], default: Any) -> T | Any:
        """The checked value of a key; the default where it is absent or null."""
        value = self.data.get(key)
        if value is None:
            return default
        try:
            return check(value)
        except _Wrong as wrong:
            raise SourceError(
                f"the value of {key!r} in an adapter's config is wrong",
                file=self.file,
                key=key,
                found=repr(value)[:200],
                expected=str(wrong),
            ) from None


class _Wrong(ValueError):
    """A value is of another kind; the text says which is expected."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong("text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("true or false")
    return value


def _rank(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _Wrong("a whole number, 1 or more")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Wrong("a number")
    return float(value)


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(v) is not int or v < 0 for v in value):
        raise _Wrong("a list of token numbers")
    return tuple(value)


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise _Wrong("a list of names")
    return tuple(value)


def _patterns(check: Callable[[Any], T]) -> Callable[[Any], dict[str, T]]:
    def checked(value: Any) -> dict[str, T]:
        if not isinstance(value, dict):
            raise _Wrong("a mapping of patterns to numbers")
        for pattern in value:
            try:
                re.compile(f"({pattern})")
            except re.error as error:
                raise _Wrong(f"regular expressions, and {pattern!r} is none: {error}") from None
        return {pattern: check(number) for pattern, number in value.items()}

    return checked


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(value, dict):
        return {_text(name): _numbers(indices) for name, indices in value.items()}
    return {"": _numbers(value)}


def _spans(value: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, list):
        raise _Wrong("a list of [first, end]")
    spans = [tuple(v) if isinstance(v, list) else () for v in value]
    if any(len(s) != 2 or any(type(n) is not int for n in s) or not 0 <= s[0] < s[1]
           for s in spans):  # fmt: skip
        raise _Wrong("a list of [first, end] with 0 <= first < end")
    return tuple((s[0], s[1]) for s in spans)
