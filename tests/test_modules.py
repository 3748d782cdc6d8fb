"""Modules: parts of a model merged each in its own way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, CLIPConfig, CLIPModel

import merge
from merge import applying
from merge.checkpoint.memory import open_state_dict
from merge.errors import RecipeError
from merge.ir.reference import Reference
from merge.recipe.compile import Compiled, compile_recipe
from merge.recipe.read import parse_recipe

from .tiny import assert_near, assert_same, noise

NAMES = [
    "vision_tower.encoder.layers.0.w",
    "vision_tower.encoder.layers.1.w",
    "multi_modal_projector.linear.weight",
    "language_model.model.layers.0.w",
    "language_model.model.layers.1.w",
    "language_model.model.layers.2.w",
    "lm_head.weight",
]


def compiled(text: str) -> Compiled:
    """The recipe over vision-language models with values of their own."""

    def opener(reference: Reference) -> merge.Checkpoint:
        called = str(reference)
        return open_state_dict({n: noise(called, n) for n in NAMES}, called)

    return compile_recipe(parse_recipe(text), opener)


def modules(**parts: str) -> str:
    """A recipe that takes each module whole from the model it is given."""
    lines = [f"  {m}: {{models: [{{model: {of}}}]}}" for m, of in parts.items()]
    return "\n".join(["merge_method: passthrough", "modules:", *lines, ""])


WHOSE = {
    "all three": ({"text_decoder": "a", "vision_tower": "b", "multi_modal_projector": "c"},
                  "bbcaaaa", 0),
    "text and the rest": ({"text_decoder": "a", "default": "b"}, "bbbaaab", 0),
    "vision and the rest": ({"vision_tower": "b", "default": "a"}, "bbaaaaa", 0),
    "vision alone": ({"vision_tower": "b"}, "bbbbbbb", 5),
    "text alone": ({"language_model": "a"}, "aaaaaaa", 3),
    "a stack and the rest": ({"language_model.model.layers": "a", "default": "b"}, "bbbaaab", 0),
    "one within another": ({"language_model": "a", "model.layers": "b"}, "aaabbba", 3),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "whose", "rest"), WHOSE.values(), ids=WHOSE)
def test_each_module_is_of_its_model_and_the_rest_of_the_first(
    parts: dict[str, str], whose: str, rest: int
) -> None:
    made = compiled(modules(**parts))
    found = made.checkpoint.state_dict()
    assert set(found) == set(NAMES)
    for name, of in zip(NAMES, whose, strict=True):
        assert_same(found[name], noise(of, name)), name
    notes = [n for n in made.notes if "belong to no module" in n]
    assert [n.partition(" ")[0] for n in notes] == [str(rest)] * bool(rest)


def test_the_rest_is_the_bases() -> None:
    made = compiled(modules(vision_tower="b") + "base_model: c\n")
    found = made.checkpoint.state_dict()
    assert_same(found[NAMES[0]], noise("b", NAMES[0]))
    assert_same(found[NAMES[6]], noise("c", NAMES[6]))
    assert any("taken from c" in n for n in made.notes)


def test_a_module_has_its_own_depth_and_parameters() -> None:
    text = (
        "merge_method: task_arithmetic\nbase_model: base\nmodules:\n"
        "  text_decoder:\n    models: [{model: a}]\n    parameters: {weight: [0, 1]}\n"
        "  vision_tower:\n    models: [{model: a}]\n"
        "  multi_modal_projector:\n    models: [{model: a, parameters: {weight: 0.5}}]\n"
        "parameters: {weight: [1, 0]}\n"
    )
    found = compiled(text).checkpoint.state_dict()
    for name, w in zip(NAMES, (1, 0, 0.5, 0, 0.5, 1, 0), strict=True):
        base, a = noise("base", name).double(), noise("a", name).double()
        assert_near(found[name], base + w * (a - base))


def test_slices_of_one_module_leave_the_others() -> None:
    text = (
        "merge_method: passthrough\nmodules:\n  text_decoder:\n    slices:\n"
        "    - sources: [{model: a, layer_range: [0, 2]}]\n"
        "    - sources: [{model: b, layer_range: [1, 3]}]\n"
        "  default:\n    models: [{model: c}]\n"
    )
    found = compiled(text).checkpoint.state_dict()
    text_layers = [f"language_model.model.layers.{i}.w" for i in range(4)]
    assert set(found) == {*NAMES, *text_layers}
    for name, (of, old) in zip(text_layers, (("a", 0), ("a", 1), ("b", 1), ("b", 2)), strict=True):
        assert_same(found[name], noise(of, f"language_model.model.layers.{old}.w"))
    assert_same(found[NAMES[1]], noise("c", NAMES[1]))


REFUSED: dict[str, tuple[str, str, tuple[int, int]]] = {
    "an unknown module": (
        modules(vision_tower="a", decodr="a"),
        "no tensor of a belongs to module 'decodr'",
        (4, 3),
    ),
    "no module": ("merge_method: passthrough\nmodules: {}\n", "'modules' is wrong", (2, 1)),
    "a module of nothing": (
        "merge_method: passthrough\nmodules:\n  vision_tower: {}\n",
        "the key 'models' is missing here",
        (3, 3),
    ),
    "a module of nothing at all": (
        "merge_method: passthrough\nmodules:\n  vision_tower:\n",
        "'vision_tower' is wrong: it is no mapping of keys",
        (3, 3),
    ),
    "models and slices": (
        "merge_method: passthrough\nmodules:\n  vision_tower:\n    models: [{model: a}]\n"
        "    slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
        "both models and slices are given",
        (5, 5),
    ),
    "modules and models": (
        modules(default="a") + "models: [{model: a}]\n",
        "both models and modules are given",
        (2, 1),
    ),
    "slices of several stacks": (
        "merge_method: passthrough\nmodules:\n  default:\n"
        "    slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n",
        "several stacks",
        (4, 14),
    ),
    "a range past the module's end": (
        "merge_method: passthrough\nmodules:\n  vision_tower:\n"
        "    slices: [{sources: [{model: a, layer_range: [0, 3]}]}]\n",
        "a has no layer 2",
        (4, 36),
    ),
}


@pytest.mark.parametrize(("text", "what", "where"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_with_modules_has_its_place(
    text: str, what: str, where: tuple[int, int]
) -> None:
    with pytest.raises(RecipeError) as caught:
        compiled(text)
    assert what in caught.value.what
    assert (caught.value.where["line"], caught.value.where["column"]) == tuple(map(str, where))


def test_an_unknown_module_comes_with_those_there_are() -> None:
    with pytest.raises(RecipeError) as caught:
        compiled(modules(decodr="a"))
    for part in ("vision_tower.encoder.layers", "language_model", "multi_modal_projector"):
        assert part in str(caught.value.expected)


# -- models of transformers ------------------------------------------------------------------------


def written(tmp_path: Path, text: str) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    (tmp_path / "r.yml").write_text(text)
    planned = applying.plan_recipe(tmp_path / "r.yml")
    applying.apply_plan(planned, tmp_path / "out")
    return load_file(tmp_path / "out" / "model.safetensors"), planned.compiled.notes


def test_an_encoder_of_one_and_a_decoder_of_another(t5s: list[Path], tmp_path: Path) -> None:
    found, notes = written(tmp_path, modules(encoder=str(t5s[0]), decoder=str(t5s[1])))
    a, b = (load_file(t / "model.safetensors") for t in t5s)
    for name, tensor in found.items():
        assert_same(tensor, (b if name.startswith("decoder.") else a)[name])
    assert any("belong to no module" in n and "shared.weight" in n for n in notes)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[3, 4, 5]])
    assert loaded(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


def test_towers_of_clip(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
             "num_hidden_layers": 2}  # fmt: skip
    config = CLIPConfig(
        text_config={**small, "vocab_size": 40, "max_position_embeddings": 16},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    for name in "ab":
        CLIPModel(config).save_pretrained(tmp_path / name)
    parts = modules(text_model=str(tmp_path / "a"), vision_model=str(tmp_path / "b"))
    found, notes = written(tmp_path, parts)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    for name, tensor in found.items():
        assert_same(tensor, (b if name.startswith("vision_model.") else a)[name])
    assert any("3 tensors belong to no module" in n for n in notes)
    _, info = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
