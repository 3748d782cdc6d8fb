"""Which axis of which tensor counts tokens: embeddings, language-model heads and their biases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from merge.families.layers import place_of
from merge.families.roles import role_of, stated_part
from merge.ir.checkpoint import Checkpoint

__all__ = [
    "input_embedding",
    "lookup_tables",
    "text_configs",
    "vocabulary_rows",
    "vocabulary_tensors",
]

_INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings?|shared|tok_embeddings|token_embeddings?|embed_in|"
    r"tokens_embed|embeddings(?=\.weight$)|embedding(?=\.weight$)|emb(?=\.weight$)|"
    r"w(?=\.weight$))(\.|$)"
)
"""Names of the matrix that turns tokens into vectors."""

_IN_A_LAYER = re.compile(r"\.(embed_tokens|shared_head\.head|lm_head)\.")
"""Layers that predict further tokens keep a copy of embeddings and head."""

_INNER = re.compile(r"(^|\.)(dense|transform|norm|\w*_norm|layernorm|LayerNorm)\.")
"""What a head works on features with, before it counts tokens."""

_NO_TOKENS = re.compile(
    r"(^|[._])(token_type\w*|segment\w*|type_embeddings?|classifier|score|qa_outputs|"
    r"seq_relationship|mc_head|summary|pooler)([._]|$)"
)
_OTHER_SENSES = ("vision", "audio", "projector")
_TEXT_CONFIGS = (
    "text_config", "language_config", "llm_config", "llm", "text_encoder", "thinker_config",
    "decoder", "encoder",
)  # fmt: skip


def vocabulary_tensors(checkpoint: Checkpoint) -> dict[str, int]:
    """The axis that counts tokens, for each tensor that has one, in the checkpoint's order.

    Embeddings and heads have a row a token (axis 0), ``final_logits_bias`` a column (axis 1).
    """
    rows = vocabulary_rows(checkpoint)
    found: dict[str, int] = {}
    if not rows:
        return found
    for name, expr in checkpoint.tensors.items():
        shape = expr.shape
        axis = next((i for i, size in enumerate(shape) if size in rows), None)
        if axis is None or len(shape) > 2 or stated_part(name) in _OTHER_SENSES:
            continue
        if place_of(name) is None:
            counts = _counts_tokens(name, shape)
        else:
            counts = _IN_A_LAYER.search(name) is not None
        if counts:
            found[name] = axis
    return found


def lookup_tables(checkpoints: Iterable[Checkpoint]) -> frozenset[str]:
    """Tensors that map no features to features: those of a vocabulary, and other embeddings.

    Empty where no checkpoint has a vocabulary that is recognised.
    """
    found = {n for c in checkpoints for n in vocabulary_tensors(c)}
    every = {n: e.shape for c in checkpoints for n, e in c.tensors.items() if found}
    return frozenset(found | {n for n, shape in every.items() if role_of(n, shape) == "embedding"})


def vocabulary_rows(checkpoint: Checkpoint) -> frozenset[int]:
    """How many rows the vocabulary has, as config.json says, else as the input embedding has.

    Several numbers where config.json names several, as with a stale one at its top; none for a
    model that reads no tokens.
    """
    embedded = [e.shape[0] for n, e in checkpoint.tensors.items() if input_embedding(n, e.shape)]
    said = [c.get("vocab_size") for c in text_configs(checkpoint.side.config)]
    known = frozenset(v for v in said if type(v) is int and v > 0)
    sizes = {s for e in checkpoint.tensors.values() for s in e.shape}
    if known & sizes and (not embedded or known & set(embedded)):
        return known
    return frozenset(embedded[:1])


def input_embedding(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor turns tokens into vectors, by its name.

    >>> input_embedding("transformer.wte.weight", (40, 16))
    True
    >>> input_embedding("bert.embeddings.position_embeddings.weight", (32, 16))
    False
    """
    if len(shape) != 2 or place_of(name) is not None or _NO_TOKENS.search(name):
        return False
    return _INPUT.search(name) is not None and role_of(name, shape) == "embedding"


def text_configs(config: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """The config itself, and those in it that describe the part which reads and writes text."""
    yield config
    for key in _TEXT_CONFIGS:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            yield from text_configs(inner)


def _counts_tokens(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor outside the layers with an axis as long as the vocabulary is of it."""
    if _NO_TOKENS.search(name) or _INNER.search(name):
        return False
    role = role_of(name, shape)
    if role == "embedding":
        return len(shape) == 2
    return role == "head" or (role == "other" and len(shape) == 2)
