"""The config of a tiny twin: the same structure, with small sizes that are all different.

Two sizes are made, so that what a size depends on can be told from the two. Whether query heads are
grouped, which layers are special, what is tied, and all other switches stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["LAYERS", "shrunk"]

HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
    "decoder_attention_heads", "attention_heads", "num_encoder_attention_heads",
    "num_decoder_attention_heads", "swa_num_attention_heads",
)  # fmt: skip
GROUPS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")
HIDDEN = (
    "hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_dim", "word_embed_proj_dim",
    "attention_hidden_size", "lru_width", "backbone_hidden_size",
)  # fmt: skip
HEAD_SIZE = ("head_dim", "d_kv", "kv_channels", "dim_head", "d_head", "attention_head_size",
             "swa_head_dim", "attention_head_dim", "global_head_dim")  # fmt: skip
INNER = (
    "intermediate_size", "n_inner", "d_ff", "ffn_dim", "dff", "dim_ff", "ffn_hidden_size",
    "encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size", "d_inner", "hidden_dim",
    "intermediate_size_mlp", "dense_intermediate_size",
)  # fmt: skip
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
SIZES: dict[str, tuple[int, int]] = {
    "vocab_size": (40, 48), "decoder_vocab_size": (40, 48), "unpadded_vocab_size": (40, 48),
    "vocab_size_per_layer_input": (40, 48), "type_vocab_size": (2, 2),
    "moe_intermediate_size": (24, 36), "shared_expert_intermediate_size": (28, 44),
    "shared_intermediate_size": (28, 44), "moe_shared_expert_intermediate_size": (28, 44),
    "shared_experts_intermediate_size": (28, 44), "expert_ffn_hidden_size": (24, 36),
    "num_experts": (4, 6), "num_local_experts": (4, 6), "n_routed_experts": (4, 6),
    "moe_num_experts": (4, 6), "zero_expert_num": (2, 2), "num_experts_per_tok": (2, 2),
    "num_experts_per_token": (2, 2), "moe_topk": (2, 2), "moe_k": (2, 2),
    "n_group": (2, 2), "num_expert_group": (2, 2), "topk_group": (1, 1),
    "n_shared_experts": (1, 1), "num_shared_experts": (1, 1), "moe_num_shared_experts": (1, 1),
    "q_lora_rank": (12, 20), "kv_lora_rank": (14, 22), "qk_rope_head_dim": (4, 8),
    "qk_nope_head_dim": (6, 10), "qk_head_dim": (10, 18), "v_head_dim": (8, 12),
    "o_lora_rank": (10, 18), "o_groups": (2, 2), "index_head_dim": (8, 16),
    "index_n_heads": (2, 4), "index_topk": (4, 4), "rotary_dim": (4, 8),
    "embedding_size": (20, 28), "input_embedding_size": (20, 28),
    "output_embedding_size": (26, 34), "hidden_size_per_layer_input": (6, 10),
    "laurel_rank": (6, 10), "state_size": (4, 6), "ssm_state_size": (4, 6),
    "mamba_d_state": (4, 6), "time_step_rank": (5, 7), "mamba_dt_rank": (5, 7),
    "linear_num_key_heads": (2, 2), "linear_num_value_heads": (4, 4),
    "linear_key_head_dim": (6, 10), "linear_value_head_dim": (8, 12),
    "linear_head_dim": (8, 12), "linear_num_heads": (2, 3), "d_rel": (4, 6),
    "sliding_window": (8, 8), "sliding_window_size": (8, 8), "attention_window_size": (8, 8),
    "attention_chunk_size": (8, 8), "local_attention": (8, 8), "window_size": (8, 8),
    "first_k_dense_replace": (1, 1), "num_dense_layers": (1, 1), "moe_layer_start_index": (1, 1),
    "max_window_layers": (1, 1), "num_nextn_predict_layers": (0, 0), "chunk_size": (4, 4),
    "mamba_chunk_size": (4, 4), "query_pre_attn_scalar": (8, 16), "projection_dim": (18, 26),
    "image_size": (16, 16), "patch_size": (4, 4), "num_mel_bins": (6, 10),
    "mm_tokens_per_image": (4, 4),
    "max_source_positions": (8, 8), "max_target_positions": (24, 24), "mem_len": (0, 0),
}  # fmt: skip
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length",
             "model_max_length", "original_max_position_embeddings", "max_length")  # fmt: skip
PLACES = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers",
          "num_nextn_predict_layers")  # fmt: skip
"""Numbers of layers, which stay where all layers do."""

PERIODS = (
    "attn_layer_period", "expert_layer_period", "full_attention_interval", "decoder_sparse_step",
    "sliding_window_pattern", "layer_group_size", "global_attn_every_n_layers",
    "interleave_moe_layer_step", "no_rope_layer_interval", "attn_every_n_layers",
)  # fmt: skip


def shrunk(
    config: Mapping[str, Any], number: int = 0, *, layers: bool = True, second: bool = False
) -> dict[str, Any]:
    """The config of twin ``number`` (0 or 1): sizes replaced, lists of layers cut.

    Sub-configs, such as that of a vision tower, are shrunk too. ``layers``: without it all layers
    stay. ``second`` is set for sub-configs that get other sizes than the text model, as decoders
    get other ones than encoders.
    """
    out = {k: _inner(k, v, number, layers) for k, v in config.items()}
    heads = next((config[k] for k in HEADS if isinstance(config.get(k), int)), None)
    groups = next((config[k] for k in GROUPS if isinstance(config.get(k), int)), None)
    grouped = heads is not None and groups is not None and 1 < groups < heads
    plain = ((5, 7) if second else (4, 6))[number]
    new_heads = (6, 8)[number] if grouped else plain
    head_size = ((4, 12) if second else (8, 16))[number]
    _set(out, HEADS, new_heads)
    for key in GROUPS:
        if isinstance(out.get(key), int) and out[key] > 1:
            out[key] = ((2, 4)[number] if grouped else new_heads) if out[key] != 1 else 1
    own = _has_head_size(config, heads)
    _set(out, HEAD_SIZE, head_size)
    _set(out, HIDDEN, new_heads * ((10, 14)[number] if own else head_size))
    _set(out, INNER, ((52, 68) if second else (44, 60))[number])
    decoders = [k for k in out if "decoder" in k and f"{k.replace('decoder', 'encoder')}" in out]
    _set(out, tuple(k for k in HEADS if k in decoders), (2, 8)[number])
    _set(out, tuple(k for k in INNER if k in decoders), (52, 68)[number])
    for key, sizes in SIZES.items():
        if not layers and key in PLACES:
            continue
        if key == "embedding_size" and isinstance(config.get("hidden_sizes"), list):
            continue  # those stay, and where a stage begins as wide as this it adds to it
        if isinstance(out.get(key), int) and not isinstance(out[key], bool) and out[key] > 0:
            out[key] = sizes[number]
    _related(out, config)
    _set(out, POSITIONS, 64)
    _tokens(out)
    if layers:
        _layers(out, config)
    _rotary(out, head_size)
    return out


def _related(config: dict[str, Any], old: Mapping[str, Any]) -> None:
    """Sizes that must be products or sums of others."""
    for key in ("qk_rope_head_dim", "qk_head_dim"):
        if type(old.get("head_dim")) is int and old.get("head_dim") == old.get(key):
            config["head_dim"] = config[key]
    width = config.get("hidden_size")
    for expand, heads, size in (
        ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
        ("expand", "num_heads", "head_dim"),
        ("expand", "mamba_num_heads", "mamba_head_dim"),
    ):
        if all(type(config.get(k)) is int for k in (expand, heads)) and size in config:
            config[heads] = 4
            config[size] = width * config[expand] // 4
            if type(config.get("mamba_d_ssm")) is int:
                config["mamba_d_ssm"] = width * config[expand]


def _set(config: dict[str, Any], keys: tuple[str, ...], value: int) -> None:
    for key in keys:
        if type(config.get(key)) is int:
            config[key] = value


def _inner(key: str, value: Any, number: int, layers: bool) -> Any:
    nested = isinstance(value, Mapping) and (key.endswith("_config") or "model_type" in value)
    if nested and not key.startswith("quantization"):
        return shrunk(value, number, layers=layers, second=not key.startswith("text"))
    return dict(value) if isinstance(value, Mapping) else value


def _has_head_size(config: Mapping[str, Any], heads: int | None) -> bool:
    """Whether heads have a size of their own, which is not the width divided by their number."""
    size = next((config[k] for k in HEAD_SIZE if type(config.get(k)) is int), None)
    width = next((config[k] for k in HIDDEN if type(config.get(k)) is int), None)
    return bool(size and width and heads and size * heads != width)


def _tokens(config: dict[str, Any]) -> None:
    """Special tokens become the first ten of the vocabulary."""
    known = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 3}
    count = 4
    for key, value in config.items():
        if not key.endswith(("_token_id", "_token_index", "_token_ids")) or value is None:
            continue
        name = key.rpartition("_token_i")[0]
        number = known.get(name, min(count, 9))
        count += name not in known
        config[key] = [number] if isinstance(value, list) else number
    if "begin_suppress_tokens" in config:
        config["begin_suppress_tokens"] = None


def _layers(config: dict[str, Any], old: Mapping[str, Any]) -> None:
    """Three layers, or as many as it takes for each kind of layer to be there."""
    counts = [old[k] for k in LAYERS if type(old.get(k)) is int]
    if not counts:
        return
    total = max(counts)
    lists = {k: v for k, v in config.items() if isinstance(v, list) and len(v) == total > 3}
    lists = {k: v for k, v in lists.items() if all(isinstance(e, str | int | float) for e in v)}
    named = [v for v in lists.values() if all(isinstance(e, str | int) for e in v)]
    periods = [old[k] for k in PERIODS if type(old.get(k)) is int and old[k] > 0]
    needed = max([3, *(p + 1 for p in periods if p < 12)])
    kinds = list(zip(*named, strict=True))
    while kinds and len(set(kinds[:needed])) < len(set(kinds)) and needed < total:
        needed += 1
    chosen = list(range(min(total, needed)))
    if needed > 12:  # one layer of each kind, and one more of the last
        firsts = [kinds.index(k) for k in dict.fromkeys(kinds)]
        chosen = sorted({*firsts, total - 1, *range(2)})
    for key, value in lists.items():
        config[key] = [value[k] for k in chosen]
    for key, value in config.items():
        if isinstance(value, dict) and value and all(str(k).isdigit() for k in value):
            by_number = {int(k): v for k, v in value.items()}
            config[key] = {n: by_number[k] for n, k in enumerate(chosen) if k in by_number}
    for key in LAYERS:
        if type(config.get(key)) is int:
            config[key] = min(len(chosen), old[key])
    for key in ("mlp_only_layers", "moe_layers", "full_attn_idxs", "hybrid_layer_ids"):
        if isinstance(config.get(key), list):
            config[key] = [k for k in config[key] if isinstance(k, int) and k < len(chosen)]
    if isinstance(config.get("attention_types"), list):
        config["attention_types"] = [[["global", "local"], math.ceil(len(chosen) / 2)]]
        config["num_layers"] = 2 * math.ceil(len(chosen) / 2)
        config.pop("attention_layers", None)


def _rotary(config: dict[str, Any], head_size: int) -> None:
    """Rotary settings whose lists have an entry for each pair of coordinates."""
    for name in ("rope_parameters", "rope_scaling"):
        found = config.get(name)
        for inner in [found, *(found or {}).values()] if isinstance(found, dict) else []:
            if not isinstance(inner, dict):
                continue
            part = inner.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1
            pairs = int(head_size * part) // 2
            for key in ("short_factor", "long_factor"):
                if isinstance(inner.get(key), list):
                    inner[key] = [1.0] * pairs
            if isinstance(inner.get("mrope_section"), list):
                first = max(1, pairs // 3)
                inner["mrope_section"] = [pairs - 2 * first, first, first]
