"""Data without labels: what is learned and measured on, and what cannot be judged by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import merge
from merge.coefficients import read_coefficients
from merge.errors import SourceError
from merge.streams.open import open_task

from .texts import saved_classifier, written_texts


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two classifiers with heads of their own; texts with and without labels."""
    monkeypatch.chdir(tmp_path)
    saved_classifier("base", ["a", "b"], 0)
    saved_classifier("size", ["low", "high"], 2, base="base")
    saved_classifier("turn", ["zero", "one", "two"], 5, base="base")
    for name, classes in (("size", ["low", "high"]), ("turn", ["zero", "one", "two"])):
        written_texts(f"{name}.jsonl", "label", classes, 1)
        rows = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        Path(f"{name}.txt").write_text("\n".join(r["text"] for r in rows))
    return tmp_path


def given_to(task: merge.Task) -> list[dict[str, Tensor]]:
    """The inputs of all parts."""
    return [x for part in (task.adapt, task.train, task.validate, task.test) for x, _ in part]


# -- kinds of data ---------------------------------------------------------------------------------
def test_texts_without_labels_are_inputs_of_a_classifier(here: Path) -> None:
    """The same texts in the same parts as with labels, tokenised as by transformers; no targets."""
    bare, labelled = open_task("turn.txt", "turn"), open_task("turn.jsonl?label=label", "turn")
    for part in ("train", "validate", "test"):
        own, other = getattr(bare, part), getattr(labelled, part)
        assert all(target is None for _, target in own)
        rows = [sorted(r for x, _ in p for r in x["input_ids"].tolist()) for p in (own, other)]
        assert rows[0] == rows[1] and rows[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained("turn")
    lines = Path("turn.txt").read_text().splitlines()
    wanted = tokenizer(lines, padding=True)["input_ids"]
    assert sorted(r for x in given_to(bare) for r in x["input_ids"].tolist()) == sorted(wanted)
    assert "labels" not in bare.train[0][0]


def test_rows_to_adapt_to_need_no_label_where_others_have_one(here: Path) -> None:
    rows = [json.loads(line) for line in Path("turn.jsonl").read_text().splitlines()]
    told = [{"text": r["text"], "part": "adapt"} if i % 4 else {**r, "part": "validate"}
            for i, r in enumerate(rows)]  # fmt: skip
    Path("mixed.jsonl").write_text("\n".join(map(json.dumps, told)))
    task = open_task("mixed.jsonl?label=label&split=part", "turn")
    assert [sum(len(x["input_ids"]) for x, _ in p) for p in (task.adapt, task.validate)] == [60, 20]
    assert all(t is None for _, t in task.adapt) and all(t is not None for _, t in task.validate)
    Path("more.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w3"}')
    task = open_task("turn.jsonl?label=label&adapt=more.jsonl", "turn")
    assert sum(len(x["input_ids"]) for x, _ in task.adapt) == 2
    told[0].pop("label")
    Path("mixed.jsonl").write_text("\n".join(map(json.dumps, told)))
    with pytest.raises(SourceError, match="no key 'label'") as caught:
        open_task("mixed.jsonl?label=label&split=part", "turn")
    assert caught.value.where["line"] == "1"


def test_pictures_and_arrays_need_no_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    draw = np.random.default_rng(0)
    (tmp_path / "loose").mkdir()
    for i in range(12):
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "loose" / f"{i}.png")
    np.savez(tmp_path / "x.npz", x=draw.random((12, 3, 8, 8), dtype=np.float32))
    for data in ("loose", "x.npz"):
        task = open_task(f"{tmp_path / data}?split=train:0.5,validate:0.5", tmp_path / "vit")
        batches = [*task.train, *task.validate]
        assert sum(len(x["pixel_values"]) for x, _ in batches) == 12
        assert all(target is None for _, target in batches)
        with pytest.raises(SourceError, match="without labels cannot judge") as caught:
            task.measure(task.module.state_dict(), task.validate)
        assert "label" in str(caught.value.do)
    np.savez(tmp_path / "odd.npz", x=np.zeros((4, 3, 8, 8)), labels=np.zeros(4))
    with pytest.raises(SourceError, match="lacks an array") as caught:
        open_task(str(tmp_path / "odd.npz"), tmp_path / "vit")
    assert caught.value.found == "x, labels"


