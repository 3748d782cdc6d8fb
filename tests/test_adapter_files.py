"""Opening adapters: where the base is, what is copied, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merge
from merge.errors import OutputRefused, PlanError, SourceError
from merge.ir.expr import Read
from merge.ir.reference import Reference
from tests.adapters import (
    Trained,
    assert_equal,
    edit,
    family,
    lora,
    opened,
    quiet,
    retensor,
    train,
)


# -- what does not fit -----------------------------------------------------------------------------
@pytest.fixture
def plain(tmp_path: Path) -> Trained:
    return train(tmp_path, family("llama", num_hidden_layers=1), lora())


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(2)}), "belongs to nothing"),
        (lambda t: t.update({"base_model.model.other.weight": torch.ones(2)}), "belongs to noth"),
        (lambda t: t.update({f"{Q[:-6]}.x.lora_A.weight": t[f"{Q}.lora_A.weight"].clone(),
                             f"{Q[:-6]}.x.lora_B.weight": t[f"{Q}.lora_B.weight"].clone()}),
         "belongs to nothing"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "half of an adapter"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 16),
                             f"{Q}.lora_B.weight": torch.ones(16, 3)}), "another rank"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(16)}), "a bias that the model does"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(16)}), "disagree on DoRA"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], Any], said: str, plain: Trained
) -> None:
    retensor(plain, change)
    with pytest.raises(PlanError, match=said) as caught:
        opened(plain)
    assert caught.value.where["tensor"].startswith("base_model.model.")


def test_magnitudes_of_another_size_are_refused(plain: Trained) -> None:
    """They are one for each output of their own module."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n.removesuffix(".lora_A.weight") for n in tensors if ".lora_A." in n]:
            tensors[f"{name}.lora_magnitude_vector"] = torch.ones(5)

    retensor(plain, change)
    edit(plain, {"use_dora": True})
    with pytest.raises(PlanError, match="not one for each output") as caught:
        opened(plain)
    assert caught.value.where["tensor"].endswith(".lora_magnitude_vector")


WRONG: dict[str, Any] = {
    "r": 0, "lora_alpha": "much", "use_rslora": 1, "rank_pattern": {"q_proj": 2.5},
    "alpha_pattern": ["q_proj"], "fan_in_fan_out": "no", "modules_to_save": [1],
    "use_dora": "yes", "trainable_token_indices": [1, -1], "target_parameters": {"a": 1},
    "layer_replication": [[2, 1]], "base_model_name_or_path": 7, "ensure_weight_tying": 0,
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_a_corrupt_config_is_refused_with_file_and_key(key: str, plain: Trained) -> None:
    edit(plain, {key: WRONG[key]})
    with pytest.raises(SourceError, match=f"the value of '{key}'") as caught:
        opened(plain)
    assert caught.value.where["file"] == str(plain.adapter / "adapter_config.json")
    assert caught.value.where["key"] == key
    assert caught.value.expected is not None


def test_patterns_must_be_regular_expressions(plain: Trained) -> None:
    edit(plain, {"rank_pattern": {"q_proj(": 2}})
    with pytest.raises(SourceError, match="regular expressions"):
        opened(plain)


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 8}', '{"r": 8, "r": 9}', ""])
def test_a_config_that_is_none_is_refused(text: str, plain: Trained) -> None:
    (plain.adapter / "adapter_config.json").write_text(text)
    with pytest.raises(SourceError) as caught:
        opened(plain)
    assert "adapter_config.json" in caught.value.where["file"]


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    it = train(tmp_path, family("llama"), lora(trainable_token_indices={"embed_tokens": [1, 2]}))
    for wrong in ({"embed_tokens": [1, 99]}, {"embed_tokens": [1]}):
        edit(it, {"trainable_token_indices": wrong})
        with pytest.raises(PlanError, match="rows of an adapter's tokens"):
            opened(it)
    edit(it, {"trainable_token_indices": {"wte": [1, 2]}})
    with pytest.raises(PlanError, match="which tokens its rows are of"):
        opened(it)


# -- opening ---------------------------------------------------------------------------------------
def test_an_adapter_alone_is_opened_on_the_base_it_names(plain: Trained) -> None:
    """By an absolute path, one from its own folder, and one from the working directory."""
    wanted = opened(plain).state_dict()
    for name in (str(plain.base), "../base"):
        edit(plain, {"base_model_name_or_path": name})
        assert_equal(merge.open(plain.adapter).state_dict(), wanted)


