"""A checkpoint as a lazy value: an ordered mapping from tensor name to `TensorSpec`.

Values combine with ``+``, ``-`` and ``*``; no weight is read until `save` or `state_dict`.

Each value has a *mass*: 1 for weights, 0 for a difference of weights, and sums follow
(``base + 0.4 * (tuned - base)`` has mass 1). A result of any other mass, such as the sum of two
models, is almost surely a mistake and is refused when it is planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from merge.errors import PlanError
from merge.ir.align import align_names, short, some
from merge.ir.dtypes import DType, parse_dtype
from merge.ir.expr import Expr, Same, linear_sum
from merge.ir.side import Side
from merge.ir.spec import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from merge.plan.model import Plan

__all__ = ["SPACE_KEY", "Checkpoint", "combine", "linear_combination", "same", "short", "some"]

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
    stored: Callable[[], Mapping[str, str]] | None = None  # a live model's names in files -> here

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
        return _combined(1.0, self, 1.0, other)

    def __sub__(self, other: Checkpoint) -> Checkpoint:
        if not isinstance(other, Checkpoint):
            return NotImplemented
        return _combined(1.0, self, -1.0, other)

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

    # -- the way down: with `_combined` where the IR reaches for the rooms below it --------------
    def plan(
        self, *, memory: int | str | None = None, threads: int | None = None, device: str = "cpu"
    ) -> Plan:
        """What would be read, written and held in memory; raises PlanError if it cannot work."""
        from merge import run

        return run.plan(self, run.PlanOptions(memory, threads, device))

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
        options = run.PlanOptions(memory, threads, device, shard_size, card, copy_code)
        return run.save(checkpoint, out, options, run.WriteOptions(replace, fresh)).path

    def push_to_hub(
        self,
        repo: str,
        *,
        dtype: str | None = None,
        branch: str = "main",
        create_pr: bool = False,
        private: bool | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
        device: str = "cpu",
        shard_size: int | str = "5GB",
        card: bool = True,
        fresh: bool = False,
        copy_code: bool = False,
    ) -> str:
        """Compute the checkpoint into ``repo`` (owner/name) on the Hub; the address of its page.

        One weight file at a time is held in memory and sent, none lies on a disk. The repo, made as
        needed, shows the model when it is whole, and an interrupted run is taken up unless
        ``fresh``. ``private``: whether a repo that is made is; unless it is said, where an input is
        gated or private. ``create_pr``: propose the model in a pull request. ``memory`` bounds
        buffers and weight file together. The rest is as for `save`.
        """
        from merge import run
        from merge.publishing import Target, push_checkpoint

        to = Target(repo, branch, create_pr, private, commit_message, token)
        checkpoint = self if dtype is None else self.cast(dtype)
        options = run.PlanOptions(memory, threads, device, shard_size, card, copy_code)
        return push_checkpoint(checkpoint, to, options, fresh=fresh)

    def state_dict(
        self, *, threads: int | None = None, device: str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Compute the checkpoint into memory, ready for ``model.load_state_dict``."""
        from merge import run

        return run.state_dict(self, threads=threads, device=device)


def _combined(a: float, one: Checkpoint, b: float, other: Checkpoint) -> Checkpoint:
    """a times one plus b times the other, in the tree of the one with more mass."""
    from merge import run

    if other.mass > one.mass:
        theirs, ours = run.reconcile([other, one])
    else:
        ours, theirs = run.reconcile([one, other])
    return linear_combination([(a, ours), (b, theirs)])


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
