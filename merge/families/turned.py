"""Matrices that are stored turned: (in, out) where others store (out, in)."""

from __future__ import annotations

from collections.abc import Mapping

from merge.families.vocabulary import text_configs

__all__ = ["experts_turned", "stored_turned"]

_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder", "clvp")
_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""Layers of the class Conv1D. Other families have layers of these names that are not turned, and a
square matrix does not show it, so this is declared and not inferred."""


_EXPERTS = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")


def experts_turned(config: Mapping[str, object]) -> bool:
    """Whether stacks of experts are stored as (experts, in, out) in models with this config."""
    return not {c.get("model_type") for c in text_configs(config)}.isdisjoint(_EXPERTS)


def stored_turned(name: str, config: Mapping[str, object]) -> bool:
    """Whether the matrix ``name`` of a model with this config.json is stored as (in, out).

    >>> stored_turned("h.0.attn.c_proj.weight", {"model_type": "gpt2"})
    True
    >>> stored_turned("h.0.mlp.c_proj.weight", {"model_type": "gpt_bigcode"})
    False
    """
    words = name.removesuffix(".weight").rpartition(".")
    kinds = {c.get("model_type") for c in text_configs(config)}
    return words[2] in _MODULES and not kinds.isdisjoint(_FAMILIES)
