"""``learn:`` in recipes, ``--coefficients`` and ``merge coefficients``."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from merge_cli.app import cli
from safetensors.torch import load_file
from torch import Tensor

import merge
from merge import applying
from merge.analysis.named import called
from merge.coefficients import by_layer, read_coefficients
from merge.errors import MergeError, RecipeError, SourceError
from merge.recipe.read import parse_recipe
from merge.recipe.schema import json_schema, keys_at

from .conftest import write_model
from .texts import saved_classifier, written_texts

OWN = """
import time
import merge, torch
from safetensors.torch import load_file
from torch import nn

WAIT = 0.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 4)])

    def forward(self, x):
        time.sleep(WAIT)
        return self.layers[1](torch.relu(self.layers[0](x)))


def _task(name, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 6, generator=draw) + seed - 1.5
    net = Net()
    net.load_state_dict(load_file(f"{name}/model.safetensors"))
    with torch.no_grad():
        y = net(x).argmax(-1)
    cut = lambda a, b: [(x[i : i + 20], y[i : i + 20]) for i in range(a, b, 20)]
    return merge.Task(
        Net(), nn.functional.cross_entropy, cut(0, 100), cut(160, 200),
        lambda out, t: float((out.argmax(-1) == t).float().mean()), validate=cut(100, 160),
    )


def one():
    return _task("x", 1)


def two():
    return _task("y", 2)


def broken():
    def batches():
        yield from one().train
        raise OSError("the disk is gone")

    return {"train": batches()}


def net():
    return Net()


def far():
    return merge.Task(Net(), nn.functional.cross_entropy, [(torch.ones(9, 6), torch.arange(9))])


def empty():
    return merge.Task(Net(), nn.functional.cross_entropy, [])


def headless():
    return merge.Task(Wrapped(), nn.functional.cross_entropy, one().train)


class Wrapped(Net):
    def forward(self, x):
        return {"hidden": super().forward(x)}


def calm(out, batch, task, expert):
    return out.square().mean()
"""
TEXT = """# learned
merge_method: task_arithmetic
base_model: base
models:
  - model: x
  - model: y   # the second
parameters: {weight: 0.3}
learn:
  preset: pseudo_labels
  data: {x: 'learn_own:one', y: 'learn_own:two'}
  steps: 30
  every: 10
  rate: 0.02
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Folders base, x and y, tasks of x and of y, and a recipe."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = {
        "layers.0.weight": torch.randn(8, 6), "layers.0.bias": torch.randn(8),
        "layers.1.weight": torch.randn(4, 8), "layers.1.bias": torch.randn(4),
    }  # fmt: skip
    states = {"base": base}
    for name in "xy":
        states[name] = {n: t + 0.5 * torch.randn_like(t) for n, t in base.items()}
    for name, state in states.items():
        write_model(tmp_path / name, state)
    (tmp_path / "learn_own.py").write_text(OWN)
    yield states
    sys.modules.pop("learn_own", None)


def recipe(text: str = TEXT) -> Path:
    Path("r.yml").write_text(text)
    return Path("r.yml")


def shares(state: dict[str, Tensor]) -> list[float]:
    """What is right of each task's validation data."""
    found = []
    for name in ("one", "two"):
        task = called(f"learn_own:{name}")
        found.append(task.measure(state, list(task.validate)).right)
    return found


# -- what comes out --------------------------------------------------------------------------------
def test_it_is_what_the_library_learns(here: dict[str, Any]) -> None:
    merge.apply(recipe(), "out")
    tasks = {n: called(f"learn_own:{f}") for n, f in (("x", "one"), ("y", "two"))}
    found = merge.learn(
        {"x": "x", "y": "y"}, base="base", tasks=tasks, preset="pseudo_labels",
        steps=30, every=10, rate=0.02, init=0.3,
    )  # fmt: skip
    assert read_coefficients("out").blocks == found.coefficients.blocks
    state = found.checkpoint.state_dict()
    written = load_file("out/model.safetensors")
    assert all(torch.equal(written[n], t) for n, t in state.items())
    assert merge.verify("out").ok and not list(Path().glob("out.*"))


