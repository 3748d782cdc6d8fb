"""Where a recipe takes the rows of single tokens from: `tokens` of its `tokenizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merge.ir.reference import Reference
from merge.recipe.document import Document, Place
from merge.recipe.inputs import OpenAt
from merge.recipe.schema import TokenEntry, TokenSource
from merge.recipe.shared_vocabulary import Tokenized
from merge.vocabulary.table import Choice

__all__ = ["choices_of"]


def choices_of(
    document: Document,
    models: Sequence[Tokenized],
    tokens: Mapping[str, TokenEntry],
    open_at: OpenAt,
) -> dict[str, Choice]:
    """The choice for each token that the recipe has one for; the rules are for all others.

    RecipeError with a place for a row that is not there.
    """
    found = {}
    for token, entry in tokens.items():
        place: Place = ("tokenizer", "tokens", token)
        if entry.source is not None:
            row = _row(document, models, token, entry.source, open_at)
            found[token] = Choice(row, entry.force)
        elif entry.force:
            raise document.error(
                "force needs a source: the row that every model is to have",
                (*place, "force"),
                key="force",
            )
    return found


def _row(
    document: Document,
    models: Sequence[Tokenized],
    token: str,
    source: TokenSource | Reference,
    open_at: OpenAt,
) -> tuple[int, int] | None:
    """Model and row; None for zeros."""
    place: Place = ("tokenizer", "tokens", token, "source")
    wanted: str | None = token
    row: int | None = None
    if isinstance(source, Reference):
        named = source
    elif source.kind == "zero" or source.model is None:
        return None
    else:
        named, wanted, row = source.model, source.token, source.token_id
    checkpoint = open_at(named, place)
    merged = [i for i, m in enumerate(models) if m.present]
    number = next((i for i in merged if models[i].checkpoint.same_as(checkpoint)), None)
    if number is None:
        raise document.error(
            "a token's row can only come from a model that is merged",
            place,
            found=named,
            expected=f"one of {', '.join(models[i].label for i in merged)}",
        )
    model = models[number]
    if wanted is not None:
        row = model.vocabulary.ids.get(wanted)
    if row is None or row >= model.rows:
        raise document.error(
            f"{model.label} has no row for the token",
            place,
            key=token,
            found=f"row {row}" if wanted is None else f"token {wanted!r}",
            expected=f"a token of its vocabulary, within its {model.rows} rows",
        )
    return number, row
