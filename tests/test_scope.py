"""Part of a model merged and the rest copied; tensors that not every model has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge
from merge import applying
from merge.checkpoint.memory import open_state_dict
from merge.errors import MergeError, RecipeError
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import reads
from merge.ir.reference import Reference
from merge.ir.side import Side
from merge.recipe.compile import Compiled, compile_recipe
from merge.recipe.read import parse_recipe

from .architectures import DECODERS, PARTS, PICTURE, Family, loaded_model, new_model
from .conftest import write_model
from .tiny import assert_near, assert_same, noise
from .tokens import byte_level, save_tokenizer

LLAVA = [
    "model.vision_tower.encoder.layers.0.w",
    "model.multi_modal_projector.linear.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.w",
    "model.language_model.layers.1.w",
    "lm_head.weight",
]
TEXT = LLAVA[2:]
LLAMA = [n.replace("model.language_model.", "model.") for n in TEXT]
NAMES = {"llava": LLAVA, "llava2": LLAVA, "llama": LLAMA, "llama2": LLAMA}


def value(called: str, name: str) -> Tensor:
    shape = (9, 4) if "embed" in name or "head" in name else (4, 4)
    return noise(called, name.replace("model.language_model.", "model."), shape=shape)


def opener(reference: Reference) -> Checkpoint:
    called = str(reference)
    return open_state_dict({n: value(called, n) for n in NAMES[called]}, called)


def compiled(text: str) -> Compiled:
    return compile_recipe(parse_recipe(text), opener)


def scoped(models: str, scope: str = "text", more: str = "", method: str = "linear") -> str:
    listed = "".join(f"- {{model: {m}}}\n" for m in models.split())
    head = f"merge_method: {method}\nscope: {scope}\n{more}parameters: {{weight: 1}}\n"
    return f"{head}models:\n{listed}"


def mean(name: str, *models: str) -> Tensor:
    return torch.stack([value(m, name).double() for m in models]).mean(0)


# -- scope -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("models", ["llava llama", "llama llava"])
def test_a_text_model_is_merged_into_the_text_of_a_llava(models: str) -> None:
    """Whatever the order, the model that holds more than the scope is the donor."""
    made = compiled(scoped(models))
    found = made.checkpoint.state_dict()
    assert set(found) == set(LLAVA)
    for name in LLAVA:
        if name in TEXT:
            assert_near(found[name], mean(name, "llava", "llama"))
        else:
            assert_same(found[name], value("llava", name))
    assert any("no part of the scope 'text'" in n for n in made.notes)
    assert any("'model.' as 'model.language_model.'" in n for n in made.checkpoint.notes)


def test_the_difference_of_two_text_models_is_added_to_a_llavas_text() -> None:
    text = scoped("llava llama2", more="base_model: llama\n", method="task_arithmetic")
    found = compiled(text).checkpoint.state_dict()
    assert set(found) == set(LLAVA)
    for name in LLAVA:
        if name in TEXT:
            base, a, b = (value(m, name).double() for m in ("llama", "llava", "llama2"))
            assert_near(found[name], base + (a - base) + (b - base))
        else:
            assert_same(found[name], value("llava", name))


def test_the_rest_is_copied_byte_for_byte_and_the_other_models_is_named() -> None:
    made = compiled(scoped("llava llava2"))
    plan = made.checkpoint.plan()
    rest = [s for s in plan.steps if s.output.name not in TEXT]
    assert len(rest) == 2 and all(len(s.reads) == 1 and s.expr is s.reads[0] for s in rest)
    dropped = made.checkpoint.dropped
    assert set(dropped) == set(LLAVA) - set(TEXT)
    assert set(dropped.values()) == {"the recipe takes other parts of llava2"}


SCOPES = {
    "text": TEXT,
    "vision": LLAVA[:1],
    "projector": LLAVA[1:2],
    "vision_tower": LLAVA[:1],
    "language_model": TEXT,
    "model.language_model.layers": LLAVA[3:5],
    "model.language_model.layers.1": LLAVA[4:5],
    "lm_head": LLAVA[5:],
}


@pytest.mark.parametrize(("scope", "names"), SCOPES.items(), ids=SCOPES)
def test_a_scope_is_a_sense_a_stack_or_a_prefix(scope: str, names: list[str]) -> None:
    found = compiled(scoped("llava llava2", scope)).checkpoint.state_dict()
    for name in LLAVA:
        if name in names:
            assert_near(found[name], mean(name, "llava", "llava2"))
        else:
            assert_same(found[name], value("llava", name))


def test_a_scope_has_the_depth_of_its_own_layers() -> None:
    text = scoped("llava llama", more="base_model: llava\n", method="slerp")
    text = text.replace("weight: 1", "t: [0, 1]")
    found = compiled(text).checkpoint.state_dict()
    assert_near(found[LLAVA[3]], value("llava", LLAVA[3]))
    assert_near(found[LLAVA[4]], value("llama", LLAVA[4]))


@pytest.mark.parametrize("scope", ["vision", "text"])
def test_a_head_counts_where_it_is_in_the_scope(scope: str) -> None:
    """One llava ties its head and the other does not; the towers know nothing of it."""

    def opened(reference: Reference) -> Checkpoint:
        made = opener(reference)
        if str(reference) == "llava2":
            return made
        tensors = {n: e for n, e in made.tensors.items() if n != LLAVA[5]}
        side = Side(config={"tie_word_embeddings": True, "vocab_size": 9})
        return replace(made, tensors=tensors, side=side)

    made = compile_recipe(parse_recipe(scoped("llava llava2", scope)), opened).checkpoint
    assert made.side.config["tie_word_embeddings"] is (scope == "vision")
    found = made.state_dict()
    assert (LLAVA[5] in found) is (scope == "text")
    if scope == "text":
        tied, own = value("llava", LLAVA[2]).double(), value("llava2", LLAVA[5]).double()
        assert_near(found[LLAVA[5]], (tied + own) / 2)


def test_an_unknown_part_comes_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match="belongs to scope 'txet'") as caught:
        compiled(scoped("llava llama", "txet"))
    assert (caught.value.where["line"], caught.value.where["column"]) == ("2", "1")
    for part in ("text", "vision", "projector", "model.language_model.layers", "lm_head"):
        assert part in str(caught.value.expected)
    assert "'text'" in str(caught.value.do)


def test_a_part_by_the_name_that_a_text_model_has_for_it_comes_with_the_donors() -> None:
    with pytest.raises(RecipeError, match="no tensor of llava belongs to scope") as caught:
        compiled(scoped("llama llava", "model.layers"))
    assert "model.language_model.layers" in str(caught.value.expected)


def test_a_base_of_equal_parts_is_the_donor() -> None:
    text = scoped("llava llava2", more="base_model: llava2\n", method="task_arithmetic")
    found = compiled(text).checkpoint.state_dict()
    assert_same(found[LLAVA[0]], value("llava2", LLAVA[0]))


def test_a_scope_is_not_for_slices_or_modules() -> None:
    slices = "slices: [{sources: [{model: llama, layer_range: [0, 1]}]}]\n"
    with pytest.raises(RecipeError, match="a scope is of whole models") as caught:
        compiled(f"merge_method: passthrough\nscope: text\n{slices}")
    assert caught.value.found == "slices" and caught.value.where["line"] == "2"


def test_modules_take_models_of_one_part_too() -> None:
    text = (
        "merge_method: linear\nbase_model: llava\nparameters: {weight: 1}\nmodules:\n"
        "  text_decoder:\n    models: [{model: llava}, {model: llama}]\n"
        "  vision_tower:\n    models: [{model: llava}, {model: llava2}]\n"
    )
    found = compiled(text).checkpoint.state_dict()
    for name, models in (
        *((n, ("llava", "llama")) for n in TEXT),
        (LLAVA[0], ("llava", "llava2")),
    ):
        assert_near(found[name], mean(name, *models))
    assert_same(found[LLAVA[1]], value("llava", LLAVA[1]))


# -- missing ---------------------------------------------------------------------------------------

HAS = {"a": "xyz", "b": "xy", "c": "xz", "d": "wxyz"}
"""Which of four tensors each model has."""


def odd(reference: Reference) -> Checkpoint:
    called = str(reference)
    state = {f"layers.0.{n}": noise(called, n) for n in HAS[called]}
    return open_state_dict(state, called)


def with_missing(rule: str, models: str, method: str = "linear", **more: Any) -> Compiled:
    keys = "".join(f"{k}: {v}\n" for k, v in more.items())
    listed = "".join(f"- {{model: {m}}}\n" for m in models.split())
    weights = "" if method == "slerp" else "parameters: {weight: 1}\n"
    rule = f"missing: {rule}\n" if rule else ""
    text = f"merge_method: {method}\n{rule}{keys}{weights}models:\n{listed}"
    return compile_recipe(parse_recipe(text), odd)


def near(found: Mapping[str, Tensor], **wanted: Tensor) -> None:
    assert set(found) == {f"layers.0.{n}" for n in wanted}
    for name, tensor in wanted.items():
        assert_near(found[f"layers.0.{name}"], tensor)


def avg(name: str, *models: str) -> Tensor:
    return torch.stack([noise(m, name).double() for m in models]).mean(0)


@pytest.mark.parametrize("models", ["a b", "b a", "a d"])
def test_what_not_all_have_is_an_error_that_names_it_and_the_key(models: str) -> None:
    with pytest.raises(MergeError, match="do not hold the same tensors") as caught:
        with_missing("", models)
    assert "layers.0." in str(caught.value.found)
    assert "missing: base" in str(caught.value.do)


def test_base_takes_the_donors() -> None:
    made = with_missing("base", "a b d")
    near(
        made.checkpoint.state_dict(),
        x=avg("x", "a", "b", "d"),
        y=avg("y", "a", "b", "d"),
        z=noise("a", "z"),
    )
    assert made.checkpoint.dropped == {
        "layers.0.w": "a has no such tensor (d has)",
        "layers.0.z": "not every model has it, and a's is taken",
    }
    assert any("are a's as they are: layers.0.z" in n for n in made.checkpoint.notes)


def test_skip_merges_those_that_have_it() -> None:
    made = with_missing("skip", "a b c d")
    near(
        made.checkpoint.state_dict(),
        x=avg("x", "a", "b", "c", "d"),
        y=avg("y", "a", "b", "d"),
        z=avg("z", "a", "c", "d"),
    )
    assert "layers.0.w" in made.checkpoint.dropped
    assert any("merged among those that have them" in n for n in made.checkpoint.notes)


def test_each_models_own_parameters_stay_with_it() -> None:
    text = (
        "merge_method: linear\nmissing: skip\nmodels:\n"
        "- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 5}}\n"
        "- {model: c, parameters: {weight: 3}}\n"
    )
    found = compile_recipe(parse_recipe(text), odd).checkpoint.state_dict()
    a, c = noise("a", "z").double(), noise("c", "z").double()
    assert_near(found["layers.0.z"], (a + 3 * c) / 4)


def test_a_method_that_takes_two_copies_what_one_has() -> None:
    made = with_missing("skip", "a b", "slerp", base_model="a", parameters="{t: 0.5}")
    assert_same(made.checkpoint.state_dict()["layers.0.z"], noise("a", "z"))


def test_differences_to_a_base_that_lacks_the_tensor_are_none() -> None:
    made = with_missing("skip", "a d", "task_arithmetic", base_model="c")
    found = made.checkpoint.state_dict()
    assert set(found) == {"layers.0.x", "layers.0.z"}
    c, a, d = (noise(m, "z").double() for m in "cad")
    assert_near(found["layers.0.z"], c + (a - c) + (d - c))
    assert set(made.checkpoint.dropped) == {"layers.0.y", "layers.0.w"}


def test_a_delta_of_the_one_that_has_it() -> None:
    found = with_missing("skip", "b d", "ties", base_model="a").checkpoint.state_dict()
    assert_near(found["layers.0.z"], noise("d", "z").double())


def test_explained_are_the_models_that_have_it() -> None:
    shown = with_missing("skip", "a b c").explain("layers.0.z")[0]
    assert shown.inputs == ("a[layers.0.z]", "c[layers.0.z]")
    assert [r.model for r in shown.reasons if r.parameter == "weight"] == ["a", "c"]
    copied = with_missing("base", "a b c").explain("layers.0.z")[0]
    assert (copied.method, copied.inputs) == ("missing: base", ("a[layers.0.z]",))


def test_the_library_has_the_key_too() -> None:
    models = [odd(Reference(m)) for m in "ab"]
    found = merge.linear(models, weight=1.0, missing="skip").state_dict()
    near(found, x=avg("x", "a", "b"), y=avg("y", "a", "b"), z=noise("a", "z"))
    with pytest.raises(RecipeError, match="missing") as caught:
        merge.linear(models, weight=1.0, missing="bse")
    assert "'base'" in str(caught.value.do)


def test_a_word_that_is_none_has_its_place() -> None:
    with pytest.raises(RecipeError, match="'missing' is wrong") as caught:
        with_missing("skp", "a b")
    assert caught.value.where["line"] == "2" and "'skip'" in str(caught.value.do)


def test_the_command_line_overrides_the_recipe(make_model: Any, tmp_path: Path) -> None:
    folders = [make_model(m, {f"layers.0.{n}": noise(m, n) for n in HAS[m]}) for m in ("a", "b")]
    listed = "".join(f"- {{model: {f}}}\n" for f in folders)
    (tmp_path / "r.yml").write_text(
        f"merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n{listed}"
    )
    with pytest.raises(MergeError, match="do not hold the same"):
        applying.plan_recipe(tmp_path / "r.yml")
    planned = applying.plan_recipe(tmp_path / "r.yml", missing="base")
    assert len(planned.plan.steps) == 3
    merge.apply(tmp_path / "r.yml", tmp_path / "out", missing="skip")
    assert len(merge.open(tmp_path / "out")) == 3


# -- nothing is lost without a word ----------------------------------------------------------------

ACCOUNTS = {
    "a scope": (scoped("llava llava2"), opener, "llava llava2"),
    "a scope of a text model": (scoped("llava llama"), opener, "llava llama"),
    "modules": (
        "merge_method: linear\nbase_model: llava\nparameters: {weight: 1}\nmodules:\n"
        "  text: {models: [{model: llava}, {model: llava2}]}\n",
        opener,
        "llava llava2",
    ),
    **{
        rule: (
            f"merge_method: linear\nmissing: {rule}\nparameters: {{weight: 1}}\nmodels:\n"
            "- {model: a}\n- {model: b}\n- {model: c}\n- {model: d}\n",
            odd,
            "a b c d",
        )
        for rule in ("base", "skip")
    },
}


@pytest.mark.parametrize(("text", "opened", "models"), ACCOUNTS.values(), ids=ACCOUNTS)
def test_every_tensor_of_every_model_is_in_the_result_or_dropped_with_a_reason(
    text: str, opened: Any, models: str
) -> None:
    made = compile_recipe(parse_recipe(text), opened).checkpoint
    read = {(r.source.identity, r.spec.name) for e in made.tensors.values() for r in reads(e)}
    for called in models.split():
        for name in opened(Reference(called)):
            in_tree = (
                name
                if name in made or name in made.dropped
                else name.replace("model.", "model.language_model.", 1)
            )
            assert (called, name) in read or made.dropped.get(in_tree), (called, name)


# -- models of transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("original", [True, False])
def test_a_llama_in_the_text_tower_of_a_llava_loads(original: bool, tmp_path: Path) -> None:
    family = PARTS["llava text"]
    llava, llama = new_model(family), new_model(DECODERS["llama"])
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(torch.randn_like(parameter))
    llava.save_pretrained(tmp_path / "llava", save_original_format=original)
    llama.save_pretrained(tmp_path / "llama")
    (tmp_path / "r.yml").write_text(
        f"merge_method: linear\nscope: text\nparameters: {{weight: 1}}\nmodels:\n"
        f"- model: {tmp_path / 'llava'}\n- model: {tmp_path / 'llama'}\n"
    )
    merge.apply(tmp_path / "r.yml", tmp_path / "out")
    before, text = llava.state_dict(), llama.state_dict()
    for name, tensor in loaded_model(family, tmp_path / "out").state_dict().items():
        own = name.replace("model.language_model.", "model.")
        if own in text:
            assert_near(tensor, (before[name].double() + text[own].double()) / 2)
        else:
            assert_same(tensor, before[name])


def test_a_text_model_of_another_vocabulary_goes_into_a_union(tmp_path: Path) -> None:
    """The rows of both are those of one tokenizer; the donor's config follows, wherever it is."""
    fox, sea = (byte_level(text, 270) for text in ("the quick brown fox", "the sea was quiet"))
    rows, sizes = {"llava": 280, "llama": 272}, {"llava": fox, "llama": sea}
    for called, names in (("llama", LLAMA), ("llava", LLAVA)):
        state = {n: value(called, n) for n in names}
        state |= {
            n: noise(called, n, shape=(rows[called], 4))
            for n in names
            if "embed" in n or "head" in n
        }
        said = {"vocab_size": rows[called]}
        config = {"text_config": said} if called == "llava" else said
        write_model(tmp_path / called, state, config=config)
        save_tokenizer(sizes[called], tmp_path / called, bos_token="<s>", eos_token="</s>")
    text = scoped(f"{tmp_path / 'llama'} {tmp_path / 'llava'}", more="tokenizer_source: union\n")
    (tmp_path / "r.yml").write_text(text)
    merge.apply(tmp_path / "r.yml", tmp_path / "out")
    tokens = {*fox.get_vocab(), *sea.get_vocab()}
    found = merge.open(tmp_path / "out")
    embedded, head = found["model.language_model.embed_tokens.weight"], found["lm_head.weight"]
    assert embedded.shape == head.shape and embedded.shape[0] >= len(tokens)
    assert found.side.config == {"text_config": {"vocab_size": embedded.shape[0]}}
    assert_same(found.state_dict()[LLAVA[0]], value("llava", LLAVA[0]))
    kept = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    first = kept["model"]["vocab"]
    assert all(first[t] == i for t, i in fox.get_vocab().items() if t in first)


