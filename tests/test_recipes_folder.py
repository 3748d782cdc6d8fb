"""Every recipe in recipes/ runs, on tiny models with the names that it uses."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import merge
from merge import methods
from merge.recipe.read import Recipe, read_recipe
from tests.architectures import DECODERS, PARTS, new_model

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yml"))


def names_of(recipe: Recipe) -> list[str]:
    """The models that a recipe reads, bases first."""
    found: dict[str, None] = {}
    for stage in recipe.stages:
        bases = [stage.model.base_model, *(s.base_model for s in stage.model.slices or [])]
        sources = [s for part in stage.model.slices or [] for s in part.sources]
        entries = [e for m in (stage.model.modules or {}).values() for e in m.models or []]
        everything = (*(stage.model.models or []), *sources, *entries)
        listed = [r for e in everything for r in (e.model, e.statistics)]
        found.update(dict.fromkeys(str(r) for r in (*bases, *listed) if r is not None))
    return [name for name in found if name not in {s.name for s in recipe.stages}]


def saved_llava() -> None:
    """A model that sees, and a fine-tune of the language model in it."""
    new_model(PARTS["llava text"]).save_pretrained("llava")
    new_model(DECODERS["llama"]).save_pretrained("llama")


def saved_classifiers() -> None:
    """Fine-tunes of one encoder for two and for five labels."""
    for name, labels in (("topics", 5), ("sentiment", 2)):
        config = transformers.BertConfig(**DECODERS["bert"].config, num_labels=labels)
        transformers.BertForSequenceClassification(config).save_pretrained(name)


def saved_tasks() -> None:
    """A base, fine-tunes for two and for three labels, a tokenizer beside each, and texts."""
    from .texts import saved_classifier, written_texts

    saved_classifier("base", ["LABEL_0", "LABEL_1"], 0)
    for seed, (name, field, names) in enumerate(
        (("topics", "topic", ["art", "law", "sea"]), ("sentiment", "mood", ["bad", "good"])), 1
    ):
        saved_classifier(name, names, seed, base="base")
        written_texts(f"{name}.jsonl", field, names, seed)


def saved_adapters(base: Path) -> None:
    """Two adapters of a base, which no longer do nothing."""
    shutil.copytree(base, "base")
    for name in ("poetry", "code"):
        model = AutoModelForCausalLM.from_pretrained("base", dtype="auto")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft uses a name that transformers has renamed
            tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        tuned.save_pretrained(name)


def saved_widths() -> None:
    """A model, and one of the same family that is wider and deeper."""
    config = DECODERS["llama"].config
    larger = {"hidden_size": 2 * config["hidden_size"], "num_hidden_layers": 3}
    for name, change in (("narrow", {}), ("wide", larger)):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{"head_dim": 8, **config, **change})
        )
        model.save_pretrained(name)


def gathered_grams(recipe: Recipe) -> None:
    """The statistics that the models of a recipe name, of random tokens."""
    for entry in recipe.final.model.models or []:
        folder, known = str(entry.model), str(entry.statistics)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        ids = torch.arange(40).reshape(4, 10)
        task = merge.Task(model, torch.nn.functional.cross_entropy, [({"input_ids": ids}, None)])
        shutil.rmtree(known)
        merge.gather_statistics(folder, task).save(known)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_it_runs_and_loads(
    recipe: Path,
    tmp_path: Path,
    llamas: Callable[[str], list[Path]],
    t5s: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    read = read_recipe(recipe)
    kind = AutoModelForCausalLM
    if recipe.stem == "scope":
        kind = AutoModelForImageTextToText
        saved_llava()
    elif recipe.stem == "heads":
        kind = AutoModelForSequenceClassification
        saved_classifiers()
    elif recipe.stem == "transport":
        saved_widths()
    elif recipe.stem in ("learn", "tinting"):
        kind = AutoModelForSequenceClassification
        saved_tasks()
    elif recipe.stem == "adapters":
        saved_adapters(llamas("bfloat16")[0])
    else:
        has_encoder = "encoder" in (read.final.model.modules or {})
        kind = AutoModelForSeq2SeqLM if has_encoder else kind
        models = t5s if has_encoder else llamas("bfloat16")
        for name, folder in zip(names_of(read), models, strict=False):
            shutil.copytree(folder, tmp_path / name)
    if recipe.stem == "regmean":
        gathered_grams(read)
    if read.final.model.tune is not None:
        Path("score.py").write_text("import sys\nprint(len(sys.argv))\n")
    merge.apply(recipe, "out")
    loaded = kind.from_pretrained("out", dtype="auto")
    assert all(p.isfinite().all() for p in loaded.parameters())
    written = (tmp_path / "out" / "merge_recipe.yml").read_text()
    chosen = read.final.model.tune is not None or read.final.model.learn is not None
    assert written == recipe.read_text() or chosen


def test_every_method_has_a_recipe() -> None:
    used = {stage.model.merge_method for path in RECIPES for stage in read_recipe(path).stages}
    assert used == set(methods.registry())
