"""The shipped symmetry templates: each holds for models that it was not derived from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge
from merge.symmetry.action import apply
from merge.symmetry.axes import Axis, Factor
from merge.symmetry.elements import random_element
from merge.symmetry.symmetry import Symmetry
from merge.symmetry.templates import shipped, template_of
from merge.tracing.build import Family, build, twin_config
from merge.tracing.check import Check
from merge.tracing.derive import derive
from merge.tracing.fallback import goes_by_layer
from merge.tracing.generate import text_of
from merge.tracing.precision import twin_of
from merge.tracing.shipped import FAMILIES
from merge.tracing.shrink import LAYERS, shrunk
from merge.tracing.twins import Twin, main_outputs, make_twin, model_class

from .test_tracing import alone

DEEPER: dict[str, Any] = {"num_hidden_layers": 4, "n_layer": 4, "num_layers": 4, "n_layers": 4}


def config_of(model: str, name: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config of other sizes and more layers than the template was derived from."""
    family, kind = FAMILIES[model], model_class(name)
    if family.twins is not None:
        config = {**family.twins[0], "depths": [2, 4, 3, 2], **(changes or {})}
        return {**config, "hidden_sizes": [10, 14, 18, 22]} if "hidden_sizes" in config else config
    full = kind.config_class(**{**family.config, **(changes or {})}).to_dict()
    config = shrunk(full, 1)
    config |= {k: 4 for k in LAYERS if k in config and "layer_types" not in config}
    return {**config, **(changes or {})}


@cache
def twin(model: str, name: str, changes: tuple[tuple[str, Any], ...] = ()) -> Twin:
    made = make_twin(model_class(name), config_of(model, name, dict(changes)))
    return Twin(twin_of(made.module, seed=3), made.inputs, made.headed)


def deviations(twin: Twin, symmetry: Symmetry) -> dict[str, float]:
    """How much the outputs change under an element of all groups, for each kind of moves."""
    inputs = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in twin.inputs.items()
    }
    check = Check(twin.module, inputs, pick=main_outputs)
    kinds = ("P", "S", "D", "PSDR")
    return {k: check.deviation(symmetry, random_element(symmetry, 4, k)) for k in kinds}


# -- the universal test --------------------------------------------------------------------------

CLASSES = [(f.model, name) for f in FAMILIES.values() for name in (*f.heads[:1], *f.bodies)]


@pytest.mark.parametrize(("model", "name"), CLASSES, ids=lambda v: str(v))
def test_an_element_of_the_template_keeps_the_function(model: str, name: str) -> None:
    made = twin(model, name)
    symmetry = merge.symmetry_of(made.module)
    assert max(deviations(made, symmetry).values()) < 1e-10
    element = random_element(symmetry, 4)
    state = made.module.state_dict()
    moved = apply(symmetry, state, element)
    share = sum(v.numel() for n, v in state.items() if not torch.equal(v, moved[n]))
    assert share > 0.6 * sum(v.numel() for v in state.values())


SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "LlamaForCausalLM", {"num_key_value_heads": 4, "num_attention_heads": 4}),
    ("llama", "LlamaForCausalLM", {"num_key_value_heads": 1, "num_attention_heads": 4}),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": False}),
    ("qwen2", "Qwen2ForCausalLM", {"num_key_value_heads": 2, "num_attention_heads": 8}),
    ("gpt2", "GPT2LMHeadModel", {"activation_function": "relu"}),
    ("gpt2", "GPT2LMHeadModel", {"activation_function": "silu", "n_inner": 36}),
    ("opt", "OPTForCausalLM", {"do_layer_norm_before": False}),
    ("opt", "OPTForCausalLM", {"word_embed_proj_dim": 12}),
    ("opt", "OPTForCausalLM", {"activation_function": "gelu"}),
    ("bert", "BertForMaskedLM", {"tie_word_embeddings": False}),
    ("bert", "BertForTokenClassification", {}),
    ("bert", "BertForPreTraining", {}),
    ("t5", "T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    ("gpt_neox", "GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    ("gpt_neox", "GPTNeoXForCausalLM",
     {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                          "partial_rotary_factor": 1.0}}),
    ("gpt_neox", "GPTNeoXForCausalLM",
     {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                          "partial_rotary_factor": 0.5}}),
    ("phi3", "Phi3ForCausalLM",
     {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                          "partial_rotary_factor": 0.5}}),
    ("resnet", "ResNetForImageClassification", {"layer_type": "basic"}),
    ("resnet", "ResNetForImageClassification", {"downsample_in_first_stage": True}),
    ("mixtral", "MixtralForCausalLM", {"num_local_experts": 5}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name", "changes"), SETTINGS, ids=[f"{m} {list(c)}" for m, _, c in SETTINGS]
)
def test_it_holds_for_other_settings_too(model: str, name: str, changes: dict[str, Any]) -> None:
    made = make_twin(model_class(name), config_of(model, name, changes))
    made = Twin(twin_of(made.module, seed=3), made.inputs, made.headed)
    assert max(deviations(made, merge.symmetry_of(made.module)).values()) < 1e-10


