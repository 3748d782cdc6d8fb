"""Small models of transformers' families, by name, and what becomes of their configs.

Shared by the tests of families; nothing here is a test.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

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


def new_model(family: Family, changes: Mapping[str, Any] | None = None) -> Any:
    """The family's model with random weights, the same each time; ``changes`` to its config."""
    kind = getattr(transformers, family.model)
    config_class = getattr(transformers, family.kind) if family.kind else kind.config_class
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of token ids that a small vocabulary does not have
        return kind(config_class(**{**family.config, **(changes or {})})).eval()


def two_models(family: Family) -> tuple[Any, Any]:
    """Two models of a family; every weight of the second is another."""
    first, second = new_model(family), new_model(family)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(torch.randn_like(parameter))
    return first, second


def loaded_model(family: Family, folder: Path) -> Any:
    """The model in ``folder``, as transformers loads it, with every weight in its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(transformers, family.model)
        model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()