def test_a_base_is_also_looked_for_from_the_working_directory(
    plain: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(plain, {"base_model_name_or_path": "base"})
    monkeypatch.chdir(plain.base.parent)
    assert_equal(merge.open("adapter").state_dict(), opened(plain).state_dict())


def test_a_base_that_is_not_here_is_named(plain: Trained) -> None:
    edit(plain, {"base_model_name_or_path": "org/model", "revision": "main"})
    with pytest.raises(SourceError, match="no such model") as caught:
        merge.open(plain.adapter)
    assert "org/model" in caught.value.where["model"]
    assert caught.value.where["named_by"] == str(plain.adapter / "adapter_config.json")
    edit(plain, {"base_model_name_or_path": None})
    with pytest.raises(SourceError, match="does not say which model"):
        merge.open(plain.adapter)


def test_an_adapter_on_an_adapter(plain: Trained, tmp_path: Path) -> None:
    """The second one's base is the first one."""
    with quiet():
        model = plain.kind.from_pretrained(opened(plain).save(tmp_path / "first"))
    second = train(tmp_path, model, lora(), base=plain.base, name="second", seed=5)
    wanted = merge.open(f"{tmp_path / 'first'}+{second.adapter}").state_dict()
    edit(second, {"base_model_name_or_path": "../adapter"})
    for name, found in merge.open(second.adapter).state_dict().items():
        torch.testing.assert_close(found, wanted[name], rtol=0, atol=1e-7)
    edit(plain, {"base_model_name_or_path": "../second"})
    with pytest.raises(SourceError, match="its own base"):
        merge.open(second.adapter)


def test_the_parts_of_a_reference(plain: Trained) -> None:
    """As a recipe's mapping has them, with an architecture that survives the adapter."""
    made = merge.open(Reference(str(plain.base), adapter=str(plain.adapter), architecture="Other"))
    assert made.side.config["architectures"] == ["Other"]
    assert_equal(made.state_dict(), opened(plain).state_dict())
    assert made.label == f"{plain.base}+adapter"
    for wrong in (f"{plain.base}+{plain.adapter}@v2", f"{plain.base}@v2+{plain.adapter}"):
        with pytest.raises(SourceError, match="no revisions"):
            merge.open(wrong)
    with pytest.raises(SourceError, match="no such adapter"):
        merge.open(f"{plain.base}+{plain.base}")


def test_weights_of_an_adapter_may_be_missing_or_a_pickle(plain: Trained) -> None:
    wanted = opened(plain).state_dict()
    file = plain.adapter / "adapter_model.safetensors"
    torch.save(load_file(file), plain.adapter / "adapter_model.bin")
    file.unlink()
    with pytest.raises(SourceError, match="a pickle"):
        opened(plain)
    reference = f"{plain.base}+{plain.adapter}"
    assert_equal(merge.open(reference, allow_pickle=True).state_dict(), wanted)
    (plain.adapter / "adapter_model.bin").unlink()
    with pytest.raises(SourceError, match="holds no weights"):
        opened(plain)


def test_the_output_has_the_bases_files_and_none_of_the_adapters(plain: Trained) -> None:
    (plain.base / "tokenizer.json").write_text('{"of": "base"}')
    (plain.adapter / "tokenizer.json").write_text('{"of": "adapter"}')
    made = opened(plain)
    out = made.save(plain.base.parent / "out")
    assert json.loads((out / "tokenizer.json").read_text()) == {"of": "base"}
    assert not (out / "adapter_config.json").exists()
    assert any("its own tokenizer (tokenizer.json) is not used" in n for n in made.plan().notes)


def test_an_adapter_that_brings_new_tokens_brings_its_tokenizer(tmp_path: Path) -> None:
    base = family("llama", num_hidden_layers=1)
    model = family("llama", num_hidden_layers=1)
    with quiet():
        model.resize_token_embeddings(44)
    save = ["embed_tokens", "lm_head"]
    it = train(tmp_path, model, lora(modules_to_save=save), saved_on=base)
    (it.base / "tokenizer.json").write_text('{"of": "base"}')
    (it.adapter / "tokenizer.json").write_text('{"of": "adapter"}')
    out = opened(it).save(tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 44
    assert json.loads((out / "tokenizer.json").read_text()) == {"of": "adapter"}
    torch.testing.assert_close(it.says(out), it.output, rtol=0, atol=1e-6)
    names = load_file(it.adapter / "adapter_model.safetensors").keys()
    assert "base_model.model.lm_head.modules_to_save.weight" in names  # and once more without
    retensor(it, lambda t: [t.pop(n) for n in names if ".lm_head." in n])
    with pytest.raises(PlanError, match="not all that belong to it"):
        opened(it)


def test_an_adapter_is_not_written_over(plain: Trained) -> None:
    with pytest.raises(OutputRefused, match="is an input"):
        opened(plain).save(plain.adapter, replace=True)


def test_an_adapter_costs_neither_threads_nor_memory_their_word(plain: Trained) -> None:
    made = opened(plain)
    small, large = (
        made.save(plain.base.parent / name, memory=memory, threads=threads)
        for name, memory, threads in (("s", "6MiB", 1), ("l", "200MiB", 4))
    )
    file = "model.safetensors"
    assert (small / file).read_bytes() == (large / file).read_bytes()


def test_only_the_weights_that_change_are_computed(plain: Trained) -> None:
    steps = opened(plain).plan().steps
    computed = {s.output.name for s in steps if not isinstance(s.expr, Read)}
    assert computed == {
        "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight",
    }  # fmt: skip
