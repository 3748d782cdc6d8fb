"""A vocabulary: tokens and their ids, which of them were added and how they match, their roles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from merge.vocabulary.document import Document

__all__ = ["AddedToken", "Vocabulary", "added_ids"]


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched as a whole before the model splits the text.

    special: left out when special tokens are skipped in decoding. lstrip, rstrip: takes the white
    space beside it along. single_word: not inside a word. normalized: matched in the normalised
    text. These are the names of tokenizer.json.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True

    def differs_from(self, other: AddedToken) -> str:
        """The flags in which two definitions of a token differ, as text."""
        mine, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name} {str(mine[name]).lower()} against {str(theirs[name]).lower()}"
            for name in mine
            if mine[name] != theirs[name]
        )


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What a model's tokenizer files say, as data.

    ids: all tokens, of the model and added. pieces: how many belong to the tokenizer's model (the
    others were added). kind: BPE, WordPiece, Unigram or WordLevel. roles: bos_token and so on, to
    tokens. texts: the files by name; document: tokenizer.json taken apart, where there is one.
    """

    label: str
    kind: str
    ids: Mapping[str, int]
    pieces: int
    added: Mapping[str, AddedToken]
    roles: Mapping[str, str]
    texts: Mapping[str, str] = field(repr=False)
    document: Document | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def in_order(self) -> list[str]:
        """All tokens by id."""
        ids = self.ids
        return sorted(ids, key=ids.__getitem__)

    def same_as(self, other: Vocabulary) -> bool:
        """Whether both split every text into the same ids, and name the same special tokens."""
        if self is other:
            return True
        same = (self.kind, self.pieces, self.roles) == (other.kind, other.pieces, other.roles)
        if not same or self.ids != other.ids or self.added != other.added:
            return False
        return self._splitting() == other._splitting()

    def _splitting(self) -> list[object]:
        """What decides how a text is split."""
        if self.document is None:
            return [self.texts.get("merges.txt")]
        return [self.document.values.get(k) for k in ("model", "normalizer", "pre_tokenizer")]


def added_ids(pieces: Mapping[str, int], contents: Iterable[str]) -> Iterator[tuple[str, int]]:
    """The ids that the tokenizers library gives to added tokens, whatever their file says.

    One that is a piece keeps its id; any other gets the next after all pieces and added tokens.

    >>> list(added_ids({"a": 0, "b": 1}, ["<s>", "a", "</s>"]))
    [('<s>', 2), ('a', 0), ('</s>', 3)]
    """
    following, known = len(pieces), dict[str, int]()
    for content in contents:
        number = known.get(content, pieces.get(content, following))
        known[content] = number
        following = max(following, number + 1)
        yield content, number
