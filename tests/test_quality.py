"""The benchmark of quality in miniature: texts of packages, a tiny encoder, a few lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import merge
from benchmarks.quality import table
from benchmarks.quality.__main__ import ROWS, make_lines, read
from benchmarks.quality.encoder import classifier, encode, stream
from benchmarks.quality.fixture import TOKENIZER, Fixture, Training, fixture
from benchmarks.quality.given import task_of
from benchmarks.quality.learned import learned
from benchmarks.quality.measure import Judge, difference, figures, mean_accuracy
from benchmarks.quality.rows import Row
from benchmarks.quality.sources import Text, plain
from benchmarks.quality.tasks import Sizes, TextTask, areas, distinct, exceptions, kinds, split

KEYS = ("base", "individual", "average", "dare", "tsv_tuned", "cart_tuned", "regmean")
LINES = [row for row in ROWS if row.key in KEYS] + [
    Row("few_shot", "labels", "labels",
        learned("pseudo_labels", 64, seeds=(0, 1), objective="cross_entropy", steps=10)),
    Row("gates", "gates", "inputs", learned("spectral_gates", seeds=(0, 1), steps=10)),
]  # fmt: skip
SIZES = Sizes(train=96, valid=12, adapt=24, test=24, shots=3)


@pytest.fixture(scope="module")
def made(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    """Two tasks of optuna's sources and experts of a BERT with random weights."""
    root = tmp_path_factory.mktemp("quality")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertModel(config).save_pretrained(root / "tiny")
    for name in TOKENIZER:
        shutil.copyfile(minilm / name, root / "tiny" / name)
    labels = ("call", "comparison", "list")
    tasks = [
        split("kind", labels, (t for t in kinds(["optuna"]) if t.label in labels), 0, SIZES),
        split("area", ("samplers", "storages", "visualization"),
              areas("optuna", ("samplers", "storages", "visualization")), 0, SIZES),
    ]  # fmt: skip
    training = Training(steps=12, batch=8, rate=1e-2)
    return fixture(0, root, tasks, SIZES, training, root / "tiny", say=lambda _: None)


def test_tasks_share_no_object_between_their_parts(made: Fixture) -> None:
    for task in made.tasks:
        parts = [task.train, task.valid, task.adapt, task.test]
        origins = [{t.origin for t in part} for part in parts]
        assert all(origins)
        assert sum(map(len, origins)) == len(set().union(*origins))
        assert {t.label for t in task.train} == set(task.labels)


def test_the_seed_chooses_the_texts() -> None:
    pool = [Text(f"word{i} other{i} third{i}", "ab"[i % 2], f"o{i}") for i in range(60)]
    sizes = Sizes(train=20, valid=4, adapt=4, test=4)
    one, same, other = (split("t", "ab", reversed(pool), s, sizes) for s in (0, 0, 1))
    assert one == same
    assert one.train != other.train


def test_near_duplicates_and_paths_are_dropped() -> None:
    a = Text("the sum of all the squares", "x", "a")
    b = Text("the sum of all the cubes", "y", "b")
    c = Text("an entirely different text here", "y", "c")
    assert distinct([a, b, c]) == [a, c]
    assert plain("see :class:`scipy.stats.norm` of numpy").split() == ["see", "norm", "of"]


def test_messages_are_those_written_out() -> None:
    found = {t.label for t in exceptions(["optuna"])}
    assert {"ValueError", "RuntimeError"} <= found


def test_experts_differ_from_the_base_in_their_layers_alone(made: Fixture) -> None:
    base = merge.open(made.base).state_dict()
    for folder in made.experts.values():
        expert = merge.open(folder).state_dict()
        moved = {n for n in base if not torch.equal(base[n], expert[n])}
        assert moved
        assert all(n.startswith("encoder.") for n in moved)


def test_a_fixture_is_made_once(made: Fixture) -> None:
    root = made.base.parent.parent
    before = {p: p.stat().st_mtime_ns for p in made.base.parent.rglob("*.safetensors")}
    again = fixture(0, root, made.tasks, SIZES, Training(12, 8, 1e-2), root / "tiny")
    assert again.base == made.base
    assert before == {p: p.stat().st_mtime_ns for p in made.base.parent.rglob("*.safetensors")}


def test_batches_give_what_single_texts_give(made: Fixture) -> None:
    task = made.tasks[0]
    module = classifier(made.base, made.heads[task.name])
    texts = stream(made.base, task, task.test, batch=5)
    order = sorted(task.test, key=lambda t: t.words)
    with torch.no_grad():
        single = torch.cat([module(**encode(made.base, [t])) for t in order])
        batched = torch.cat([module(**inputs) for inputs, _ in texts])
    assert sorted(texts.targets.tolist()) == sorted(task.targets(task.test))
    by_row = sorted(batched.double().sum(1).tolist())
    assert np.allclose(by_row, sorted(single.double().sum(1).tolist()), atol=1e-4)


def test_lines_are_made_and_told(
    made: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path)
    make_lines(made, LINES, again=False)
    lines = {r.key: found for r in LINES if (found := read(made, r)) is not None}
    assert len(lines) == len(KEYS) + 2
    judge = Judge(made)
    right = judge.examined(merge.average(list(made.experts.values())).state_dict())
    assert lines["average"].runs == (right,)
    text = table.write(LINES, [(made, lines)])
    assert all(row.title in text for row in LINES)
    data = json.loads((tmp_path / "quality.json").read_text())
    figures_of = {row["row"]: row for row in data["seeds"][0]["rows"]}
    assert figures_of["individual"]["normalised"] == pytest.approx(100)
    for row in figures_of.values():
        assert row["low"] <= row["mean"] <= row["high"]
    for key, line in lines.items():
        if "validation" in line.settings:
            runs, chosen = line.settings["validation"], line.settings["chosen"]
            assert isinstance(runs, list) and isinstance(chosen, list)
            assert len(runs) == len(chosen) == len(line.runs) == 2
            assert all(s[c] == max(s.values()) for s, c in zip(runs, chosen, strict=True)), key


def test_intervals_hold_the_mean_and_pairs_are_paired() -> None:
    draw = np.random.default_rng(1)
    a = {"t": (draw.random(200) < 0.6).tolist(), "u": (draw.random(100) < 0.8).tolist()}
    found = figures([a], a)
    assert found.mean == pytest.approx(100 * mean_accuracy(a))
    assert found.low < found.mean < found.high
    assert (found.normalised, found.normalised_low, found.normalised_high) == (100, 100, 100)
    assert difference([a], [a]) == (0, 0, 0)
    standard = 100 * np.sqrt(0.6 * 0.4 / 200 + 0.8 * 0.2 / 100) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * standard, rel=0.15)


def test_a_task_says_the_numbers_of_its_classes() -> None:
    texts = (Text("a", "x", "1"), Text("b", "y", "2"))
    assert TextTask("t", ("x", "y"), texts, (), (), ()).targets(texts) == [0, 1]


def test_tasks_are_given_with_labels_without_or_with_more_texts(made: Fixture) -> None:
    task = made.tasks[0]
    plain_, labelled, more = (
        task_of(made, task.name, **how) for how in ({}, {"labelled": 16}, {"more": True})
    )
    counts = [
        sum(len(inputs["input_ids"]) for inputs, _ in t.train) for t in (plain_, labelled, more)
    ]
    assert counts == [len(task.adapt), 16, len(task.adapt) + len(task.train)]
    assert all(target is None for t in (plain_, more) for _, target in t.train)
    assert all(len(inputs["input_ids"]) == len(target) for inputs, target in labelled.train)
