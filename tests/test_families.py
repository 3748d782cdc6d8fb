"""Models of transformers with layers stacked anew: config.json follows, they load and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import merge
from merge import methods
from merge.families.config import relayer
from merge.families.modules import modules_of

from .architectures import DECODERS, ORDER, PARTS, TOKENS, Family, loaded_model, new_model
from .conftest import MakeModel
from .tiny import noise


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
    new_model(family).save_pretrained(tmp_path / "a")
    (tmp_path / "r.yml").write_text(recipe(family, tmp_path / "a"))
    planned = merge.applying.plan_recipe(tmp_path / "r.yml")
    merge.applying.apply_plan(planned, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, wanted in family.after.items():
        if isinstance(wanted, dict):
            assert {k: config[key].get(k) for k in wanted} == wanted, key
        else:
            assert config.get(key) == wanted, key
    notes = [n for n in planned.compiled.notes if n.startswith("config.json")]
    assert (family.noted in " ".join(notes)) if family.noted else not notes
    loaded = loaded_model(family, tmp_path / "out")
    inputs = family.inputs or {"input_ids": TOKENS}
    with torch.no_grad():
        found = loaded(**inputs)
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


# -- a family that nobody has heard of -------------------------------------------------------------

INVENTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "by the stack's word": ({"num_decks": 3, "width": 3}, {"num_decks": 4, "width": 3}),
    "by a word for layers": ({"layer_count": 3}, {"layer_count": 4}),
    "in a part": ({"core_config": {"n_deck": 3}}, {"core_config": {"n_deck": 4}}),
    "with a list": (
        {"num_decks": 3, "deck_kinds": ["a", "b", "c"]},
        {"num_decks": 4, "deck_kinds": ["a", "b", "b", "c"]},
    ),
}
UNCLEAR = {
    "two keys": {"num_decks": 3, "num_blocks": 3},
    "no word for it": {"width": 3},
    "another number": {"num_decks": 5},
    "no number": {"num_decks": "3"},
    "a customary key of another number": {"num_hidden_layers": 7, "num_decks": 3},
}


@pytest.mark.parametrize(("config", "after"), INVENTED.values(), ids=INVENTED)
def test_an_unknown_count_is_found_by_its_name_and_number(
    config: dict[str, Any], after: dict[str, Any]
) -> None:
    found = relayer(config, "core.decks", 3, [(config, i) for i in ORDER])
    assert found.counted and found.config == after


@pytest.mark.parametrize("config", UNCLEAR.values(), ids=UNCLEAR)
def test_a_count_that_is_not_clear_is_left_to_the_author(config: dict[str, Any]) -> None:
    found = relayer(config, "core.decks", 3, [(config, i) for i in ORDER])
    assert not found.counted and found.config == config


def invented(called: str) -> dict[str, torch.Tensor]:
    names = [f"core.decks.{i}.{part}" for i in range(3) for part in ("mixer.weight", "gain")]
    shapes = {n: (4, 4) if n.endswith("weight") else (4,) for n in names}
    shapes |= {"core.lexicon.weight": (9, 4), "core.close.gain": (4,), "speak.weight": (9, 4)}
    return {n: noise(called, n, shape=s) for n, s in shapes.items()}


def test_models_of_an_unknown_family_merge_by_every_method(make_model: MakeModel) -> None:
    models = [make_model(m, invented(m), config={"model_type": "ark"}) for m in "abc"]
    for name, method in methods.registry().items():
        least, most = method.inputs
        count = min(max(least, 2), most or 2)
        needed = {k: 0.5 for k, s in method.parameters.items() if s.required}
        if method.statistics and name != "fisher":
            continue  # statistics of its own shapes: those of weights are refused
        known = {"statistics": models[:count]} if method.statistics else {}
        base = {} if method.base == "donor" else {"base": models[2]}
        if method.base == "first operand":
            count -= 1
        made = getattr(merge, name)(models[:count], **base, **needed, **known)
        assert set(made) == set(invented("a")), name
        assert all(t.isfinite().all() for t in made.state_dict().values()), name


@pytest.mark.parametrize("counted", [True, False])
def test_layers_of_an_unknown_family_are_stacked_anew(
    counted: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    config = {"model_type": "ark", **({"num_decks": 3} if counted else {})}
    model = make_model("a", invented("a"), config=config)
    (tmp_path / "r.yml").write_text(recipe(Family("", {}, {}), model))
    planned = merge.applying.plan_recipe(tmp_path / "r.yml")
    merge.applying.apply_plan(planned, tmp_path / "out")
    found = merge.open(tmp_path / "out").state_dict()
    for new, old in enumerate(ORDER):
        for part in ("mixer.weight", "gain"):
            wanted = invented("a")[f"core.decks.{old}.{part}"]
            assert torch.equal(found[f"core.decks.{new}.{part}"], wanted)
    assert torch.equal(found["core.lexicon.weight"], invented("a")["core.lexicon.weight"])
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said.get("num_decks") == (4 if counted else None)
    noted = [n for n in planned.compiled.notes if "set the count by hand" in n]
    assert bool(noted) is not counted and all("core.decks" in n for n in noted)


def test_an_unknown_embedding_between_two_models_is_noted(make_model: MakeModel) -> None:
    config = {"model_type": "ark", "num_decks": 3, "vocab_size": 9}
    a, b = (make_model(m, invented(m), config=config) for m in "ab")
    text = "merge_method: passthrough\nslices:\n"
    for model in (a, b):
        text += f"- sources: [{{model: {model}, layer_range: [0, 1]}}]\n"
    (a.parent / "r.yml").write_text(text)
    notes = merge.applying.plan_recipe(a.parent / "r.yml").compiled.notes
    assert any("whether core.lexicon.weight" in n and "last slice" in n for n in notes)


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
