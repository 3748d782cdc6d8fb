"""config.json after layers were put together anew: counts and per-layer lists follow.

A family is recognised by its config alone: the mapping (the whole, or a sub-model such as
``text_config``) that counts exactly the layers of the stack under one of the customary keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    r"(_ids?|_tokens?|_scaling|_channels|_strides?|_kernels?|_mean|_std|_inference|^hidden_sizes|"
    r"(image|patch|window|crop|grid|pool|tile)_sizes?|^conv_\w+|^architectures|^depths|"
    r"^stage_names|^out_(features|indices))$"
)
_EVERY = re.compile(r"(_step|_freq|_frequency|_interval|_pattern|_period|_n_layers)$")
"""Of keys that say that every so manyth layer is special: 1 says that all are alike."""

_MEANS = {
    "language": "text", "llm": "text", "lm": "text", "visual": "vision", "image": "vision",
    "vit": "vision", "speech": "audio", "sound": "audio",
}  # fmt: skip
_SENSES = {"text", "vision", "audio"}


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
    if config.get("is_encoder_decoder") and type(config.get("num_layers")) is int:
        config = {"num_decoder_layers": config["num_layers"], **config}  # as T5 takes it
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
    """Where the layers of the stack are counted, and under which keys.

    Of several sub-models of equal depth it is the one that the stack's name speaks of. One that
    leaves out the count, since it is the default of its class, gets it under the usual key. In an
    unknown family the count is the only number of the right size whose key speaks of layers.
    """
    found: list[tuple[int, tuple[str, ...], list[str]]] = []
    telling: list[tuple[int, tuple[str, ...], list[str]]] = []
    silent: list[tuple[int, tuple[str, ...], list[str]]] = []
    for path, inner in _sub_models(config):
        likeness = _likeness(path, stack)
        if likeness is None:
            continue
        if keys := _count_keys(inner, stack, count):
            found.append((likeness, path, keys))
        elif len(keys := _telling_keys(inner, stack, count)) == 1:
            telling.append((likeness, path, keys))
        elif likeness and "model_type" in inner and not any(k in inner for k in _COUNTS):
            silent.append((likeness, path, ["num_hidden_layers"]))
    best = max(found or telling or silent, key=lambda f: (f[0], -len(f[1])), default=None)
    return None if best is None else best[1:]


def _sub_models(
    config: Mapping[str, object], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, object]]]:
    """The config and the mappings in it, such as ``text_config``, each with its path."""
    yield path, config
    for name, value in config.items():
        if isinstance(value, Mapping) and len(path) < 3:
            yield from _sub_models(value, (*path, name))


def _count_keys(config: Mapping[str, object], stack: str, count: int) -> list[str]:
    keys = [k for k in _COUNTS if config.get(k) == count and type(config[k]) is int]
    coder = next((c for c in ("decoder", "encoder") if c in stack.split(".")), None)
    other = {"decoder": "encoder", "encoder": "decoder"}.get(coder or "", "")
    if coder and any(other in k or coder in k for k in config if k in _COUNTS):
        own = [k for k in keys if coder in k]
        plain = [k for k in keys if coder not in k and other not in k]
        return plain if not own else own + [k for k in plain if coder == "encoder"]
    return keys


def _telling_keys(config: Mapping[str, object], stack: str, count: int) -> list[str]:
    """Keys that may count the layers, by a word for layers or the stack's own: ``num_decks``."""
    if any(k in config for k in _COUNTS):
        return []
    own = {stack.rpartition(".")[2], "layer", "block", "depth"}
    words = own | {f"{w}s" for w in own} | {w.removesuffix("s") for w in own}
    fits = [k for k, value in config.items() if type(value) is int and value == count]
    return [k for k in fits if k not in _SCHEDULES and words & {*k.split("_")}]


def _likeness(path: tuple[str, ...], stack: str) -> int | None:
    """How many words the path and the stack share; None where they are of different senses."""
    ours = _words(part for name in path for part in re.split(r"[._]", name))
    theirs = _words(re.split(r"[._]", stack))
    sense = ours & _SENSES
    other = bool(sense) and not sense & (theirs & _SENSES or {"text"})
    return None if other else len(ours & theirs)


def _words(parts: Iterable[str]) -> set[str]:
    return {_MEANS.get(p, p) for p in parts} - {"config", "model"}


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
        elif key == "hybrid_override_pattern" and isinstance(value, str):  # a letter a layer
            letters = [str(c.get(key, value))[old : old + 1] for c, old in layers]
            out[key] = "".join(letters)
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
    out.update({key: len(layers) for key in counts})
    return out, [k for k in unsure if not _settled(k, config)]


_MADE_BY = {
    "sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "max_window_layers": "layer_types",
    "first_k_dense_replace": "mlp_layer_types",
    "interleave_moe_layer_step": "moe_layers",
}
"""Rules that only make a list which, once it stands there, goes before them."""


def _settled(key: str, config: Mapping[str, object]) -> bool:
    """Whether a rule says nothing that the new order of layers could break."""
    if key == "max_window_layers" and not config.get("use_sliding_window", True):
        return True
    every = config[key] == 1 and _EVERY.search(key) is not None
    return every or isinstance(config.get(_MADE_BY.get(key, "")), list)


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