def test_the_rotary_coordinates_may_not_be_permuted() -> None:
    """The groups that are frozen within an axis, each alone."""
    for model, name in [("llama", "LlamaForCausalLM"), ("gpt_neox", "GPTNeoXForCausalLM")]:
        made = twin(model, name)
        symmetry = merge.symmetry_of(made.module)
        frozen = [g for g in symmetry.groups.values() if not g.flags]
        assert frozen
        check = Check(made.module, made.inputs, pick=main_outputs)
        for group in frozen:
            free = type(group)(group.name, group.size)
            groups = {**symmetry.groups, group.name: free}
            larger = Symmetry(groups, symmetry.tensors)
            element = alone(symmetry, dict(symmetry.tensors), free)
            assert check.deviation(larger, element) > 1e-2


# -- on disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [("llama", "LlamaForCausalLM"), ("mixtral", "MixtralForCausalLM"), ("vit", "ViTModel"),
     ("swin", "SwinForImageClassification"), ("bert", "BertForMaskedLM")],
)  # fmt: skip
def test_files_that_are_permuted_load_as_the_same_function(
    model: str, name: str, tmp_path: Path
) -> None:
    made = twin(model, name)
    made.module.save_pretrained(tmp_path)  # type: ignore[operator]
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    symmetry = merge.symmetry_of(tmp_path, outputs="fixed")
    moved = apply(symmetry, tensors, random_element(symmetry, 5))
    assert sum(not torch.equal(moved[n], t) for n, t in tensors.items()) > len(tensors) / 2
    save_file({n: t.contiguous() for n, t in moved.items()}, file, {"format": "pt"})
    again = model_class(name).from_pretrained(tmp_path, dtype=torch.float64).eval()
    again.set_attn_implementation("eager")
    if hasattr(made.module.config, "num_experts_per_tok"):
        again.set_experts_implementation("batched_mm")
    for key, value in made.module.named_buffers():
        if key not in made.module.state_dict():  # tables in float64, as in the twin
            again.get_buffer(key).data = value.clone()
    check = Check(made.module, {k: _double(v) for k, v in made.inputs.items()}, pick=main_outputs)
    found = Check(again, {k: _double(v) for k, v in made.inputs.items()}, pick=main_outputs)
    for key, wanted in check.expected.items():
        torch.testing.assert_close(found.expected[key], wanted, rtol=1e-9, atol=1e-9)


