"""What tensors are: roles, sub-models, vocabulary axes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers

from merge.checkpoint.memory import open_state_dict
from merge.families.layers import place_of
from merge.families.roles import parts_of, role_of
from merge.families.vocabulary import vocabulary_rows, vocabulary_tensors
from merge.ir.checkpoint import Checkpoint
from merge.ir.side import Side

from .test_families import DECODERS, PARTS, Family

ROLES = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.0.self_attn.q_proj.weight": "attention",
    "model.layers.0.self_attn.q_norm.weight": "norm",
    "model.layers.0.mlp.gate_proj.weight": "mlp",
    "model.layers.0.input_layernorm.weight": "norm",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
    "language_model.lm_head.weight": "head",
    "thinker.model.lm_head.weight": "head",
    "decoder.lm_head.weight": "head",
    "decoder.weight": "head",
    "decoder.embed_tokens.weight": "embedding",
    "transformer.h.0.attn.c_attn.weight": "attention",
    "transformer.h.0.mlp.c_proj.bias": "mlp",
    "transformer.h.0.ln_1.weight": "norm",
    "transformer.wpe.weight": "position",
    "bert.embeddings.LayerNorm.weight": "norm",
    "bert.encoder.layer.0.attention.output.dense.weight": "attention",
    "bert.encoder.layer.0.attention.output.LayerNorm.weight": "norm",
    "bert.encoder.layer.0.intermediate.dense.weight": "mlp",
    "bert.encoder.layer.0.output.dense.weight": "mlp",
    "bert.embeddings.token_type_embeddings.weight": "embedding",
    "bert.pooler.dense.weight": "other",
    "cls.predictions.transform.LayerNorm.weight": "head",
    "cls.predictions.bias": "head",
    "classifier.out_proj.weight": "head",
    "score.weight": "head",
    "qa_outputs.bias": "head",
    "distilbert.transformer.layer.0.ffn.lin1.weight": "mlp",
    "distilbert.transformer.layer.0.attention.q_lin.weight": "attention",
    "distilbert.transformer.layer.0.sa_layer_norm.weight": "norm",
    "model.layers.0.mlp.experts.3.up_proj.weight": "expert",
    "model.layers.0.mlp.experts.gate_up_proj": "expert",
    "model.layers.0.mlp.shared_expert.up_proj.weight": "expert",
    "model.layers.0.mlp.shared_experts.up_proj.weight": "expert",
    "model.layers.0.block_sparse_moe.experts.0.w1.weight": "expert",
    "model.layers.0.block_sparse_moe.gate.weight": "router",
    "model.layers.0.mlp.gate.weight": "router",
    "model.layers.0.mlp.gate.e_score_correction_bias": "router",
    "model.layers.0.mlp.shared_expert_gate.weight": "router",
    "model.layers.0.mlp.router.weight": "router",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "position",
    "decoder.block.0.layer.1.EncDecAttention.q.weight": "attention",
    "decoder.block.0.layer.2.DenseReluDense.wi_0.weight": "mlp",
    "model.encoder.conv1.bias": "convolution",
    "vision_model.pre_layrnorm.weight": "norm",
    "vision_model.embeddings.class_embedding": "embedding",
    "layer1.0.bn1.running_mean": "norm",
    "text_encoder/text_model.embeddings.token_embedding.weight": "embedding",
    "logit_scale": "other",
    "core.decks.0.mixer.weight": "other",
}


@pytest.mark.parametrize(("name", "role"), ROLES.items(), ids=ROLES)
def test_the_words_of_a_name_say_the_role(name: str, role: str) -> None:
    assert role_of(name, (8, 8)) == role


def test_a_kernel_is_a_convolution_whatever_it_is_called() -> None:
    assert role_of("vit.embeddings.patch_embeddings.projection.weight", (16, 3, 4, 4)) == (
        "convolution"
    )
    assert role_of("model.layers.0.mlp.experts.gate_up_proj", (8, 48, 32)) == "expert"


# -- models of transformers, on the meta device --------------------------------------------------

FAMILIES = {**DECODERS, **{k: f for k, f in PARTS.items() if k.endswith(("encoder", "text"))}}


def meta(family: Family) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    kind = getattr(transformers, family.model)
    config_class = getattr(transformers, family.kind) if family.kind else kind.config_class
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = kind(config_class(**family.config))
    return model.state_dict(), model.config.to_diff_dict()


def opened(shapes: dict[str, tuple[int, ...]], config: dict[str, Any] | None = None) -> Checkpoint:
    state = {n: torch.zeros(s) for n, s in shapes.items()}
    return open_state_dict(state, "a", Side(config=config or {}))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_vocabulary_tensors_are_those_that_grow_with_the_vocabulary(family: Family) -> None:
    """The truth is transformers': build the model with one more token and see what changes."""
    small, config = meta(family)
    one = {"vocab_size": 1 + family.config.get("text_config", family.config).get("vocab_size", -1)}
    larger = {**family.config, **one}
    if "text_config" in family.config:
        larger = {**family.config, "text_config": {**family.config["text_config"], **one}}
    large, _ = meta(Family(family.model, larger, {}, kind=family.kind))
    grown = {
        n: next(i for i, (a, b) in enumerate(zip(t.shape, large[n].shape, strict=True)) if a != b)
        for n, t in small.items()
        if t.shape != large[n].shape
    }
    shapes = {n: tuple(t.shape) for n, t in small.items()}
    assert vocabulary_tensors(opened(shapes, config)) == grown
    assert vocabulary_tensors(opened(shapes)) == grown, "and without a config"


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_layer_has_attention_or_a_mixer(family: Family) -> None:
    state, _ = meta(family)
    roles = {n: role_of(n, tuple(t.shape)) for n, t in state.items()}
    inside = {r for n, r in roles.items() if place_of(n) is not None}
    assert "head" not in inside
    if family.model != "MambaForCausalLM":
        assert "attention" in inside and inside & {"mlp", "expert"}
        assert "other" not in inside


