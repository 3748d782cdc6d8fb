"""A model's tensors while an adapter changes them one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merge.adapters.config import AdapterConfig
from merge.adapters.names import Module, Parts
from merge.errors import PlanError
from merge.families.turned import stored_turned
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Expr

__all__ = ["Work"]


@dataclass(slots=True)
class Work:
    """``tensors`` are the model's, and change.

    places: from names in the adapter's model to the model's own. heads: those that had no tensor of
    their own. second: these and all others that are tied to an embedding. alone: tensors that were
    changed, and what is tied to them was not. paired: embeddings of which the head's change is a
    copy.
    """

    base: Checkpoint
    adapter: Checkpoint
    config: AdapterConfig
    parts: Parts
    tensors: dict[str, Expr]
    places: dict[str, str] = field(default_factory=dict)
    heads: set[str] = field(default_factory=set)
    second: frozenset[str] = frozenset()
    alone: set[str] = field(default_factory=set)
    paired: set[str] = field(default_factory=set)

    def exprs(self, module: Module) -> Mapping[str, Expr]:
        """The adapter's tensors of a module, by kind."""
        return {kind: self.adapter.tensors[name] for kind, name in module.tensors.items()}

    def at(self, wanted: str, name: str) -> str:
        """The model's name of a tensor; the error names the adapter's tensor ``name`` for it."""
        if wanted not in self.places:
            raise PlanError(
                "a tensor of an adapter belongs to nothing in the model",
                tensor=name,
                shape=list(self.adapter.tensors[name].shape),
                adapter=self.adapter.label,
                model=self.base.label,
                expected=f"a tensor like {wanted} in the model",
                do="name the model that the adapter was trained on",
            )
        return self.places[wanted]

    def put(self, place: str, expr: Expr, *, together: bool) -> None:
        """Change a tensor, and together with it those that are tied to it."""
        owner = self.base.tied.get(place, place)
        tied = [n for n, o in self.base.tied.items() if o == owner]
        for name in (place, *((owner, *tied) if together else ())):
            self.tensors[name] = expr
        if not together:
            self.alone.add(place)

    def is_turned(self, place: str) -> bool:
        """Whether a square matrix is stored as (in, out)."""
        return stored_turned(place, self.base.side.config) or self.config.transposed

    def is_the_embeddings(self, place: str) -> bool:
        """Whether a head's change is that of the embeddings which it stays tied to."""
        if not self.config.stays_tied or place not in self.second:
            return False
        self.forget(place)
        return True

    def forget(self, place: str) -> None:
        """Leave a head without a tensor of its own."""
        if place in self.heads:
            self.heads.discard(place)
            del self.tensors[place]

    def check_rank(self, place: str, rank: int, name: str) -> None:
        """PlanError unless the change ``name`` of ``place`` is of the rank that the config says."""
        wanted = self.config.rank_of(place)
        if rank != wanted:
            raise PlanError(
                "a change is of another rank than the config says, so its scale is not known",
                tensor=name,
                file=self.config.file,
                found=rank,
                expected=wanted,
            )
