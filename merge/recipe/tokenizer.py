"""What a recipe says about the vocabulary: `tokenizer` or `tokenizer_source`, with its places.

Models are put into the result's vocabulary before they are merged, so that a method sees equal
shapes. Where all have one and the same tokenizer, and equally many rows, nothing is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from merge import methods
from merge.errors import MergeError, hint
from merge.families.vocabulary import vocabulary_tensors
from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference
from merge.ir.side import Side
from merge.recipe.document import Place
from merge.recipe.inputs import Named, OpenAt, named_models
from merge.recipe.read import Stage
from merge.recipe.schema import TokenizerEntry
from merge.recipe.shared_vocabulary import SharedVocabulary, Tokenized, rows_of
from merge.recipe.token_choices import choices_of
from merge.recipe.tokenizer_files import tokenizer_texts
from merge.recipe.tokenizer_side import with_vocabulary
from merge.vocabulary.combine import combine
from merge.vocabulary.document import Document
from merge.vocabulary.parse import parse_vocabulary
from merge.vocabulary.tokens import Vocabulary

__all__ = ["Vocabularies", "vocabularies"]


@dataclass(frozen=True, slots=True)
class Vocabularies:
    """The models of a stage in one vocabulary. ``open_at`` opens them so."""

    shared: SharedVocabulary
    stage: Stage
    opener: OpenAt
    statistics: Mapping[Place, int]

    def open_at(self, reference: Reference, place: Place) -> Checkpoint:
        """The model, or the statistic of a model, that is named at this place."""
        opened = self.opener(reference, place)
        try:
            if place in self.statistics:
                return self.shared.statistics(self.statistics[place], opened)
            number = self.shared.number_of(opened)
            return opened if number is None else self.shared.model(number)
        except MergeError as error:
            raise error.at(**self.stage.document.where(place)) from None

    def side(self, side: Side, notes: list[str]) -> Side:
        """The side files of the result."""
        side, found = with_vocabulary(side, self.shared)
        notes += found
        return side


@dataclass(frozen=True, slots=True)
class _Model:
    """A model that the stage names, and where it first does."""

    label: str
    checkpoint: Checkpoint
    place: Place
    axes: Mapping[str, int]
    texts: Mapping[str, str]
    merged: bool


@dataclass(frozen=True, slots=True)
class _Words:
    """The stage's words about its vocabulary, and the models that they may be about."""

    stage: Stage
    opener: OpenAt
    key: str
    entry: TokenizerEntry
    models: list[_Model]

    def number(self, reference: Reference, place: Place, *, merged: bool = True) -> int:
        """The number of a model among those that are known, to which it is added."""
        checkpoint = self.opener(reference, place)
        for i, model in enumerate(self.models):
            if model.checkpoint.same_as(checkpoint):
                return i
        try:
            texts = tokenizer_texts(checkpoint)
        except MergeError as error:
            raise error.at(**self.stage.document.where(place)) from None
        axes = vocabulary_tensors(checkpoint)
        self.models.append(_Model(str(reference), checkpoint, place, axes, texts, merged))
        return len(self.models) - 1


def vocabularies(
    stage: Stage, open_at: OpenAt, notes: list[str], donor: Named | None = None
) -> Vocabularies | None:
    """The stage's models in the vocabulary that it asks for; None where all is as it should be.

    donor: the model whose config is the result's: by default the base_model, else the first.
    RecipeError with a place for a source that is not there; notes say what was done.
    """
    recipe = stage.model
    if recipe.tokenizer is not None:
        words = _Words(stage, open_at, "tokenizer", recipe.tokenizer, [])
    elif recipe.tokenizer_source is not None:
        entry = TokenizerEntry(source=recipe.tokenizer_source, pad_to_multiple_of=None)
        words = _Words(stage, open_at, "tokenizer_source", entry, [])
    else:
        return None
    statistics: dict[Place, int] = {}
    base = 0
    apart = methods.get(recipe.merge_method).statistic is not None  # these have no row for a token
    for named in named_models(recipe):
        number = words.number(named.reference, named.place)
        if named.statistics is not None and not apart:
            statistics[named.statistics.place] = number
        if named.place == (("base_model",) if donor is None else donor.place):
            base = number
    ground, source = base, words.entry.source
    if str(source) not in ("union", "base"):
        at = ("tokenizer", "source") if recipe.tokenizer is not None else ("tokenizer_source",)
        try:
            ground = words.number(source, at, merged=False)
        except MergeError as error:
            error.do = hint(source, ("union", "base"), error.do)
            raise
    line = stage.document.where((words.key,))["line"]
    if _agree(words):
        notes.append(
            f"line {line}: all models have one tokenizer, which is taken as it is"
            if words.models[0].texts
            else f"line {line}: '{words.key}' does nothing: no model has a tokenizer beside its"
            " weights"
        )
        return None
    if not any(m.axes for m in words.models):
        raise stage.document.error(
            "no tensor of the models is known to have a row for each token, so their vocabularies"
            " cannot be merged",
            (words.key,),
            key=words.key,
            expected="embeddings, by a customary name such as embed_tokens or word_embeddings",
            do=f"leave {words.key} out to keep the donor's tokenizer",
        )
    shared = _shared(words, base, ground, notes)
    notes.append(f"line {line}: {shared.summary()}")
    return Vocabularies(shared, stage, open_at, statistics)


