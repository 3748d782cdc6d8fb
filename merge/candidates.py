"""Candidates of a search: a recipe compiled with some values, and the score of what it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import RecipeError
from merge.families.layers import Layers
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference
from merge.judging import Judge, in_memory, open_tasks, state_from
from merge.learning.score import Score
from merge.learning.span import Span
from merge.recipe.compile import compile_recipe
from merge.recipe.computed import Steps
from merge.recipe.read import Recipe, parse_recipe
from merge.recipe.schema import RecipeModel
from merge.recipe.tune_words import TuneEntry
from merge.run import PlanOptions
from merge.score import score_by_command
from merge.tuning.knobs import Place, places_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Candidates", "Judged", "Opener", "score_of", "unsaid"]

_HELD = 4 << 30
"""Bytes of differences that are kept, so that the next merge is a sum."""


class Opener:
    """Opens each model once."""

    def __init__(self, opener: Callable[[Reference], Checkpoint]) -> None:
        self._opener = opener
        self._known: dict[Reference, Checkpoint] = {}

    def __call__(self, reference: Reference) -> Checkpoint:
        if reference not in self._known:
            self._known[reference] = self._opener(reference)
        return self._known[reference]


@dataclass(slots=True)
class Candidates:
    """One search: compiles the recipe at values, and judges what comes of it."""

    recipe: Recipe
    entry: TuneEntry
    opener: Callable[[Reference], Checkpoint]
    seed: int | None
    steps: Steps | None
    options: PlanOptions

    def compiled(self, settings: Sequence[str]) -> Checkpoint:
        """The checkpoint of the recipe with some values."""
        return compile_recipe(
            self.read(settings), self.opener, seed=self.seed, steps=self.steps
        ).checkpoint

    def read(self, settings: Sequence[str]) -> Recipe:
        final = self.recipe.final
        return parse_recipe(
            self.recipe.source,
            final.document.name,
            lenient=final.lenient,
            settings=(*self.recipe.settings, *settings),
        )

    def places(self) -> list[Place]:
        """Where numbers go."""
        return places_of(self.recipe.final, self.entry, self._layers)

    def _layers(self) -> int:
        model = self.recipe.final.model
        first = model.base_model or next(_references(model), None)
        names = [] if first is None else list(self.opener(first).tensors)
        return max(Layers.of(names).stacks.values(), default=0)

    def folders(self, checkpoint: Checkpoint) -> list[str]:
        """Folders of models whose code may run the data: the base's first."""
        base = self.recipe.final.model.base_model
        first = () if base is None else self.opener(base).roots
        return [*first, *checkpoint.roots]

    def own(self) -> dict[str, tuple[str, ...]]:
        """Folders of the recipe's models by the last part of their names."""
        stages = {s.name for s in self.recipe.stages}
        found: dict[str, tuple[str, ...]] = {}
        for stage in self.recipe.stages:
            for reference in _references(stage.model):
                if str(reference) not in stages:
                    name = str(reference).rstrip("/").rpartition("/")[2]
                    found.setdefault(name, self.opener(reference).roots)
        return found

    def evaluate(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The tensors, in float32 at least."""
        wide = any(e.dtype.name == "float64" for e in checkpoint.tensors.values())
        cast = checkpoint.cast("float64" if wide else "float32")
        return cast.state_dict(threads=self.options.threads, device=self.options.device)


def _references(model: RecipeModel) -> Iterator[Reference]:
    yield from (e.model for e in model.models or ())
    yield from (s.model for part in model.slices or () for s in part.sources)


# -- scores ----------------------------------------------------------------------------------------
class Judged:
    """A score of checkpoints, each computed as a sum of earlier ones where it can be."""

    def __init__(
        self,
        own: Candidates,
        size: int,
        on_state: Callable[[Checkpoint, Mapping[str, Tensor]], float],
        on_checkpoint: Score | None,
    ) -> None:
        self._span = Span(own.evaluate, _HELD)
        self._on_state = on_state
        # a model too large to be held twice is merged anew each time, in bounded memory
        self._on_checkpoint = on_checkpoint if 2 * size > _HELD else None
        self._count = 0

    def __call__(self, checkpoint: Checkpoint) -> float:
        self._count += 1
        if self._on_checkpoint is not None:
            return self._on_checkpoint(checkpoint)
        return self._on_state(checkpoint, self._span.state(checkpoint))

    def passed(self, checkpoint: Checkpoint) -> None:
        """A checkpoint whose score is known; later ones are the same sums as with it."""
        if self._on_checkpoint is None:
            self._span.follow(checkpoint)

    def merges(self) -> int:
        return self._count if self._on_checkpoint is not None else self._span.computed


def unsaid(entry: TuneEntry, where: Mapping[str, Any]) -> RecipeError:
    """The error where there is not exactly one thing that values are chosen by."""
    both = entry.data is not None and entry.score is not None
    return RecipeError(
        "both data and a score are given" if both else "it is not said by what values are chosen",
        key="data",
        expected="data: ..., or score: a command that prints a number",
        **where,
    )


def score_of(
    own: Candidates, first: Checkpoint, score: Score | None, scratch: Path | None
) -> tuple[Judged, str]:
    """The score, and what it is in words."""
    entry = own.entry
    ways = [w for w in (score, entry.score, entry.data) if w is not None]
    if len(ways) != 1:
        raise unsaid(entry, own.recipe.final.document.where(("tune",)))
    size = 4 * sum(spec.numel for spec in first.values())
    if entry.data is not None:
        judge = Judge(open_tasks(entry.data, own.folders(first), own.own()), entry.metric)
        paths = ", ".join(e.path for e in entry.data.values())

        def on_data(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> float:
            return judge(lambda task: state_from(task, checkpoint, state))

        return Judged(own, size, on_data, None), f"{judge.told()} of {paths}"
    by = score
    if by is None:
        assert entry.score is not None
        by = score_by_command(
            entry.score, scratch, minimize=entry.minimize, memory=own.options.memory,
            threads=own.options.threads, device=own.options.device,
        )  # fmt: skip
    scored = by

    def on_checkpoint(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> float:
        return float(scored(in_memory(checkpoint, state)))

    sign = "minus " if entry.minimize else ""
    told = f"{sign}{entry.score}" if score is None else "a score of your own"
    return Judged(own, size, on_checkpoint, by), told