def test_sub_models_of_a_vision_language_model() -> None:
    state, _ = meta(PARTS["llava text"])
    found = parts_of(state)
    for name, part in found.items():
        wanted = (
            "vision" if "vision_tower" in name else "projector" if "projector" in name else "text"
        )
        assert part == wanted, name


def test_sub_models_of_an_encoder_and_a_decoder() -> None:
    state, _ = meta(PARTS["t5 encoder"])
    found = parts_of(state)
    assert {found["shared.weight"], found["lm_head.weight"]} == {"model"}
    assert found["encoder.final_layer_norm.weight"] == "encoder"
    assert found["decoder.block.0.layer.0.SelfAttention.q.weight"] == "decoder"


# -- vocabularies that no small model shows ------------------------------------------------------


def test_a_stale_number_at_the_top_does_no_harm() -> None:
    shapes = {"model.embed_tokens.weight": (44, 8), "lm_head.weight": (44, 8)}
    config = {"vocab_size": 40, "text_config": {"vocab_size": 44}}
    assert vocabulary_tensors(opened(shapes, config)) == dict.fromkeys(shapes, 0)


def test_a_config_of_another_vocabulary_is_not_believed() -> None:
    shapes = {"model.embed_tokens.weight": (44, 8), "model.norm.weight": (8,)}
    for config in ({"vocab_size": 40}, {"vocab_size": 8}, {"vocab_size": "many"}):
        assert vocabulary_rows(opened(shapes, config)) == {44}


def test_equal_sizes_of_other_things_are_told_apart() -> None:
    shapes = {
        "bert.embeddings.word_embeddings.weight": (8, 8),
        "bert.embeddings.position_embeddings.weight": (8, 8),
        "bert.embeddings.token_type_embeddings.weight": (8, 8),
        "bert.embeddings.LayerNorm.weight": (8,),
        "bert.encoder.layer.0.output.dense.weight": (8, 8),
        "bert.pooler.dense.weight": (8, 8),
        "classifier.weight": (8, 8),
        "cls.predictions.transform.dense.weight": (8, 8),
        "cls.predictions.bias": (8,),
    }
    found = vocabulary_tensors(opened(shapes, {"vocab_size": 8}))
    assert list(found) == ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"]


def test_layers_that_predict_further_tokens_keep_copies() -> None:
    shapes = {
        "model.embed_tokens.weight": (40, 8),
        "model.layers.2.embed_tokens.weight": (40, 8),
        "model.layers.2.shared_head.head.weight": (40, 8),
        "model.layers.2.mlp.up_proj.weight": (40, 8),
    }
    assert list(vocabulary_tensors(opened(shapes))) == list(shapes)[:3]


def test_a_model_that_reads_no_tokens_has_no_vocabulary() -> None:
    state, config = meta(DECODERS["vit"])
    shapes = {n: tuple(t.shape) for n, t in state.items()}
    assert vocabulary_rows(opened(shapes, config)) == frozenset()
