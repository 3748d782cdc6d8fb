"""Tokenizers that nobody asked about: where they number tokens differently, the plan says so.

Without `tokenizer` in a recipe the rows of embeddings are merged by number, and the donor's
tokenizer is the result's. That is right for fine-tunes of one model, and noise for others.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge.errors import SourceError
from merge.ir.checkpoint import Checkpoint, some
from merge.ir.side import Side
from merge.recipe.together import Inputs
from merge.recipe.tokenizer_files import names_of, text_of
from merge.vocabulary.document import Document
from merge.vocabulary.parse import TEXTS, parse_vocabulary

__all__ = ["clash_notes"]

_WHOLE = ("tokenizer.json", "vocab.json", "vocab.txt")
"""Files that hold a vocabulary, of which one is enough."""


def clash_notes(inputs: Inputs) -> Iterator[str]:
    """A note for each model, and tokenizer of it, that numbers tokens otherwise than the donor."""
    donor = inputs.donor
    statistics = {n.statistics.reference for n in inputs.named if n.statistics is not None}
    known: dict[str, Document] = {}
    for reference, model in inputs.models.items():
        if model is donor or reference in statistics:
            continue
        for folder in _folders(donor.side):
            ours, theirs = _texts(donor.side, folder), _texts(model.side, folder)
            if theirs and ours != theirs:
                yield from _compared(donor, ours, model, theirs, known, folder)


def _folders(side: Side) -> list[str]:
    """Where tokenizers lie: '' for beside the weights, else a folder with a slash at its end."""
    found = (n.rpartition("/") for n in names_of(side))
    return list(dict.fromkeys(above + slash for above, slash, name in found if name in _WHOLE))


def _texts(side: Side, folder: str) -> dict[str, str]:
    """The tokenizer's files in a folder; {} where none holds a vocabulary."""
    names = [n for n in names_of(side) if n.startswith(folder) and n.removeprefix(folder) in TEXTS]
    found = {n.removeprefix(folder): n for n in names}
    return {k: text_of(side, n) for k, n in found.items()} if found.keys() & {*_WHOLE} else {}


def _compared(
    donor: Checkpoint,
    ours: dict[str, str],
    model: Checkpoint,
    theirs: dict[str, str],
    known: dict[str, Document],
    folder: str,
) -> Iterator[str]:
    try:
        first = parse_vocabulary(ours, donor.label, known).ids
        second = parse_vocabulary(theirs, model.label, known).ids
    except SourceError as error:
        where = ", ".join(f"{k} {v}" for k, v in error.where.items())
        yield (
            f"whether {model.label} and {donor.label} number tokens alike is not known:"
            f" {error.what} ({where})"
        )
        return
    if first == second:
        return
    tokens = {number: token for token, number in first.items()}
    other = [t for t, i in second.items() if first.get(t, i) != i or tokens.get(i, t) != t]
    if other:
        yield (
            f"{model.label} numbers {len(other)} tokens otherwise than {donor.label}, such as"
            f" {some([repr(t) for t in other])}: embeddings are merged by number"
            f"{'' if folder else '; `tokenizer_source: union` merges them by token'}"
        )
