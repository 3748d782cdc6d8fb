"""Read a vocabulary from a tokenizer's files: tokenizer.json first, else the older files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from merge.errors import SourceError
from merge.vocabulary.document import Document, parse_document
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
    try:
        kind, pieces = _pieces(texts, documents, label)
        said = {token.content: (token, number) for token, number in _added(documents, roles)}
        ids = dict(added_ids(pieces, said))
        tokens = {content: said[content][0] for content in ids}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SourceError(
            "a tokenizer's files are not as they should be",
            model=label,
            file=", ".join(n for n in TEXTS if n in texts),
            found=f"{type(error).__name__}: {error}",
            do="save the tokenizer anew with save_pretrained of transformers",
        ) from None
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
        try:
            known[text] = parse_document(text)
        except ValueError as error:
            raise SourceError(f"not sound JSON: {error}", file=name, model=label) from None
    return known[text]


def _pieces(
    texts: Mapping[str, str], documents: Documents, label: str
) -> tuple[str, Mapping[str, int]]:
    """The kind of the tokenizer's model, and its tokens."""
    if "tokenizer.json" in documents:
        model = documents["tokenizer.json"].values["model"]
        vocab = model["vocab"]
        if isinstance(vocab, list):
            return "Unigram", {piece: i for i, (piece, _) in enumerate(vocab)}
        return model.get("type") or _guess(model), _numbers(vocab)
    if "vocab.json" in documents:
        kind = "BPE" if "merges.txt" in texts else "WordLevel"
        return kind, _numbers(documents["vocab.json"].values)
    if "vocab.txt" in texts:
        lines = texts["vocab.txt"].removesuffix("\n").split("\n")
        return "WordPiece", {line.removesuffix("\r"): i for i, line in enumerate(lines)}
    raise SourceError(
        "no file says what the tokens of a model are",
        model=label,
        expected="tokenizer.json, vocab.json or vocab.txt",
    )


def _numbers(vocab: Mapping[str, int]) -> Mapping[str, int]:
    if not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise ValueError("an id that is no whole number")
    return vocab


def _guess(model: Mapping[str, Any]) -> str:
    """The kind of a model that does not name it, as in older files."""
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _added(documents: Documents, roles: Mapping[str, str]) -> list[tuple[AddedToken, int]]:
    """The added tokens with the ids that the files say, in the order in which they are loaded.

    Those that only tokenizer_config.json knows come after those of tokenizer.json.
    """
    config = _at(documents, "tokenizer_config.json", "added_tokens_decoder")
    further = [(_token(e), int(i)) for i, e in config.items()]
    further.sort(key=lambda found: found[1])
    if "tokenizer.json" in documents:
        listed = documents["tokenizer.json"].values.get("added_tokens") or []
        first = [(_token(e), int(e["id"])) for e in listed]
        known = {token.content for token, _ in first}
        return [*first, *((t, i) for t, i in further if t.content not in known)]
    if further or "added_tokens.json" not in documents:
        return further
    special = set(roles.values())
    entries = documents["added_tokens.json"].values.items()
    older = [
        (AddedToken(c, special=c in special, normalized=c not in special), int(i))
        for c, i in entries
    ]
    return sorted(older, key=lambda found: found[1])


def _at(documents: Documents, name: str, key: str) -> Mapping[str, Any]:
    """A mapping in a file; {} where it is not there."""
    return (documents[name].values.get(key) if name in documents else None) or {}


def _token(entry: Mapping[str, Any]) -> AddedToken:
    special = bool(entry.get("special", False))
    normalized = bool(entry.get("normalized", not special))
    flags = {k: bool(entry.get(k, False)) for k in ("lstrip", "rstrip", "single_word")}
    return AddedToken(entry["content"], special=special, normalized=normalized, **flags)


def _roles(documents: Iterable[Document]) -> dict[str, str]:
    """bos_token and the like; of several files the first that names one counts."""
    roles: dict[str, str] = {}
    for document in documents:
        for key, value in document.values.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                roles.setdefault(key, content)
    return roles
