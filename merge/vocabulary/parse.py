"""Read a vocabulary from a tokenizer's files: tokenizer.json first, else the older files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from merge.errors import SourceError
from merge.vocabulary.document import Document, read_document
from merge.vocabulary.tokens import AddedToken, Vocabulary, added_ids

__all__ = ["PIECES", "TEXTS", "parse_vocabulary"]

TEXTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
"""Text files that say what the tokens of a model are."""

PIECES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Older files, which hold the tokens of the tokenizer's model but not those added to it."""

_TOKENS = "tokens and their ids, whole numbers"
_MOST_IDS = 2**31
Documents = Mapping[str, Document]


def parse_vocabulary(
    texts: Mapping[str, str], label: str, parsed: dict[str, Document] | None = None
) -> Vocabulary:
    """The vocabulary in these files, given by name; SourceError names the file that is unsound.

    label: whose it is, for messages. parsed: texts that were parsed before, to which those of this
    vocabulary are added: fine-tunes often share a large file.
    """
    known = {} if parsed is None else parsed
    documents = {n: _document(t, n, label, known) for n, t in texts.items() if n.endswith(".json")}
    roles = _roles(
        documents[n] for n in ("tokenizer_config.json", "special_tokens_map.json") if n in documents
    )
    kind, pieces = _pieces(texts, documents, label)
    said = {token.content: (token, number) for token, number in _added(documents, roles, label)}
    ids = dict(added_ids(pieces, said))
    tokens = {content: said[content][0] for content in ids}
    moved = [c for c in ids if said[c][1] != ids[c]]
    return Vocabulary(
        label=label,
        kind=kind,
        ids={**pieces, **ids},
        pieces=len(pieces),
        added=tokens,
        roles=roles,
        texts=dict(texts),
        document=documents.get("tokenizer.json"),
        notes=tuple(
            f"{label}: its tokenizer says that {c!r} has id {said[c][1]}, but it is loaded as"
            f" {ids[c]}, which counts here ({len(moved)} such tokens)"
            for c in moved[:1]
        ),
    )


def _document(text: str, name: str, label: str, known: dict[str, Document]) -> Document:
    if text not in known:
        known[text] = read_document(text, name, label)
    return known[text]


def _pieces(
    texts: Mapping[str, str], documents: Documents, label: str
) -> tuple[str, Mapping[str, int]]:
    """The kind of the tokenizer's model, and its tokens."""
    if "tokenizer.json" in documents:
        with _reading("tokenizer.json", "model", label, "a type and a vocab"):
            model = documents["tokenizer.json"].values["model"]
            kind, vocab = model.get("type") or _guess(model), model["vocab"]
        with _reading("tokenizer.json", "model.vocab", label, _TOKENS):
            if isinstance(vocab, list):
                return "Unigram", {_text(piece): i for i, (piece, _) in enumerate(vocab)}
            return _text(kind), _numbers(vocab)
    if "vocab.json" in documents:
        kind = "BPE" if "merges.txt" in texts else "WordLevel"
        with _reading("vocab.json", None, label, _TOKENS):
            return kind, _numbers(documents["vocab.json"].values)
    if "vocab.txt" in texts:
        lines = texts["vocab.txt"].removesuffix("\n").split("\n")
        return "WordPiece", {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    raise SourceError(
        "no file says what the tokens of a model are",
        model=label,
        expected="tokenizer.json, vocab.json or vocab.txt",
    )


@contextmanager
def _reading(file: str, key: str | None, label: str, expected: str) -> Iterator[None]:
    """What goes wrong while a value is read is an error that names it."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(
            "a tokenizer's file is not as it should be",
            model=label,
            file=file,
            key=key,
            found=f"no {error}" if isinstance(error, KeyError) else error,
            expected=expected,
            do="save the tokenizer anew with save_pretrained of transformers",
        ) from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80}, which is no text")
    return value


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MOST_IDS:
        raise ValueError(f"{value!r:.80}, which is no id")
    return value


def _numbers(vocab: Mapping[str, int]) -> Mapping[str, int]:
    if not all(type(i) is int and 0 <= i < _MOST_IDS for i in vocab.values()):
        for number in vocab.values():
            _number(number)
    return vocab


def _guess(model: Mapping[str, Any]) -> str:
    """The kind of a model that does not name it, as in older files."""
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _added(
    documents: Documents, roles: Mapping[str, str], label: str
) -> list[tuple[AddedToken, int]]:
    """The added tokens with the ids that the files say, in the order in which they are loaded.

    Those that only tokenizer_config.json knows come after those of tokenizer.json.
    """
    with _reading("tokenizer_config.json", "added_tokens_decoder", label, "ids and their tokens"):
        config = _at(documents, "tokenizer_config.json", "added_tokens_decoder")
        further = [(_token(e), _number(int(i))) for i, e in config.items()]
    further.sort(key=lambda found: found[1])
    if "tokenizer.json" in documents:
        with _reading("tokenizer.json", "added_tokens", label, "a list of tokens with ids"):
            listed = documents["tokenizer.json"].values.get("added_tokens") or []
            first = [(_token(e), _number(e["id"])) for e in listed]
        known = {token.content for token, _ in first}
        return [*first, *((t, i) for t, i in further if t.content not in known)]
    if further or "added_tokens.json" not in documents:
        return further
    special = set(roles.values())
    with _reading("added_tokens.json", None, label, _TOKENS):
        entries = _numbers(documents["added_tokens.json"].values).items()
    older = [
        (AddedToken(c, special=c in special, normalized=c not in special), i) for c, i in entries
    ]
    return sorted(older, key=lambda found: found[1])


def _at(documents: Documents, name: str, key: str) -> Mapping[str, Any]:
    """A mapping in a file; {} where it is not there."""
    return (documents[name].values.get(key) if name in documents else None) or {}


def _token(entry: Mapping[str, Any]) -> AddedToken:
    special = bool(entry.get("special", False))
    normalized = bool(entry.get("normalized", not special))
    flags = {k: bool(entry.get(k, False)) for k in ("lstrip", "rstrip", "single_word")}
    return AddedToken(_text(entry["content"]), special=special, normalized=normalized, **flags)


def _roles(documents: Iterable[Document]) -> dict[str, str]:
    """bos_token and the like; of several files the first that names one counts."""
    roles: dict[str, str] = {}
    for document in documents:
        for key, value in document.values.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                roles.setdefault(key, content)
    return roles
