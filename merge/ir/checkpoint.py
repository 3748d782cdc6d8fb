"""A checkpoint as a lazy value: an ordered mapping from tensor name to `TensorSpec`.

Values combine with ``+``, ``-`` and ``*``; no weight is read until `save` or `state_dict`.

Each value has a *mass*: 1 for weights, 0 for a difference of weights, and sums follow
(``base + 0.4 * (tuned - base)`` has mass 1). A result of any other mass, such as the sum of two
models, is almost surely a mistake and is refused when it is planned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from merge.errors import PlanError
from merge.ir.dtypes import DType, parse_dtype
from merge.ir.expr import Expr, Same, linear_sum
from merge.ir.side import Side
from merge.ir.spec import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from merge.plan.model import Plan

__all__ = ["SPACE_KEY", "Checkpoint", "align_names", "linear_combination", "some"]

Space = Literal["weight", "delta", "neither"]
SPACE_KEY = "merge_space"
"""Metadata key of a safetensors file that holds a difference of weights: its value is delta."""


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Mapping[str, TensorSpec]):
    """Named tensors, not yet computed. Made by `merge.open`, by methods and by arithmetic.

    Example::

        base, tuned = merge.open("base"), merge.open("tuned")
        half = base + 0.5 * (tuned - base)
        half.save("half")
    """

    tensors: Mapping[str, Expr]
    label: str
    mass: float = 1.0
    side: Side = field(default_factory=Side)
    out_dtype: DType | None = None
    tied: Mapping[str, str] = field(default_factory=dict)  # second name -> first name, in memory
    dropped: Mapping[str, str] = field(default_factory=dict)  # tensors of inputs left out, and why
    folders: Mapping[str, str] = field(default_factory=dict)  # of tensors that are not at the top
    stems: Mapping[str, str] = field(default_factory=dict)  # folder -> name of its weight files
    notes: tuple[str, ...] = ()  # what was found when the inputs were opened, and is told in plans
    roots: tuple[str, ...] = ()  # paths of all inputs, also of those whose weights are not read

    # -- a mapping of specs ------------------------------------------------------------------
    def __getitem__(self, name: str) -> TensorSpec:
        expr = self.tensors[name]
        spec = TensorSpec(name, expr.dtype, expr.shape, self.folders.get(name, ""))
        return spec.cast(self.out_dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"<{self.space} checkpoint {self.label!r}: {len(self)} tensors>"

    __hash__ = object.__hash__
    __eq__ = object.__eq__  # two checkpoints of the same shapes are not the same

    @property
    def space(self) -> Space:
        """``weight`` (mass 1), ``delta`` (mass 0), or ``neither``."""
        if math.isclose(self.mass, 1.0, abs_tol=1e-6):
            return "weight"
        return "delta" if abs(self.mass) < 1e-6 else "neither"

    def same_as(self, other: Checkpoint) -> bool:
        """Whether both stand for the same tensors, as when one folder was opened twice."""
        return self is other or (self.roots == other.roots and self.tensors == other.tensors)

    # -- arithmetic --------------------------------------------------------------------------
    def __add__(self, other: Checkpoint) -> Checkpoint:
        if not isinstance(other, Checkpoint):
            return NotImplemented
        return linear_combination([(1.0, self), (1.0, other)])

    def __sub__(self, other: Checkpoint) -> Checkpoint:
        if not isinstance(other, Checkpoint):
            return NotImplemented
        return linear_combination([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float) -> Checkpoint:
        if not isinstance(factor, int | float):
            return NotImplemented
        return linear_combination([(float(factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Checkpoint:
        if not isinstance(divisor, int | float):
            return NotImplemented
        return linear_combination([(1.0 / divisor, self)])

    def __neg__(self) -> Checkpoint:
        return linear_combination([(-1.0, self)])

    def cast(self, dtype: str | DType | None) -> Checkpoint:
        """The same tensors, stored as ``dtype`` when they are written; integers stay."""
        wanted = parse_dtype(dtype) if isinstance(dtype, str) else dtype
        return replace(self, out_dtype=wanted)

    # -- the way down: the only place where the IR reaches for the rooms below it ----------------
    def plan(
        self, *, memory: int | str | None = None, threads: int | None = None, device: str = "cpu"
    ) -> Plan:
        """What would be read, written and held in memory; raises PlanError if it cannot work."""
        from merge import run

        return run.plan(self, memory=memory, threads=threads, device=device)

    def save(
        self,
        out: str | Path,
        *,
        dtype: str | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
        device: str = "cpu",
        shard_size: int | str = "5GB",
        card: bool = True,
        replace: bool = False,
        fresh: bool = False,
        copy_code: bool = False,
    ) -> Path:
        """Compute the checkpoint into the folder ``out``, which appears whole or not at all.

        ``memory`` bounds the buffers (bytes, or text such as "256MiB"). An interrupted run is
        taken up where it stopped unless ``fresh``. ``replace`` allows an ``out`` that is not empty.
        ``copy_code`` copies programs that came with the model, such as modeling_x.py.
        ``card``: with a README.md that says what the checkpoint is made of.
        """
        from merge import run

        checkpoint = self if dtype is None else self.cast(dtype)
        return run.save(
            checkpoint,
            out,
            memory=memory,
            threads=threads,
            device=device,
            shard_size=shard_size,
            card=card,
            replace=replace,
            fresh=fresh,
            copy_code=copy_code,
        ).path

    def state_dict(
        self, *, threads: int | None = None, device: str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Compute the checkpoint into memory, ready for ``model.load_state_dict``."""
        from merge import run

        return run.state_dict(self, threads=threads, device=device)


