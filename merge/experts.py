"""A base and its experts in one tree, and the merge that coefficients make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merge import run
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError
from merge.families.vocabulary import lookup_tables
from merge.given import several
from merge.ir.checkpoint import Checkpoint, short
from merge.ir.expr import Expr
from merge.learning.coefficients import BASE, Coefficients
from merge.learning.expressions import merged_tensor
from merge.learning.prepare import Preparation

__all__ = ["Experts", "Tutor", "check_tutors", "opened", "tutors_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """Base and experts in one tree. common: tensors of floats that all have, of one shape."""

    base: Checkpoint
    experts: tuple[tuple[Checkpoint, bool], ...]
    names: tuple[str, ...]
    common: tuple[str, ...]
    odd: Mapping[str, str]

    @classmethod
    def of(cls, experts: Mapping[str, Checkpoint], base: Checkpoint) -> Experts:
        if base.space != "weight":
            raise PlanError("the base is no model", model=base.label, found=base.space)
        for name, expert in experts.items():
            if expert.space == "neither":
                raise PlanError(
                    "an expert is neither weights nor a difference of weights",
                    expert=name,
                    model=expert.label,
                    found=f"mass {expert.mass:g}",
                )
        base, *own = run.reconcile([base, *experts.values()])
        common, odd = [], {}
        for name, expr in base.tensors.items():
            if name in base.tied or expr.dtype.kind != "float":
                continue
            found = [e.tensors.get(name) for e in own]
            lacking = [n for n, e in zip(experts, found, strict=True) if e is None]
            other = [
                n
                for n, e in zip(experts, found, strict=True)
                if e is not None and e.shape != expr.shape
            ]
            if lacking:
                odd[name] = f"{', '.join(lacking)} has no such tensor"
            elif other:
                odd[name] = f"{', '.join(other)} has another shape"
            else:
                common.append(name)
        if not common:
            raise PlanError(
                "base and experts have no tensor in common",
                model=base.label,
                found=next((f"{n}: {why}" for n, why in odd.items()), "no tensors of floats"),
                do="take experts that were fine-tuned from this base",
            )
        pairs = tuple((e, e.space == "delta") for e in own)
        return cls(base, pairs, tuple(experts), tuple(common), odd)

    @property
    def wide(self) -> bool:
        """Whether the arithmetic is in float64."""
        return any(self.base.tensors[n].dtype.name == "float64" for n in self.common)

    def tables(self) -> frozenset[str]:
        """Tensors that are vocabularies, where any is recognised."""
        return lookup_tables([self.base, *(e for e, _ in self.experts)])

    def merged(self, coefficients: Coefficients, prepare: Preparation) -> Checkpoint:
        """The merge with these coefficients; tensors that have none are the base's."""
        missing = [n for n in coefficients.tensors if n not in self.common]
        if missing:
            raise PlanError(
                "a tensor has coefficients, and not every model has it",
                tensor=missing[0],
                found=self.odd.get(missing[0], "the base has no such tensor"),
                do="apply them to models of the same architecture",
            )
        tables = self.tables()
        tensors: dict[str, Expr] = dict(self.base.tensors)
        for name in coefficients.tensors:
            tensors[name] = merged_tensor(
                name,
                self.base.tensors[name],
                [(e.tensors[name], is_delta) for e, is_delta in self.experts],
                coefficients,
                prepare,
                (name in tables) if tables else None,
            )
        for name, owner in self.base.tied.items():
            tensors[name] = tensors[owner]
        roots = [r for c in (self.base, *(e for e, _ in self.experts)) for r in c.roots]
        labels = ", ".join(short(e.label) for e, _ in self.experts)
        return replace(
            self.base,
            tensors=tensors,
            label=f"learned({labels})",
            mass=1.0,
            roots=tuple(dict.fromkeys(roots)),
        )


def opened(given: Mapping[str, object] | Sequence[object], what: str) -> dict[str, Checkpoint]:
    listed, names = several(given, what)
    checkpoints = [open_checkpoint(m) for m in listed]
    if names is None:
        names = [short(c.label) for c in checkpoints]
        if len(set(names)) < len(names):
            names = [f"expert {i + 1}" for i in range(len(checkpoints))]
    named = dict(zip(names, checkpoints, strict=True))
    if BASE in named:
        raise RecipeError("an expert cannot be called that", found=BASE)
    return named


@dataclass(frozen=True, slots=True, eq=False)
class Tutor:
    """A model that tasks learn from. has_heads: it is a whole model, with the heads of its task."""

    name: str
    model: Checkpoint
    has_heads: bool = True


def tutors_of(
    given: Mapping[str, object] | Sequence[object] | None, models: Experts
) -> list[Tutor]:
    """The models that tasks learn from: those given, or the experts themselves."""
    if given is None:
        pairs = zip(models.names, models.experts, strict=True)
        return [Tutor(n, models.base + e if d else e, not d) for n, (e, d) in pairs]
    found = opened(given, "teachers")
    names = list(found) if isinstance(given, Mapping) else list(models.names)
    if len(found) != len(names):
        raise PlanError(
            "there is not one teacher for each expert",
            found=f"{len(found)} teachers",
            expected=f"{len(names)}, or a mapping from names of tasks",
        )
    known = run.reconcile([models.base, *found.values()])[1:]
    return [Tutor(n, m) for n, m in zip(names, known, strict=True)]


def check_tutors(tutors: Sequence[Tutor], tensors: Sequence[str]) -> None:
    """PlanError unless every tutor has the tensors that are merged."""
    for tutor in tutors:
        missing = [n for n in tensors if n not in tutor.model.tensors]
        if missing:
            raise PlanError(
                "a teacher lacks a tensor that is merged",
                model=tutor.model.label,
                tensor=missing[0],
                do="give a whole model of the same architecture",
            )
