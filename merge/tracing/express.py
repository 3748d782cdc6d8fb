"""Sizes of groups as expressions over config keys, told from twins of different sizes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merge.errors import MergeError
from merge.symmetry.axes import factors_of
from merge.symmetry.patterns import slots
from merge.symmetry.sizes import evaluate
from merge.symmetry.spec import Spec
from merge.symmetry.symmetry import Symmetry
from merge.tracing.naming import Called

__all__ = ["Sizes", "expressed", "keys_of", "sizes_of"]

_MISSING = {
    "num_key_value_heads": "num_attention_heads",
    "head_dim": "hidden_size/num_attention_heads",
    "n_inner": "4*n_embd",
    "rope_parameters.partial_rotary_factor": "rotary_pct",
}
"""What old configs leave out, or have as null, and what it then is."""

_OTHER = ("vocab", "token", "position", "max_", "_layers", "n_layer", "window", "dropout", "seed",
          "image_size", "_topk", "_per_tok", "init", "eps", "theta", "chunk")  # fmt: skip


Sizes = Mapping[str, Mapping[tuple[tuple[str, int], ...], int]]
"""Of each kind of group the sizes of its groups, by the numbers of their layers."""


def sizes_of(symmetry: Symmetry, names: Mapping[str, Called]) -> Sizes:
    """The sizes of all groups by kind and numbers."""
    out: dict[str, dict[tuple[tuple[str, int], ...], int]] = defaultdict(dict)
    for group in symmetry.groups.values():
        called = names[group.name]
        out[called.pattern][called.numbers] = group.size
    return out


def expressed(
    specs: Sequence[Spec], configs: Sequence[Mapping[str, Any]], sizes: Sequence[Sizes]
) -> Spec:
    """The first spec, each size as the simplest expression that gives it in every config.

    The specs are those of the same model at different sizes. A size that no expression gives, or
    that the shapes tell and only a composed expression gives, is left to the shapes.
    """
    told = _told_by_shapes(specs[0])
    groups = {}
    for name, group in specs[0].groups.items():
        found = None
        if all(name in s for s in sizes):
            found = next(_expressions([s[name] for s in sizes], configs), None)
        if found is not None and name in told and not found.replace(".", "").isidentifier():
            found = None
        groups[name] = replace(group, size=found and _with_missing(found))
    return replace(specs[0], groups=groups)


def _told_by_shapes(spec: Spec) -> set[str]:
    """Groups that are an axis on their own somewhere."""
    axes = [list(factors_of(a)) for axes in spec.tensors.values() for a in axes]
    alone = {str(f[0].group) for f in axes if len(f) == 1 and f[0].group is not None}
    return {g for g in spec.groups if any(slots(g, name) is not None for name in alone)}


def _expressions(
    sizes: Sequence[Mapping[tuple[tuple[str, int], ...], int]],
    configs: Sequence[Mapping[str, Any]],
) -> Iterator[str]:
    """Expressions that give these sizes, the simplest first."""
    keys = [k for k in keys_of(configs[0]) if all(k in keys_of(c) for c in configs[1:])]
    keys = [k for k in keys if not any(word in k for word in _OTHER)]
    factors = [k for k in keys if "factor" in k or "pct" in k]
    whole = [k for k in keys if k not in factors]
    lists = [k for k, v in configs[0].items() if isinstance(v, list) and all(map(_number, v))]
    letters = {letter for one in sizes for numbers in one for letter, _ in numbers}
    candidates = itertools.chain(
        whole,
        (f"{key}[{letter}]" for key in lists for letter in sorted(letters)),
        (f"{a}/{b}" for a, b in itertools.permutations(whole, 2)),
        (f"{n}*{a}" for a in whole for n in (2, 3, 4)),
        (f"{a}/{b}*{f}" for a, b in itertools.permutations(whole, 2) for f in factors),
        (f"{a}*{f}" for a in whole for f in factors),
        (f"{a}-{b}" for a, b in itertools.permutations(whole, 2)),
        (f"{a}*{b}" for a, b in itertools.combinations(whole, 2)),
        (f"{a}/{b} - {a}/{b}*{f}" for a, b in itertools.permutations(whole, 2) for f in factors),
    )
    for text in candidates:
        fitting = (
            _fits(text, size, config, dict(numbers))
            for one, config in zip(sizes, configs, strict=True)
            for numbers, size in one.items()
        )
        if all(fitting):
            yield text


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fits(text: str, size: int, config: Mapping[str, Any], numbers: Mapping[str, int]) -> bool:
    try:
        return evaluate(text, config, numbers) == size
    except MergeError:
        return False


def _with_missing(text: str) -> str:
    """The expression, and what it is where a config leaves out one of its keys."""
    alternatives = [text]
    for key, value in _MISSING.items():
        words = text.replace("/", " / ").replace("*", " * ").split()
        if key in words:
            rest = [
                f"({value})" if w == key and len(words) > 1 else value if w == key else w
                for w in words
            ]
            other = "".join(rest)
            same = other == f"{value}/({value})"
            alternatives.append("1" if same else other)
    return " or ".join(alternatives)


def keys_of(config: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in a config by their keys, those of sub-configs with dots."""
    out: dict[str, float] = {}
    for key, value in config.items():
        if not str(key).isidentifier():
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            out[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            out.update(keys_of(value, f"{prefix}{key}."))
    return out