def _double(value: Any) -> Any:
    return (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


def test_experts_on_disk_are_counted_by_their_names() -> None:
    template = template_of("mixtral")
    assert template is not None
    (variant,) = template.variants
    pattern = "[model.]layers.{i}.block_sparse_moe.experts.{e{i}}.w1.weight"
    assert list(map(str, variant.spec.tensors[pattern])) == ["|f{i}|", "d"]
    assert variant.spec.groups["f{i}"].per == ("e{i}",)


# -- what is shipped -----------------------------------------------------------------------------


def test_every_family_is_shipped_and_no_other() -> None:
    assert shipped() == sorted(FAMILIES)
    asked = "llama mistral qwen2 qwen3 gemma gemma2 gemma3 gemma3_text phi3 gpt2 gpt_neox opt bert"
    asked += " roberta distilbert vit deit clip t5 whisper mixtral qwen3_moe resnet convnext swin"
    assert set(asked.split()) <= set(shipped())


@pytest.mark.parametrize("model", ["vit", "phi3"])
def test_a_template_is_what_is_derived(model: str) -> None:
    template = template_of(model)
    assert template is not None
    assert text_of(build(FAMILIES[model])) == text_of(template)


def settings_of(family: Family) -> list[dict[str, Any]]:
    """Each value of each switch, the others at their first."""
    first = [s.values[0][1] for s in family.switches]
    found = [{k: v for change in first for k, v in change.items()}]
    for number, switch in enumerate(family.switches):
        for _, change in switch.values[1:]:
            changes = [*first[:number], *first[number + 1 :], change]
            found.append({k: v for each in changes for k, v in each.items()})
    return found


def canonical(symmetry: Symmetry) -> tuple[dict[str, list[str]], dict[str, Any], dict[str, str]]:
    """Axes of all tensors, sizes and parents of all groups, and flags, whatever they are called."""
    names: dict[str, str] = {}

    def named(group: str) -> str:
        return names.setdefault(group, f"g{len(names)}")

    def text(part: Axis | Factor) -> str:
        if isinstance(part, Axis):
            return " + ".join(".".join(map(text, product)) for product in part.parts)
        return f"{named(part.group)}{part.form}:{part.size}" if part.group else f"_:{part.size}"

    axes = {n: [text(a) for a in t.axes] for n, t in sorted(symmetry.tensors.items())}
    groups = {
        named(n): (g.size, sorted(map(named, g.per))) for n, g in sorted(symmetry.groups.items())
    }
    return axes, groups, {named(n): "".join(sorted(g.flags)) for n, g in symmetry.groups.items()}


EVERY = [(model, setting) for model, family in FAMILIES.items() for setting in settings_of(family)]


@pytest.mark.parametrize(
    ("model", "setting"), EVERY, ids=[f"{m} {[*s.values()]}"[:60] for m, s in EVERY]
)
def test_every_setting_of_a_template_is_what_one_twin_shows(
    model: str, setting: dict[str, Any]
) -> None:
    """The first class of every family, by each value of each switch, derived from scratch."""
    family = FAMILIES[model]
    kind = model_class(family.heads[0])
    made = make_twin(kind, twin_config(family, kind, setting, 0), seed=0)
    derived = derive(made.module, made.inputs, pick=main_outputs).symmetry
    axes, groups, flags = canonical(derived)
    found = canonical(merge.symmetry_of(made.module))
    assert found[:2] == (axes, groups)
    if "gated" in str(setting):  # joined with settings in which signs pass nowhere
        assert all(set(found[2][g]) <= set(flags[g]) for g in flags)
        return
    assert found[2] == flags


@pytest.mark.parametrize("model", FAMILIES)
def test_nothing_in_a_template_was_left_out(model: str) -> None:
    """No operator was unknown, no check failed; sizes are over keys that the config has."""
    template = template_of(model)
    assert template is not None
    assert not any(v.spec.notes for v in template.variants)
    staged = model in ("resnet", "convnext", "swin")  # of which all have four
    assert staged or not any(goes_by_layer(v.spec) for v in template.variants)
    for variant in template.variants:
        words = {f for axes in variant.spec.tensors.values() for a in axes for f in str(a).split()}
        assert not any("operator" in w or "unused_a" in w or "_disk" in w for w in words)


def test_templates_are_small_and_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from merge.symmetry.templates import shipped, template_of\n"
        "assert all(template_of(m) for m in shipped())\n"
        "print(*(m for m in ('torch', 'transformers', 'numpy') if m in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# -- structures that a template does not have ------------------------------------------------------
@pytest.mark.parametrize(
    "sizes",
    [
        {"embedding_size": 10, "hidden_sizes": [10, 14, 18, 22], "layer_type": "basic"},
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "layer_type": "bottleneck"},
        {"embedding_size": 8, "hidden_sizes": [10, 14], "layer_type": "basic"},
        {"embedding_size": 8, "hidden_sizes": [12, 16, 20, 24, 28], "layer_type": "bottleneck"},
    ],
    ids=["no projection", "no projection in bottlenecks", "two stages", "five stages"],
)
def test_a_resnet_of_another_structure_is_not_taken_for_that_of_the_template(
    sizes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in resnet-18, whose first stage adds to what it got, without a projection of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    twins = FAMILIES["resnet"].twins
    assert twins is not None
    config = {**twins[0], **sizes, "depths": [2] * len(sizes["hidden_sizes"])}
    template = template_of("resnet")
    assert template is not None and template.find(config) is None
    made = make_twin(model_class("ResNetForImageClassification"), config)
    whole = Twin(twin_of(made.module, seed=3), made.inputs, made.headed)
    symmetry = merge.symmetry_of(whole.module)
    assert max(deviations(whole, symmetry).values()) < 1e-10
    assert sum(bool(g.flags) for g in symmetry.groups.values()) >= 7