REBUILT = ("position_ids", "rotary_emb.inv_freq", "masked_bias")
"""Ends of the names of constants that models rebuild; some library versions do not store them."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """Checkpoints seen as one: the names that all share, and how the odd ones were settled."""

    names: tuple[str, ...]
    dropped: Mapping[str, str]
    tied: Mapping[str, str]
    out_dtype: DType | None
    notes: tuple[str, ...]
    roots: tuple[str, ...]
    _owner: Mapping[str, str]

    def expr(self, checkpoint: Checkpoint, name: str) -> Expr:
        """The tensor ``name`` of one of the checkpoints, under the name of its tie if need be."""
        found = checkpoint.tensors.get(name)
        return checkpoint.tensors[self._owner[name]] if found is None else found


def align_names(checkpoints: Sequence[Checkpoint]) -> Aligned:
    """The tensors of the first checkpoint, which all others must have too, with its shapes.

    Constants that a model rebuilds by itself may be missing anywhere and are then dropped. A name
    that is tied to another in one model may be missing in the next, which was saved with the tie;
    it stays tied when no model has a value of its own for it. Raises PlanError that names every
    other difference (the first few of each kind).
    """
    first = checkpoints[0]
    owner = {n: o for c in checkpoints for n, o in c.tied.items()}
    every = [n for c in checkpoints for n in c.tensors if n.endswith(REBUILT)]
    dropped = {n for n in every if any(n not in c.tensors for c in checkpoints)}
    names = [n for n in dict.fromkeys([*first.tensors, *owner]) if n not in dropped]
    tied = {
        n: o
        for n, o in owner.items()
        if all(n not in c.tensors or c.tied.get(n) == o for c in checkpoints)
    }
    dtypes = {c.out_dtype for c in checkpoints}
    aligned = Aligned(
        tuple(names),
        {n: why for c in checkpoints for n, why in c.dropped.items()}
        | dict.fromkeys(sorted(dropped), "the model rebuilds it, and not every input holds it"),
        tied,
        dtypes.pop() if len(dtypes) == 1 else None,
        tuple(dict.fromkeys(note for c in checkpoints for note in c.notes)),
        tuple(dict.fromkeys(r for c in checkpoints for r in c.roots)),
        owner,
    )
    for other in checkpoints:
        missing = [n for n in names if n not in other.tensors]
        missing = [n for n in missing if owner.get(n) not in other.tensors]
        extra = [n for n in other.tensors if n not in first.tensors]
        extra = [n for n in extra if n not in dropped and n not in owner]
        if missing or extra:
            raise PlanError(
                "the models do not hold the same tensors",
                model=other.label,
                against=first.label,
                found="; ".join(
                    f"{len(odd)} {kind}: {some(odd)}"
                    for kind, odd in (("missing", missing), ("extra", extra))
                    if odd
                ),
                expected=f"the {len(first)} tensors of {first.label}",
                do="check that both are models of the same architecture",
            )
    for other in checkpoints[1:]:
        for name in names:
            wanted, shape = aligned.expr(first, name).shape, aligned.expr(other, name).shape
            if shape != wanted:
                raise PlanError(
                    "a tensor has different shapes",
                    tensor=name,
                    found=f"{list(shape)} in {other.label}",
                    expected=f"{list(wanted)} as in {first.label}",
                    do=_shape_advice(wanted, shape),
                )
    return aligned


def some(names: Sequence[str], most: int = 4) -> str:
    """The first few names as text, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shape_advice(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    if len(a) == len(b) == 2 and a[1] == b[1]:
        return "the row counts differ, as when a vocabulary grew; try `tokenizer_source: union`"
    if len(a) == len(b) == 2 and a == b[::-1]:
        return "one is the transpose of the other; were both saved by the same library?"
    return "merge models of the same architecture and size"


def linear_combination(terms: Sequence[tuple[float, Checkpoint]]) -> Checkpoint:
    """Sum of coefficient times checkpoint; side files come from the first of largest mass."""
    checkpoints = [c for _, c in terms]
    aligned = align_names(checkpoints)
    donor = max(checkpoints, key=lambda c: c.mass)
    text = " + ".join(f"{c:g}*{short(m.label)}" for c, m in terms)
    return replace(
        donor,
        tensors={n: combine(n, [(c, aligned.expr(m, n)) for c, m in terms]) for n in aligned.names},
        label=f"({text})",
        mass=sum(c * m.mass for c, m in terms),
        out_dtype=aligned.out_dtype,
        tied=aligned.tied,
        dropped=aligned.dropped,
        notes=aligned.notes,
        roots=aligned.roots,
    )


def short(label: str) -> str:
    """The last part of a path, or a text that is no path as it is."""
    return label if label.endswith(")") else label.rstrip("/").rpartition("/")[2] or label


def combine(name: str, terms: Sequence[tuple[float, Expr]]) -> Expr:
    """The weighted sum of expressions for one tensor; what is not a float must be equal in all."""
    operands = tuple(e for _, e in terms)
    if all(e.dtype.kind == "float" for e in operands):
        return linear_sum(terms)
    return same(name, operands)


def same(name: str, operands: tuple[Expr, ...]) -> Expr:
    """The first operand, after a check that all hold equal bytes.

    Step counters of BatchNorm count batches, not knowledge: they differ between any two runs and
    the first is taken as it is.
    """
    dtypes = {e.dtype for e in operands}
    if len(dtypes) > 1:
        raise PlanError(
            "a tensor mixes element types that have no common arithmetic",
            tensor=name,
            found=", ".join(sorted(d.name for d in dtypes)),
            expected="floats in all models, or one and the same other type",
        )
    if name.endswith("num_batches_tracked"):
        return operands[0]
    flat: dict[Expr, None] = {}
    for operand in operands:
        flat.update(dict.fromkeys(operand.operands if isinstance(operand, Same) else [operand]))
    return Same(tuple(flat))
