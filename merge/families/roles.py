"""What a tensor is in its network, from its name and shape: attention, mlp, norm, head and so on.

Names of all families are made of the same words. The last module of a path says most: a norm
within attention is a norm. Only words that stand between dots (or underscores) count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from merge.families.layers import place_of

__all__ = ["Part", "Role", "parts_of", "role_of", "stated_part"]

Role = Literal[
    "attention", "mlp", "norm", "embedding", "position", "head", "expert", "router", "convolution",
    "other",
]  # fmt: skip
Part = Literal["text", "vision", "audio", "projector", "encoder", "decoder", "model"]
"""A sub-model; ``model`` is what is in none of them, in a model of one part all of it."""


_EXPERT = re.compile(r"(^|\.)(\w*experts?|expert_\d+)(\.|$)")
_ROUTER = re.compile(
    r"(^|\.)(router|shared_expert_gate|((mlp|moe|ffn|feed_forward|block_sparse_moe|mixer)\.gate))"
    r"(\.|$)|e_score_correction_bias$"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|\w*_lm_head|\w*_head|head|heads|head_dist|classifier|\w*_classifier|cls|score|"
    r"qa_outputs|fc|fc_out|embed_out|proj_out|output|output_layer|final_logits_bias|"
    r"vocab_(transform|layer_norm|projector)|\w+_predictions|sequence_summary|logits_proj|lm_loss|"
    r"pred_layer|seq_relationship|mc_head|summary|start_logits|end_logits|answer_class|"
    r"decoder(?=\.(weight|bias)$))(\.|$)"
)
_INNER_HEAD = re.compile(r"(^|\.)shared_head\.head\.")
_NORM = re.compile(
    r"(^|[._])(\w*norm\w*|ln|ln_\w+|\w+_ln|layrnorm|\w*layrnorm|bn\d*|ln\d+)$", re.IGNORECASE
)
_POSITION = re.compile(
    r"(^|[._])(wpe|pos(ition(al|s)?)?_?(embed\w*|emb|ids|bias\w*|conv\w*)|embed_positions?|"
    r"positions_embed|rel_pos\w*|relative_(attention|position)\w*|rel_attn_embed|rel_embeddings|"
    r"rotary\w*|inv_freq|pos_emb\w*)(\.|$)"
)
_EMBEDDING = re.compile(
    r"(^|[._])(\w*embeddings?|embed\w*|emb|wte|shared|token_emb\w*|tok_\w+|tokens_embed|word_embed\w*|"
    r"(cls|class|mask|distillation|register)_(token|embedding|embed)s?|embed_in)(\.|$)"
)
_ATTENTION = re.compile(
    r"(^|[._])(\w*attn\w*|\w*attention\w*|c_attn|qkv\w*|[qkvo]_proj|[qkvo]_lin|query\w*|key|value|"
    r"out_lin|wqkv|w[qkvo]|query_key_value|SelfAttention|EncDecAttention|in_proj_(weight|bias))(\.|$)"
)
_MLP = re.compile(
    r"(^|[._])(mlp\w*|ffn?|feed_forward|\w*ff|fc_?[12i]|fc_in|fc_out|lin[12]|intermediate|output|"
    r"DenseReluDense|wi(_[01])?|wo|c_fc|dense_(h_to_4h|4h_to_h)|(gate|up|down)_proj|gate_up_proj|"
    r"w[123])(\.|$)"
)
_CONVOLUTION = re.compile(r"(^|[._])conv\d*(1d|2d|3d)?(_\w+)?$")

_SMALL_KERNEL = 32  # an axis of a kernel is shorter, and no stack of matrices has a shorter side


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    """The role of a tensor. A head is what stands outside the layers and ends a task.

    >>> role_of("model.layers.3.mlp.up_proj.weight", (48, 32))
    'mlp'
    >>> role_of("bert.encoder.layer.0.attention.output.LayerNorm.weight", (32,))
    'norm'
    >>> role_of("cls.predictions.transform.LayerNorm.weight", (32,))
    'head'
    """
    name = name.replace("/", ".")
    place = place_of(name)
    module = name.rpartition(".")[0] or name
    if place is None and _HEAD.match(_top(name)):
        return "head"
    if _INNER_HEAD.search(name):
        return "head"
    if _ROUTER.search(name):
        return "router"
    if _EXPERT.search(module):
        return "expert"
    if _POSITION.search(name):
        return "position"
    if _NORM.search(module) or name.endswith(("running_mean", "running_var")):
        return "norm"
    kernel = len(shape) > 2 and min(shape[2:]) < _SMALL_KERNEL and name.endswith("weight")
    if kernel or _CONVOLUTION.search(module):
        return "convolution"
    inner = name if place is None else place[2].lstrip(".")
    if _ATTENTION.search(inner):
        return "attention"
    if place is not None and _MLP.search(inner):
        return "mlp"
    return "embedding" if _EMBEDDING.search(name) else "other"


_TRUNK = re.compile(
    r"^((model|transformer|base_model|module|net|language_model|text_model|llm|thinker|"
    r"decoder(?!\.(weight|bias)$))\.)+"
)


def _top(name: str) -> str:
    """The name without words for the whole model or its text, which may stand before a head's."""
    return _TRUNK.sub("", name)


