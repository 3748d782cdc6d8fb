"""config.json after layers were put together anew: counts and per-layer lists follow.

A family is recognised by its config alone: the mapping (the whole, or a sub-model such as
``text_config``) that counts exactly the layers of the stack under one of the customary keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Origin", "Relayered", "relayer"]

_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers",
    "decoder_layers", "encoder_layers", "num_encoder_layers", "depth",
)  # fmt: skip
_INDICES = (
    "mlp_only_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs",
    "moe_layers", "dense_layers", "global_attn_layers", "attention_layer_indices",
    "full_attention_layers", "skip_layers",
)  # fmt: skip
"""Lists of layer numbers."""

_SCHEDULES = (
    "first_k_dense_replace", "max_window_layers", "decoder_sparse_step", "full_attention_interval",
    "sliding_window_pattern", "interleave_moe_layer_step", "num_kv_shared_layers",
    "attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset",
    "moe_layer_frequency", "num_nextn_predict_layers", "layer_freq", "attn_every_n_layers",
    "encoder_sparse_step", "num_sparse_decoder_layers", "global_attn_every_n_layers",
)  # fmt: skip
"""Numbers that say which layers are special; they cannot describe every order of layers."""

_NOT_PER_LAYER = re.compile(
    r"(_ids?|architectures|_scaling|_sizes?|depths|hidden_sizes|idx2label)$"
)


@dataclass(frozen=True, slots=True)
class Relayered:
    """The new config; ``counted``: whether a count of layers was found; keys left to the user."""

    config: dict[str, object]
    counted: bool
    unsure: tuple[str, ...]


Origin = tuple[Mapping[str, object], int]
"""The config of the model that a layer was taken from, and its number there."""


def relayer(
    config: Mapping[str, object], stack: str, count: int, layers: Sequence[Origin]
) -> Relayered:
    """``config`` for a model whose stack of ``count`` layers was replaced by ``layers``.

    >>> config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}
    >>> relayer(config, "h", 3, [(config, i) for i in (0, 2, 2, 1)]).config
    {'num_hidden_layers': 4, 'layer_types': ['a', 'c', 'c', 'b']}
    """
    where = _counting(config, stack, count)
    if where is None:
        return Relayered(dict(config), False, ())
    path, keys = where
    inner = [(_at(origin, path), number) for origin, number in layers]
    new, unsure = _changed(_at(config, path), keys, count, inner)
    return Relayered(_put(config, path, new), True, tuple(unsure))


def _counting(
    config: Mapping[str, object], stack: str, count: int
) -> tuple[tuple[str, ...], list[str]] | None:
    """Where the layers of the stack are counted, and under which keys."""
    found: list[tuple[tuple[str, ...], list[str]]] = []
    if keys := _count_keys(config, stack, count):
        found.append(((), keys))
    for name, value in config.items():
        if isinstance(value, Mapping) and (keys := _count_keys(value, stack, count)):
            found.append(((name,), keys))
    # several sub-models of equal depth: the one that the stack's name speaks of
    return max(found, key=lambda f: (_speaks_of(f[0], stack), -len(f[0])), default=None)


def _count_keys(config: Mapping[str, object], stack: str, count: int) -> list[str]:
    keys = [k for k in _COUNTS if config.get(k) == count and type(config[k]) is int]
    coder = next((c for c in ("decoder", "encoder") if c in stack.split(".")), None)
    other = {"decoder": "encoder", "encoder": "decoder"}.get(coder or "", "")
    if coder and any(other in k or coder in k for k in config if k in _COUNTS):
        own = [k for k in keys if coder in k]
        plain = [k for k in keys if coder not in k and other not in k]
        return plain if not own else own + [k for k in plain if coder == "encoder"]
    return keys


def _speaks_of(path: tuple[str, ...], stack: str) -> int:
    words = {w for part in path for w in re.split(r"[._]", part)} - {"config"}
    return len(words & set(re.split(r"[._]", stack)))


def _changed(
    config: Mapping[str, object], counts: Sequence[str], count: int, layers: Sequence[Origin]
) -> tuple[dict[str, object], list[str]]:
    numbers = [number for _, number in layers]
    in_place = numbers == list(range(len(numbers)))
    out: dict[str, object] = {}
    unsure: list[str] = []
    for key, value in config.items():
        if key in counts:
            out[key] = len(layers)
        elif key == "attention_types" and isinstance(value, list):
            out[key] = _attention_types(value, numbers)
        elif key in _INDICES and isinstance(value, list):
            out[key] = [new for new, (c, old) in enumerate(layers) if old in _list(c, key, value)]
        elif isinstance(value, list) and len(value) == count and not _NOT_PER_LAYER.search(key):
            chosen = [(_list(origin, key, value), old) for origin, old in layers]
            fits = all(old < len(entries) for entries, old in chosen)
            out[key] = [entries[old] for entries, old in chosen] if fits else value
            unsure += [] if fits else [key]
        else:
            out[key] = value
            if key in _SCHEDULES and value and not in_place:
                unsure.append(key)
    if isinstance(config.get("layer_types"), list):  # which goes before the rules that made it
        unsure = [k for k in unsure if k not in _MADE_TYPES]
    return out, unsure


_MADE_TYPES = ("sliding_window_pattern", "full_attention_interval")


def _list(config: Mapping[str, object], key: str, default: list[object]) -> list[object]:
    found = config.get(key)
    return found if isinstance(found, list) else default


def _attention_types(value: list[object], chosen: Sequence[int]) -> list[object]:
    """GPT-Neo's ``[[["global", "local"], 6]]``, repeated patterns, for the chosen layers."""
    kinds: list[object] = []
    for entry in value:
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list):
            kinds += entry[0] * int(entry[1])
    if not kinds or max(chosen) >= len(kinds):
        return value
    return [[[kinds[old]], 1] for old in chosen]


def _at(config: Mapping[str, object], path: tuple[str, ...]) -> Mapping[str, object]:
    """The sub-model's config; {} where there is none."""
    for key in path:
        inner = config.get(key)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def _put(
    config: Mapping[str, object], path: tuple[str, ...], new: dict[str, object]
) -> dict[str, object]:
    return {**config, path[0]: _put(_at(config, path[:1]), path[1:], new)} if path else new
