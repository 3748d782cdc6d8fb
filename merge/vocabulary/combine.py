"""The vocabulary of the result: that of one model, or the union of all.

A union keeps the ids of its ground, the base's vocabulary. New tokens follow: first the ordinary
tokens of the other models, in the order of the recipe and of their ids, then tokens that were
added to the others, then those that the recipe names. They match as literal text: only merges of
the tokenizer's model could make them of parts. Tokens without a row in their model's embeddings
bring nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge.errors import PlanError
from merge.ir.checkpoint import some
from merge.vocabulary.tokens import AddedToken, Vocabulary

__all__ = ["Combined", "Member", "combine"]


@dataclass(frozen=True, slots=True)
class Member:
    """A model's vocabulary, and the number of rows of its embeddings.

    present: whether those rows may be used; of a model outside the merge only the tokens are.
    """

    vocabulary: Vocabulary
    rows: int
    present: bool = True

    @property
    def label(self) -> str:
        return self.vocabulary.label


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """The result's vocabulary.

    ground: which member's files it is made of. ids: all tokens, those of the ground first. new: the
    tokens that the ground lacks, by id. added: the definition of every added token. rows: of the
    result's embeddings, before any rounding up: never fewer than the ground's.
    """

    ground: int
    ids: dict[str, int]
    new: tuple[str, ...]
    added: dict[str, AddedToken]
    rows: int
    notes: tuple[str, ...]


def combine(
    members: Sequence[Member], ground: int, *, union: bool, extra: Sequence[str] = ()
) -> Combined:
    """The vocabulary of member ``ground``, of all members if ``union``, and the tokens ``extra``.

    PlanError where the ground's ids leave no place for new tokens.
    """
    own, rows = members[ground].vocabulary, members[ground].rows
    others = [m for i, m in enumerate(members) if i != ground and m.present]
    known = [_with_rows(m) for m in others]
    labelled = zip((m.vocabulary for m in others), known, strict=True)
    joined = list(labelled) if union else []
    new: dict[str, None] = {}
    for theirs, tokens in joined:
        kept = own.ids.keys() | theirs.added.keys()
        new.update(dict.fromkeys([t for t in tokens if t not in kept]))
    ordinary = list(new)
    brought = [(theirs, [t for t in theirs.added if t in tokens]) for theirs, tokens in joined]
    for _, additions in brought:
        new.update((t, None) for t in additions if t not in own.ids)
    new.update((t, None) for t in extra if t not in own.ids)
    added, notes = _defined(own, brought)
    if ordinary:
        notes.append(
            f"{len(ordinary)} tokens that other models put together from parts of words are whole"
            f" words here, matched wherever they occur: {_quoted(ordinary)}"
        )
    added.update((t, AddedToken(t)) for t in new if t not in added)
    ids = {**own.ids, **_numbered(own, list(new))}
    beyond = [t for t, i in own.ids.items() if i >= rows]
    wanted = [t for t in beyond if t in extra or any(t in tokens for tokens in known)]
    last = max((ids[t] for t in (*new, *wanted)), default=-1)
    left = [(members[ground], [t for t in beyond if ids[t] > last])]
    left += [(m, [t for t, i in m.vocabulary.ids.items() if i >= m.rows]) for m in others if union]
    notes += [
        f"{member.label}: its embeddings have {member.rows} rows, and none for {len(tokens)} of its"
        f" tokens, which bring nothing: {_quoted(tokens)}"
        for member, tokens in left
        if tokens
    ]
    return Combined(ground, ids, tuple(new), added, max(rows, last + 1), tuple(notes))


def _quoted(tokens: Sequence[str]) -> str:
    """The first few tokens in quotes, and how many more there are."""
    return some([*map(repr, tokens[:4]), *tokens[4:]], 4)


def _with_rows(member: Member) -> dict[str, int]:
    """The tokens that have a row, by id."""
    ids = member.vocabulary.ids
    return {t: ids[t] for t in member.vocabulary.in_order() if ids[t] < member.rows}


def _numbered(own: Vocabulary, new: Sequence[str]) -> dict[str, int]:
    """The ids of new tokens, which are those that the tokenizers library will give them."""
    start = max(own.pieces, *(own.ids[t] + 1 for t in own.added), 0)
    last = max(own.ids.values(), default=-1)
    if new and start <= last:
        raise PlanError(
            "the tokenizer has gaps in its ids, so no token can be added to it",
            model=own.label,
            found=f"{own.pieces} tokens with ids up to {last}",
            expected="ids without gaps",
            do="take the tokenizer of another model: tokenizer_source",
        )
    return {token: start + i for i, token in enumerate(new)}


def _defined(
    own: Vocabulary, others: Sequence[tuple[Vocabulary, Sequence[str]]]
) -> tuple[dict[str, AddedToken], list[str]]:
    """How each added token matches: the first definition counts, later ones that differ are told.

    others: the other vocabularies, with those of their added tokens that come in.
    """
    added, owner = dict(own.added), dict.fromkeys(own.added, own.label)
    clashes: dict[tuple[str, str], list[str]] = {}
    for other, tokens in others:
        for token in tokens:
            first = added.setdefault(token, other.added[token])
            whose = owner.setdefault(token, other.label)
            if first != other.added[token]:
                clash = f"{token!r} ({first.differs_from(other.added[token])})"
                clashes.setdefault((whose, other.label), []).append(clash)
    notes = [
        f"{first} and {second} define added tokens differently, those of {first} count: "
        + some(tokens)
        for (first, second), tokens in clashes.items()
    ]
    return added, notes
