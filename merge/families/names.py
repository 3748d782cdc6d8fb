"""Names of one model in the tree of another: which prefix stands for which.

Saved models of one family differ in what stands before a tensor's own name: ``bert.`` or nothing,
``language_model.model.`` or ``model.language_model.``, or the whole of a multimodal model around a
text model. Names are compared as patterns, with a star for every number. The longest common end of
two patterns gives a rule, prefix for prefix; the rule under which the most tensors find one of
their own shape is taken, then the next for what is left. A rule moves layers, or what stands beside
layers: that a pooler and a classifier both end in ``dense.weight`` makes no rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from merge.errors import PlanError

__all__ = ["Renaming", "Rule", "match_names"]

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Rule:
    """The prefix ``old`` becomes ``new``; both end with a dot, or are nothing."""

    old: str
    new: str

    def __str__(self) -> str:
        if not self.old:
            return f"{self.new!r} put before"
        return f"{self.old!r} as {self.new!r}" if self.new else f"{self.old!r} left out"

    def applied(self, name: str) -> str:
        """A name that begins with the old prefix, with the new one."""
        return self.new + name.removeprefix(self.old)


_HEAD, _INNER = "lm_head.", Rule("", "language_model.")
"""A head that the other model ties, and so does not hold, moves with the whole language model."""


@dataclass(frozen=True, slots=True)
class Renaming:
    """``names``: from a model's own names to the tree's, where they differ, and the rules used."""

    names: Mapping[str, str]
    rules: tuple[Rule, ...]


def match_names(own: Shapes, tree: Shapes) -> Renaming:
    """How the tensors ``own`` are called in ``tree``; what has no counterpart keeps its name.

    PlanError where two rules fit equally well, as for an encoder that could be either tower.

    >>> own = {"embed.weight": (9, 4), "layers.0.w": (4, 4), "layers.0.b": (4,)}
    >>> tree = {f"model.{name}": shape for name, shape in own.items()}
    >>> match_names(own, tree).rules
    (Rule(old='', new='model.'),)
    """
    if not own.keys() - tree.keys():
        return Renaming({}, ())
    ours, theirs = _patterns(own), _patterns(tree)
    left = {p: n for p, n in ours.items() if p not in theirs}
    free = {p: n for p, n in theirs.items() if p not in ours}
    chosen: dict[str, Rule] = {}  # of a pattern
    rules: list[Rule] = []
    stacks = _Stacks.of(ours, theirs)
    while (best := _best(left, free, own, tree, stacks)) is not None:
        rule, covered = best
        rules.append(rule)
        chosen.update(dict.fromkeys(_moved(left, rule, covered), rule))
        free = {p: n for p, n in free.items() if p not in {rule.applied(c) for c in covered}}
        left = {p: n for p, n in left.items() if p not in chosen}
    chosen.update({p: r for p in left for r in rules if p.startswith(_HEAD) and r == _INNER})
    names: dict[str, str] = {}
    for name in own:
        found = chosen.get(_NUMBER.sub("*", name))
        if found is not None and (new := found.applied(name)) not in own:
            names[name] = new
    return Renaming(names, tuple(rules))


@dataclass(frozen=True, slots=True)
class _Stacks:
    """The patterns of tensors in layers, of both models; ``count``: all patterns of our own."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    count: int

    @classmethod
    def of(cls, ours: Iterable[str], theirs: Iterable[str]) -> _Stacks:
        every = list(ours)
        return cls(
            tuple(p for p in every if "*" in p), tuple(p for p in theirs if "*" in p), len(every)
        )

    def support(self, rule: Rule, covered: list[str]) -> bool:
        """Whether a rule moves layers, or between places where there are layers, or nearly all."""
        if any("*" in p for p in covered) or (len(covered) > 1 and 2 * len(covered) >= self.count):
            return True
        places = ((rule.old, self.ours), (rule.new, self.theirs))
        return all(not at or any(p.startswith(at) for p in stacks) for at, stacks in places)


def _patterns(names: Iterable[str]) -> dict[str, str]:
    """Each pattern of names with the first name of it."""
    out: dict[str, str] = {}
    for name in names:
        out.setdefault(_NUMBER.sub("*", name), name)
    return out


def _moved(left: Iterable[str], rule: Rule, covered: Iterable[str]) -> list[str]:
    """The patterns that a rule renames: what stands under one word moves together."""

    def branch(pattern: str) -> str:
        return pattern.removeprefix(rule.old).partition(".")[0]

    branches = {branch(p) for p in covered}
    return [p for p in left if p.startswith(rule.old) and branch(p) in branches]


def _best(
    left: Mapping[str, str],
    free: Mapping[str, str],
    own: Shapes,
    tree: Shapes,
    stacks: _Stacks,
) -> tuple[Rule, list[str]] | None:
    """The rule with the most witnesses and the patterns that it covers; None where there is none.

    A witness is a tensor that finds one of its own shape. Where fewer than half of those that find
    a name are witnesses, or fewer than half of what moves finds one, the likeness is an accident.
    Of two rules with equally many the one that keeps more of the names is taken.
    """
    found: list[tuple[int, Rule, list[str]]] = []
    for rule in _rules(left, free):
        covered = [p for p in left if p.startswith(rule.old) and rule.applied(p) in free]
        witnesses = sum(
            own[left[p]] == tree.get(rule.applied(left[p]), tree[free[rule.applied(p)]])
            for p in covered
        )
        moved = _moved(left, rule, covered)
        if 2 * witnesses >= len(covered) >= len(moved) / 2 > 0 and stacks.support(rule, covered):
            found.append((witnesses, rule, covered))
    if not found:
        return None
    found.sort(key=lambda f: (-f[0], f[1].old.count(".")))
    most, rule, covered = found[0]
    for witnesses, other, also in found[1:]:
        if (witnesses, other.old.count(".")) == (most, rule.old.count(".")) and any(
            rule.applied(p) != other.applied(p) for p in {*covered} & {*also}
        ):
            raise PlanError(
                "names of tensors match another model's in several ways",
                tensor=left[covered[0]],
                found=f"{rule}, or {other}",
                do="say which part of the model is meant: scope, or modules, in the recipe",
            )
    return rule, covered


def _rules(left: Iterable[str], free: Iterable[str]) -> list[Rule]:
    """Every prefix for prefix by which a pattern becomes a free one, the last two words kept."""
    ends: dict[str, list[list[str]]] = {}
    for pattern in free:
        words = pattern.split(".")
        ends.setdefault(".".join(words[-2:]), []).append(words)
    rules: dict[Rule, None] = {}
    for pattern in left:
        words = pattern.split(".")
        for other in ends.get(".".join(words[-2:]), []):
            same = 0
            while same < min(len(words), len(other)) and words[-1 - same] == other[-1 - same]:
                same += 1
            rule = Rule(*(_prefix(w[: len(w) - same]) for w in (words, other)))
            if "*" not in rule.old + rule.new:  # within a layer, equal ends mean little
                rules[rule] = None
    return list(rules)


def _prefix(words: list[str]) -> str:
    return "".join(f"{w}." for w in words)
