"""Heads of tasks: merged, copied from one model, dropped, or kept for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import merge
from merge.checkpoint.memory import open_state_dict
from merge.errors import MergeError, RecipeError
from merge.families.heads import task_heads
from merge.ir.checkpoint import Checkpoint
from merge.ir.side import Side
from merge.recipe.compile import Compiled, compile_recipe
from merge.recipe.read import parse_recipe
from merge.verify import verify

from .architectures import DECODERS, new_model
from .tiny import assert_near, assert_same, noise

BODY = {"bert.embeddings.word_embeddings.weight": (9, 4), "bert.encoder.layer.0.w": (4, 4)}
CLASSIFIER = "classifier.weight"
LABELS = {"a": 2, "b": 3, "c": 3}


def task(called: str, labels: int | None = None) -> Checkpoint:
    """A classifier with so many labels; ``bare`` has none."""
    count = LABELS.get(called, 0) if labels is None else labels
    shapes = {**BODY, **({CLASSIFIER: (count, 4)} if count else {})}
    kind = "ToyForSequenceClassification" if count else "ToyModel"
    config: dict[str, object] = {"vocab_size": 9, "architectures": [kind], "of": called}
    if count:
        config["id2label"] = {str(i): f"{called}{i}" for i in range(count)}
    state = {n: noise(called, n, shape=s) for n, s in shapes.items()}
    return open_state_dict(state, called, Side(config=config))


def compiled(heads: str, models: str = "a b", more: str = "") -> Compiled:
    rule = f"heads: {heads}\n" if heads else ""
    listed = "".join(f"- {{model: {m}}}\n" for m in models.split())
    text = f"merge_method: linear\nparameters: {{weight: 1}}\n{rule}{more}models:\n{listed}"
    return compile_recipe(parse_recipe(text), lambda r: task(str(r)))


def state(made: Compiled) -> dict[str, Tensor]:
    return made.checkpoint.state_dict()


# -- what is a head --------------------------------------------------------------------------------

HEADS: dict[str, tuple[str, str, set[str]]] = {
    "a classifier": ("bert", "BertForSequenceClassification", {"classifier"}),
    "tags": ("bert", "BertForTokenClassification", {"classifier"}),
    "answers": ("bert", "BertForQuestionAnswering", {"qa_outputs"}),
    "a masked language model": ("bert", "BertForMaskedLM", {"cls"}),
    "a bare model": ("bert", "BertModel", set()),
    "a classifier of two layers": ("roberta", "RobertaForSequenceClassification", {"classifier"}),
    "distilbert": (
        "distilbert", "DistilBertForSequenceClassification", {"pre_classifier", "classifier"},
    ),
    "distilbert's words": (
        "distilbert", "DistilBertForMaskedLM",
        {"vocab_transform", "vocab_layer_norm", "vocab_projector"},
    ),
    "a language model": ("llama", "LlamaForCausalLM", set()),
    "a score": ("llama", "LlamaForSequenceClassification", {"score"}),
    "gpt2 and a choice": ("gpt2", "GPT2DoubleHeadsModel", {"multiple_choice_head"}),
    "pictures": ("vit", "ViTForImageClassification", {"classifier"}),
    "a bart": ("bart", "BartForSequenceClassification", {"classification_head"}),
}  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "heads"), HEADS.values(), ids=HEADS)
def test_heads_are_told_from_bodies(family: str, kind: str, heads: set[str]) -> None:
    config = DECODERS[family].config if family in DECODERS else {"d_model": 16, "vocab_size": 40,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}  # fmt: skip
    model_class = getattr(transformers, kind)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    shapes = {n: torch.empty(t.shape) for n, t in model.state_dict().items()}
    side = Side(config={**model.config.to_diff_dict(), "architectures": [kind]})
    found = task_heads(open_state_dict(shapes, "a", side))
    assert {n.partition(".")[0] for n in found} == heads
    assert found == {n for n in shapes if n.partition(".")[0] in heads}


# -- the rules -------------------------------------------------------------------------------------


def test_heads_of_one_shape_are_merged() -> None:
    found = state(compiled("", "b c"))
    for name in (*BODY, CLASSIFIER):
        shape = tuple(found[name].shape)
        both = noise("b", name, shape=shape).double() + noise("c", name, shape=shape).double()
        assert_near(found[name], both / 2)


@pytest.mark.parametrize("models", ["a b", "a bare", "bare a"])
def test_other_heads_are_refused_and_the_key_is_named(models: str) -> None:
    with pytest.raises(MergeError, match="different heads") as caught:
        compiled("", models)
    assert caught.value.where["tensor"] == CLASSIFIER
    assert "a: [2, 4]" in str(caught.value.found)
    for word in ("heads: base", "heads: drop", "heads: keep"):
        assert word in str(caught.value.do)


@pytest.mark.parametrize(
    ("heads", "models", "whose"),
    [("base", "a b", "a"), ("b", "a b", "b"), ("a", "bare a", "a"), ("keep", "b a", "b")],
)
def test_heads_are_those_of_one_model(heads: str, models: str, whose: str) -> None:
    made = compiled(heads, models)
    found = state(made)
    shape = (LABELS[whose], 4)
    assert_same(found[CLASSIFIER], noise(whose, CLASSIFIER, shape=shape))
    others = [m for m in models.split() if m != whose]
    body = next(iter(BODY))
    both = sum(noise(m, body, shape=(9, 4)).double() for m in (whose, *others))
    assert_near(found[body], torch.as_tensor(both / 2))
    config = made.checkpoint.side.config
    assert config["id2label"] == {str(i): f"{whose}{i}" for i in range(LABELS[whose])}
    assert config["architectures"] == ["ToyForSequenceClassification"]
    assert config["of"] == models.split()[0]


def test_a_bare_donor_takes_no_labels_along() -> None:
    made = compiled("base", "bare a")
    assert CLASSIFIER not in made.checkpoint
    assert made.checkpoint.dropped[CLASSIFIER] == "the result has the heads of bare"
    assert made.checkpoint.side.config["architectures"] == ["ToyModel"]


def test_dropped_heads_leave_the_class_without_one() -> None:
    made = compiled("drop")
    assert set(made.checkpoint) == set(BODY)
    config = made.checkpoint.side.config
    assert config["architectures"] == ["ToyModel"] and "id2label" not in config
    assert made.checkpoint.dropped == {CLASSIFIER: "the recipe drops heads"}


def test_kept_heads_lie_beside_the_result_with_their_labels(tmp_path: Path) -> None:
    made = compiled("keep", "a b c", "base_model: a\n")
    made.checkpoint.save(tmp_path / "out")
    for name in "bc":
        folder = tmp_path / "out" / "heads" / name
        found = load_file(folder / "model.safetensors")
        assert set(found) == {CLASSIFIER}
        assert_same(found[CLASSIFIER], noise(name, CLASSIFIER, shape=(3, 4)))
        config = json.loads((folder / "config.json").read_text())
        assert config["id2label"] == {str(i): f"{name}{i}" for i in range(3)}
    assert not (tmp_path / "out" / "heads" / "a").exists()
    top = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(top[CLASSIFIER], noise("a", CLASSIFIER, shape=(2, 4)))
    assert verify(tmp_path / "out").ok


def test_names_of_models_become_plain_names_of_folders() -> None:
    models = ["org/x", "other/x", "../../etc", "C:\\m\\y z"]
    listed = "".join(f"- {{model: '{m}'}}\n" for m in ["a", *models])
    text = f"merge_method: linear\nparameters: {{weight: 1}}\nheads: keep\nmodels:\n{listed}"
    made = compile_recipe(parse_recipe(text), lambda r: task(str(r), 3))
    assert set(made.checkpoint.folders.values()) == {
        "heads/x",
        "heads/x-2",
        "heads/etc",
        "heads/y-z",
    }


def test_deltas_of_bodies_under_a_head_of_one_model() -> None:
    text = (
        "merge_method: task_arithmetic\nbase_model: bare\nheads: b\nparameters: {weight: 0.5}\n"
        "models:\n- model: a\n- model: b\n"
    )
    found = state(compile_recipe(parse_recipe(text), lambda r: task(str(r))))
    assert_same(found[CLASSIFIER], noise("b", CLASSIFIER, shape=(3, 4)))
    body = next(iter(BODY))
    base, a, b = (noise(m, body, shape=(9, 4)).double() for m in ("bare", "a", "b"))
    assert_near(found[body], base + 0.5 * (a - base) + 0.5 * (b - base))


def test_slices_may_have_the_heads_of_one_model() -> None:
    text = (
        "merge_method: passthrough\nheads: a\nslices:\n"
        "- sources: [{model: b, layer_range: [0, 1]}]\n"
        "- sources: [{model: a, layer_range: [0, 1]}]\n"
    )
    made = compile_recipe(parse_recipe(text), lambda r: task(str(r)))
    found = state(made)
    assert_same(found[CLASSIFIER], noise("a", CLASSIFIER, shape=(2, 4)))
    assert "bert.encoder.layer.1.w" in found
    assert made.checkpoint.side.config["id2label"] == {"0": "a0", "1": "a1"}


SLICED = (
    "merge_method: passthrough\n{}base_model: a\nslices:\n"
    "- sources: [{{model: a, layer_range: [0, 1]}}]\n"
    "- sources: [{{model: {}, layer_range: [0, 1]}}]\n"
)


def test_slices_do_not_end_in_a_head_that_the_config_denies() -> None:
    with pytest.raises(RecipeError, match="of another shape than the config") as caught:
        compile_recipe(parse_recipe(SLICED.format("", "b")), lambda r: task(str(r)))
    assert caught.value.where["tensor"] == CLASSIFIER and "heads: base" in str(caught.value.do)
    made = compile_recipe(parse_recipe(SLICED.format("heads: base\n", "b")), lambda r: task(str(r)))
    assert_same(state(made)[CLASSIFIER], noise("a", CLASSIFIER, shape=(2, 4)))


def test_slices_that_lack_a_head_may_take_the_donors() -> None:
    with pytest.raises(RecipeError, match="do not hold all tensors") as caught:
        compile_recipe(parse_recipe(SLICED.format("", "bare")), lambda r: task(str(r)))
    assert "missing: base" in str(caught.value.do)
    text = SLICED.format("missing: base\n", "bare")
    made = compile_recipe(parse_recipe(text), lambda r: task(str(r)))
    assert_same(state(made)[CLASSIFIER], noise("a", CLASSIFIER, shape=(2, 4)))


def test_a_copied_head_is_explained() -> None:
    found = compiled("b").explain(CLASSIFIER)
    assert found[0].inputs == (f"b[{CLASSIFIER}]",)


def test_missing_heads_may_be_the_donors_as_other_tensors() -> None:
    found = state(compiled("", "a bare", "missing: base\n"))
    assert_same(found[CLASSIFIER], noise("a", CLASSIFIER, shape=(2, 4)))


# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "near"), [("kep", "'keep'"), ("drp", "'drop'"), ("zebra", "")])
def test_a_word_that_names_no_model_has_its_place(word: str, near: str) -> None:
    with pytest.raises(RecipeError, match="names no model of the recipe") as caught:
        compiled(word)
    assert (caught.value.where["line"], caught.value.where["column"]) == ("3", "1")
    assert "merge, base, drop, keep, a, b" in str(caught.value.expected)
    assert near in str(caught.value.do) and (caught.value.do is None) == (not near)


# -- models of transformers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Fine-tunes of one BERT for different tasks."""
    root = tmp_path_factory.mktemp("berts")
    kinds = {
        "bare": ("BertModel", {}),
        "two": ("BertForSequenceClassification", {"num_labels": 2}),
        "five": ("BertForSequenceClassification", {"num_labels": 5}),
        "tags": ("BertForTokenClassification", {"num_labels": 4}),
        "words": ("BertForMaskedLM", {}),
    }
    made = {}
    for seed, (name, (kind, changes)) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        config = transformers.BertConfig(**DECODERS["bert"].config, **changes)
        model = getattr(transformers, kind)(config)
        model.save_pretrained(root / name)
        made[name] = (root / name, load_file(root / name / "model.safetensors"))
    return made


