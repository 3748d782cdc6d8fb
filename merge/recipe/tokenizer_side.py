"""The side files of a merge with one vocabulary: tokenizer, config.json, generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge.ir.checkpoint import some
from merge.ir.json_text import not_an_object, not_sound, strict_json
from merge.ir.side import Side
from merge.recipe.shared_vocabulary import SharedVocabulary
from merge.recipe.tokenizer_files import is_of_tokenizer, names_of, path_of, text_of
from merge.vocabulary.ids import follow, resize
from merge.vocabulary.output import tokenizer_files

__all__ = ["with_vocabulary"]

_GENERATION = "generation_config.json"


def with_vocabulary(side: Side, shared: SharedVocabulary) -> tuple[Side, list[str]]:
    """The base's side files in the result's vocabulary, and notes on what was done to them."""
    base = shared.models[shared.base]
    ground = shared.models[shared.combined.ground]
    members = [m.member() for m in shared.models]
    files = tokenizer_files(members, shared.combined, names_of(ground.checkpoint.side))
    notes = list(files.notes)
    source = shared.models[files.copied]
    if source is not base:
        side = _with_tokenizer_of(side, source.checkpoint.side)
    side = side.without(files.gone).with_texts(files.texts)
    ids, roles = shared.combined.ids, source.vocabulary.roles
    moved = base.vocabulary is not ground.vocabulary

    def changed(config: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A config with the ids of its tokens."""
        if not moved:
            return dict(config)
        new, left = follow(config, base.vocabulary, ids, roles)
        if left:
            notes.append(
                f"{name} speaks of tokens that the vocabulary lacks, and keeps their ids:"
                f" {some(left)}; set them by hand"
            )
        return new

    config = changed(resize(side.config, base.rows, shared.rows), "config.json")
    if side.config and config != side.config:
        side = side.with_config(config)
    if _GENERATION in names_of(side):
        old = _json(side, _GENERATION)
        new = changed(old, _GENERATION)
        if new != old:
            side = side.with_texts({_GENERATION: json.dumps(new, indent=2) + "\n"})
    return side, notes


def _with_tokenizer_of(side: Side, other: Side) -> Side:
    """The side files with another model's tokenizer."""
    side = side.without([n for n in names_of(side) if is_of_tokenizer(n)])
    files = [f for f in other.files if is_of_tokenizer(f.name)]
    texts = {n: t for n, t in other.texts.items() if is_of_tokenizer(n)}
    joined = sorted([*side.files, *files], key=lambda f: f.name)
    return replace(side, files=tuple(joined)).with_texts(texts)


def _json(side: Side, name: str) -> dict[str, Any]:
    path = path_of(side, name)
    try:
        parsed = strict_json(text_of(side, name), infinite=True)
    except ValueError as error:
        raise not_sound(error, file=path) from None
    if not isinstance(parsed, dict):
        raise not_an_object(parsed, file=path)
    return parsed
