"""Layers of models stacked anew: each slice takes equally many layers of its sources.

What comes before the layers is merged from the sources of the first slice, what comes after them
from those of the last. A gradient runs anew in each slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from merge.families.config import Origin, relayer
from merge.families.layers import Layers, comes_first, depth, of_stack, place_of
from merge.families.roles import role_of
from merge.families.vocabulary import vocabulary_tensors
from merge.ir.align import some
from merge.ir.checkpoint import Checkpoint
from merge.recipe.document import Place
from merge.recipe.levels import Level
from merge.recipe.schema import SliceEntry
from merge.recipe.sections import Input, Opening, Section, viewed

__all__ = ["Sliced", "find_stack", "slice_up"]

Span = tuple[int, int]
Taken = Callable[[Span, Checkpoint], dict[str, str]]
"""What is taken of a model that gives these layers."""


@dataclass(frozen=True, slots=True)
class Sliced:
    """The sections, and for each layer the config of its first source and its number there."""

    sections: list[Section]
    layers: list[Origin]


def slice_up(
    opening: Opening,
    entries: Sequence[SliceEntry],
    place: Place,
    shared: tuple[Level, ...],
    module: str | None,
) -> Sliced:
    """The sections of the slices; every layer range is checked against its model."""
    slices: list[_Slice] = []
    for i, entry in enumerate(entries):
        at: Place = (*place, "slices", i)
        if entry.residual_weight is not None:
            line = opening.reader.line((*at, "residual_weight"))
            opening.reader.notes.append(f"line {line}: 'residual_weight' is ignored, as ever")
        level = opening.reader.level(f"parameters of slice {i + 1}", at, entry.parameters)
        start = sum(s.count for s in slices)
        made = _Slice.of(opening, entry, at, (level, *shared), module, start)
        slices.append(made)
        if made.stack != slices[0].stack:
            raise opening.reader.document.error(
                "the slices are of models that name their layers differently",
                (*at, "sources", 0, "model"),
                found=f"{made.stack} in {entry.sources[0].model}",
                expected=f"{slices[0].stack}, as in the first slice",
            )
        made.check_width(slices[0])
    if not slices[0].first.same_as(slices[-1].first) and (odd := slices[-1].unplaced()):
        opening.reader.notes.append(
            f"nothing tells whether {some(odd)} comes before the layers or after them: taken from"
            f" the last slice, of {entries[-1].sources[0].model}"
        )
    ends = [slices[0].outside(before=True), slices[-1].outside(before=False)]
    sections = [*ends[:1], *(s.section() for s in slices), *ends[1:]]
    return Sliced([s for s in sections if s is not None], [o for s in slices for o in s.origins()])


@dataclass(frozen=True, slots=True)
class _Slice:
    """One entry of ``slices``: the layers from ``start`` on."""

    opening: Opening
    entry: SliceEntry
    place: Place
    shared: tuple[Level, ...]
    module: str | None
    start: int
    first: Checkpoint  # the model of the first source
    stack: str

    @classmethod
    def of(
        cls,
        opening: Opening,
        entry: SliceEntry,
        place: Place,
        shared: tuple[Level, ...],
        module: str | None,
        start: int,
    ) -> _Slice:
        first = opening.open_at(entry.sources[0].model, (*place, "sources", 0, "model"))
        stack = find_stack(opening, first, module, place)
        made = cls(opening, entry, place, shared, module, start, first, stack)
        for i, source in enumerate(entry.sources):
            at: Place = (*place, "sources", i)
            model = opening.open_at(source.model, (*at, "model"))
            made._check(str(source.model), model, source.layer_range, (*at, "layer_range"))
        return made

    @property
    def count(self) -> int:
        """Layers that the slice makes."""
        first, end = self.entry.sources[0].layer_range
        return end - first

    def origins(self) -> list[Origin]:
        """For each layer, the config of the first source and the layer's number there."""
        return [(self.first.side.config, n) for n in range(*self.entry.sources[0].layer_range)]

    def _check(self, called: str, model: Checkpoint, span: Span, place: Place) -> None:
        """The model has these layers, and they are as many as those of the first source."""
        document, (first, end) = self.opening.reader.document, span
        there = Layers.of(self.opening.names(model, self.module)).stacks.get(self.stack, 0)
        if end > there:
            raise document.error(
                f"{called} has no layer {end - 1}",
                place,
                key="layer_range",
                found=f"[{first}, {end}]",
                expected=f"at most [0, {there}]: it has {there} layers in {self.stack}",
            )
        if end - first != self.count:
            raise document.error(
                "the sources of a slice have different numbers of layers",
                place,
                key="layer_range",
                found=f"{end - first} layers",
                expected=f"{self.count}, as the first source of the slice",
            )

    def check_width(self, other: _Slice) -> None:
        """The layers work on as many features as the other slice's: norms and biases tell."""
        own, theirs = self._vectors(), other._vectors()
        for rest, shape in own.items():
            if theirs.get(rest, shape) != shape:
                raise self.opening.reader.document.error(
                    "the slices are of models of different widths",
                    (*self.place, "sources", 0, "model"),
                    tensor=f"{self.stack}.*{rest}",
                    found=f"{list(shape)} in {self.entry.sources[0].model}",
                    expected=f"{list(theirs[rest])}, as in {other.entry.sources[0].model}",
                )

    def _vectors(self) -> dict[str, tuple[int, ...]]:
        """The vectors of the first layer, by what their names end in."""
        first, _ = self.entry.sources[0].layer_range
        names = self._layers((first, first + 1), self.first)
        shapes = {at[2]: self.first[own].shape for n, own in names.items() if (at := place_of(n))}
        return {rest: shape for rest, shape in shapes.items() if len(shape) == 1}

    def unplaced(self) -> list[str]:
        """Vocabularies of an unknown family: embeddings, which come first, or heads."""
        shapes = {n: self.first.tensors[n].shape for n in vocabulary_tensors(self.first)}
        return [n for n, shape in shapes.items() if role_of(n, shape) == "other"]

    def section(self) -> Section:
        """The layers of this slice."""
        return self._section(self._layers, self._depth)

    def outside(self, *, before: bool) -> Section | None:
        """What comes before the layers, or after them, from this slice's sources."""

        def taken(_: Span, model: Checkpoint) -> dict[str, str]:
            names = self.opening.names(model, self.module)
            shared = of_stack(names, self.stack)
            outer = [n for n in names if (at := place_of(n)) is None or at[0] != self.stack]
            found = [n for n in outer if comes_first(n) == before]
            return {n: n for n in [*found, *(n for n in names if before and n in shared)]}

        return self._section(taken, lambda _: 0.0) if taken((0, 0), self.first) else None

    def _layers(self, layers: Span, model: Checkpoint) -> dict[str, str]:
        """The tensors of some layers, under the names that they have in this slice."""
        first, end = layers
        names = self.opening.names(model, self.module)
        shared, dot = of_stack(names, self.stack), "." if self.stack else ""
        out = {}
        for name in names:
            at = place_of(name)
            if at is None or at[0] != self.stack or name in shared:
                continue
            if first <= at[1] < end:
                out[f"{self.stack}{dot}{self.start + at[1] - first}{at[2]}"] = name
        return out

    def _depth(self, name: str) -> float:
        at = place_of(name)
        assert at is not None
        return depth(at[1] - self.start, self.count)

    def _section(self, taken: Taken, at: Callable[[str], float]) -> Section:
        inputs = tuple(
            self.opening.input(
                source, (*self.place, "sources", i), partial(taken, source.layer_range)
            )
            for i, source in enumerate(self.entry.sources)
        )
        base = self._base(inputs, taken)
        return Section(inputs, base, self.shared, at, self.place, whole=False)

    def _base(self, inputs: Sequence[Input], taken: Taken) -> Input | None:
        """The base's layers: those it is listed with, else those that all sources agree on."""
        reader = self.opening.reader
        base = self.opening.base(self.place, self.entry.base_model)
        if base is None:
            return None
        for found in inputs:
            if found.model.same_as(base):
                return found
        called = str(self.entry.base_model or self.opening.stage.base_model)
        if reader.method.base == "donor":  # which gives no weights
            return None
        ranges = {s.layer_range for s in self.entry.sources}
        if len(ranges) > 1:
            raise reader.document.error(
                "the sources have different layers, and the base_model is not among them",
                self.place,
                found=f"base_model {called}",
                expected="the base_model among the sources, with its layer_range",
            )
        span = ranges.pop()
        above: Place = () if self.entry.base_model is None else self.place
        self._check(called, base, span, (*above, "base_model"))
        return viewed(called, base, taken(span, base), span=span)


def find_stack(opening: Opening, model: Checkpoint, module: str | None, place: Place) -> str:
    """The stack that slices are of: the only one, or the only one that the config counts."""
    stacks = Layers.of(opening.names(model, module)).stacks
    config = model.side.config
    counted = [s for s, n in stacks.items() if relayer(config, s, n, [(config, 0)]).counted]
    found = list(stacks) if len(stacks) == 1 else counted
    if len(found) == 1:
        return found[0]
    raise opening.reader.document.error(
        f"{model.label} has several stacks of layers, so it is not clear what the slices are of"
        if stacks
        else f"{model.label} has no layers that slices could be of",
        place,
        found=", ".join(f"{s} ({n} layers)" for s, n in stacks.items()) or "no numbered tensors",
        do="write modules: with slices for one of them, or for each" if stacks else None,
    )