Berts = dict[str, tuple[Path, dict[str, Tensor]]]


def merged(berts: Berts, names: str, heads: str, out: Path) -> None:
    """The mean of some of the models; what not all have, such as a pooler, is that of those."""
    listed = "".join(f"- {{model: {berts[n][0]}}}\n" for n in names.split())
    word = str(berts[heads][0]) if heads in berts else heads
    out.with_suffix(".yml").write_text(
        f"merge_method: linear\nparameters: {{weight: 1}}\nheads: {word}\nmissing: skip\n"
        f"models:\n{listed}"
    )
    merge.apply(out.with_suffix(".yml"), out)


def loaded(kind: str, folder: Path, new: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state of a model that loads with every weight in its place, but for ``new`` ones."""
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert {k.partition(".")[0] for k in info["missing_keys"]} <= set(new), info
    return dict(model.state_dict())


CASES: dict[str, tuple[str, str, str, str]] = {
    "the base's": ("two five", "base", "BertForSequenceClassification", "two"),
    "another's": ("two five", "five", "BertForSequenceClassification", "five"),
    "another task's": ("five words two", "two", "BertForSequenceClassification", "two"),
    "of words": ("words two", "base", "BertForMaskedLM", "words"),
    "a bare model's body": ("bare five", "five", "BertForSequenceClassification", "five"),
    "kept": ("two five", "keep", "BertForSequenceClassification", "two"),
}


@pytest.mark.parametrize(("names", "heads", "kind", "whose"), CASES.values(), ids=CASES)
def test_berts_of_different_tasks_merge_and_load(
    berts: Berts, names: str, heads: str, kind: str, whose: str, tmp_path: Path
) -> None:
    merged(berts, names, heads, tmp_path / "out")
    found = loaded(kind, tmp_path / "out")
    head = {n: t for n, t in berts[whose][1].items() if n.startswith("cl")}
    both = names.split()
    for name, tensor in found.items():
        if name in head:
            assert_same(tensor, head[name])
        elif not name.startswith("cls.predictions.decoder"):  # which is tied
            bodies = [{n.removeprefix("bert."): t for n, t in berts[b][1].items()} for b in both]
            own = [b[bare].double() for b in bodies if (bare := name.removeprefix("bert.")) in b]
            assert_near(tensor, torch.stack(own).mean(0))


def test_a_dropped_head_leaves_a_bare_bert(berts: Berts, tmp_path: Path) -> None:
    merged(berts, "two five", "drop", tmp_path / "out")
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    found = loaded("BertModel", tmp_path / "out")
    assert set(found) == set(berts["bare"][1])
    auto = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert type(auto).__name__ == "BertModel"


def test_a_kept_head_goes_back_on(berts: Berts, tmp_path: Path) -> None:
    merged(berts, "two five tags", "keep", tmp_path / "out")
    folder = tmp_path / "out" / "heads" / "five"
    config = transformers.BertConfig.from_pretrained(folder)
    assert config.num_labels == 5
    model = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "out", num_labels=5, ignore_mismatched_sizes=True
    )
    missing = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    assert_same(model.classifier.weight.detach(), berts["five"][1][CLASSIFIER])


def test_a_language_models_head_is_no_task(tmp_path: Path) -> None:
    model = new_model(DECODERS["llama"])
    model.save_pretrained(tmp_path / "a")
    text = "merge_method: linear\nparameters: {weight: 1}\nheads: drop\nmodels:\n"
    (tmp_path / "r.yml").write_text(f"{text}- model: {tmp_path / 'a'}\n")
    merge.apply(tmp_path / "r.yml", tmp_path / "out")
    found = loaded("LlamaForCausalLM", tmp_path / "out")
    assert_same(found["lm_head.weight"], model.lm_head.weight.detach())
