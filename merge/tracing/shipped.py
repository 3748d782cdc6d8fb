"""The families that have a template: their classes, switches, and what old files call things.

A spec that was derived with biases holds without them, since a bias only takes freedom away: so
they are on. The same goes for a layer that is dense among sparse ones, and for grouped queries of
which there may be one for each head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from merge.tracing.build import Family, Switch

__all__ = ["FAMILIES"]

GROUPED = {"num_attention_heads": 32, "num_key_value_heads": 8}
TIED = Switch(
    "tie_word_embeddings",
    ((False, {"tie_word_embeddings": False}), (True, {"tie_word_embeddings": True})),
)


def _relu(key: str) -> Switch:
    """Only ReLU lets scales pass; all other activations are as GELU is."""
    return Switch(key, (("relu", {key: "relu"}), (None, {key: "gelu"})))


def _decoder(model: str, name: str, **config: Any) -> Family:
    """A language model with grouped queries."""
    heads = (f"{name}ForCausalLM", f"{name}ForSequenceClassification")
    tables = {"[model.]layers.{i}.self_attn.rotary_emb.inv_freq": 1}
    body = (f"{name}Model",)
    return Family(model, heads, body, {**GROUPED, **config}, (TIED,), extra=tables)


def _encoder(model: str, name: str, *more: str, prefix: str = "") -> Family:
    """A masked language model with the usual heads."""
    kinds = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
    heads = (*(f"{name}For{kind}" for kind in kinds), *more)
    extra = {f"[{prefix or model}.]embeddings.position_ids": 2}
    return Family(model, heads, (f"{name}Model",), {}, (TIED,), extra=extra)


def _vision(model: str, name: str, *more: str) -> Family:
    heads = (f"{name}ForImageClassification", *more)
    return Family(model, heads, (f"{name}Model",))


def _stages(model: str, name: str, small: Any, large: Any, *switches: Switch) -> Family:
    """A network of four stages of three layers; the shapes tell most of its sizes.

    The last stage is what the head reads, so a network of another number of stages is another.
    """
    depths = {"depths": [3, 3, 3, 3], "image_size": 32}
    twins = ({**depths, **small}, {**depths, **large})
    return replace(
        _vision(model, name),
        twins=twins,
        switches=switches,
        only={"depths[4]": (None,)},
        never={"depths[3]": (None,)},
    )


def _straight(family: Family) -> Family:
    """Only networks whose first stage begins with a projection: without, it adds to what it got."""
    return replace(family, never={**family.never, "hidden_sizes[0] - embedding_size": (0,)})


_BERT = _encoder("bert", "Bert", "BertForPreTraining", "BertForNextSentencePrediction")
_LAYERS = (
    Switch("layer_type", (("basic", {"layer_type": "basic"}),
                          ("bottleneck", {"layer_type": "bottleneck"}))),
    Switch("downsample_in_first_stage", ((False, {"downsample_in_first_stage": False}),
                                         (True, {"downsample_in_first_stage": True}))),
)  # fmt: skip
_PROJECTED = Switch(
    "word_embed_proj_dim - hidden_size", ((0, {}), (None, {"word_embed_proj_dim": 20}))
)
_NORM_FIRST = Switch(
    "do_layer_norm_before",
    ((True, {"do_layer_norm_before": True}), (False, {"do_layer_norm_before": False})),
)
_ROTARY = Switch(
    "rope_parameters.partial_rotary_factor or rotary_pct",
    tuple(
        (value, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                     "partial_rotary_factor": value or 0.25}})
        for value in (1.0, None)
    ),
)  # fmt: skip
_GATED = Switch(
    "feed_forward_proj",
    tuple((kind, {"feed_forward_proj": kind}) for kind in ("relu", "gated-gelu", "gated-silu")),
)

FAMILIES = {
    family.model: family
    for family in (
        _decoder("llama", "Llama", attention_bias=True, mlp_bias=True),
        _decoder("mistral", "Mistral"),
        _decoder("qwen2", "Qwen2"),
        _decoder("qwen3", "Qwen3", attention_bias=True),
        _decoder("gemma", "Gemma", attention_bias=True),
        _decoder("gemma2", "Gemma2", attention_bias=True),
        Family("gemma3_text", ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
               ("Gemma3TextModel",), {**GROUPED, "attention_bias": True}, (TIED,)),
        Family("gemma3", ("Gemma3ForConditionalGeneration",), ("Gemma3Model",),
               {"text_config": {**GROUPED, "attention_bias": True}}, (TIED,)),
        _decoder("phi3", "Phi3"),
        _decoder("mixtral", "Mixtral"),
        _decoder("qwen3_moe", "Qwen3Moe", mlp_only_layers=[1], attention_bias=True),
        Family("gpt2", ("GPT2LMHeadModel", "GPT2ForSequenceClassification"), ("GPT2Model",), {},
               (TIED, _relu("activation_function")),
               extra={"[transformer.]h.{i}.attn.bias": 4,
                      "[transformer.]h.{i}.attn.masked_bias": 0}),
        Family("gpt_neox", ("GPTNeoXForCausalLM",), ("GPTNeoXModel",), {}, (TIED, _ROTARY),
               extra={"[gpt_neox.]layers.{i}.attention.bias": 4,
                      "[gpt_neox.]layers.{i}.attention.masked_bias": 0,
                      "[gpt_neox.]layers.{i}.attention.rotary_emb.inv_freq": 1}),
        Family("opt", ("OPTForCausalLM", "OPTForSequenceClassification"), ("OPTModel",), {},
               (TIED, _NORM_FIRST, _PROJECTED, _relu("activation_function"))),
        replace(_BERT, old=(("LayerNorm.weight", "LayerNorm.gamma"),
                            ("LayerNorm.bias", "LayerNorm.beta"))),
        _encoder("roberta", "Roberta"),
        _encoder("distilbert", "DistilBert"),
        _vision("vit", "ViT"),
        _vision("deit", "DeiT", "DeiTForImageClassificationWithTeacher"),
        Family("clip", ("CLIPModel",), extra={"text_model.embeddings.position_ids": 2,
                                              "vision_model.embeddings.position_ids": 2}),
        Family("clip_text_model", ("CLIPTextModelWithProjection",), ("CLIPTextModel",),
               extra={"text_model.embeddings.position_ids": 2}),
        Family("clip_vision_model", ("CLIPVisionModelWithProjection",), ("CLIPVisionModel",),
               extra={"vision_model.embeddings.position_ids": 2}),
        Family("t5", ("T5ForConditionalGeneration",), ("T5Model",), {}, (TIED, _GATED)),
        Family("whisper", ("WhisperForConditionalGeneration",), ("WhisperModel",)),
        _straight(
            _stages("resnet", "ResNet", {"embedding_size": 6, "hidden_sizes": [8, 12, 16, 20]},
                    {"embedding_size": 8, "hidden_sizes": [12, 16, 20, 24]}, *_LAYERS)),
        _stages("convnext", "ConvNext",
                {"hidden_sizes": [6, 8, 10, 12]}, {"hidden_sizes": [8, 10, 12, 14]}),
        _stages("swin", "Swin",
                {"embed_dim": 8, "num_heads": [2, 4, 4, 8], "window_size": 2, "patch_size": 2},
                {"embed_dim": 12, "num_heads": [3, 6, 6, 12], "window_size": 2, "patch_size": 2}),
    )
}  # fmt: skip
"""By model type."""
