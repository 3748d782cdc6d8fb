"""The tensors of an adapter by name: of which module, and which part of what is done to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Module", "Parts", "read_names"]

_PREFIX = re.compile(r"^(base_model\.model\.|base_model\.)")
_LORA = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(weight|bias))?$"
)
_TOKENS = re.compile(r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?$")
_TRAINING = re.compile(r"\.(lora_monteclora_sampler|original_module)\.|\.trainable_tokens_original")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?|token_adapter)(?=\.)")
_DEPTH = re.compile(r"\.base_layer(?=(?:\.base_layer)*$)")
_SHARED = re.compile(r"base_model\.(?!model\.)")


@dataclass(slots=True)
class Module:
    """The tensors by which LoRA changes one module, by their names in the adapter.

    depth: how many other changes of the same module lie around this one: stacks of experts that are
    changed one by one share a path.
    """

    path: str
    depth: int = 0
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Parts:
    """What the tensors of an adapter are. All values are names in the adapter.

    modules: changed by LoRA, or by another kind. tokens: rows to put in the place of others, by
    module. full: tensors that take the place of the model's, by its name. shared: tensors that all
    modules use. idle: what is kept for training only.
    """

    modules: list[Module] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    full: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)


def read_names(names: Iterable[str], prefix: str | None = None) -> Parts:
    """The parts of an adapter, its modules in the order of first mention.

    prefix: how the tensors of another kind than plain LoRA begin, behind the module's path.

    >>> parts = read_names(["base_model.model.a.q.lora_A.weight", "base_model.model.head.weight"])
    >>> parts.modules[0].path, *parts.modules[0].tensors, *parts.full
    ('a.q', 'lora_A', 'head.weight')
    """
    parts = Parts()
    known: dict[tuple[str, int], Module] = {}

    def module(path: str, depth: int = 0) -> Module:
        if (path, depth) not in known:
            known[path, depth] = Module(path, depth)
            parts.modules.append(known[path, depth])
        return known[path, depth]

    for name in names:
        own = _PREFIX.sub("", name)
        if prefix is not None and (at := f".{own}".find(f".{prefix}")) > 0:
            module(own[: at - 1]).tensors[name] = name
        elif prefix is not None and name.startswith("base_model.") and _SHARED.match(name):
            parts.shared.append(name)
        elif _TRAINING.search(own):
            parts.idle.append(name)
        elif match := _LORA.search(own):
            path = own[: match.start()]
            depth = len(_DEPTH.findall(path))
            path = path.removesuffix(".base_layer" * depth)
            kind = match[1] if match[2] != "bias" else f"{match[1]}.bias"
            module(path, depth).tensors[kind] = name
        elif match := _TOKENS.search(own):
            parts.tokens[own[: match.start()]] = name
        elif (wanted := _WRAPPED.sub("", own)) in parts.full:  # the same, written down twice
            parts.idle.append(name)
        else:
            parts.full[wanted] = name
    return parts