# -- encoders --------------------------------------------------------------------------------------
def pooled(folder: Path, texts: list[str]) -> Tensor:
    """What a sentence encoder makes of texts, by its library: the mean over tokens, at length 1."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    found = model.encode(texts, convert_to_numpy=True, normalize_embeddings=True)
    return torch.from_numpy(found)


def test_pairs_are_texts_with_such_as_mean_the_same(minilm: Path, tmp_path: Path) -> None:
    """The contrastive loss of a batch is that of the library's embeddings."""
    from merge.learning.objectives import Contrastive, View

    words = ["dog", "loan", "rain", "a longer text about cats"]
    rows = [{"q": f"what is {w}?", "p": f"{w} is known", "part": "train"} for w in words]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = open_task(f"{tmp_path / 'p.jsonl'}?text=q&positive=p&split=part", minilm)
    ((inputs, target),) = task.train
    with torch.no_grad():
        out, positives = task.module(**inputs), task.module(**target)
    order = [int(i) for i in out.matmul(pooled(minilm, [r["q"] for r in rows]).T).argmax(1)]
    assert sorted(order) == [0, 1, 2, 3]
    queries, wanted = (pooled(minilm, [rows[i][k] for i in order]) for k in "qp")
    torch.testing.assert_close(out, queries, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(positives, wanted, rtol=1e-4, atol=1e-5)
    view = View(task, "t", inputs, target, out, None, lambda x: task.module(**x), lambda o: o)
    with torch.no_grad():
        loss = Contrastive(0.1).loss(view)
    scores = (queries.double() @ wanted.double().T) / 0.1
    assert float(loss) == pytest.approx(float(-scores.log_softmax(1).diagonal().mean()), rel=1e-4)
    with pytest.raises(SourceError, match="nothing is judged by them"):
        task.measure(task.module.state_dict(), task.train)


def test_an_encoder_is_learned_by_its_features(minilm: Path, tmp_path: Path) -> None:
    """Texts alone: the merge's sentences near to those of each expert, scored by that distance."""
    from safetensors.torch import load_file

    base = load_file(minilm / "model.safetensors")
    name = "encoder.layer.5.output.dense.weight"
    moved = {**base, name: base[name] + 0.3 * base[name].std() * torch.randn(
        base[name].shape, generator=torch.Generator().manual_seed(0))}  # fmt: skip
    texts = [f"a text about the {w} of number {i}" for i, w in enumerate("abcdefghij" * 2)]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    task = open_task(f"{tmp_path / 't.txt'}?split=train:0.5,validate:0.5&tokens=16", minilm)
    found = merge.learn(
        {"a": {name: moved[name]}}, base={name: base[name]}, tasks={"a": task},
        objective="features", granularity="tensor", steps=6, every=3, rate=0.1, init=0.3,
        scales=(0.5,),
    )  # fmt: skip
    scores = {c.name: c.score for c in found.scores}
    assert scores["step 6"] > scores["start"] > scores["base"]
    with torch.no_grad():
        states = [{**task.module.state_dict(), name: t[name]} for t in (base, moved)]
        rows = [
            torch.cat([torch.func.functional_call(task.module, s, (), x) for x, _ in task.validate])
            for s in states
        ]
    away = 1 - torch.nn.functional.cosine_similarity(*rows).mean()
    assert scores["base"] == pytest.approx(-float(away), rel=1e-4)


# -- in recipes ------------------------------------------------------------------------------------
RECIPE = """
merge_method: task_arithmetic
base_model: base
heads: keep
models: [{model: size}, {model: turn}]
parameters: {weight: 0.3}
learn:
  objective: OBJECTIVE
  granularity: tensor
  data: {size: size.txt, turn: turn.txt}
  steps: 30
  every: 10
  rate: 0.05
"""


def test_a_recipe_learns_from_texts_alone(here: Path) -> None:
    """No label anywhere: what is chosen answers more often as the experts do than the start."""
    Path("r.yml").write_text(RECIPE.replace("OBJECTIVE", "distill"))
    merge.apply("r.yml", "out")
    assert any(v not in (0.0, 0.3) for row in read_coefficients("out").table().values()
               for v in row.values())  # fmt: skip
    merged = merge.open("out").state_dict()
    agreed: dict[str, Any] = {}
    for which in ("out", "base"):
        for name in ("size", "turn"):
            expert = transformers.BertForSequenceClassification.from_pretrained(name).eval()
            task = open_task(f"{name}.txt", name)
            own = expert.state_dict()
            body = merged if which == "out" else merge.open("base").state_dict()
            mixed = {n: body[n] if n in body and "classifier" not in n else t
                     for n, t in own.items()}  # fmt: skip
            with torch.no_grad():
                answers = [
                    torch.cat([
                        torch.func.functional_call(expert, s, (), x).logits.argmax(-1)
                        for x, _ in task.validate
                    ])
                    for s in (own, mixed)
                ]  # fmt: skip
            agreed[which, name] = float((answers[0] == answers[1]).float().mean())
    mean = {w: sum(agreed[w, n] for n in ("size", "turn")) for w in ("out", "base")}
    assert mean["out"] > mean["base"]


def test_an_objective_that_needs_labels_says_so(here: Path) -> None:
    Path("r.yml").write_text(RECIPE.replace("OBJECTIVE", "cross_entropy"))
    with pytest.raises(merge.PlanError, match="no labels") as caught:
        merge.apply("r.yml", "out")
    assert caught.value.where["task"] == "size" and caught.value.where["line"] == "7"
    assert not Path("out").exists()
    Path("r.yml").write_text(RECIPE.partition("learn:")[0])
    with pytest.raises(SourceError, match="without labels cannot judge"):
        merge.tune("r.yml", over={"weight": "0,1"}, data="turn.txt")