def test_the_result_is_never_worse_on_validation_data_than_what_is_written(
    here: dict[str, Any],
) -> None:
    plain = TEXT.partition("learn:")[0]
    for start in ("0.3", "0.7", "0.05"):
        merge.apply(recipe(plain.replace("0.3", start)), "plain", replace=True)
        merge.apply(recipe(TEXT.replace("0.3", start)), "out", replace=True)
        reached = sum(shares(load_file("out/model.safetensors")))
        for other in ("plain", "base"):
            assert reached >= sum(shares(load_file(f"{other}/model.safetensors"))) - 1e-6
    assert reached > sum(shares(load_file("plain/model.safetensors"))) + 0.05


@pytest.mark.parametrize(
    "top",
    [
        "merge_method: task_arithmetic\nparameters: {weight: [0.1, 0.7]}\n",
        "merge_method: task_arithmetic\nparameters: {weight: 0.4, normalize: true, lambda: 0.9}\n",
        "merge_method: tsv\nparameters: {lambda: 0.8}\n",
    ],
)
def test_learning_starts_from_what_is_written(here: dict[str, Any], top: str) -> None:
    """No steps, and no other candidate: the same tensors, whatever the method's coefficients."""
    plain = f"{top}base_model: base\nmodels: [{{model: x}}, {{model: y}}]\n"
    merge.apply(recipe(plain), "plain")
    learn = "learn: {data: {x: 'learn_own:one', y: 'learn_own:two'}, steps: 0, candidates: [start]"
    merge.apply(recipe(f"{plain}{learn}, granularity: tensor, link: identity}}\n"), "out")
    found, wanted = (load_file(f"{n}/model.safetensors") for n in ("out", "plain"))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_what_was_learned_is_applied_again_without_data(here: dict[str, Any]) -> None:
    file = recipe()
    merge.apply(file, "out")
    Path("learn_own.py").unlink()
    weights = Path("out/model.safetensors").read_bytes()
    merge.apply("out/merge_recipe.yml", "again")
    merge.apply("out/merge.lock.yml", "locked")
    done = invoke("apply", file, "third", "--coefficients", "out/coefficients.json", "-q")
    assert done.exit_code == 0, done.output
    for name in ("again", "locked", "third"):
        assert Path(name, "model.safetensors").read_bytes() == weights
        assert read_coefficients(name) == read_coefficients("out")
    text = Path("out/merge_recipe.yml").read_text()
    assert "# the second" in text and "learn_own" not in text
    assert Path("again/merge_recipe.yml").read_text() == text
    plain = recipe(TEXT.partition("learn:")[0])  # which learns nothing itself
    done = invoke("apply", plain, "fourth", "--coefficients", "out", "-q")
    assert done.exit_code == 2  # a folder
    done = invoke("apply", plain, "fourth", "--coefficients", "out/coefficients.json", "-q")
    assert Path("fourth/model.safetensors").read_bytes() == weights
    assert "learned from data" in Path("out/README.md").read_text()


