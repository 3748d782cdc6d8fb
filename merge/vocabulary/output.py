"""The tokenizer files of the result, as texts.

All stays as the ground's files have it but the lists of added tokens: tokenizer.json,
added_tokens_decoder in tokenizer_config.json, and added_tokens.json. Older files beside them
(vocab.json, tokenizer.model) hold the tokens of the tokenizer's model, which are the same as ever,
so they stay, with an added_tokens.json for their readers. Files that hold a whole tokenizer in a
form of their own would be stale, and go.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from json.encoder import encode_basestring as encode

from merge.ir.checkpoint import some
from merge.vocabulary.combine import Combined, Member
from merge.vocabulary.document import Document, parse_document
from merge.vocabulary.parse import PIECES
from merge.vocabulary.tokens import AddedToken, Vocabulary

__all__ = ["Files", "is_whole", "tokenizer_files"]


def is_whole(name: str) -> bool:
    """Whether a file holds a whole tokenizer in a form of its own, as those of other libraries."""
    return name in ("tekken.json", "tiktoken.model") or name.endswith(".tiktoken")


@dataclass(frozen=True, slots=True)
class Files:
    """The result's tokenizer files: those of member ``copied``, without ``gone``, and ``texts``.

    ``texts`` are written anew; there are none where a member's tokenizer is the result's as it is.
    """

    copied: int
    texts: Mapping[str, str]
    gone: tuple[str, ...]
    notes: tuple[str, ...]


def tokenizer_files(members: Sequence[Member], combined: Combined, names: Collection[str]) -> Files:
    """The files for ``combined``. names: all files beside the ground's weights."""
    ground = members[combined.ground].vocabulary
    if not combined.new and combined.added == ground.added:
        return Files(combined.ground, {}, (), ())
    for number, member in enumerate(members):
        if _equals(member.vocabulary, ground, combined):
            return Files(number, {}, (), ())
    texts: dict[str, str] = {}
    kept = [n for n in PIECES if n in names]
    order = sorted(combined.added, key=combined.ids.__getitem__)
    if ground.document is not None:
        listed = _array(combined, order)
        texts["tokenizer.json"] = ground.document.replaced({"added_tokens": listed})
    config = parse_document(ground.texts.get("tokenizer_config.json", "{}"))
    if ground.document is None or "added_tokens_decoder" in config.values:
        texts["tokenizer_config.json"] = _configured(config, ground, combined, order)
    if kept or "added_tokens.json" in names:
        beyond = {t: combined.ids[t] for t in order if combined.ids[t] >= ground.pieces}
        texts["added_tokens.json"] = json.dumps(beyond, indent=2, ensure_ascii=False) + "\n"
    gone = tuple(n for n in names if is_whole(n))
    notes = []
    if kept:
        notes.append(
            f"{some(kept)} of {ground.label} hold none of the new tokens: added_tokens.json does"
        )
    if gone:
        notes.append(
            f"{some(gone)} of {ground.label} would not know the new tokens, and are left out"
        )
    return Files(combined.ground, texts, gone, tuple(notes))


def _equals(vocabulary: Vocabulary, ground: Vocabulary, combined: Combined) -> bool:
    """Whether a member's tokenizer is what would be written."""
    return vocabulary.same_as(replace(ground, ids=combined.ids, added=combined.added))


def _configured(
    config: Document, ground: Vocabulary, combined: Combined, order: Sequence[str]
) -> str:
    """tokenizer_config.json with all added tokens.

    Beside tokens listed there, special_tokens_map.json is not read, so roles come along.
    """
    changes = {r: encode(t) for r, t in ground.roles.items() if r not in config.values}
    entries = [f'\n    "{combined.ids[t]}": {{{_fields(combined.added[t])}' for t in order]
    return config.replaced({**changes, "added_tokens_decoder": f"{{{','.join(entries)}\n  }}"})


def _array(combined: Combined, order: Sequence[str]) -> str:
    """The list of added tokens as tokenizer.json has it."""
    entries = [
        f'\n    {{\n      "id": {combined.ids[t]},{_fields(combined.added[t])}' for t in order
    ]
    return f"[{','.join(entries)}\n  ]"


def _fields(token: AddedToken) -> str:
    """A token's fields as JSON, to the closing brace. Written out, since thousands go through."""
    flags = (token.single_word, token.lstrip, token.rstrip, token.normalized, token.special)
    return f'\n      "content": {encode(token.content)},{_flags(*flags)}\n    }}'


@cache
def _flags(*values: bool) -> str:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    pairs = zip(names, values, strict=True)
    return ",".join(f'\n      "{name}": {str(value).lower()}' for name, value in pairs)
