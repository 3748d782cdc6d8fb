"""Which layer a tensor belongs to, from its name alone.

The first run of digits between dots numbers the layer; what stands before it names the stack:
``model.layers.3.mlp.up_proj.weight`` is layer 3 of stack ``model.layers``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Layers", "comes_first", "depth", "of_stack", "place_of"]

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_FIRST = re.compile(
    r"(^|[._])(emb|embed|embeds|embedding|embeddings|embed_\w+|\w+_embed|\w+_embedding|"
    r"\w+_embeddings|wte|wpe|word_embeddings_layernorm|tok_\w+|shared|patchify|conv_stem|stem)"
    r"([._]|$)"
)

_OF_STACK = re.compile(r"\.(relative_attention_bias|rel_attn_embed)\.")


@dataclass(frozen=True, slots=True)
class Layers:
    """The stacks of a checkpoint: stack name to number of layers."""

    stacks: Mapping[str, int]

    @classmethod
    def of(cls, names: Iterable[str]) -> Layers:
        """Infer the stacks from tensor names.

        >>> Layers.of(["emb", "h.0.w", "h.1.w"]).stacks
        {'h': 2}
        """
        stacks: dict[str, int] = {}
        for name in names:
            if (found := place_of(name)) is not None:
                stacks[found[0]] = max(stacks.get(found[0], 0), found[1] + 1)
        return cls(stacks)

    def position(self, name: str) -> float:
        """Depth of a tensor in its stack, in [0, 1]: where a gradient is read.

        What is in no layer (embeddings, final norm, head) is at 0: that is what published recipes
        were made with.
        """
        found = place_of(name)
        return 0.0 if found is None else depth(found[1], self.stacks.get(found[0], found[1] + 1))


def depth(index: int, count: int) -> float:
    """Layer ``index`` of ``count`` is at index / (count - 1), the layer of a one-layer stack at 1.

    >>> depth(0, 3), depth(1, 3), depth(0, 1)
    (0.0, 0.5, 1.0)
    """
    return index / (count - 1) if count > 1 else 1.0


@lru_cache(maxsize=1 << 17)  # slices ask for every name again and again
def place_of(name: str) -> tuple[str, int, str] | None:
    """Stack, layer, and the rest of a tensor's name; None for what is in no layer.

    >>> place_of("model.layers.3.mlp.up_proj.weight")
    ('model.layers', 3, '.mlp.up_proj.weight')
    """
    match = _NUMBER.search(name)
    if match is None:
        return None
    return name[: match.start()], int(match[1]), name[match.end(1) :]


def of_stack(names: Iterable[str], stack: str) -> frozenset[str]:
    """Tensors that the first layer keeps for all, as T5 its position bias; they stay the first's.

    >>> ends = ["relative_attention_bias.weight", "q.weight"]
    >>> of_stack([f"h.0.{ends[0]}", f"h.0.{ends[1]}", f"h.1.{ends[1]}"], "h")
    frozenset({'h.0.relative_attention_bias.weight'})
    >>> of_stack([f"h.{i}.{end}" for i in (0, 1) for end in ends], "h")
    frozenset()
    """
    places = {n: at for n in names if _OF_STACK.search(n) and (at := place_of(n)) is not None}
    own = {at[2] for at in places.values() if at[0] == stack and at[1] > 0}
    return frozenset(n for n, at in places.items() if at[:2] == (stack, 0) and at[2] not in own)


def comes_first(name: str) -> bool:
    """Whether a tensor that is in no layer is used before the layers, as embeddings are.

    >>> comes_first("model.embed_tokens.weight"), comes_first("transformer.wpe.weight")
    (True, True)
    >>> comes_first("model.norm.weight"), comes_first("lm_head.weight")
    (False, False)
    """
    return _FIRST.search(name) is not None