def _agree(words: _Words) -> bool:
    """Whether nothing is to be done: one tokenizer, one number of rows, and no wish beyond that."""
    if words.entry.tokens or words.entry.pad_to_multiple_of:
        return False
    first = words.models[0]
    rows = {rows_of(m.checkpoint, m.axes) for m in words.models}
    return len(rows) == 1 and all(m.texts == first.texts for m in words.models)


def _shared(words: _Words, base: int, ground: int, notes: list[str]) -> SharedVocabulary:
    """The vocabulary that the words describe."""
    entry, document = words.entry, words.stage.document
    if str(entry.source) == "base" and words.stage.model.base_model is None:
        notes.append(f"there is no base_model: {words.models[0].label} stands for it")
    found = _parsed(words, ground, notes)
    models = [
        Tokenized(m.label, m.checkpoint, m.axes, v, m.merged)
        for m, v in zip(words.models, found, strict=True)
    ]
    members = [m.member() for m in models]
    union = str(entry.source) == "union"
    try:
        combined = combine(members, ground, union=union, extra=list(entry.tokens))
    except MergeError as error:
        raise error.at(**document.where((words.key,))) from None
    notes += [n for v in dict.fromkeys(found) for n in v.notes]
    notes += combined.notes
    choices = choices_of(words.stage.document, models, entry.tokens, words.opener)
    return SharedVocabulary(tuple(models), combined, base, choices, entry.pad_to_multiple_of or 1)


def _parsed(words: _Words, ground: int, notes: list[str]) -> list[Vocabulary]:
    """The vocabulary of each model; one without a tokenizer has that of the source."""
    known: dict[str, Document] = {}
    models = words.models
    if not models[ground].texts:
        raise words.stage.document.error(
            "the model whose tokenizer is to be taken has none",
            (words.key,),
            model=models[ground].label,
            expected="tokenizer.json, or vocab.json or vocab.txt, beside its weights",
            do="name a model with a tokenizer as its source, or save the tokenizer there",
        )

    def read(model: _Model) -> Vocabulary:
        try:
            return parse_vocabulary(model.texts, model.label, known)
        except MergeError as error:
            raise error.at(**words.stage.document.where(model.place)) from None

    own = read(models[ground])
    found = []
    for i, model in enumerate(models):
        if i == ground:
            found.append(own)
        elif model.texts:
            found.append(read(model))
        else:
            _check_assumed(words, model, own)
            found.append(replace(own, label=model.label))
            if model.axes:
                notes.append(f"{model.label} has no tokenizer: it is taken to have {own.label}'s")
    return found


def _check_assumed(words: _Words, model: _Model, own: Vocabulary) -> None:
    """A model without a tokenizer can have the source's."""
    rows, tokens = rows_of(model.checkpoint, model.axes), len(own.ids)
    if model.axes and rows < tokens:
        raise words.stage.document.error(
            "a model has no tokenizer, and its embeddings do not fit that of the source",
            model.place,
            model=model.label,
            found=f"{rows} rows",
            expected=f"at least the {tokens} tokens of {own.label}",
            do="save its tokenizer beside its weights",
        )
