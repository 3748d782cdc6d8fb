"""Coefficients of a merge, named: what learning finds, as data that can be read, drawn and reused.

The merged tensor n of block b is ``base_n + sum_k c[b, k] part_{k,n}``, where part k is the
difference of expert k to the base, or what a preparation makes of it (`merge.learning.prepare`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from merge.errors import SourceError

__all__ = ["BASE", "Block", "Coefficients", "Kind"]

Kind = Literal["whole", "row", "partition", "singular", "singular+row"]
"""What numbers scale: a tensor, its rows, hashed parts, singular directions, these and rows."""

BASE = "(base)"
"""The operand's name under which the base itself has a coefficient, where that is learned."""

_FORMAT = "merge-coefficients"


@dataclass(frozen=True, slots=True)
class Block:
    """The numbers of one block: for each operand one, or as many as the tensor has pieces.

    gates: of kind ``singular+row``, how many of an operand's numbers are those of directions; those
    of rows follow them.
    """

    tensors: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    kind: Kind = "whole"
    gates: int | None = None

    @property
    def width(self) -> int:
        """Numbers for each operand."""
        return len(self.values[0]) if self.values else 0

    def mean(self, operand: int) -> float:
        """The mean of an operand's numbers; of those of directions, where rows have theirs too."""
        row = self.values[operand][: self.gates]
        return math.fsum(row) / len(row) if row else 0.0


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Named coefficients of a merge: block to operand to numbers.

    operands: names of the experts, in their order, and `BASE` at the end where the base has
    coefficients too. prepare: what the differences go through first, as text (``none``,
    ``ties:0.2``, ``tsv``, ...). granularity, link, bounds: how they were learned, for the reader.
    seed: what hashed partitions and random masks are drawn by. tasks: those for which tensors of
    their own were learned together with these numbers.

    Example::

        found = merge.learn(experts, base=base, tasks=tasks)
        Path("coefficients.json").write_text(found.coefficients.to_json())
        merge.apply_coefficients("coefficients.json", experts, base).save("merged")
    """

    operands: tuple[str, ...]
    blocks: Mapping[str, Block]
    prepare: str = "none"
    granularity: str = "tensor"
    link: str = "identity"
    bounds: tuple[float, float] | None = None
    seed: int = 0
    tasks: tuple[str, ...] = ()
    _of: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        of = {n: b for b, block in self.blocks.items() for n in block.tensors}
        object.__setattr__(self, "_of", of)

    @property
    def experts(self) -> tuple[str, ...]:
        """The operands that are experts."""
        return tuple(o for o in self.operands if o != BASE)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that have coefficients."""
        return tuple(self._of)

    def block_of(self, tensor: str) -> Block:
        """The block of a tensor."""
        return self.blocks[self._of[tensor]]

    def table(self) -> dict[str, dict[str, float]]:
        """Block to operand to the mean of its numbers: what a heat map shows."""
        return {
            name: {operand: block.mean(i) for i, operand in enumerate(self.operands)}
            for name, block in self.blocks.items()
        }

    @classmethod
    def uniform(
        cls,
        operands: Sequence[str],
        tensors: Sequence[str],
        value: float | Sequence[float],
        prepare: str = "none",
        seed: int = 0,
    ) -> Coefficients:
        """One number for all tensors and operands, or one an operand: task arithmetic."""
        each = [value] * len(operands) if isinstance(value, int | float) else list(value)
        block = Block(tuple(tensors), tuple((float(v),) for v in each))
        return cls(tuple(operands), {"all": block}, prepare, "task", seed=seed)

    # -- files ---------------------------------------------------------------------------------
    def to_json(self) -> str:
        """The coefficients as JSON, every number to the bit."""
        blocks = {
            name: {
                "kind": block.kind,
                "values": {
                    operand: row[0] if block.kind == "whole" else list(row)
                    for operand, row in zip(self.operands, block.values, strict=True)
                },
                "tensors": list(block.tensors),
                **({} if block.gates is None else {"gates": block.gates}),
            }
            for name, block in self.blocks.items()
        }
        document = {
            "format": _FORMAT,
            "version": 1,
            "operands": list(self.operands),
            "prepare": self.prepare,
            "granularity": self.granularity,
            "link": self.link,
            "bounds": None if self.bounds is None else list(self.bounds),
            "seed": self.seed,
            **({"tasks": list(self.tasks)} if self.tasks else {}),
            "blocks": blocks,
        }
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Coefficients:
        """The coefficients that `to_json` wrote; SourceError for anything else."""
        try:
            found = json.loads(text)
        except ValueError as error:
            raise SourceError("coefficients are no JSON", found=error) from None
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise SourceError(
                "this is no file of coefficients",
                found=str(found.get("format") if isinstance(found, dict) else type(found).__name__),
                expected=f'an object with "format": "{_FORMAT}"',
            )
        if found.get("version") != 1:
            raise SourceError(
                "coefficients are of another version", found=found.get("version"), expected=1
            )
        try:
            return cls._parsed(found)
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(
                "a file of coefficients is incomplete or damaged",
                found=f"{type(error).__name__}: {error}",
                expected="what merge.learn wrote",
            ) from None

    @classmethod
    def _parsed(cls, found: Mapping[str, Any]) -> Coefficients:
        operands = tuple(str(o) for o in found["operands"])
        blocks: dict[str, Block] = {}
        seen: set[str] = set()
        for name, block in found["blocks"].items():
            kind, tensors = block["kind"], tuple(str(t) for t in block["tensors"])
            if kind not in get_args(Kind):
                raise ValueError(f"block {name}: unknown kind {kind!r}")
            if twice := seen.intersection(tensors):
                raise ValueError(f"block {name}: tensor {min(twice)} is in two blocks")
            seen.update(tensors)
            rows = []
            for operand in operands:
                given = block["values"][operand]
                row = tuple(float(v) for v in (given if isinstance(given, list) else [given]))
                if not all(map(math.isfinite, row)):
                    raise ValueError(f"block {name}: a number of {operand} is not finite")
                rows.append(row)
            if len({len(r) for r in rows}) > 1 or (kind == "whole" and len(rows[0]) != 1):
                raise ValueError(f"block {name}: rows of different lengths")
            gates = int(block["gates"]) if kind == "singular+row" else None
            if gates is not None and not 0 < gates < len(rows[0]):
                raise ValueError(f"block {name}: {gates} gates among {len(rows[0])} numbers")
            blocks[str(name)] = Block(tensors, tuple(rows), kind, gates)
        bounds = found["bounds"]
        return cls(
            operands,
            blocks,
            str(found["prepare"]),
            str(found["granularity"]),
            str(found["link"]),
            None if bounds is None else (float(bounds[0]), float(bounds[1])),
            int(found["seed"]),
            tuple(str(t) for t in found.get("tasks", ())),
        )
