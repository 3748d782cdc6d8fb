"""Recipe to IR: open the models, resolve every parameter for every tensor, apply the methods.

The stages of a recipe are one graph: a stage that another one uses is a checkpoint like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merge import methods
from merge.errors import MergeError
from merge.families.heads import check_heads
from merge.families.vocabulary import lookup_tables
from merge.ir.assembly import union
from merge.ir.checkpoint import Checkpoint
from merge.ir.merging import merge_checkpoints
from merge.ir.reference import Reference
from merge.recipe.assemble import assemble
from merge.recipe.chat_template import with_chat_template
from merge.recipe.clashes import clash_notes
from merge.recipe.computed import Steps, align_models, repair_result
from merge.recipe.document import Place
from merge.recipe.explain import Explanation, Made, explain
from merge.recipe.learned import learn_coefficients
from merge.recipe.levels import Reader
from merge.recipe.read import Recipe, Stage
from merge.recipe.sections import Assembly, Input, Section
from merge.recipe.together import open_together, settle_heads
from merge.recipe.tokenizer import vocabularies

__all__ = ["Compiled", "compile_recipe"]

Opener = Callable[[Reference], Checkpoint]


@dataclass(frozen=True, slots=True)
class Compiled:
    """The checkpoint that a recipe describes, and what its author may want to know.

    saved: stages that the recipe asks to write too, with their folders. made: how each stage was
    compiled, the result's last. base: what the result is written as an adapter over, where it is.
    """

    checkpoint: Checkpoint
    notes: tuple[str, ...]
    saved: tuple[tuple[str, Checkpoint], ...]
    made: tuple[Made, ...]
    base: Checkpoint | None = None

    def explain(self, tensor: str) -> list[Explanation]:
        """Which value each parameter takes for ``tensor``, and why; the result's stage first."""
        return explain(self.made, tensor)


def compile_recipe(
    recipe: Recipe, opener: Opener, *, seed: int | None = None, steps: Steps | None = None
) -> Compiled:
    """The checkpoint of ``recipe``. ``opener`` turns a model reference into a checkpoint.

    ``seed`` overrides the recipe's. ``steps`` computes alignments and repairs; without it models
    and results are taken as they are, and the notes say so. Every error names the recipe's line
    and column.
    """
    compiler = _Compiler(recipe, opener, seed, steps)
    final = recipe.final
    if final.model.save is not None:
        line = final.document.where(("save",))["line"]
        compiler.notes.append(f"line {line}: 'save' is ignored: this stage is the result itself")
    checkpoint = compiler.stage(final)
    base = compiler.base_of_adapter()
    for stage in recipe.stages:
        if stage.name is not None and stage.name not in compiler.done and stage is not recipe.final:
            if stage.model.save is not None:
                compiler.stage(stage)
            else:
                compiler.notes.append(f"stage {stage.name!r} is not used")
    saved = [
        (s.model.save, compiler.done[s.name])
        for s in recipe.stages
        if s.model.save is not None and s.name is not None and s is not recipe.final
    ]
    notes = tuple(dict.fromkeys(compiler.notes))
    made = sorted(compiler.made, key=lambda m: m.stage is final)
    return Compiled(checkpoint, notes, tuple(saved), tuple(made), base)