@pytest.mark.parametrize("original", [True, False])
def test_a_head_of_its_own_unties_a_model_that_sees(original: bool, tmp_path: Path) -> None:
    """Mistral 3 ties its head and Mistral does not; in the result's tree the head has its place."""
    small = {**DECODERS["mistral"].config}
    kinds = {
        "sees": Family(
            "Mistral3ForConditionalGeneration",
            {
                "text_config": {"model_type": "mistral", **small},
                "vision_config": {"model_type": "pixtral", **PICTURE, "patch_size": 4,
                                  "num_hidden_layers": 1, "head_dim": 8},
            },
            {},
        ),
        "text": DECODERS["mistral"],
    }  # fmt: skip
    models = {name: new_model(family) for name, family in kinds.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, save_original_format=original)
    listed = f"{tmp_path / 'sees'} {tmp_path / 'text'}"
    (tmp_path / "r.yml").write_text(scoped(listed))
    merge.apply(tmp_path / "r.yml", tmp_path / "out")
    head = "language_model.lm_head.weight" if original else "lm_head.weight"
    assert head in merge.open(tmp_path / "out")
    loaded = loaded_model(kinds["sees"], tmp_path / "out")
    sees, text = (m.state_dict() for m in models.values())
    both = (
        sees["model.language_model.embed_tokens.weight"].double() + text["lm_head.weight"].double()
    )
    assert_near(loaded.lm_head.weight.detach(), both / 2)
    assert loaded.config.tie_word_embeddings is False