def test_a_stage_of_its_own_is_learned(here: dict[str, Any]) -> None:
    merge.apply(recipe(), "alone")
    last = "merge_method: linear\nmodels: [{model: inner}, {model: base}]\nparameters: {weight: 1}"
    merge.apply(recipe(f"name: inner\n{TEXT}---\n{last}\n"), "out")
    alone, found = (load_file(f"{n}/model.safetensors") for n in ("alone", "out"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (alone[name] + here["base"][name]) / 2)
    shutil.move("learn_own.py", "gone")
    merge.apply("out/merge_recipe.yml", "again")
    assert torch.equal(
        load_file("again/model.safetensors")["layers.0.bias"], found["layers.0.bias"]
    )


def test_models_of_transformers_keep_their_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task runs with its own model's classifier, of so many classes as that has."""
    monkeypatch.chdir(tmp_path)
    saved_classifier("base", ["a", "b"], 0)
    saved_classifier("size", ["low", "high"], 1, base="base")
    saved_classifier("turn", ["zero", "one", "two"], 2, base="base")
    written_texts("size.jsonl", "label", ["low", "high"], 1)
    written_texts("turn.jsonl", "label", ["zero", "one", "two"], 2)
    text = """
merge_method: task_arithmetic
base_model: base
heads: keep
models: [{model: size}, {model: turn}]
parameters: {weight: 0.3}
learn:
  objective: {kind: distill, temperature: 2.0}
  granularity: layer
  data: {size: size.jsonl?label=label, turn: turn.jsonl?label=label}
  steps: 6
  batch: 16
  every: 3
"""
    merge.apply(recipe(text), "out")
    found = read_coefficients("out")
    assert found.operands == ("size", "turn")
    assert not any("classifier" in n for n in found.tensors)
    rows = by_layer(found).rows
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1"} <= set(rows)
    assert sorted(p.name for p in Path("out/heads").iterdir()) == ["size", "turn"]


# -- what is kept ----------------------------------------------------------------------------------
def test_learning_that_was_killed_goes_on_to_the_same_bytes(here: dict[str, Any]) -> None:
    file = recipe()
    merge.apply(file, "whole")
    Path("learn_own.py").write_text(OWN.replace("WAIT = 0.0", "WAIT = 0.02"))
    words = [sys.executable, "-m", "merge_cli", "apply", str(file), "out"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    state = Path("out.learn.safetensors")
    while not state.exists():
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert state.exists() and not Path("out").exists()
    Path("learn_own.py").write_text(OWN)
    seen: list[int] = []
    planned = applying.plan_recipe(file, out="out", learning=lambda s, of: seen.append(s.number))
    applying.apply_plan(planned, Path("out"))
    assert 1 < seen[0] <= 30 == seen[-1]
    assert (
        Path("out/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    )
    assert not state.exists()


def test_other_settings_do_not_take_up_what_was_kept(here: dict[str, Any]) -> None:
    applying.plan_recipe(recipe(), out="out")  # learned, and not yet written
    assert Path("out.learn.safetensors").exists()
    other = recipe(TEXT.replace("rate: 0.02", "rate: 0.03"))
    with pytest.raises(MergeError, match="under other settings") as caught:
        applying.plan_recipe(other, out="out")
    assert caught.value.where["kept"] == "out.learn.safetensors"
    applying.plan_recipe(other, out="out", fresh=True)


def test_an_error_leaves_the_output_of_before(here: dict[str, Any]) -> None:
    merge.apply(recipe(), "out")
    before = {p.name: p.read_bytes() for p in Path("out").iterdir()}
    data = "y: 'learn_own:broken?model=learn_own:net'"
    with pytest.raises(SourceError, match="of your own raised") as caught:
        merge.apply(recipe(TEXT.replace("y: 'learn_own:two'", data)), "out", replace=True)
    assert caught.value.where["task"] == "y" and "the disk is gone" in str(caught.value)
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == before


# -- plans, words and errors -----------------------------------------------------------------------
def test_a_plan_says_what_would_be_learned_and_reads_no_data(here: dict[str, Any]) -> None:
    Path("learn_own.py").unlink()
    planned = applying.plan_recipe(recipe(), compute=False)
    note = next(n for n in planned.plan.notes if "learned" in n)
    assert note.startswith("line 8: coefficients of x, y are learned by pseudo_labels")
    assert "in 30 steps on learn_own:one, learn_own:two" in note
    assert "learn" in json_schema()["properties"]
    assert "granularity" in keys_at(("learn", "")) and "label" in keys_at(("learn", "data", ""))


LINEAR = TEXT.replace("task_arithmetic", "ties").replace("0.3}", "0.3, density: 0.5}")


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        (TEXT.replace("  data: {x: 'learn_own:one', y: 'learn_own:two'}\n", ""), "not said", 8),
        (f"{TEXT}  coefficients: c.json\n", "both data and coefficients", 8),
        (LINEAR, "learned of a sum of differences", 8),
        (TEXT.replace("pseudo_labels", "adamergin"), "no such preset", 9),
        (f"{TEXT}  granularty: layer\n", "unknown key 'granularty'", 14),
        (f"{TEXT}  granularity: layers\n", "granularity", None),
        (f"{TEXT}  objective: entropi\n", "no such objective", 14),
        (f"{TEXT}  objective: {{kind: entropy, tempo: 1}}\n", "no such option", 14),
        (f"{TEXT}  objective: {{kind: distill, temperature: 0}}\n", "'temperature' cannot be", 14),
        (f"{TEXT}  objective: {{kind: negation, forget: [x, y]}}\n", "all tasks are to be", 8),
        (f"{TEXT}  objective: 'learn_own:none'\n", "no such function", 8),
        (f"{TEXT}  optimiser: adan\n", "no known word", 14),
        (f"{TEXT}  prepare: tiess\n", "", None),
        (f"{TEXT}  preset: tinting\n".replace("  preset: pseudo_labels\n", ""), "own", 8),
        (TEXT.replace("{x: 'learn", "{z: 'learn"), "not there", 8),
        (TEXT.replace("'learn_own:two'", "two.csv"), "no such data", None),
        (TEXT.replace("'learn_own:two'", "'learn_own:empty'"), "", 8),
        (TEXT.replace("'learn_own:two'", "'learn_own:headless'"), "no head", 8),
        (TEXT.replace("pseudo_labels", "atlas").replace("learn_own:two", "learn_own:far"), "", 8),
        ("scope: layers\n" + TEXT, "whole models", 9),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    here: dict[str, Any], text: str, what: str, line: int | None
) -> None:
    with pytest.raises(MergeError) as caught:
        merge.apply(recipe(text), "out")
    error = caught.value
    assert what in error.what, error
    if line is not None:
        assert error.where["line"] == str(line), error
    if "learn_own:two" not in text and "data:" in text:
        assert error.where["task"] == "y", error
    assert not Path("out").exists()


def test_two_stages_that_learn_are_too_many(here: dict[str, Any]) -> None:
    second = TEXT.replace("model: x", "model: inner").replace("{x:", "{inner:")
    with pytest.raises(RecipeError, match="learned once"):
        merge.apply(recipe(f"name: inner\n{TEXT}---\n{second}"), "out")
    with pytest.raises(RecipeError, match="not in one that is tuned"):
        merge.apply(recipe(f"{TEXT}tune: {{over: {{weight: 0:1}}, score: a}}\n"), "out")


def test_an_objective_of_ones_own_is_learned(here: dict[str, Any]) -> None:
    merge.apply(recipe(f"{TEXT}  objective: 'learn_own:calm'\n"), "out")
    assert read_coefficients("out").operands == ("x", "y")


# -- looking at them -------------------------------------------------------------------------------
def invoke(*words: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, [str(w) for w in words])


def test_coefficients_are_shown_by_layer(here: dict[str, Any]) -> None:
    done = invoke("apply", recipe(TEXT.replace("  every", "  granularity: tensor\n  every")), "out")
    assert done.exit_code == 0, done.output
    assert "step 10 of 30, loss" in done.stderr and "s left" in done.stderr
    done = invoke("coefficients", "out", "--json")
    found = json.loads(done.stdout)
    blocks = read_coefficients("out").blocks
    means = [blocks[f"layers.0.{n}"].values[0][0] for n in ("weight", "bias")]
    assert found["layers.0"]["x"] == pytest.approx(sum(means) / 2)
    done = invoke("coefficients", "out/coefficients.json", "--plot", "heat.png")
    assert done.exit_code == 0 and Path("heat.png").read_bytes().startswith(b"\x89PNG")
    assert [row.split()[0] for row in done.stdout.splitlines()] == ["x", "layers.0", "layers.1"]
    rows = invoke("coefficients", "out", "--blocks").stdout.splitlines()
    assert len(rows) == 5 and rows[1].startswith("layers.0.")
    assert parse_recipe(Path("out/merge_recipe.yml").read_text()).final.model.learn is not None


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"format": "merge-coefficients"}'])
def test_what_is_no_file_of_coefficients_is_told(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "c.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read_coefficients(file)
    assert caught.value.where["file"] == str(file)
