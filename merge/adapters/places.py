"""Where the tensors of an adapter's model lie in a checkpoint, whose names may differ.

One and the same network is called by several names: with the word for the whole model in front or
without, with towers side by side or one in the other, as an older or a newer library saved it.
What differs is one run of words in the middle of a name, and the same run in all names of a part.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from merge.errors import PlanError

__all__ = ["locate"]

Rule = tuple[str, str]
"""The words that are replaced, and those that take their place."""


def locate(
    wanted: Sequence[str], there: Iterable[str], fits: Callable[[str, str], bool]
) -> dict[str, str]:
    """For each wanted name that has one, its counterpart among those ``there``.

    fits: whether a wanted tensor may be one that is there, as by their shapes. A name that is there
    is its own. Any other takes the rule by which most names are found. PlanError where two rules
    are equally good and lead to different tensors.

    >>> every = ["encoder.layer.0.q.weight", "encoder.layer.1.q.weight"]
    >>> locate(["bert.encoder.layer.1.q.weight"], every, lambda a, b: True)
    {'bert.encoder.layer.1.q.weight': 'encoder.layer.1.q.weight'}
    """
    known = dict.fromkeys(there)
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in known:
        alike[_signature(name)].append(name)
    found = {name: name for name in wanted if name in known and fits(name, name)}
    options: dict[str, dict[Rule, str]] = {}
    for name in wanted:
        if name not in found:
            others = [n for n in alike[_signature(name)] if fits(name, n)]
            if others:
                options[name] = {_rule(name, other): other for other in others}
    votes = Counter(rule for rules in options.values() for rule in rules)
    for name, rules in options.items():
        found[name] = _best(name, rules, votes)
    return {name: found[name] for name in wanted if name in found}


def _best(name: str, rules: dict[Rule, str], votes: Counter[Rule]) -> str:
    ranked = sorted(rules, key=lambda r: (-votes[r], -_shared(r)))
    first = ranked[0]
    equal = [r for r in ranked[1:] if (votes[r], _shared(r)) == (votes[first], _shared(first))]
    if equal:
        raise PlanError(
            "a tensor of an adapter may be one of several of the model",
            tensor=name,
            found=f"{rules[first]} and {rules[equal[0]]} are both called much the same",
            do="name the model that the adapter was trained on",
        )
    return rules[first]


def _signature(name: str) -> tuple[str, ...]:
    """The numbers in a name and its last two words: what is the same under all names."""
    words = name.split(".")
    return (*(w for w in words if w.isdigit()), "|", *words[-2:])


def _rule(name: str, other: str) -> Rule:
    """What differs between two names once common ends are taken off.

    >>> _rule("model.a.0.mlp.gate.weight", "model.a.0.moe.gate.weight")
    ('mlp', 'moe')
    """
    left, right = name.split("."), other.split(".")
    while left and right and left[-1] == right[-1]:
        left.pop(), right.pop()
    while left and right and left[0] == right[0]:
        left.pop(0), right.pop(0)
    return ".".join(left), ".".join(right)


def _shared(rule: Rule) -> int:
    """How many words both sides of a rule have: the likelier, the more."""
    left, right = (set(side.split(".")) for side in rule)
    return len(left & right - {""})