_PROJECTOR = re.compile(
    r"(^|\.)(multi_modal_projector|mm_projector|connector|\w*merger|\w*merger_list|projector|aligner|"
    r"modality_projection|(visual|text|audio|language)_projection|embed_(vision|audio)|resampler|"
    r"(vision|audio)_embed_tokens|perceiver_resampler|image_newline)(\.|$)"
)
_VISION = re.compile(
    r"(^|\.)(vision\w*|visual\w*|image_(encoder|model|tower|backbone)|vit|vpm|pixel_values)\."
)
_AUDIO = re.compile(r"(^|\.)(audio\w*|speech\w*|apm|sound_\w+)\.")
_TEXT = re.compile(r"(^|\.)(text\w*|language_\w+|llm|thinker\.model)\.")
_CODER = re.compile(r"^(model\.)?(encoder|decoder)\.(?!(weight|bias)$)")


def parts_of(names: Iterable[str]) -> dict[str, Part]:
    """For each tensor the sub-model that it is of, by the words of its name.

    Encoder and decoder are parts where a model has both. What has no such word is text beside
    other text, and where it has layers beside a part that sees or hears.

    >>> parts_of(["visual.blocks.0.w", "visual.merger.w", "model.layers.0.w"]).values()
    dict_values(['vision', 'projector', 'text'])
    >>> parts_of(["bert.encoder.layer.0.w", "cls.bias"]).values()
    dict_values(['model', 'model'])
    """
    found: dict[str, Part | None] = {name: stated_part(name) for name in names}
    stacked = any(found.values()) and any(p is None and place_of(n) for n, p in found.items())
    rest: Part = "text" if stacked or "text" in found.values() else "model"
    coders = {m[2] for n, p in found.items() if p is None and (m := _CODER.search(n))}
    both = len(coders) == 2
    return {
        n: p or (m[2] if both and (m := _CODER.search(n)) else rest)  # type: ignore[misc]
        for n, p in found.items()
    }


def stated_part(name: str) -> Part | None:
    """The sub-model that the name itself speaks of, None where it does not; the last word counts.

    >>> stated_part("model.vision_tower.embeddings.class_embedding"), stated_part("lm_head.weight")
    ('vision', None)
    """
    name = name.replace("/", ".")
    if _PROJECTOR.search(name):
        return "projector"
    senses: tuple[tuple[re.Pattern[str], Part], ...] = (
        (_VISION, "vision"), (_AUDIO, "audio"), (_TEXT, "text"),
    )  # fmt: skip
    ends: list[tuple[int, Part]] = [(m.end(), p) for w, p in senses if (m := w.search(name))]
    return max(ends)[1] if ends else None
