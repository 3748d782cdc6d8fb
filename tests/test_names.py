"""Names between trees: which prefix stands for which, and when that is not clear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import merge
from merge.checkpoint.memory import open_state_dict
from merge.errors import PlanError
from merge.families.names import Rule, match_names
from merge.families.reconcile import reconcile

from .architectures import DECODERS, PARTS, Family, loaded_model, new_model, two_models
from .conftest import write_model
from .tiny import assert_near, assert_same, noise

Shapes = dict[str, tuple[int, ...]]


def shapes_of(name: str) -> Shapes:
    family = DECODERS.get(name) or PARTS[name]
    with torch.device("meta"):
        return {n: tuple(t.shape) for n, t in new_model(family).state_dict().items()}


def old_llava(new: Shapes) -> Shapes:
    """The names of a llava as transformers wrote them before its towers moved under ``model``."""
    moves = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    out = {}
    for name, shape in new.items():
        old = next(o for o in moves if name.startswith(o))
        out[moves[old] + name.removeprefix(old)] = shape
    return out


def without(shapes: Shapes, prefix: str) -> Shapes:
    return {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}


# -- laws ------------------------------------------------------------------------------------------

WORD = st.sampled_from(["model", "transformer", "bert", "language_model", "base"])
PREFIX = st.lists(WORD, max_size=3).map(lambda words: "".join(f"{w}." for w in words))


@given(PREFIX, PREFIX, st.sampled_from(["llama", "gpt2", "bert", "t5 encoder", "mixtral"]))
def test_a_rename_there_and_back(a: str, b: str, family: str) -> None:
    shapes = STORED[family]
    ours = {a + n: s for n, s in shapes.items()}
    theirs = {b + n: s for n, s in shapes.items()}
    there, back = match_names(ours, theirs).names, match_names(theirs, ours).names
    assert {there.get(n, n) for n in ours} == set(theirs)
    assert {back.get(there.get(n, n), there.get(n, n)): n for n in ours} == {n: n for n in ours}


STORED = {f: shapes_of(f) for f in ("llama", "gpt2", "bert", "t5 encoder", "mixtral")}


def test_equal_names_are_left_alone() -> None:
    shapes = STORED["llama"]
    assert not match_names(shapes, shapes).names
    part = dict(list(shapes.items())[:5])
    assert not match_names(part, shapes).names


# -- trees of transformers -------------------------------------------------------------------------

LLAVA = shapes_of("llava text")
OLD = old_llava(LLAVA)
BERT = without(STORED["bert"], "bert.")
TREES: dict[str, tuple[Shapes, Shapes, int]] = {
    "an old llava and a new": (OLD, LLAVA, len(OLD)),
    "a new llava and an old": (LLAVA, OLD, len(OLD)),
    "a text model and a llava": (STORED["llama"], LLAVA, len(STORED["llama"])),
    "a text model and an old llava": (STORED["llama"], OLD, len(STORED["llama"])),
    "a llava and a text model": (LLAVA, STORED["llama"], len(STORED["llama"])),
    "a bare bert and one for a task": (BERT, STORED["bert"], len(BERT)),
    "a bert for a task and a bare one": (STORED["bert"], BERT, len(BERT)),
    "qwen2-vl before and after": (
        {"visual.blocks.0.w": (4, 4), "model.layers.0.w": (4, 4), "lm_head.w": (9, 4)},
        {"model.visual.blocks.0.w": (4, 4), "model.language_model.layers.0.w": (4, 4),
         "lm_head.w": (9, 4)},
        3,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("own", "tree", "count"), TREES.values(), ids=TREES)
def test_every_counterpart_is_found_and_has_the_shape(
    own: Shapes, tree: Shapes, count: int
) -> None:
    names = match_names(own, tree).names
    found = {n: names.get(n, n) for n in own if names.get(n, n) in tree}
    assert len(found) == len(set(found.values())) == count
    assert all(own[n] == tree[new] for n, new in found.items())


def test_the_rules_are_prefix_for_prefix() -> None:
    assert match_names(STORED["llama"], LLAVA).rules == (Rule("model.", "model.language_model."),)
    assert set(match_names(OLD, LLAVA).rules) == {
        Rule("language_model.model.", "model.language_model."),
        Rule("vision_tower.vision_model.", "model.vision_tower."),
        Rule("", "model."),
        Rule("language_model.", ""),
    }


def test_a_longer_vocabulary_or_another_layer_does_not_hide_the_likeness() -> None:
    own = {n: (44, *s[1:]) if s[0] == 40 else s for n, s in STORED["llama"].items()}
    own |= {n.replace(".2.", ".3."): s for n, s in own.items() if ".2." in n}
    names = match_names(own, LLAVA).names
    assert names["model.layers.3.mlp.up_proj.weight"] == (
        "model.language_model.layers.3.mlp.up_proj.weight"
    )
    assert names["model.embed_tokens.weight"] == "model.language_model.embed_tokens.weight"


# -- what is not taken for a likeness --------------------------------------------------------------


def test_an_encoder_that_could_be_either_tower_is_refused() -> None:
    towers = {f"{t}.{n}": s for t in ("encoder", "decoder") for n, s in BERT.items()}
    with pytest.raises(PlanError, match="in several ways") as caught:
        match_names(BERT, towers)
    assert "'encoder.'" in str(caught.value.found) and "'decoder.'" in str(caught.value.found)
    encoder = {n: s for n, s in towers.items() if n.startswith("encoder.")}
    assert match_names(BERT, encoder).rules == (Rule("", "encoder."),)


def test_towers_of_other_widths_are_told_apart_by_shape() -> None:
    wide = {f"decoder.{n}": tuple(2 * d for d in s) for n, s in BERT.items()}
    towers = {f"encoder.{n}": s for n, s in BERT.items()} | wide
    assert match_names(BERT, towers).rules == (Rule("", "encoder."),)


def test_equal_ends_of_unlike_tensors_make_no_rule() -> None:
    own = {"roberta.encoder.layer.0.w": (4, 4), "roberta.pooler.dense.weight": (4, 4)}
    tree = {"roberta.encoder.layer.0.w": (4, 4), "classifier.dense.weight": (4, 4)}
    assert not match_names(own, tree).names
    inside = {"h.0.attn.out.weight": (4, 4), "h.0.b": (4,)}
    assert not match_names(inside, {"h.0.mlp.out.weight": (4, 4), "h.0.b": (4,)}).names


def test_layers_of_another_family_are_not_taken_for_these() -> None:
    """They share the names of norms, and no more."""
    neox = {n: s for n, s in shapes_of("gpt_neox").items() if n != "lm_head.weight"}
    assert not match_names(neox, STORED["llama"]).names


def test_names_of_other_shapes_make_no_rule() -> None:
    wide = {f"model.{n}": tuple(2 * d for d in s) for n, s in BERT.items()}
    assert not match_names(BERT, wide).names


# -- merges ----------------------------------------------------------------------------------------


def states(**prefixes: str) -> list[merge.Checkpoint]:
    """Models of equal shapes and values of their own, each with a prefix."""
    return [
        open_state_dict({p + n: noise(m, n, shape=s) for n, s in BERT.items()}, m)
        for m, p in prefixes.items()
    ]


def test_a_mean_of_models_with_different_prefixes() -> None:
    merged = merge.linear(states(a="bert.", b="", c="model.bert."), weight=1.0)
    found = merged.state_dict()
    assert set(found) == {f"bert.{n}" for n in BERT}
    for name, shape in BERT.items():
        wanted = sum(noise(m, name, shape=shape).double() for m in "abc") / 3
        assert_near(found[f"bert.{name}"], torch.as_tensor(wanted))
    said = [n for n in merged.plan().notes if "are read as" in n]
    assert len(said) == 2 and "'bert.' put before" in said[0] and "'model.' left out" in said[1]


def test_arithmetic_is_of_names_too() -> None:
    base, tuned = states(a="bert.", b="")
    found = (base + 0.5 * (tuned - base)).state_dict()
    for name, shape in BERT.items():
        both = (noise(m, name, shape=shape).double() for m in "ab")
        assert_near(found[f"bert.{name}"], sum(both) / 2)


def test_tied_names_move_with_the_others() -> None:
    shared = torch.randn(9, 4)
    state = {"embed_tokens.weight": shared, "layers.0.w": torch.randn(4, 4), "head.weight": shared}
    tree = {f"model.{n}": t.clone() for n, t in state.items()}
    _, other = reconcile([open_state_dict(tree, "a"), open_state_dict(state, "b")])
    assert other.tied == {"model.head.weight": "model.embed_tokens.weight"}
    assert set(other.tensors) == set(tree)


def saved(model: Any, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    model.save_pretrained(folder)
    return folder, model.state_dict()


def test_a_bare_bert_merged_into_one_for_a_task_loads(tmp_path: Path) -> None:
    """A bare model has no head, so the recipe says whose it is."""
    config = transformers.BertConfig(**DECODERS["bert"].config, num_labels=3)
    torch.manual_seed(1)
    task, a = saved(transformers.BertForSequenceClassification(config), tmp_path / "task")
    bare, b = saved(transformers.BertModel(config), tmp_path / "bare")
    recipe = f"merge_method: linear\nmodels: [{{model: {task}}}, {{model: {bare}}}]\n"
    (tmp_path / "r.yml").write_text(f"{recipe}parameters: {{weight: 0.5}}\nheads: base\n")
    merge.apply(tmp_path / "r.yml", tmp_path / "out")
    loaded, info = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        if name.startswith("classifier"):
            assert_same(tensor, a[name])
        else:
            assert_near(tensor, (a[name].double() + b[name.removeprefix("bert.")].double()) / 2)


def test_llavas_of_old_and_new_names_merge_and_load(tmp_path: Path) -> None:
    family = PARTS["llava text"]
    models = list(two_models(family))
    for model, form, name in zip(models, (True, False), "ab", strict=True):
        model.save_pretrained(tmp_path / name, save_original_format=form)
    for first, second in (("a", "b"), ("b", "a")):
        merged = merge.linear([tmp_path / first, tmp_path / second], weight=1.0)
        merged.save(tmp_path / f"{first}out")
        loaded = loaded_model(family, tmp_path / f"{first}out")
        ours, theirs = (m.state_dict() for m in models)
        for name, tensor in loaded.state_dict().items():
            assert_near(tensor, (ours[name].double() + theirs[name].double()) / 2)


def test_gpt2_as_it_was_first_saved_merges_with_a_fine_tune(tmp_path: Path) -> None:
    """The first file has no prefix, no head, and a causal mask in every layer."""
    family = DECODERS["gpt2"]
    first, tuned = two_models(family)
    state = {n.removeprefix("transformer."): t for n, t in first.transformer.state_dict().items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(3)}
    write_model(tmp_path / "first", {**state, **masks}, config=first.config.to_diff_dict())
    tuned.save_pretrained(tmp_path / "tuned")
    for models in (["first", "tuned"], ["tuned", "first"]):
        merged = merge.linear([tmp_path / m for m in models], weight=1.0)
        assert {n.removeprefix("transformer.") for n in merged.dropped} == set(masks)
        merged.save(tmp_path / "out", replace=True)
        ours, theirs = first.state_dict(), tuned.state_dict()
        for name, tensor in loaded_model(family, tmp_path / "out").state_dict().items():
            assert_near(tensor, (ours[name].double() + theirs[name].double()) / 2)


CONVERTED = {
    "vit": DECODERS["vit"],
    "llava": PARTS["llava text"],
    "gpt_neox": DECODERS["gpt_neox"],
    "mixtral": DECODERS["mixtral"],
    "clip": PARTS["clip text"],
}


@pytest.mark.parametrize("family", CONVERTED.values(), ids=CONVERTED)
def test_a_live_model_and_a_folder_under_the_names_of_files(family: Family, tmp_path: Path) -> None:
    """transformers holds these models under other names than it stores them."""
    live, stored = two_models(family)
    stored.save_pretrained(tmp_path / "a")
    ours, theirs = live.state_dict(), stored.state_dict()
    for models in ([live, tmp_path / "a"], [tmp_path / "a", live]):
        merged = merge.linear(models, weight=1.0)
        if models[0] is live:
            assert merged.state_dict().keys() == ours.keys()
        merged.save(tmp_path / "out", replace=True)
        for name, tensor in loaded_model(family, tmp_path / "out").state_dict().items():
            assert_near(tensor, (ours[name].double() + theirs[name].double()) / 2)
