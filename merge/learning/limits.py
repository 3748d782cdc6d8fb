"""What the settings of learning may be: known words, numbers in their ranges, patterns."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from merge.errors import RecipeError, check_word

__all__ = ["check_objective", "check_settings"]

_WORDS: Mapping[str, Sequence[str]] = {
    "optimiser": ("adam", "adamw", "sgd"),
    "schedule": ("constant", "linear", "cosine"),
    "buffers": ("base", "mean", "recalibrate"),
    "dead": ("init", "zero", "average"),
}
_WHOLE = {"steps": 0, "every": 1, "rebuild": 1, "keep": 0, "surgery_rank": 1, "batch": 1,
          "patience": 1, "depth_smooth": 2, "seed": 0}  # fmt: skip
_NUMBERS = ("rate", "free_rate", "decay", "pull", "lp_weight", "holdout")
_OPTIONS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "PseudoLabels": {"gate": ("none", "confidence")},
    "Distill": {"kind": ("kl", "mse")},
    "Features": {"kind": ("cosine", "l1", "mse")},
}
_KNOWN = (*_OPTIONS, "Entropy", "CrossEntropy", "Contrastive", "Negation")
_CANDIDATES = ("start", "base", "task_arithmetic")


def check_settings(given: Mapping[str, Any]) -> None:
    """RecipeError, with its key, for a setting that cannot be."""
    for key, known in _WORDS.items():
        check_word(given[key], known, key, f"the value of '{key}' is no known word")
    for word in given["candidates"]:
        check_word(word, _CANDIDATES, "candidates", "there is no such candidate")
    for key, least in _WHOLE.items():
        value = given[key]
        if value is None and key in ("batch", "patience", "depth_smooth"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise _wrong(key, value, f"a whole number of {least} or more")
    for key in _NUMBERS:
        if not _number(given[key]) or given[key] < 0:
            raise _wrong(key, given[key], "a number of 0 or more")
    if given["lp"] not in (None, 1, 2):
        raise _wrong("lp", given["lp"], "1 or 2, or none")
    if given["clip"] is not None and not (_number(given["clip"]) and given["clip"] > 0):
        raise _wrong("clip", given["clip"], "a number above 0, or none")
    if not _numbers(given["bounds"], finite=False) or len(given["bounds"]) != 2:
        raise _wrong("bounds", given["bounds"], "two numbers")
    if not _numbers(given["scales"]):
        raise _wrong("scales", given["scales"], "numbers")
    for key in ("freeze", "free"):
        if isinstance(given[key], str):
            raise _wrong(key, given[key], f"a list, such as {[given[key]]}")
    patterns = [("freeze", p) for p in given["freeze"]]
    for pair in given["groups"]:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise _wrong("groups", pair, "pairs of a pattern and the name of a group")
        patterns.append(("groups", pair[0]))
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            said = f"{pattern!r}: {error}"
            raise _wrong(key, said, "a regular expression that is searched in names") from None
    init = given["init"]
    if isinstance(init, str) and init not in ("tuned", "uniform"):
        raise RecipeError(
            "coefficients cannot start there",
            key="init",
            found=init,
            expected="a number, a number for each expert, 'tuned' or 'uniform'",
        )


def check_objective(objective: object) -> None:
    """RecipeError for an option of an objective that cannot be."""
    name = type(objective).__name__
    for key, known in _OPTIONS.get(name, {}).items():
        word = getattr(objective, key)
        check_word(word, known, "objective", f"the value of '{key}' is no known word")
    for key in ("temperature", "smoothing", "diversity", "least", "floor", "top"):
        value = getattr(objective, key, None) if name in _KNOWN else None
        if value is None:
            continue
        least = {"temperature": 0, "top": 0}.get(key)
        if not _number(value) or (least is not None and value <= least):
            above = "" if least is None else f" above {least}"
            said = f"{key}: {value!r}"
            raise RecipeError(
                f"the value of '{key}' cannot be",
                key="objective",
                found=said,
                expected=f"a number{above}",
            )


def _wrong(key: str, value: object, expected: str) -> RecipeError:
    return RecipeError(
        f"the value of '{key}' cannot be", key=key, found=repr(value), expected=expected
    )


def _number(value: object, *, finite: bool = True) -> bool:
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    return whole and (math.isfinite(value) if finite else not math.isnan(value))  # type: ignore[arg-type]


def _numbers(value: object, *, finite: bool = True) -> bool:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return several and all(_number(v, finite=finite) for v in value)  # type: ignore[attr-defined]
