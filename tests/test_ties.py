"""Tied weights: tied in all models and in the result, or in none of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
from merge import applying
from merge.checkpoint.memory import open_state_dict
from merge.errors import MergeError, PlanError
from merge.families.ties import settle_ties
from merge.ir.checkpoint import Checkpoint
from merge.ir.side import Side

from .architectures import DECODERS, PARTS, loaded_model, new_model, two_models
from .conftest import MakeModel
from .tiny import assert_near, assert_same, noise

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LANGUAGE = {"model_type": "toy", "architectures": ["ToyForCausalLM"], "vocab_size": 9}


def toy(called: str, *, head: bool, ties: bool | None = None, **config: object) -> Checkpoint:
    """A language model with or without a head of its own, whose config may speak of ties."""
    names = [EMBED, "model.layers.0.w", *([HEAD] if head else [])]
    state = {n: noise(called, n, shape=(4, 4) if "layers" in n else (9, 4)) for n in names}
    said = {} if ties is None else {"tie_word_embeddings": ties}
    return open_state_dict(state, called, Side(config={**LANGUAGE, **said, **config}))


def own_head(called: str) -> Tensor:
    return noise(called, HEAD, shape=(9, 4))


def embedding(called: str) -> Tensor:
    return noise(called, EMBED, shape=(9, 4))


# -- tied in all, own in one -----------------------------------------------------------------------


def test_tied_in_all_is_tied_in_the_result() -> None:
    merged = merge.linear([toy("a", head=False, ties=True), toy("b", head=False)], weight=1.0)
    assert HEAD not in merged
    assert merged.side.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("first", [True, False])
def test_one_head_of_its_own_unties_the_result(first: bool) -> None:
    models = [toy("own", head=True), toy("tied", head=False, ties=True)]
    merged = merge.linear(models if first else models[::-1], weight=1.0)
    found = merged.state_dict()
    assert_near(found[HEAD], (own_head("own").double() + embedding("tied").double()) / 2)
    assert_near(found[EMBED], (embedding("own").double() + embedding("tied").double()) / 2)
    assert merged.side.config["tie_word_embeddings"] is False and not merged.tied
    assert any(f"{HEAD} is not tied: own has one" in n for n in merged.plan().notes)


def test_differences_to_a_tied_base_are_those_to_its_embedding() -> None:
    base, tuned = toy("base", head=False, ties=True), toy("tuned", head=True)
    merged = merge.task_arithmetic([tuned], base=base, weight=0.5).state_dict()
    wanted = embedding("base").double() + 0.5 * (own_head("tuned") - embedding("base")).double()
    assert_near(merged[HEAD], wanted)
    by_hand = (base + 0.5 * (tuned - base)).state_dict()
    assert_near(by_hand[HEAD], wanted)


def test_every_part_of_the_config_that_writes_text_says_so() -> None:
    config = {"text_config": {"vocab_size": 9, "tie_word_embeddings": True}, "vision_config": {}}
    models = [toy("tied", head=False, **config), toy("own", head=True)]
    said = merge.linear(models, weight=1.0).side.config
    assert said["tie_word_embeddings"] is False
    assert said["text_config"]["tie_word_embeddings"] is False  # type: ignore[index]
    assert said["vision_config"] == {}


def test_nobodys_config_speaks_and_everyone_has_a_head() -> None:
    models = [toy(m, head=True) for m in "ab"]
    assert settle_ties(models) == models


# -- what the config says against what is there ----------------------------------------------------

MISSING: dict[str, tuple[dict[str, Any], bool]] = {
    "it says so": ({"ties": True}, True),
    "it is silent": ({}, True),
    "it says that nothing is tied": ({"ties": False}, False),
}


@pytest.mark.parametrize(("config", "tied"), MISSING.values(), ids=MISSING)
def test_a_head_that_is_not_there_is_tied_unless_the_config_denies_it(
    config: dict[str, Any], tied: bool
) -> None:
    models = [toy("own", head=True), toy("bare", head=False, **config)]
    if tied:
        assert HEAD in merge.linear(models, weight=1.0)
        return
    with pytest.raises(PlanError, match="lacks its head") as caught:
        merge.linear(models, weight=1.0)
    assert caught.value.where["model"] == "bare"


def test_all_models_lack_the_head_that_the_config_wants() -> None:
    with pytest.raises(PlanError, match="lacks its head"):
        merge.linear([toy(m, head=False, ties=False) for m in "ab"], weight=1.0)


def test_a_model_of_another_task_lacks_no_head() -> None:
    task = toy("task", head=False, ties=False, architectures=["ToyForSequenceClassification"])
    with pytest.raises(PlanError, match="do not hold the same tensors"):
        merge.linear([toy("own", head=True), task], weight=1.0)
    assert merge.linear([task, task], weight=1.0)


def folder(make: MakeModel, called: str, head: Tensor | None, **config: object) -> Path:
    state = {EMBED: embedding(called), "model.layers.0.w": noise(called)}
    state |= {} if head is None else {HEAD: head}
    return make(called, state, config={**LANGUAGE, **config})


def test_a_stored_head_that_equals_the_embedding_is_tied(make_model: MakeModel) -> None:
    """As transformers does; files that other tools wrote hold it twice."""
    a = folder(make_model, "a", embedding("a"), tie_word_embeddings=True)
    b = folder(make_model, "b", None, tie_word_embeddings=True)
    for models in ([a, b], [b, a], [a]):
        merged = merge.linear(models, weight=1.0)
        merged.save(a.parent / "out", replace=True)
        assert HEAD not in load_file(a.parent / "out" / "model.safetensors")
        assert HEAD in merged.dropped and "equal to" in merged.dropped[HEAD]
        config = json.loads((a.parent / "out" / "config.json").read_text())
        assert config["tie_word_embeddings"] is True


def test_a_stored_head_of_its_own_counts_whatever_the_config_says(make_model: MakeModel) -> None:
    a = folder(make_model, "a", own_head("a"), tie_word_embeddings=True)
    merged = merge.linear([a, a], weight=1.0)
    assert_same(merged.state_dict()[HEAD], own_head("a"))
    assert merged.side.config["tie_word_embeddings"] is False


def test_one_element_makes_a_head_its_own(make_model: MakeModel) -> None:
    head = embedding("a").clone()
    head[-1, -1] += 1
    a = folder(make_model, "a", head, tie_word_embeddings=True)
    assert merge.linear([a], weight=1.0).side.config["tie_word_embeddings"] is False


# -- other names for it ----------------------------------------------------------------------------


def bert(called: str, *, decoder: bool) -> Checkpoint:
    names = {"bert.embeddings.word_embeddings.weight": (9, 4), "cls.predictions.bias": (9,)}
    if decoder:
        names |= {"cls.predictions.decoder.weight": (9, 4), "cls.predictions.decoder.bias": (9,)}
    state = {n: noise(called, n, shape=s) for n, s in names.items()}
    config = {"architectures": ["BertForMaskedLM"], "vocab_size": 9}
    return open_state_dict(state, called, Side(config=config))


def test_berts_decoder_is_its_embedding_and_its_bias_a_bias() -> None:
    found = merge.linear([bert("a", decoder=True), bert("b", decoder=False)], weight=1.0)
    state = found.state_dict()
    for name, other in (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ):
        shape = tuple(state[name].shape)
        both = noise("a", name, shape=shape).double() + noise("b", other, shape=shape).double()
        assert_near(state[name], both / 2)


def encoder_decoder(called: str, *names: str, **config: object) -> Checkpoint:
    state = {n: noise(called, n, shape=(9, 4)) for n in names}
    state |= {n: noise(called, n) for n in ("encoder.block.0.w", "decoder.block.0.w")}
    said = {"vocab_size": 9, "architectures": ["T5ForConditionalGeneration"], **config}
    return open_state_dict(state, called, Side(config=said))


def test_copies_of_shared_embeddings_are_those_embeddings() -> None:
    """Old files of T5 hold the embeddings three times."""
    copies = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    old, new = encoder_decoder("a", *copies), encoder_decoder("b", copies[0])
    state = merge.linear([new, old], weight=1.0).state_dict()
    for name in copies:
        both = (
            noise("a", name, shape=(9, 4)).double() + noise("b", copies[0], shape=(9, 4)).double()
        )
        assert_near(state[name], both / 2)


def test_a_family_whose_flag_means_more_is_refused() -> None:
    own = encoder_decoder("own", "shared.weight", "lm_head.weight", model_type="t5")
    tied = encoder_decoder("tied", "shared.weight", model_type="t5")
    with pytest.raises(PlanError, match="features of another scale") as caught:
        merge.linear([own, tied], weight=1.0)
    assert "own: own" in str(caught.value.found) and "tied: tied" in str(caught.value.found)
    assert HEAD in merge.linear([own, own], weight=1.0)


# -- models of transformers ------------------------------------------------------------------------


def written(model: Any, path: Path, head: Tensor | None = None) -> Path:
    """The model in a folder, with a head of its own in its file and config if there is one."""
    model.save_pretrained(path)
    if head is not None:
        state = load_file(path / "model.safetensors")
        save_file({**state, HEAD: head}, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        text = json.dumps({**config, "tie_word_embeddings": False})
        (path / "config.json").write_text(text)
    return path


def near_mean(
    found: Mapping[str, Tensor], a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> None:
    assert found.keys() == a.keys() == b.keys()
    for name, tensor in found.items():
        assert_near(tensor, (a[name].double() + b[name].double()) / 2)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_gemma_with_a_head_of_its_own_and_one_without(tmp_path: Path, order: str) -> None:
    family = DECODERS["gemma"]
    tied, other = two_models(family)
    head = torch.randn(tied.lm_head.weight.shape)
    folders = {"a": written(tied, tmp_path / "a"), "b": written(other, tmp_path / "b", head)}
    (tmp_path / "r.yml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels:\n"
        + "".join(f"- {{model: {folders[m]}}}\n" for m in order)
    )
    planned = applying.plan_recipe(tmp_path / "r.yml")
    applying.apply_plan(planned, tmp_path / "out")
    assert any("is not tied" in n for n in planned.plan.notes)
    loaded = loaded_model(family, tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()
    near_mean(loaded.state_dict(), tied.state_dict(), {**other.state_dict(), HEAD: head})


@pytest.mark.parametrize(
    "name",
    [
        "gemma",
        "gpt2",
        "bert",
        "roberta",
        "distilbert",
        "modernbert",
        "t5 encoder",
        "bart encoder",
        "whisper decoder",
        "opt",
    ],
)
def test_a_live_model_and_a_folder_stay_tied(name: str, tmp_path: Path) -> None:
    """In memory the head is there, in a file it is not."""
    family = DECODERS.get(name) or PARTS[name]
    live, stored = two_models(family)
    stored.save_pretrained(tmp_path / "a")
    for models in ([live, tmp_path / "a"], [tmp_path / "a", live]):
        merged = merge.linear(models, weight=1.0)
        state = merged.state_dict()
        fresh = new_model(family)
        assert not fresh.load_state_dict(state, strict=models[0] is live).unexpected_keys
        near_mean(fresh.state_dict(), live.state_dict(), stored.state_dict())
        merged.save(tmp_path / "out", replace=True)
        near_mean(
            loaded_model(family, tmp_path / "out").state_dict(),
            live.state_dict(),
            stored.state_dict(),
        )


def test_a_recipe_names_the_place_of_a_model_without_its_head(
    make_model: MakeModel, tmp_path: Path
) -> None:
    a = folder(make_model, "a", own_head("a"), tie_word_embeddings=False)
    b = folder(make_model, "b", None, tie_word_embeddings=False)
    text = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels:\n- model: {a}\n- model: {b}\n"
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(MergeError, match="lacks its head") as caught:
        applying.plan_recipe(tmp_path / "r.yml")
    assert caught.value.where["line"] == "5"


def test_transformers_does_what_is_said_of_it(tmp_path: Path) -> None:
    """A file with both: equal ones are tied on loading, others are not."""
    family = DECODERS["gemma"]
    model = new_model(family)
    for equal in (True, False):
        path = tmp_path / str(equal)
        model.save_pretrained(path)
        state = load_file(path / "model.safetensors")
        head = state[EMBED].clone() if equal else torch.randn_like(state[EMBED])
        save_file({**state, HEAD: head}, path / "model.safetensors", metadata={"format": "pt"})
        loaded = transformers.GemmaForCausalLM.from_pretrained(path)
        ours = merge.linear([path], weight=1.0)
        tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
        assert tied is equal is (HEAD in ours.tied)
