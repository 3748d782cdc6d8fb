"""Adapters of all of peft's kinds: computed by a layer of peft, or refused with the reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import save_file

import merge
from merge.adapters.kinds import LAYERS, REFUSED
from merge.errors import PlanError, SourceError
from tests.adapters import (
    assert_equal,
    edit,
    family,
    inputs_of,
    lora,
    opened,
    quiet,
    train,
)

# -- the other kinds -------------------------------------------------------------------------------
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"feedforward_modules": ["fc2"]},
    "LN_TUNING": {"target_modules": ["final_layer_norm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {"effective_rank": 8},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "VBLORA": {"r": 2, "vector_length": 4, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 20},
}


def test_every_kind_that_peft_has_is_computed_or_refused_by_name() -> None:
    kinds = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert kinds == {"LORA", "TRAINABLE_TOKENS", *LAYERS, *REFUSED}
    for kind, tuner in LAYERS.items():
        assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == tuner.prefix


def opt() -> Any:
    """A model whose biases are not zero."""
    model = family("opt", num_hidden_layers=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", LAYERS)
def test_other_kinds_are_what_peft_merges(kind: str, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "fc1", "fc2"], **SETTINGS.get(kind, {})}
    it = train(tmp_path, opt(), PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings))
    assert_equal(opened(it).state_dict(), it.merged())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"],
                                fan_in_fan_out=True)),
        ("vit", peft.LoHaConfig(target_modules=["projection", "query"], r=4)),
        ("vit", peft.OFTConfig(target_modules=["projection"], oft_block_size=4)),
        ("llama", peft.HiraConfig(target_modules=["embed_tokens", "q_proj"], r=4)),
        ("llama", lora(use_bdlora=peft.BdLoraConfig(
            target_modules_bd_a=["q_proj"], target_modules_bd_b=["up_proj"], nblocks=2))),
        ("llama", lora(kasa_config=peft.KasaConfig())),
    ],
)  # fmt: skip
def test_other_kinds_on_layers_of_other_classes(name: str, config: Any, tmp_path: Path) -> None:
    it = train(tmp_path, family(name), config, inputs_of(name))
    assert_equal(opened(it).state_dict(), it.merged())


def test_torchs_own_attention_is_refused_by_name(tmp_path: Path) -> None:
    base = {"attn.in_proj_weight": torch.ones(12, 4), "attn.out_proj.weight": torch.ones(4, 4)}
    save_file(base, tmp_path / "base.safetensors")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    names = ("attn.lora_A", "attn.lora_B", "attn.base_layer.out_proj.lora_A")
    given = {f"base_model.model.{n}.weight": torch.ones(2, 4) for n in names}
    save_file(given, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(PlanError, match="MultiheadAttention"):
        merge.open(f"{tmp_path / 'base.safetensors'}+{tmp_path / 'adapter'}")


def test_matrices_that_are_not_saved_are_drawn_again(tmp_path: Path) -> None:
    with quiet():
        config = peft.VeraConfig(target_modules=["q_proj", "down_proj"], save_projection=False)
    it = train(tmp_path, family("llama"), config)
    assert_equal(opened(it).state_dict(), it.merged())


def test_other_kinds_do_not_depend_on_threads(tmp_path: Path) -> None:
    it = train(tmp_path, family("llama"), peft.LoHaConfig(target_modules=["q_proj", "up_proj"]))
    one, many = (opened(it).state_dict(threads=n) for n in (1, 4))
    assert all(torch.equal(one[n], many[n]) for n in one)


SWITCHES = {"alora_invocation_tokens": [1], "use_qalora": True, "arrow_config": {"top_k": 2}}


def test_what_no_weight_is_made_of_is_refused_by_name(tmp_path: Path) -> None:
    it = train(tmp_path, family("llama"), lora())
    for kind, why in REFUSED.items():
        edit(it, {"peft_type": kind})
        with pytest.raises(SourceError, match=f"kind {kind} .*{why[:20]}"):
            opened(it)
    for key, value in SWITCHES.items():
        edit(it, {"peft_type": "LORA", **dict.fromkeys(SWITCHES), key: value})
        with pytest.raises(SourceError, match=f"LORA with {key}"):
            opened(it)


def test_an_unknown_kind_is_refused_with_the_nearest(tmp_path: Path) -> None:
    it = train(tmp_path, family("llama"), lora())
    edit(it, {"peft_type": "LOAR"})
    with pytest.raises(SourceError, match="did you mean 'LORA'") as caught:
        opened(it)
    assert caught.value.where["key"] == "peft_type"


def test_without_peft_the_other_kinds_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = train(tmp_path, opt(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    made = opened(it)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PlanError, match=r"pip install 'hf-merge\[peft\]'"):
        made.state_dict()
