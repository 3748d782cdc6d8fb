"""config.json and generation_config.json in a new vocabulary: its size, and the ids of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from merge.vocabulary.tokens import Vocabulary

__all__ = ["follow", "resize"]

_SIZES = ("vocab_size", "padded_vocab_size", "n_words")
_IDS = re.compile(r"(_token_ids?|_token_index|^bad_words_ids|suppress_tokens)$")
"""Keys whose numbers, or lists of numbers, are ids of tokens."""

_PAIRS = "forced_decoder_ids"
"""A list of pairs of position and id."""

Change = Callable[[str, int], int]
"""From a key and an id under it to the new id."""


def resize(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """``config`` with ``new`` rows of embeddings in place of ``old``, also in its sub-models.

    Where nothing says ``old``, the size that there is changes: of the whole, or of the text model.

    >>> resize({"text_config": {"vocab_size": 9}, "vision_config": {"vocab_size": 4}}, 9, 12)
    {'text_config': {'vocab_size': 12}, 'vision_config': {'vocab_size': 4}}
    """
    if old == new:
        return dict(config)
    changed = _resized(config, old, new)
    if changed == config:
        text = config.get("text_config")
        if any(k in config for k in _SIZES):
            return {**config, **{k: new for k in _SIZES if k in config}}
        if isinstance(text, Mapping):
            return {**config, "text_config": {**text, "vocab_size": new}}
    return changed


def _resized(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    out = dict(config)
    for key, value in config.items():
        if isinstance(value, Mapping):
            out[key] = _resized(value, old, new)
        elif key in _SIZES and value == old:
            out[key] = new
    return out


def follow(
    config: Mapping[str, Any], old: Vocabulary, ids: Mapping[str, int], roles: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """``config`` with the ids that its tokens, those of ``old``, have in ``ids``; and what is left.

    A token that is gone gives way to the one with the same role (``eos_token`` for
    ``eos_token_id``); without one the id stays and is listed, with its key, as what is left.

    >>> old = Vocabulary("m", "BPE", {"</s>": 2, "<pad>": 3}, 4, {}, {}, {})
    >>> follow({"eos_token_id": [2, 3]}, old, {"</s>": 7, "<pad>": 3}, {})
    ({'eos_token_id': [7, 3]}, [])
    """
    found = set(_ids(config))
    texts = {i: token for token, i in old.ids.items() if i in found}
    left: dict[str, None] = {}

    def change(key: str, number: int) -> int:
        token = texts.get(number)
        if token is None:  # padding, or a mark such as -1
            return number
        token = token if token in ids else roles.get(key.removesuffix("_id"), "")
        if token not in ids:
            left[f"{key} {number} ({texts[number]!r})"] = None
            return number
        return ids[token]

    return _followed(config, change), list(left)


def _ids(value: object, key: str = "") -> Iterator[int]:
    """Every id of a token below ``value``."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _ids(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _ids(inner, key)
    elif type(value) is int and (_IDS.search(key) or key == _PAIRS):
        yield value


def _followed(config: Mapping[str, Any], change: Change) -> dict[str, Any]:
    out = dict(config)
    for key, value in config.items():
        if isinstance(value, Mapping):
            out[key] = _followed(value, change)
        elif key == _PAIRS and isinstance(value, list):
            out[key] = [_pair(entry, change) for entry in value]
        elif _IDS.search(key):
            out[key] = _changed(key, value, change)
    return out


def _pair(entry: Any, change: Change) -> Any:
    """A pair of position and id; anything else as it is."""
    if isinstance(entry, list) and len(entry) == 2:
        return [entry[0], _changed(_PAIRS, entry[1], change)]
    return entry


def _changed(key: str, value: Any, change: Change) -> Any:
    """One id, or a list of them."""
    if isinstance(value, list):
        return [_changed(key, v, change) for v in value]
    return change(key, value) if type(value) is int else value