@dataclass(slots=True)
class _Compiler:
    """Stages, each compiled once, when it is first needed."""

    recipe: Recipe
    opener: Opener
    seed: int | None
    steps: Steps | None = None
    notes: list[str] = field(default_factory=list)
    done: dict[str, Checkpoint] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)
    opened: dict[Reference, Checkpoint] = field(default_factory=dict)
    underway: list[str | None] = field(default_factory=list)

    def open(self, reference: Reference, stage: Stage, place: Place) -> Checkpoint:
        """The model, or the stage, of that name; errors get the place that names it."""
        document = stage.document
        used = next((s for s in self.recipe.stages if s.name == str(reference)), None)
        if used is not None:
            if used.name in self.underway:
                circle = [*self.underway[self.underway.index(used.name) :], used.name]
                raise document.error(
                    "stages use one another in a circle", place, found=" -> ".join(map(str, circle))
                )
            made = self.stage(used)
            return replace(made, side=made.side.with_architecture(reference.architecture))
        if reference.adapter and reference.path in [s.name for s in self.recipe.stages]:
            raise document.error(
                "an adapter cannot be put on a stage",
                place,
                found=str(reference),
                expected="an adapter on a model, such as its own base",
                do="put it on the stage's models, or save the stage and merge its folder",
            )
        if reference not in self.opened:
            try:
                self.opened[reference] = self.opener(reference)
            except MergeError as error:
                raise error.at(**document.where(place)) from None
        return self.opened[reference]

    def base_of_adapter(self) -> Checkpoint | None:
        """The base of the final stage, where its result is to be an adapter."""
        for stage in self.recipe.stages:
            if stage.model.output is not None and stage is not self.recipe.final:
                said = "only the result of a recipe is written as an adapter"
                raise stage.document.error(said, ("output",), key="output")
        final = self.recipe.final
        if final.model.output is None:
            return None
        if final.model.base_model is None:
            raise final.document.error(
                "an adapter needs a base_model",
                ("output",),
                key="base_model",
                expected="the model that the adapter is to be used with",
            )
        return self.open(final.model.base_model, final, ("base_model",))

    def stage(self, stage: Stage) -> Checkpoint:
        """The checkpoint of one stage."""
        if stage.name is not None and stage.name in self.done:
            return self.done[stage.name]
        self.underway.append(stage.name)
        model = stage.model
        method = methods.get(model.merge_method)
        called = "" if stage is self.recipe.final else f"stage {stage.name!r}: "
        self.notes += [called + note for note in stage.ignored]
        notes: list[str] = []
        reader = Reader(stage, method, notes)

        def open_at(reference: Reference, place: Place) -> Checkpoint:
            return self.open(reference, stage, place)

        inputs = open_together(model, stage.document, open_at)

        def in_one_tree(reference: Reference, place: Place) -> Checkpoint:
            known = inputs.models.get(reference)
            return open_at(reference, place) if known is None else known

        shared = vocabularies(stage, in_one_tree, notes, inputs.named[0])
        if shared is not None:
            inputs = inputs.through(shared.open_at)
        else:
            notes += clash_notes(inputs)
        inputs = settle_heads(align_models(stage, inputs, self.steps, notes), model.heads)
        assembly = assemble(model, reader, inputs)
        made = Made(stage, reader, assembly)
        for section in assembly.sections:
            made.parts.append(self._section(made, section))
        _note_filters(reader, assembly)
        label = f"{method.name} of {_labels(assembly)}"
        if model.base_model is not None and method.base != "donor":
            label += f" over {model.base_model}"
        try:
            merged = _whole(made.parts, assembly)
        except MergeError as error:
            raise error.at(**stage.document.where(("merge_method",))) from None
        dtype = model.out_dtype or model.dtype
        merged = replace(merged, label=label, dropped={**assembly.unused(), **merged.dropped})
        seed = model.seed if self.seed is None else self.seed
        merged = learn_coefficients(made, merged, self.steps, seed, notes)
        parents = [o.view for o in made.operands[0]]
        merged = repair_result(stage, merged, parents, self.steps, notes)
        merged = merged if dtype is None else merged.cast(dtype)
        side = merged.side if shared is None else shared.side(merged.side, notes)
        merged = replace(merged, side=with_chat_template(stage, side, open_at, notes))
        self.notes += [called + note for note in notes]
        self.made.append(made)
        self.underway.pop()
        if stage.name is not None:
            self.done[stage.name] = merged
        return merged

    def _section(self, made: Made, section: Section) -> Checkpoint:
        stage, reader, method = made.stage, made.reader, made.reader.method
        operands = _operands(section, reader)
        made.operands.append(operands)

        def arguments(name: str) -> dict[str, Any]:
            return {
                spec.argument: tuple(c.value for c in choices)
                if spec.per_model
                else choices[0].value
                for spec, choices in made.choices(section, operands, name)
            }

        seed = stage.model.seed if self.seed is None else self.seed
        missing = stage.model.missing
        views = [i.view for i in operands]
        base = None if section.base is None else section.base.view
        try:
            check_heads([v for v in (section.donor, base, *views) if v is not None], missing)
            return merge_checkpoints(
                method,
                views,
                base,
                arguments,
                seed,
                [o.statistics for o in operands if o.statistics is not None],
                tables=lookup_tables(views) if method.variants else (),
                missing=missing,
                donor=section.donor,
            )
        except MergeError as error:
            place = ("merge_method",) if section.whole else section.place
            raise error.at(**stage.document.where(place)) from None


def _note_filters(reader: Reader, assembly: Assembly) -> None:
    """Note filters that choose nothing: a misspelt name is the commonest mistake in a recipe."""
    every = assembly.names()
    for section in assembly.sections:
        for level in section.shared:
            reader.unmatched(level, every)
        for found in section.inputs:
            if found.own is not None:
                reader.unmatched(found.own, list(found.model.tensors))


def _whole(parts: Sequence[Checkpoint], assembly: Assembly) -> Checkpoint:
    """The sections as one checkpoint with the donor's side files."""
    if len(parts) == 1 and not assembly.rest:
        return replace(parts[0], side=assembly.donor.side)
    return union([*parts, *assembly.rest], assembly.donor)


def _labels(assembly: Assembly) -> str:
    every = dict.fromkeys(i.called for s in assembly.sections for i in s.inputs)
    return ", ".join(every)


def _operands(section: Section, reader: Reader) -> list[Input]:
    """Which of the listed models the method works on, given what a base is to it."""
    method, base, inputs = reader.method, section.base, list(section.inputs)
    if base is None:
        if method.base == "required":
            raise reader.document.error(
                f"method {method.name!r} needs a base_model",
                ("merge_method",),
                key="base_model",
                expected="the model that the others were fine-tuned from",
            )
        return inputs
    others = [i for i in inputs if not i.stands_for(base)]
    if method.base in ("required", "optional"):
        return others
    listed = [i for i in inputs if i not in others]
    if method.base == "first operand":
        return [*(listed[:1] or [base]), *others]
    if listed or not section.whole:
        return inputs
    if "weight" in method.parameters and any("weight" in s.values for s in section.shared):
        # mergekit counts an unlisted base as one more model, when it has a weight from above
        reader.notes.append(f"base_model {base.called} is averaged in, with the recipe's weight")
        return [*inputs, base]
    reader.notes.append(
        f"base_model {base.called} gives config and tokenizer only: {method.name} has no base"
    )
    return inputs
