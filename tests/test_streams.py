"""Data of tasks: files of each kind, how they are divided and shuffled, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cli.app import cli
from PIL import Image

import merge
from merge.errors import MergeError, RecipeError, SourceError
from merge.streams.batches import Batches
from merge.streams.examples import Example, divide, part_of, shuffled
from merge.streams.images import Preprocess
from merge.streams.open import open_task
from merge.streams.spec import DataSpec, parse_data

ROWS = [
    {"text": f"w{i} w{i * 7 % 31} w{i * 3 % 17}", "label": ("bad", "good", "odd")[i % 3]}
    for i in range(60)
]


def error(data: Any, folder: Path | None = None, name: str = "") -> MergeError:
    with pytest.raises(MergeError) as caught:
        task = open_task(data, folder, name)
        list(task.train)
    return caught.value


def example(text: str, label: str | int | None = None) -> Example:
    return Example((text,), label, text.encode())


# -- what is said of data --------------------------------------------------------------------------
def test_a_text_with_options_is_a_mapping() -> None:
    made = parse_data("a.csv?text=q,p&label=y&limit=5&batch=4&labels=no,yes&seed=3", "nli")
    same = {
        "path": "a.csv", "text": "q,p", "label": "y", "limit": 5, "batch": 4,
        "labels": ["no", "yes"], "seed": 3,
    }  # fmt: skip
    assert made == parse_data(same, "nli") and made.called == "nli"
    assert parse_data("a.csv?split=fold").split == "fold"
    assert parse_data("a.csv").called == "a"


def test_a_question_mark_may_be_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "why?text=a").touch()
    assert parse_data(str(tmp_path / "why?text=a")).text == "text"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("a.csv?lable=y", "unknown option 'lable'"),
        ("a.csv?limit=0", "value of 'limit'"),
        ("a.csv?limit=few", "value of 'limit'"),
        ({"path": "a.csv", "batch": True}, "value of 'batch'"),
        ("a.csv?split=train:0.9,test:0.3", "value of 'split'"),
        ("a.csv?split=train:0.9,tset:0.1", "value of 'split'"),
        ("a.csv?split=train:much", "value of 'split'"),
        ("a.csv?labels=a,a", "value of 'labels'"),
        ("a.csv?head=linear", "value of 'head'"),
        ({"text": "body"}, "no path"),
    ],
)
def test_options_that_are_wrong_are_named(data: Any, what: str) -> None:
    with pytest.raises(RecipeError, match=what) as caught:
        parse_data(data)
    assert caught.value.expected


# -- division and order ----------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=8), min_size=2, max_size=60), st.integers(0, 5))
def test_a_part_depends_on_content_and_seed_alone(texts: list[str], seed: int) -> None:
    spec = DataSpec("x", seed=seed)
    whole = divide([example(t) for t in texts], spec)
    assert sum(map(len, whole.values())) == len(texts)
    for part, found in divide([example(t) for t in reversed(texts[1:])], spec).items():
        assert {e.key for e in found} <= {e.key for e in whole[part]}
    keys = [{e.key for e in found} for found in whole.values()]
    assert sum(map(len, keys)) == len(set(texts))  # equal examples are in one part


def test_shares_are_kept() -> None:
    shares = {"adapt": 0.5, "validate": 0.2}
    found = Counter(part_of(b"%d" % i, 0, shares) for i in range(4000))
    assert found["adapt"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert found["validate"] / 4000 == pytest.approx(0.2, abs=0.03)
    assert found[None] / 4000 == pytest.approx(0.3, abs=0.03)


def test_a_limit_takes_the_same_examples_whatever_their_order() -> None:
    every = [example(str(i)) for i in range(200)]
    spec = DataSpec("x", limit=10)
    one, other = divide(every, spec), divide(every[::-1], spec)
    for part in ("train", "validate", "test"):
        assert len(one[part]) == 10
        assert {e.key for e in one[part]} == {e.key for e in other[part]}


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(4, 30), st.integers(0, 9))
def test_each_stretch_has_all_classes(classes: int, each: int, seed: int) -> None:
    """Sorted by class as files often are; no batch is of one class."""
    every = [example(f"{c} {i}", c) for c in range(classes) for i in range(each)]
    found = shuffled(every, seed)
    assert sorted(found, key=lambda e: e.key) == sorted(every, key=lambda e: e.key)
    half = found[: len(found) // 2]
    counts = Counter(e.label for e in half)
    assert all(abs(counts[c] - each / 2) <= 1 for c in range(classes))
    if each > 8:
        assert found != shuffled(every, seed + 1)


def test_batches_are_made_when_they_are_asked_for() -> None:
    seen: list[int] = []

    def collate(part: Any) -> tuple[Any, Any]:
        seen.append(len(part))
        return [e.label for e in part], None

    made = Batches([example(str(i), i) for i in range(7)], 3, collate)
    assert len(made) == 3 and seen == []
    assert [x for x, _ in made] == [[0, 1, 2], [3, 4, 5], [6]]
    assert made[-1][0] == [6] and [x for x, _ in made[1:]] == [[3, 4, 5], [6]]
    with pytest.raises(IndexError):
        made[3]


# -- texts -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier of texts with three named classes, its tokenizer beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(70))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    names = {0: "good", 1: "bad", 2: "odd"}
    config = transformers.BertConfig(
        vocab_size=73, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, id2label=names, label2id={n: i for i, n in names.items()},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def written(place: Path, rows: list[dict[str, Any]], suffix: str) -> Path:
    file = place / f"rows{suffix}"
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(r) + "\n\n" for r in rows))
    elif suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8-sig") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_of_any_file_are_classified_as_the_model_does(
    bert: Path, tmp_path: Path, suffix: str
) -> None:
    """Loss and share right over all, against transformers with its own padding."""
    file = written(tmp_path, ROWS, suffix)
    task = open_task(f"{file}?label=label&batch=7&split=test:1", bert, "mood")
    assert task.name == "mood" and sum(len(t) for _, t in task.test) == 60
    model = transformers.BertForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    given_ = tokenizer([r["text"] for r in ROWS], padding=True, return_tensors="pt")
    target = torch.tensor([model.config.label2id[r["label"]] for r in ROWS])
    with torch.no_grad():
        logits = model(**given_).logits
    found = [task.measure(model.state_dict(), [b]) for b in task.test]
    sizes = [len(t) for _, t in task.test]
    loss = sum(m.loss * n for m, n in zip(found, sizes, strict=True)) / 60
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)), rel=1e-5)
    share = sum((m.right or 0) * n for m, n in zip(found, sizes, strict=True)) / 60
    assert share == pytest.approx(float((logits.argmax(-1) == target).float().mean()))


def test_parts_come_from_a_field_or_from_files_of_their_own(bert: Path, tmp_path: Path) -> None:
    parts = ["train", "valid", "test", "adapt"]
    rows = [{**r, "fold": parts[i % 4]} for i, r in enumerate(ROWS)]
    file = written(tmp_path, rows, ".jsonl")
    task = open_task(f"{file}?label=label&split=fold", bert)
    sizes = [sum(len(x["input_ids"]) for x, _ in p) for p in (task.train, task.validate, task.test)]
    assert sizes == [15, 15, 15]
    assert all(t is None for _, t in task.adapt) and len(list(task.adapt)) == 1
    (tmp_path / "more").mkdir()
    own = written(tmp_path / "more", ROWS[:6], ".csv")
    task = open_task({"path": str(file), "label": "label", "validate": str(own)}, bert)
    assert [len(t) for _, t in task.validate] == [6]
    assert sum(len(t) for _, t in (*task.train, *task.test)) == 60


def test_pairs_of_texts_are_tokenised_together(bert: Path, tmp_path: Path) -> None:
    rows = [{"a": r["text"], "b": "w1", "y": i % 3} for i, r in enumerate(ROWS)]
    task = open_task(f"{written(tmp_path, rows, '.jsonl')}?text=a,b&label=y&split=test:1", bert)
    inputs, target = task.test[0]
    assert inputs["input_ids"].shape == (32, 4) and target[:4].tolist() == [0, 1, 2, 0]
    assert inputs["input_ids"][:, 3].tolist() == [4] * 32


@pytest.mark.parametrize(
    ("lines", "options", "what", "where"),
    [
        (['{"text": "w1", "label": "good"}', "{"], "label=label", "no JSON object", {"line": "2"}),
        (['{"text": "w1"}'], "label=label", "no key 'label'", {"line": "1", "field": "label"}),
        (['{"body": "w1"}'], "", "no key 'text'", {"line": "1", "field": "text"}),
        (['{"text": 3}'], "", "a text is no text", {"line": "1", "field": "text"}),
        (['{"text": null}'], "", "is empty", {"field": "text"}),
        (['{"text": "w1", "label": [1]}'], "label=label", "no name and no number", {}),
        (['{"text": "w1", "label": 0.5}'], "label=label", "no whole number", {"line": "1"}),
        (['{"text": "w1", "s": "some"}'], "split=s", "in no part", {"field": "s"}),
        (['{"text": "w1", "label": 1}'] * 9, "label=label", "of one class", {}),
        (
            ['{"text": "w1", "label": 0}', '{"text": "w2", "label": 3}'],
            "label=label", "out of range", {"line": "2"},
        ),
        (
            ['{"text": "w1", "label": "good"}', '{"text": "w2", "label": "baad"}'],
            "label=label", "none of the model's classes", {"line": "2"},
        ),
        ([""], "", "there is no data", {}),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named(
    bert: Path, tmp_path: Path, lines: list[str], options: str, what: str, where: dict[str, str]
) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(lines))
    found = error(f"{file}?{options}", bert, "mood")
    assert isinstance(found, SourceError) and what in found.what
    assert found.where["task"] == "mood" and found.where["file"] == str(file)
    assert where.items() <= found.where.items()


def test_the_nearest_name_is_told(bert: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text('{"txt": "w1"}')
    assert "'txt'" in str(error(str(file), bert).do)
    file.write_text('{"text": "w1", "label": "good"}\n{"text": "w2", "label": "baad"}')
    assert "'bad'" in str(error(f"{file}?label=label", bert).do)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", b"text,label\nw1,good,more\n", "not as many values"),
        ("b.csv", b'text\n"w1\n', "no CSV"),
        ("c.parquet", b"PAR1", "no parquet file"),
        ("d.jsonl", b"\xff\xfe", "not UTF-8"),
        ("e.txt", b"", "no data"),
    ],
)
def test_damaged_tables_are_named(
    bert: Path, tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    (tmp_path / name).write_bytes(content)
    found = error(str(tmp_path / name), bert)
    assert isinstance(found, SourceError) and what in found.what
    assert found.where["file"] == str(tmp_path / name)


def test_prototypes_judge_an_encoder_without_a_classifier(minilm: Path, tmp_path: Path) -> None:
    """Against the formula, on the real model; names of tensors stay those of its files."""
    topics = {
        "animals": ["a dog barks", "the cat sleeps", "birds fly south", "a horse runs"],
        "money": ["the bank lends", "shares fell today", "taxes rise again", "a loan is paid"],
    }
    rows = [{"text": t, "label": k} for k, ts in topics.items() for t in ts]
    file = written(tmp_path, rows, ".jsonl")
    more = [{"text": "a wolf howls", "label": "animals"}, {"text": "my salary", "label": "money"}]
    (tmp_path / "more").mkdir()
    own = written(tmp_path / "more", more, ".csv")
    task = open_task(
        {"path": str(file), "label": "label", "head": "prototypes", "split": {"train": 1},
         "test": str(own)},
        minilm,
    )  # fmt: skip
    model = transformers.AutoModel.from_pretrained(minilm).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)

    def features(text: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden.mean(0), dim=0).double()

    means = [torch.stack([features(t) for t in ts]).mean(0) for ts in topics.values()]
    means = [m / m.norm() for m in means]
    centred = [m - torch.stack(means).mean(0) for m in means]
    prototypes = torch.stack([c / c.norm() for c in centred])
    wanted = torch.stack([20 * prototypes @ features(r["text"]) for r in more])
    state = model.state_dict()
    found = task.output(state, task.test[0][0])
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)
    assert task.measure(state, task.test).right == 1.0
    assert set(task.module.state_dict()) == set(state)


# -- pictures --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    said = {
        "do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2, "do_rescale": True,
        "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog", "owl"):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = draw.integers(0, 256, (10 + i, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_pictures_come_by_class_and_part(vit: Path, pictures: Path) -> None:
    task = open_task(str(pictures), vit)
    assert sorted(t for _, ts in task.train for t in ts.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    inputs, target = task.test[0]
    assert inputs["pixel_values"].shape == (12, 3, 8, 8)
    assert target.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    file = pictures / "test" / "cat" / "1.png"
    with Image.open(file) as opened:
        small = np.asarray(opened.resize((8, 8), Image.Resampling.BILINEAR), dtype=np.float64)
    wanted = (small / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    found = inputs["pixel_values"][1].double().permute(1, 2, 0)
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-5)
    state = transformers.ViTForImageClassification.from_pretrained(vit).state_dict()
    assert task.measure(state, task.test).right is not None


def test_pictures_are_prepared_as_transformers_does(tmp_path: Path) -> None:
    """Shortest edge, middle crop, scale and normalise: CLIP's way."""
    draw = np.random.default_rng(1)
    Image.fromarray(draw.integers(0, 256, (30, 41, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    said = {"shortest_edge": 20}, {"height": 16, "width": 16}
    own = Preprocess(size=20, crop=(16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    with Image.open(tmp_path / "a.png") as opened:
        theirs = transformers.CLIPImageProcessorPil(
            size=said[0], crop_size=said[1], image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
        )(opened, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(own(tmp_path / "a.png"), theirs, rtol=0, atol=2e-2)


def test_pictures_that_cannot_be_used_are_named(vit: Path, tmp_path: Path) -> None:
    assert "no pictures" in error({"path": str(tmp_path)}, vit).what
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"no picture")
    spec = {"path": str(tmp_path), "split": {"train": 1}}
    assert "3 classes, not 2" in str(error(spec, vit))
    found = error({**spec, "labels": ["cat", "dog", "owl"]}, vit, "animals")
    assert "cannot be read" in found.what and found.where["task"] == "animals"
    assert found.where["file"].endswith("x.png")


# -- functions of one's own ------------------------------------------------------------------------
OWN = """
import merge, torch
from torch import nn

BATCHES = [(torch.ones(4, 6) * i, torch.arange(4) % 3) for i in range(3)]

def net():
    torch.manual_seed(0)
    return nn.Linear(6, 3)

def batches():
    yield from BATCHES

def parts():
    return {"train": BATCHES[:2], "validate": BATCHES[2:], "adapt": [x for x, _ in BATCHES]}

def task():
    return merge.Task(net(), nn.functional.cross_entropy, BATCHES)

def breaks():
    yield BATCHES[0]
    raise RuntimeError("the disk is gone")

def odd():
    return {"trian": BATCHES}

def nothing():
    return []

def number():
    return 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_streams.py").write_text(OWN)
    yield
    sys.modules.pop("own_streams", None)


def test_functions_return_tasks_or_batches(own: None) -> None:
    task = open_task("own_streams:task", name="mine")
    assert task.name == "mine" and len(task.train) == 3
    task = open_task("own_streams:batches?model=own_streams:net&limit=6")
    assert len(task.train) == 2
    found = task.measure(task.module.state_dict(), task.train)
    assert found.right is not None and 0 <= found.right <= 1
    task = open_task("own_streams:parts?model=own_streams:net")
    assert [len(list(p)) for p in (task.train, task.validate, task.adapt)] == [2, 1, 3]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("own_streams:breaks?model=own_streams:net", "a loader of your own raised"),
        ("own_streams:odd?model=own_streams:net", "does not return a task"),
        ("own_streams:number?model=own_streams:net", "does not return a task"),
        ("own_streams:nothing?model=own_streams:net", "there is no data"),
        ("own_streams:batches?model=own_streams:number", "does not return a module"),
    ],
)
def test_functions_that_go_wrong_are_named(own: None, data: str, what: str) -> None:
    found = error(data, name="mine")
    assert what in found.what and found.where["task"] == "mine"
    assert "own_streams" in found.where["function"]


def test_a_batch_that_breaks_off_is_counted(own: None) -> None:
    found = error("own_streams:breaks?model=own_streams:net")
    assert found.where["batch"] == "2" and "the disk is gone" in str(found.found)


# -- arrays, and the command line ------------------------------------------------------------------
def test_arrays_have_parts_of_their_own(vit: Path, tmp_path: Path) -> None:
    x, y = np.zeros((30, 3, 8, 8), np.float32) + np.arange(30)[:, None, None, None], np.arange(30)
    np.savez(
        tmp_path / "a.npz", x=x[:12], y=y[:12] % 3, x_validate=x[12:18], y_validate=y[12:18] % 3,
        x_adapt=x[18:],
    )  # fmt: skip
    task = open_task(str(tmp_path / "a.npz"), vit)
    assert [sum(len(i["pixel_values"]) for i, _ in p) for p in (task.train, task.validate)] == [
        12,
        6,
    ]
    assert sum(len(i["pixel_values"]) for i, _ in task.adapt) == 12
    assert all(t is None for _, t in task.adapt)
    np.savez(tmp_path / "b.npz", x=x, y=y % 3)
    task = open_task(str(tmp_path / "b.npz"), vit)
    assert sum(len(t) for p in (task.train, task.validate, task.test) for _, t in p) == 30
    np.savez(tmp_path / "c.npz", x=x, y=y - 1)
    assert "out of range" in error(str(tmp_path / "c.npz"), vit).what


def test_the_command_line_takes_options_of_data(bert: Path, tmp_path: Path) -> None:
    file = written(tmp_path, ROWS, ".csv")
    words = ["barrier", str(bert), str(bert), "--aligned", "none", "--points", "3", "--json"]
    done = click.testing.CliRunner().invoke(cli, [*words, "--data", f"{file}?label=label"])
    assert done.exit_code == 0, done.output
    line = json.loads(done.output)["lines"][0]
    assert line["test"]["barrier"] == pytest.approx(0, abs=1e-6) and line["test"]["right"][0] >= 0


def test_a_language_model_reads_what_has_no_label(llamas: Any, bert: Path, tmp_path: Path) -> None:
    place = tmp_path / "llama"
    shutil.copytree(llamas("float32")[0], place)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(place)
    file = written(tmp_path, [{"body": r["text"]} for r in ROWS], ".jsonl")
    task = open_task(f"{file}?text=body&tokens=8&limit=20", place)
    state = transformers.AutoModelForCausalLM.from_pretrained(place).state_dict()
    for part in (task.train, task.test):
        found = task.measure(state, part)
        assert found.loss == pytest.approx(np.log(96), abs=0.5) and found.right is None
    assert merge.Task is type(task)
