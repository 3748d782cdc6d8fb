"""Symmetry specs written by hand, which the derived ones are held against, and how to try one.

Shared by the tests of symmetries; nothing here is a test.
"""

from __future__ import annotations

from typing import Any

MLP = {
    "model": "mlp",
    "groups": {"a": {"flags": "PD"}, "b": {"flags": "PD"}},
    "frozen": {"in": "an input of the network", "out": "an output of the network"},
    "tensors": {
        "0.weight": ["a", "_in"],
        "0.bias": ["a"],
        "2.weight": ["b", "a*"],
        "2.bias": ["b"],
        "4.weight": ["_out", "b*"],
        "4.bias": ["_out"],
    },
}
"""Two hidden layers with ReLU between linear maps."""

HEADS, KV, WIDTH = "num_attention_heads", "num_key_value_heads", "hidden_size"
HEAD = f"head_dim or {WIDTH}/{HEADS}"

LLAMA = {
    "model": "llama",
    "groups": {
        "d": {"flags": "P", "size": WIDTH, "output": True},
        "kv{i}": {"flags": "P", "size": f"{KV} or {HEADS}"},
        "slot{i}": {"flags": "P", "size": f"{HEADS}/{KV} or 1", "per": ["kv{i}"]},
        "v{i}": {"flags": "PSDR", "size": HEAD, "per": ["kv{i}"]},
        "f{i}": {"flags": "P", "size": "intermediate_size"},
    },
    "frozen": {"token": "looked up by token number", "rotary": "multiplied by a constant"},
    "tensors": {
        "[model.]embed_tokens.weight": ["_token", "d"],
        "lm_head.weight": ["_token", "d"],
        "[model.]norm.weight": ["d"],
        "[model.]layers.{i}.input_layernorm.weight": ["d"],
        "[model.]layers.{i}.post_attention_layernorm.weight": ["d"],
        "[model.]layers.{i}.self_attn.q_proj.weight": ["kv{i}.slot{i}._rotary", "d"],
        "[model.]layers.{i}.self_attn.k_proj.weight": ["kv{i}._rotary", "d"],
        "[model.]layers.{i}.self_attn.v_proj.weight": ["kv{i}.v{i}", "d"],
        "[model.]layers.{i}.self_attn.o_proj.weight": ["d", "kv{i}.slot{i}.v{i}*"],
        "[model.]layers.{i}.mlp.gate_proj.weight": ["f{i}", "d"],
        "[model.]layers.{i}.mlp.up_proj.weight": ["f{i}", "d"],
        "[model.]layers.{i}.mlp.down_proj.weight": ["d", "f{i}"],
    },
}
"""A decoder with grouped queries and rotary positions."""


def randomised(model: Any, seed: int = 0) -> Any:
    """The module in float64 and evaluation mode, weights around 0.3, gains and statistics near 1.

    Weights of the usual scale of 0.02 would hide errors, since the branches would hardly count.
    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=draw, dtype=value.dtype)
            if name.endswith("running_var"):
                value.copy_(1 + 0.3 * noise.abs())
            elif value.ndim < 2 and name.endswith("weight"):
                value.copy_(1 + 0.3 * noise)
            elif isinstance(value, torch.nn.Parameter) or name.endswith("running_mean"):
                row = value[0].numel() if value.ndim > 1 else 1
                value.copy_(max(0.1, min(0.3, 1.2 / row**0.5)) * noise)
    return model


def distance(found: Any, wanted: Any) -> float:
    """Largest difference relative to the largest wanted value."""
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())
