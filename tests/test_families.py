"""Models of transformers with layers stacked anew: config.json follows, they load and run."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import merge
from merge.families.config import relayer
from merge.families.modules import modules_of

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GROUPED = {**SMALL, "num_key_value_heads": 1, "pad_token_id": 0}
SLIDES = ["sliding_attention", "full_attention", "full_attention"]
ORDER = (0, 1, 1, 2)
"""The new order of three layers."""


@dataclass(frozen=True)
class Family:
    """A model class, its small config, and what config.json holds after layers 0 1 1 2."""

    model: str
    config: dict[str, Any]
    after: dict[str, Any]
    module: str = ""
    kind: str = ""  # of config; after the model's name where it is not given
    inputs: dict[str, Any] = field(default_factory=dict)
    noted: str = ""


LAYERS = {"num_hidden_layers": 3}
FOUR = {"num_hidden_layers": 4}
MIXED = {"layer_types": SLIDES}
MIXED_AFTER = {**FOUR, "layer_types": [SLIDES[i] for i in ORDER]}

DECODERS = {
    "llama": Family("LlamaForCausalLM", {**GROUPED, **LAYERS}, FOUR),
    "mistral": Family("MistralForCausalLM", {**GROUPED, **LAYERS, "head_dim": 8}, FOUR),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**GROUPED, **LAYERS, "use_sliding_window": True, "sliding_window": 4,
         "max_window_layers": 1},
        {**FOUR, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
    ),
    "qwen3": Family("Qwen3ForCausalLM", {**GROUPED, **LAYERS, "head_dim": 8}, FOUR),
    "gemma": Family("GemmaForCausalLM", {**GROUPED, **LAYERS, "head_dim": 8}, FOUR),
    "gemma2": Family("Gemma2ForCausalLM", {**GROUPED, **LAYERS, **MIXED, "head_dim": 8},
                     MIXED_AFTER),
    "gemma3": Family(
        "Gemma3ForCausalLM", {**GROUPED, **LAYERS, **MIXED, "head_dim": 8}, MIXED_AFTER,
        kind="Gemma3TextConfig",
    ),
    "phi": Family("PhiForCausalLM", {**GROUPED, **LAYERS}, FOUR),
    "phi3": Family("Phi3ForCausalLM", {**GROUPED, **LAYERS, "eos_token_id": 1,
                                       "bos_token_id": 1}, FOUR),
    "olmo2": Family("Olmo2ForCausalLM", {**GROUPED, **LAYERS}, FOUR),
    "granite": Family("GraniteForCausalLM", {**GROUPED, **LAYERS}, FOUR),
    "stablelm": Family("StableLmForCausalLM", {**GROUPED, **LAYERS}, FOUR),
    "starcoder2": Family("Starcoder2ForCausalLM", {**GROUPED, **LAYERS}, FOUR),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {**GROUPED, **LAYERS, "no_rope_layers": [1, 0, 1]},
        {**FOUR, "no_rope_layers": [1, 0, 0, 1]},
    ),
    "cohere": Family("CohereForCausalLM", {**GROUPED, **LAYERS}, FOUR),
    "cohere2": Family("Cohere2ForCausalLM", {**GROUPED, **LAYERS, **MIXED}, MIXED_AFTER),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"vocab_size": 40, "n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 32,
         "bos_token_id": 1, "eos_token_id": 1},
        {"n_layer": 4},
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        {**SMALL, "num_layers": 3, "num_heads": 2, "attention_types": [[["global", "local"], 1],
         [["global"], 1]], "bos_token_id": 1, "eos_token_id": 1},
        {"num_layers": 4, "attention_layers": ["global", "local", "local", "global"]},
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        {"vocab_size": 40, "n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 32,
         "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 1},
        {"n_layer": 4},
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", {**SMALL, **LAYERS}, FOUR),
    "opt": Family(
        "OPTForCausalLM",
        {**SMALL, **LAYERS, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 0}, FOUR,
    ),
    "falcon": Family("FalconForCausalLM", {**SMALL, **LAYERS, "bos_token_id": 1,
                                           "eos_token_id": 1}, FOUR),
    "bloom": Family("BloomForCausalLM", {"vocab_size": 40, "hidden_size": 16, "n_layer": 3,
                                         "n_head": 2}, {"n_layer": 4}),
    "mamba": Family("MambaForCausalLM", {"vocab_size": 40, "hidden_size": 16, "state_size": 4,
                                         **LAYERS, "pad_token_id": 0}, FOUR),
    "mixtral": Family("MixtralForCausalLM", {**GROUPED, **LAYERS, "num_local_experts": 2}, FOUR),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {**GROUPED, **LAYERS, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
         "moe_intermediate_size": 8, "mlp_only_layers": [1], "decoder_sparse_step": 1},
        {**FOUR, "mlp_only_layers": [1, 2]},
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {**SMALL, **LAYERS, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2,
         "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
         "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
         "qk_nope_head_dim": 4, "num_key_value_heads": 2, "pad_token_id": 0},
        FOUR,
        noted="first_k_dense_replace",
    ),
    "bert": Family("BertForMaskedLM", {**SMALL, **LAYERS}, FOUR),
    "roberta": Family("RobertaForMaskedLM", {**SMALL, **LAYERS}, FOUR),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 3,
         "max_position_embeddings": 32},
        {"n_layers": 4},
    ),
    "electra": Family("ElectraForMaskedLM", {**SMALL, **LAYERS, "embedding_size": 8}, FOUR),
    "deberta_v2": Family("DebertaV2ForMaskedLM", {**SMALL, **LAYERS}, FOUR),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        {**SMALL, **LAYERS, "global_attn_every_n_layers": 2, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        FOUR,
    ),
    "vit": Family(
        "ViTForImageClassification",
        {**SMALL, **LAYERS, "image_size": 8, "patch_size": 4},
        FOUR,
        inputs={"pixel_values": torch.zeros(1, 3, 8, 8)},
    ),
}  # fmt: skip

PICTURE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
           "image_size": 8, "patch_size": 4}  # fmt: skip
TOKENS = torch.arange(3, 9)[None]

PARTS = {
    "t5 encoder": Family(
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 3,
         "num_decoder_layers": 3},
        {"num_layers": 4, "num_decoder_layers": 3},
        module="encoder", inputs={"input_ids": TOKENS, "decoder_input_ids": TOKENS},
    ),
    "t5 decoder": Family(
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 3,
         "num_decoder_layers": 3},
        {"num_layers": 3, "num_decoder_layers": 4},
        module="decoder", inputs={"input_ids": TOKENS, "decoder_input_ids": TOKENS},
    ),
    "bart encoder": Family(
        "BartForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
         "decoder_ffn_dim": 24, "max_position_embeddings": 32},
        {"encoder_layers": 4, "decoder_layers": 3}, module="encoder",
    ),
    "bart decoder": Family(
        "BartForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
         "decoder_ffn_dim": 24, "max_position_embeddings": 32},
        {"encoder_layers": 3, "decoder_layers": 4}, module="decoder",
    ),
    "whisper decoder": Family(
        "WhisperForConditionalGeneration",
        {"vocab_size": 60, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3,
         "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
         "decoder_ffn_dim": 24, "max_source_positions": 8, "max_target_positions": 16,
         "num_mel_bins": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 3, "begin_suppress_tokens": [4, 5, 6]},
        {"encoder_layers": 3, "decoder_layers": 4, "begin_suppress_tokens": [4, 5, 6]},
        module="decoder",
        inputs={"input_features": torch.zeros(1, 4, 16), "decoder_input_ids": TOKENS},
    ),
    "clip text": Family(
        "CLIPModel",
        {"text_config": {**SMALL, **LAYERS, "eos_token_id": 2},
         "vision_config": {**PICTURE, **LAYERS}, "projection_dim": 8},
        {"text_config": FOUR, "vision_config": LAYERS},
        module="text_model",
        inputs={"input_ids": TOKENS, "pixel_values": torch.zeros(1, 3, 8, 8)},
    ),
    "clip vision": Family(
        "CLIPModel",
        {"text_config": {**SMALL, **LAYERS, "eos_token_id": 2},
         "vision_config": {**PICTURE, **LAYERS}, "projection_dim": 8},
        {"text_config": LAYERS, "vision_config": FOUR},
        module="vision_model",
        inputs={"input_ids": TOKENS, "pixel_values": torch.zeros(1, 3, 8, 8)},
    ),
}  # fmt: skip


def _llava(module: str, text: int, vision: int) -> Family:
    return Family(
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **GROUPED, **LAYERS},
            "vision_config": {"model_type": "clip_vision_model", **PICTURE, **LAYERS},
            "image_token_index": 39,
            "vision_feature_layer": -1,
        },
        {
            "text_config": {"num_hidden_layers": text},
            "vision_config": {"num_hidden_layers": vision},
        },
        module=module,
    )


PARTS["llava text"] = _llava("text_decoder", 4, 3)
PARTS["llava language_model"] = _llava("language_model", 4, 3)
PARTS["llava vision"] = _llava("vision_tower", 3, 4)


def made(family: Family, folder: Path) -> None:
    torch.manual_seed(0)
    kind = getattr(transformers, family.model)
    config_class = getattr(transformers, family.kind) if family.kind else kind.config_class
    kind(config_class(**family.config)).save_pretrained(folder)


def recipe(family: Family, model: Path) -> str:
    slices = (
        f"slices:\n- sources: [{{model: {model}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {model}, layer_range: [1, 3]}}]\n"
    )
    if family.module:
        inner = "".join(f"    {line}\n" for line in slices.splitlines())
        slices = f"modules:\n  {family.module}:\n{inner}"
    return f"merge_method: passthrough\nbase_model: {model}\n{slices}"


@pytest.mark.parametrize("family", [*DECODERS.values(), *PARTS.values()], ids=[*DECODERS, *PARTS])
def test_a_restacked_model_loads_and_runs(
    family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made(family, tmp_path / "a")
    (tmp_path / "r.yml").write_text(recipe(family, tmp_path / "a"))
    planned = merge.run.plan_recipe(tmp_path / "r.yml")
    merge.run.apply_plan(planned, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, wanted in family.after.items():
        if isinstance(wanted, dict):
            assert {k: config[key].get(k) for k in wanted} == wanted, key
        else:
            assert config.get(key) == wanted, key
    notes = [n for n in planned.compiled.notes if n.startswith("config.json")]
    assert (family.noted in " ".join(notes)) if family.noted else not notes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(transformers, family.model)
        loaded, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    inputs = family.inputs or {"input_ids": TOKENS}
    with torch.no_grad():
        found = loaded.eval()(**inputs)
    assert all(v.isfinite().all() for v in found.values() if isinstance(v, torch.Tensor))


def test_both_halves_of_a_model_stacked_anew(t5s: list[Path], tmp_path: Path) -> None:
    """An encoder of 3 layers becomes one of 5, a decoder of 2 one of 4.

    The first layer keeps the position bias for all: it is there once, and not left out either.
    """
    text = "merge_method: passthrough\nmodules:\n"
    for module, ranges in (("encoder", ((1, 3), (0, 3))), ("decoder", ((0, 2), (0, 2)))):
        text += f"  {module}:\n    slices:\n"
        for (first, end), model in zip(ranges, t5s, strict=True):
            text += f"    - sources: [{{model: {model}, layer_range: [{first}, {end}]}}]\n"
    (tmp_path / "r.yml").write_text(text)
    merge.apply(tmp_path / "r.yml", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (5, 4)
    loaded, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert loaded(input_ids=TOKENS, decoder_input_ids=TOKENS).logits.isfinite().all()


# -- configs that no small model shows -------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "a count that is left out": (
        {
            "text_config": {"model_type": "llama"},
            "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 3},
        },
        "language_model.model.layers",
        {"text_config": {"model_type": "llama", "num_hidden_layers": 4}},
    ),
    "another part of equal depth": (
        {"num_hidden_layers": 3, "vision_config": {"depth": 3}},
        "visual.blocks",
        {"num_hidden_layers": 3, "vision_config": {"depth": 4}},
    ),
    "the text beside it": (
        {"num_hidden_layers": 3, "vision_config": {"depth": 3}},
        "model.layers",
        {"num_hidden_layers": 4, "vision_config": {"depth": 3}},
    ),
    "a part within a part": (
        {"thinker_config": {"audio_config": {"num_layers": 3}, "text_config": {"num_layers": 3}}},
        "thinker.model.layers",
        {"thinker_config": {"audio_config": {"num_layers": 3}, "text_config": {"num_layers": 4}}},
    ),
    "a T5 of one count, encoder": (
        {"is_encoder_decoder": True, "num_layers": 3},
        "encoder.block",
        {"num_layers": 4, "num_decoder_layers": 3},
    ),
    "a T5 of one count, decoder": (
        {"is_encoder_decoder": True, "num_layers": 3},
        "decoder.block",
        {"num_layers": 3, "num_decoder_layers": 4},
    ),
    "a size a layer": (
        {"num_hidden_layers": 3, "intermediate_size": [1, 2, 3], "image_size": [7, 8, 9]},
        "model.layers",
        {"num_hidden_layers": 4, "intermediate_size": [1, 2, 2, 3], "image_size": [7, 8, 9]},
    ),
    "a letter a layer": (
        {"num_hidden_layers": 3, "hybrid_override_pattern": "M-*"},
        "backbone.layers",
        {"num_hidden_layers": 4, "hybrid_override_pattern": "M--*"},
    ),
    "numbers of layers": (
        {"num_hidden_layers": 3, "moe_layers": [0, 2], "eos_token_id": [1, 2, 3]},
        "model.layers",
        {"num_hidden_layers": 4, "moe_layers": [0, 3], "eos_token_id": [1, 2, 3]},
    ),
    "local and global": (
        {"num_layers": 3, "attention_types": [[["global", "local"], 2]]},
        "transformer.h",
        {"attention_types": [[[k], 1] for k in ("global", "local", "local", "global")]},
    ),
}


@pytest.mark.parametrize(("config", "stack", "after"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_follows(config: dict[str, Any], stack: str, after: dict[str, Any]) -> None:
    found = relayer(config, stack, 3, [(config, i) for i in ORDER])
    assert found.counted and not found.unsure
    assert {k: found.config[k] for k in after} == after


def test_each_layer_brings_what_its_own_config_says_of_it() -> None:
    a = {"num_hidden_layers": 2, "layer_types": ["x", "y"], "mlp_only_layers": [0]}
    b = {"num_hidden_layers": 3, "layer_types": ["p", "q", "r"], "mlp_only_layers": [2]}
    found = relayer(a, "h", 2, [(a, 1), (b, 2), (a, 0), (b, 0)]).config
    assert found == {
        "num_hidden_layers": 4,
        "layer_types": ["y", "r", "x", "p"],
        "mlp_only_layers": [1, 2],
    }


RULES = {
    "a rule": ({"first_k_dense_replace": 1}, ["first_k_dense_replace"]),
    "a rule for none": ({"first_k_dense_replace": 0}, []),
    "every layer": ({"decoder_sparse_step": 1}, []),
    "every second": ({"decoder_sparse_step": 2}, ["decoder_sparse_step"]),
    "a list of types": ({"full_attention_interval": 2, "layer_types": ["a", "b", "c"]}, []),
    "no list of types": ({"full_attention_interval": 2}, ["full_attention_interval"]),
    "windows": ({"max_window_layers": 2}, ["max_window_layers"]),
    "no windows": ({"max_window_layers": 2, "use_sliding_window": False}, []),
}


@pytest.mark.parametrize(("rule", "unsure"), RULES.values(), ids=RULES)
def test_rules_that_the_new_order_may_break_are_named(
    rule: dict[str, Any], unsure: list[str]
) -> None:
    config = {"num_hidden_layers": 3, **rule}
    assert list(relayer(config, "h", 3, [(config, i) for i in ORDER]).unsure) == unsure
    assert not relayer(config, "h", 3, [(config, i) for i in (0, 1)]).unsure


def test_a_config_that_counts_something_else_is_left() -> None:
    config = {"num_hidden_layers": 7, "vision_config": {"num_hidden_layers": 3}}
    found = relayer(config, "model.layers", 3, [(config, 0)])
    assert (found.config, found.counted) == (config, False)


# -- modules ---------------------------------------------------------------------------------------

VISION_LANGUAGE = [
    "vision_tower.encoder.layers.0.w",
    "multi_modal_projector.linear_1.weight",
    "language_model.model.layers.0.w",
    "lm_head.weight",
]
SPLITS: dict[str, tuple[list[str], list[list[int]]]] = {
    "all three": (["text_decoder", "vision_tower", "multi_modal_projector"], [[2, 3], [0], [1]]),
    "text alone": (["text_decoder"], [[2, 3]]),
    "text by its name": (["language_model"], [[2, 3]]),
    "vision alone": (["vision_tower"], [[0]]),
    "the default": (["default"], [[0, 1, 2, 3]]),
    "vision and the default": (["vision_tower", "default"], [[0], [1, 2, 3]]),
    "a stack": (["language_model.model.layers", "default"], [[2], [0, 1, 3]]),
    "one within another": (["language_model", "model.layers"], [[3], [2]]),
    "nobody": (["encoder.block"], [[]]),
}


@pytest.mark.parametrize(("wanted", "parts"), SPLITS.values(), ids=SPLITS)
def test_modules_are_told_by_name(wanted: list[str], parts: list[list[int]]) -> None:
    found = modules_of(VISION_LANGUAGE, wanted)
    assert found == {m: [VISION_LANGUAGE[i] for i in p] for m, p in zip(wanted, parts, strict=True)}
