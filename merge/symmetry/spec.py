"""A symmetry spec: groups, and for each pattern of tensor names its axes in terms of them.

As JSON::

    {
      "model": "llama",
      "groups": {
        "d":       {"flags": "P", "size": "hidden_size"},
        "kv{i}":   {"flags": "P", "size": "num_key_value_heads"},
        "slot{i}": {"flags": "P", "size": "num_attention_heads/num_key_value_heads",
                    "per": ["kv{i}"]}
      },
      "frozen": {"rotary": "multiplied by a constant (aten.mul)"},
      "tensors": {
        "model.layers.{i}.self_attn.q_proj.weight": ["kv{i}.slot{i}._rotary", "d"]
      },
      "notes": []
    }

A group is a set of coordinates and what may be done to them without changing the network's
function: flags P permute, S change signs, D scale by positive numbers, R rotate (P, S, D and R
together: any invertible matrix). With ``per`` it may be done in another way for each index of the
groups named there. ``size`` may be left out where the shapes tell it. ``output`` marks the groups
that index what a model without a head returns. ``frozen`` explains the words behind ``_``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from merge.errors import RecipeError, nearest
from merge.symmetry.axes import Axis, factors_of, parse_axis
from merge.symmetry.patterns import Pattern, slots
from merge.symmetry.sizes import parse_size

__all__ = ["FLAGS", "GroupSpec", "Spec", "parse_spec"]

FLAGS = "PSDR"


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group of a spec; its name may hold numbers in braces."""

    name: str
    flags: str = "P"
    size: str | None = None
    per: tuple[str, ...] = ()
    output: bool = False
    reason: str = ""

    def to_json(self) -> dict[str, object]:
        """Plain data, without what is as usual."""
        data: dict[str, object] = {"flags": self.flags}
        optional = {"size": self.size, "per": list(self.per), "output": self.output}
        optional["reason"] = self.reason
        return data | {key: value for key, value in optional.items() if value}


@dataclass(frozen=True, slots=True)
class Spec:
    """Groups and patterns, not yet of a certain checkpoint; `resolve` makes it a `Symmetry`."""

    model: str
    groups: Mapping[str, GroupSpec]
    tensors: Mapping[str, tuple[Axis, ...]]
    frozen: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain data; `parse_spec` reads it back to an equal spec."""
        return {
            "model": self.model,
            "groups": {name: group.to_json() for name, group in self.groups.items()},
            "frozen": dict(self.frozen),
            "tensors": {p: [str(a) for a in axes] for p, axes in self.tensors.items()},
            "notes": list(self.notes),
        }


def parse_spec(data: object, where: str = "symmetry spec") -> Spec:
    """The spec in ``data``, as `json.load` gives it; ``where`` names it in errors.

    `RecipeError` for unknown words, groups that are not stated, and texts that cannot be read.
    """
    try:
        return _parsed(data)
    except RecipeError as error:
        raise error.at(file=where) from None


def _parsed(data: object) -> Spec:
    top = _mapping(data, "the spec")
    _known(top, ("model", "groups", "frozen", "tensors", "notes"), "key")
    groups = {n: _group(n, g) for n, g in _mapping(top.get("groups", {}), "groups").items()}
    frozen = {k: str(v) for k, v in _mapping(top.get("frozen", {}), "frozen").items()}
    tensors: dict[str, tuple[Axis, ...]] = {}
    for pattern, texts in _mapping(top.get("tensors"), "tensors").items():
        Pattern.of(pattern)
        try:
            tensors[pattern] = tuple(parse_axis(str(t)) for t in _list(texts, pattern))
        except RecipeError as error:
            raise error.at(tensor=pattern) from None
    spec = Spec(
        model=str(top.get("model", "")),
        groups=groups,
        tensors=tensors,
        frozen=frozen,
        notes=tuple(str(n) for n in _list(top.get("notes", []), "notes")),
    )
    _check_names(spec)
    return spec


def _group(name: str, data: object) -> GroupSpec:
    keys = _mapping(data, f"group '{name}'")
    _known(keys, ("flags", "size", "per", "output", "reason"), "key of a group", group=name)
    flags = str(keys.get("flags", "P"))
    if set(flags) - set(FLAGS) or len(set(flags)) < len(flags):
        raise RecipeError(
            "the flags of a group are not known",
            group=name,
            found=flags,
            expected="letters out of P (permute), S (signs), D (scale), R (rotate), each once",
        )
    size = keys.get("size")
    if size is not None:
        parse_size(str(size))
    return GroupSpec(
        name=name,
        flags="".join(f for f in FLAGS if f in flags),
        size=None if size is None else str(size),
        per=tuple(str(p) for p in _list(keys.get("per", []), f"per of '{name}'")),
        output=bool(keys.get("output", False)),
        reason=str(keys.get("reason", "")),
    )


def _check_names(spec: Spec) -> None:
    """Every group that is named somewhere is stated, and its parents' parents are its own too."""

    def stated(name: str) -> GroupSpec:
        found = next((g for g in spec.groups if slots(g, name) is not None), None)
        if found is None:
            raise RecipeError(
                f"there is no group '{name}'",
                found=name,
                expected=f"one of {', '.join(spec.groups) or 'none'}",
                do=f"perhaps '{near}'" if (near := nearest(name, spec.groups)) else None,
            )
        return spec.groups[found]

    for pattern, axes in spec.tensors.items():
        for factor in (f for axis in axes for f in factors_of(axis) if f.group is not None):
            try:
                stated(str(factor.group))
            except RecipeError as error:
                raise error.at(tensor=pattern) from None
        if stack := Pattern.of(pattern).stack:
            stated(stack)
    for group in spec.groups.values():
        for parent in group.per:
            missing = [p for p in stated(parent).per if p not in group.per]
            if missing or parent == group.name:
                raise RecipeError(
                    "a group depends on the groups that its parents depend on",
                    group=group.name,
                    found=f"per: {', '.join(group.per)}",
                    expected=f"also {', '.join(missing)}" if missing else "groups besides itself",
                )


def _mapping(data: object, what: str) -> Mapping[str, object]:
    if not isinstance(data, Mapping) or not all(isinstance(k, str) for k in data):
        raise RecipeError(f"{what} is no mapping", found=type(data).__name__, expected="a mapping")
    return data


def _list(data: object, what: str) -> Sequence[object]:
    if not isinstance(data, list | tuple):
        raise RecipeError(f"'{what}' is no list", found=type(data).__name__, expected="a list")
    return data


def _known(data: Mapping[str, object], words: Sequence[str], what: str, **where: str) -> None:
    for key in data:
        if key not in words:
            near = nearest(key, words)
            raise RecipeError(
                f"'{key}' is no {what} in a symmetry spec",
                found=key,
                expected=", ".join(words),
                do=f"perhaps '{near}'" if near else None,
                **where,
            )
