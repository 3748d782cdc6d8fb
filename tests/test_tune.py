"""``tune:`` in recipes, `merge.tune`, ``merge search``: what is found, kept, told and refused."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cli.app import cli
from safetensors.torch import load_file
from torch import Tensor

import merge
from merge import applying, methods
from merge.errors import MergeError, RecipeError, ScoreError, SourceError
from merge.learning.ranges import Range, parse_range
from merge.learning.search import Trial, search, strategy_of
from merge.learning.span import Span
from merge.recipe.read import parse_recipe, read_recipe
from merge.recipe.resolved import resolved
from merge.recipe.schema import json_schema, keys_at
from merge.streams.open import open_task

from .conftest import write_model
from .texts import saved_classifier, written_texts
from .tiny import noise

NAMES = ("model.embed.weight", *(f"model.layers.{i}.mlp.weight" for i in range(4)), "model.norm")


def values_of(called: str) -> dict[str, Tensor]:
    return {n: noise(called, n, shape=(6, 5) if n != "model.norm" else (5,)) for n in NAMES}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders base, x and y, and a recipe over them."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "x", "y"):
        write_model(tmp_path / name, values_of(name))
    return tmp_path


TWO = """# what it is
merge_method: {method}
base_model: base
models:
  - model: x   # the first
  - {{model: y, parameters: {{weight: 0.5}}}}
parameters: {{{parameters}}}
"""


def recipe(
    parameters: str = "weight: 0.5", tune: str = "", method: str = "task_arithmetic"
) -> Path:
    file = Path("r.yml")
    file.write_text(TWO.format(method=method, parameters=parameters) + tune)
    return file


def nearness(wanted: dict[str, Tensor]) -> Callable[[merge.Checkpoint], float]:
    """Minus the squared distance to ``wanted``."""

    def score(checkpoint: merge.Checkpoint) -> float:
        found = checkpoint.state_dict()
        return -float(sum((found[n].double() - wanted[n].double()).square().sum() for n in wanted))

    return score


def merged(*settings: str) -> dict[str, Tensor]:
    planned = applying.plan_recipe("r.yml", settings=settings, compute=False)
    return planned.compiled.checkpoint.state_dict()


# -- ranges ----------------------------------------------------------------------------------------
@given(st.floats(-5, 5), st.floats(0.1, 9), st.floats(0, 1), st.booleans())
def test_a_place_in_a_range_leads_back(low: float, width: float, place: float, log: bool) -> None:
    low = abs(low) + 0.1 if log else low
    span = Range(low, low + width, log=log)
    assert low - 1e-9 <= span.at(place) <= low + width + 1e-9
    assert span.place(span.at(place)) == pytest.approx(place, abs=1e-6)
    stepped = Range(low, low + width, step=width / 4)
    assert stepped.at(place) in stepped.grid()
    assert stepped.at(stepped.place(stepped.grid()[2])) == stepped.grid()[2]


@pytest.mark.parametrize(
    ("given_", "grid"),
    [
        ("0:1:0.25", (0, 0.25, 0.5, 0.75, 1)),
        ("0.1,0.7", (0.1, 0.7)),
        ([3, 1], (3, 1)),
        ({"low": 1, "high": 100, "steps": 3, "log": True}, (1, 10, 100)),
    ],
)
def test_ranges_are_read(given_: Any, grid: tuple[float, ...]) -> None:
    assert parse_range(given_).grid() == pytest.approx(grid)


@pytest.mark.parametrize(
    "given_", ["", "a", "1:0", "0:1:0", "0:1:2", "0:1:0.1:2", [], [True], {"low": 1}, "nan,1",
               {"low": 0, "high": 1, "log": True}, "0:inf"],
)  # fmt: skip
def test_what_is_no_range_is_refused(given_: Any) -> None:
    with pytest.raises(RecipeError, match="no range"):
        parse_range(given_)


# -- searches --------------------------------------------------------------------------------------
def best_of(trials: list[Trial]) -> Trial:
    return max(trials, key=lambda t: t.score)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 3.9))
def test_golden_sections_close_in_on_a_peak(peak: float) -> None:
    """14 trials leave a stretch of 4 * 0.618^13."""
    found = search(
        strategy_of("golden", [Range(0, 4)], trials=14), lambda v: -(abs(v[0] - peak) ** 1.5)
    )
    assert len(found) <= 14
    assert best_of(found).values[0] == pytest.approx(peak, abs=4 * 0.618**12)


def test_a_grid_is_all_there_is() -> None:
    spans = [parse_range("0:1:0.5"), parse_range("1,2")]
    found = search(strategy_of("grid", spans), lambda v: v[0] - v[1])
    assert [t.values for t in found] == list(itertools.product((0, 0.5, 1), (1, 2)))
    assert best_of(found).values == (1, 1) and found[-2].best


@pytest.mark.parametrize("method", ["cmaes", "optuna", "random"])
def test_samplers_repeat_by_seed_and_do_better_with_time(method: str) -> None:
    def score(values: tuple[float, ...]) -> float:
        return -sum((v - 0.3 * (i + 1)) ** 2 for i, v in enumerate(values))

    def ran(seed: int) -> list[Trial]:
        spans = [Range(-1, 2)] * 3
        return search(strategy_of(method, spans, trials=60, seed=seed, start=(0, 0, 0)), score)

    one, other = ran(1), ran(1)
    assert [t.values for t in one] == [t.values for t in other] != [t.values for t in ran(2)]
    assert best_of(one).score > best_of(one[:3]).score
    if method == "cmaes":
        assert best_of(one).score > -0.02


def test_a_search_is_never_worse_than_its_start_and_scores_nothing_twice() -> None:
    calls: list[tuple[float, ...]] = []

    def score(values: tuple[float, ...]) -> float:
        calls.append(values)
        return 1.0 if values == (0.37,) else 0.0

    found = search(strategy_of("grid", [parse_range("0.37,0.5,0.5,1")]), score, start=(0.37,))
    assert best_of(found).values == (0.37,) and len(calls) == len(set(calls)) == 3


@pytest.mark.parametrize(
    ("method", "count", "trials", "what"),
    [
        ("grid", 5, None, "more points"),
        ("grid", 2, 20, "more points"),
        ("golden", 2, None, "one number"),
        ("cmaes", 1, None, "two numbers"),
    ],
)
def test_what_a_method_cannot_search_is_told(
    method: str, count: int, trials: int | None, what: str
) -> None:
    with pytest.raises(RecipeError, match=what) as caught:
        next(strategy_of(method, [Range(0, 1)] * count, trials=trials))
    assert caught.value.do


@pytest.mark.parametrize(("method", "package"), [("optuna", "optuna"), ("cmaes", "cmaes")])
def test_an_extra_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, method: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RecipeError, match=f"done by {package}") as caught:
        next(strategy_of(method, [Range(0, 1)] * 2))
    assert "hf-merge[search]" in str(caught.value.do)


# -- sums in the place of merges -------------------------------------------------------------------
AFFINE = [m for m in methods.registry().values() if "lambda" in m.parameters]


@pytest.mark.parametrize("method", AFFINE, ids=lambda m: m.name)
def test_results_are_affine_in_lambda(method: methods.Method) -> None:
    """The law that sums stand on, for every method and its variants for vectors and matrices."""
    base, models = values_of("base"), [values_of(n) for n in "xyz"]
    call = getattr(merge, method.name)
    given_: dict[str, Any] = {p: 0.7 for p, s in method.parameters.items() if s.required}
    found = {}
    for scale in (0.0, 1.0, 1.7):
        found[scale] = call(models, base=base, lambda_=scale, **given_).state_dict()
    for name in NAMES:
        zero, one = found[0.0][name].double(), found[1.0][name].double()
        wanted = zero + 1.7 * (one - zero)
        torch.testing.assert_close(found[1.7][name].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters", "keys", "most"),
    [
        ("task_arithmetic", "weight: 0.5", ["parameters.weight"], 2),
        ("task_arithmetic", "weight: 0.5", ["models.0.parameters.weight", "parameters.lambda"], 3),
        ("task_arithmetic", "weight: 0", ["models.0.parameters.weight"], 2),
        ("ties", "weight: 1, density: 0.5", ["parameters.lambda"], 2),
        ("tsv", "lambda: 1", ["parameters.lambda"], 2),
        ("cart", "lambda: 1", ["parameters.lambda"], 2),
        ("linear", "weight: 1, normalize: false", ["parameters.weight"], 2),
        ("ties", "weight: 1, density: 0.5", ["parameters.density"], 5),
    ],
)
def test_candidates_are_sums_of_what_was_computed(
    here: Path, method: str, parameters: str, keys: list[str], most: int
) -> None:
    """Equal to the merge itself; the number of merges does not grow while a number scales."""
    recipe(parameters, method=method)
    span = Span(lambda c: c.cast("float32").state_dict())
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        numbers = (0.1 + torch.rand(len(keys), generator=draw) * 0.8).tolist()
        chosen = [f"{k}={v!r}" for k, v in zip(keys, numbers, strict=True)]
        planned = applying.plan_recipe("r.yml", settings=chosen, compute=False)
        found = span.state(planned.compiled.checkpoint)
        wanted = planned.compiled.checkpoint.state_dict()
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=3e-6)
    assert span.computed == most


def test_a_method_that_breaks_the_law_is_found_out(here: Path) -> None:
    """Such as one of a plugin, where lambda is a power."""
    recipe("weight: 1, density: 0.5", method="ties")
    honest = Span(lambda c: c.cast("float32").state_dict())

    def evaluate(checkpoint: merge.Checkpoint) -> dict[str, Tensor]:
        state = checkpoint.cast("float32").state_dict()
        scale = float(re.search(r"ties", checkpoint.label) is not None)
        return {
            n: t + scale * 0.1 * (checkpoint.mass * 7 % 3) * t.square() for n, t in state.items()
        }

    odd = Span(evaluate)
    for value in (0.2, 0.9, 1.6):
        made = applying.plan_recipe("r.yml", settings=[f"parameters.lambda={value}"], compute=False)
        checkpoint = made.compiled.checkpoint
        assert honest.state(checkpoint).keys() == checkpoint.tensors.keys()
        found, wanted = odd.state(checkpoint), evaluate(checkpoint)
        assert all(torch.allclose(found[n], wanted[n], atol=1e-5) for n in wanted)
    assert honest.computed == 2 and odd.computed > 2


def test_tied_tensors_stay_one() -> None:
    shared = [torch.randn(3, 2, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    base, tuned = (merge.open({"a": t, "b": t}) for t in shared)
    span = Span(lambda c: c.state_dict())
    for scale in (0.0, 1.0, 0.3):
        found = span.state(base + scale * (tuned - base))
    assert torch.equal(found["a"], found["b"])
    assert torch.allclose(found["b"], shared[0] + 0.3 * (shared[1] - shared[0]), atol=1e-6)


# -- numbers and their places ----------------------------------------------------------------------
def test_each_model_gets_a_number(here: Path) -> None:
    wanted = nearness(
        {n: b + 0.8 * (x - b) + 0.1 * (y - b) for (n, b), x, y in zip(
            values_of("base").items(), values_of("x").values(), values_of("y").values(),
            strict=True)}
    )  # fmt: skip
    found = merge.tune(
        recipe(), over={"weight": {"low": 0, "high": 1, "step": 0.1, "each": "model"}}, score=wanted
    )
    assert found.names == ("weight[x]", "weight[y]")
    assert found.values == (0.8, 0.1) and found.score == pytest.approx(0, abs=1e-6)
    assert found.merges == 3 and len(found.trials) == 121  # and (0.5, 0.5), which is among them
    assert found.trials[0].values == (0.5, 0.5)
    out = parse_recipe(found.recipe).final.model
    assert [e.parameters["weight"] for e in out.models or ()] == [0.8, 0.1]


def test_groups_and_layers_get_numbers(here: Path) -> None:
    """The genome of evolutionary merging: by names, over depth, by runs of layers."""
    seen: list[dict[str, Any]] = []

    def score(checkpoint: merge.Checkpoint) -> float:
        return 0.0

    over = {
        "weight": {"values": [1, 2], "filters": ["norm"], "knots": 2},
        "lambda": {"values": [3], "every": 3},
    }
    found = merge.tune(recipe(), over=over, score=score, trials=100, method="grid")
    assert found.names == (
        "weight[norm][0]", "weight[norm][1]", "weight[rest][0]", "weight[rest][1]",
        "lambda[0-2]", "lambda[3]",
    )  # fmt: skip
    made = parse_recipe(found.recipe).final.model.parameters
    assert made["weight"] == [{"filter": "norm", "value": [1, 1]}, {"value": [1, 1]}]
    assert made["lambda"] == [3, 3, 3, 3]
    assert seen == []


def test_slices_and_their_sources_get_numbers(here: Path) -> None:
    Path("s.yml").write_text(
        """
merge_method: linear
slices:
  - sources: [{model: x, layer_range: [0, 2]}, {model: y, layer_range: [0, 2]}]
  - sources: [{model: x, layer_range: [2, 4]}, {model: y, layer_range: [2, 4]}]
parameters: {weight: 1, normalize: false}
"""
    )
    wanted = {
        n: (x if i < 3 else y)
        for i, (n, x, y) in enumerate(
            zip(NAMES, values_of("x").values(), values_of("y").values(), strict=True)
        )
    }
    over = {"weight": {"values": [0, 1], "each": "source", "start": 1}}
    found = merge.tune("s.yml", over=over, score=nearness(wanted))
    assert found.names == ("weight[0][x]", "weight[0][y]", "weight[1][x]", "weight[1][y]")
    assert found.values == (1, 0, 0, 1) and found.score == pytest.approx(0, abs=1e-9)


def test_a_stage_of_its_own_is_tuned_by_its_name(here: Path) -> None:
    Path("m.yml").write_text(
        """
name: inner
merge_method: task_arithmetic
base_model: base
models: [{model: x}]
parameters: {weight: 1}
---
merge_method: linear
models: [{model: inner}, {model: y}]
parameters: {weight: 1}
"""
    )
    base, x, y = (values_of(n) for n in ("base", "x", "y"))
    wanted = {n: (base[n] + 0.25 * (x[n] - base[n]) + y[n]) / 2 for n in base}
    found = merge.tune(
        "m.yml", over={"inner:parameters.weight": "0:1:0.25"}, score=nearness(wanted)
    )
    assert found.values == (0.25,)
    assert "weight: 0.25" in found.recipe and found.recipe.count("---") == 1


# -- in recipes ------------------------------------------------------------------------------------
SCORE = """
import json, sys
from pathlib import Path
from safetensors.numpy import load_file
w = load_file(sys.argv[1] + "/model.safetensors")["model.norm"]
base = load_file("base/model.safetensors")["model.norm"]
x = load_file("x/model.safetensors")["model.norm"]
with Path("calls").open("a") as f:
    f.write("x")
print(float((w - base - 0.7 * (x - base)).__pow__(2).sum()))
"""
TUNE = "tune: {{over: {{{over}}}, score: '{python} score.py', minimize: true{more}}}\n"


def by_command(over: str = "weight: 0:1:0.1", more: str = "") -> str:
    Path("score.py").write_text(SCORE)
    return TUNE.format(over=over, python=sys.executable, more=more)


ONE = """merge_method: task_arithmetic
base_model: base
models: [{model: x}]   # one
parameters: {weight: 1.0}
"""


def one(tune: str) -> Path:
    Path("r.yml").write_text(ONE + tune)
    return Path("r.yml")


def test_a_recipe_is_tuned_when_it_is_applied(here: Path) -> None:
    file = one(by_command())
    merge.apply(file, "out")
    base, x = values_of("base"), values_of("x")
    found = load_file("out/model.safetensors")
    for name in base:
        torch.testing.assert_close(
            found[name], base[name] + 0.7 * (x[name] - base[name]), rtol=0, atol=1e-6
        )
    text = Path("out/merge_recipe.yml").read_text()
    assert "weight: 0.7" in text and "tune:" not in text and "# one" in text
    assert text.startswith("# tuned by grid: weight = 0.7")
    said = json.loads(Path("out/tune.json").read_text())
    assert said["values"] == {"weight": 0.7} and len(said["trials"]) == 11
    assert said["start"] == 0 and said["trials"][0]["values"] == {"weight": 1.0}
    merge.apply("out/merge_recipe.yml", "again")  # without data, without the score
    assert load_file("again/model.safetensors").keys() == found.keys()
    assert all(torch.equal(t, found[n]) for n, t in load_file("again/model.safetensors").items())
    assert merge.verify("out").ok and not list(Path().glob("*.jsonl"))
    calls = Path("calls").read_text()
    merge.apply(file, "out")  # it is there already, and nothing is scored again
    assert Path("calls").read_text() == calls


def test_the_lock_file_makes_it_again_without_a_search(here: Path) -> None:
    merge.apply(one(by_command()), "out")
    Path("score.py").unlink()
    merge.apply("out/merge.lock.yml", "again")
    assert (
        Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    )


def test_a_plan_says_what_would_be_tuned_and_runs_nothing(here: Path) -> None:
    planned = applying.plan_recipe(one(by_command("weight: 0:1:0.1")), compute=False)
    note = next(n for n in planned.plan.notes if "tuned" in n)
    assert note.startswith("line 5: tuned by grid") and "11 trials" in note
    assert "weight from 0 to 1 in steps of 0.1" in note and not Path("calls").exists()
    Path("r.yml").write_text(ONE.replace("weight: 1.0", "lambda: 1") + by_command("weight: 0:2"))
    planned = applying.plan_recipe("r.yml", compute=False)  # which has no weight yet
    assert any("values of the middle" in n and "golden" in n for n in planned.plan.notes)
    done = click.testing.CliRunner().invoke(cli, ["plan", "r.yml"])
    assert done.exit_code == 0 and "tuned by golden" in done.output


def test_a_search_that_was_killed_goes_on(here: Path) -> None:
    """The second run scores what the first did not, and finds the same."""
    file = one(by_command())
    Path("score.py").write_text("import time\ntime.sleep(0.3)\n" + Path("score.py").read_text())
    words = [sys.executable, "-m", "merge_cli", "apply", str(file), "out"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not Path("calls").exists() or len(Path("calls").read_text()) < 2:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = Path("out.tune.jsonl").read_text().splitlines()
    assert 1 <= len(kept) - 1 < 11 and not Path("out").exists()
    with Path("out.tune.jsonl").open("a") as opened:
        opened.write('{"values": {"weight"')  # a line that was cut off
    before = len(Path("calls").read_text())
    merge.apply(file, "out")
    assert len(Path("calls").read_text()) - before == 11 - (len(kept) - 1)
    assert json.loads(Path("out/tune.json").read_text())["values"] == {"weight": 0.7}


@pytest.mark.parametrize(
    ("tune", "what", "line"),
    [
        ("tune: {over: {weight: 0:1}}\n", "not said by what", 5),
        ("tune: {over: {weight: 0:1}, score: a, data: b.csv}\n", "both data and a score", 5),
        ("tune: {score: a}\n", "'over' is missing", 5),
        ("tune: {over: {weight: 1:0}, score: a}\n", "no range", 5),
        ("tune:\n  over: {weight: {low: 0, hihg: 1}}\n  score: a\n", "no range", 6),
        ("tune:\n  over: {weight: {low: 0, high: 1, stpes: 3}}\n", "unknown key 'stpes'", 6),
        ("tune: {over: {weight: 0:1}, methd: grid}\n", "unknown key 'methd'", 5),
        ("tune: {over: {weight: 0:1}, score: a, method: golden2}\n", "no known word", 5),
        ("tune:\n  over:\n    weigth: 0:1\n  score: a\n", "unknown parameter 'weigth'", 4),
        ("tune: {over: {models.7.parameters.weight: 0:1}, score: a}\n", "no item", 5),
        ("tune: {over: {weight: {low: 0, high: 1, each: slice}}, score: a}\n", "one slice", 5),
        ("tune: {over: {weight: {low: 0, high: 1, knots: 2, every: 1}}, score: a}\n", "knots", 5),
        ("tune: {over: {weight: 0:1, lambda: 0:1}, score: a, method: golden}\n", "one number", 5),
        ("tune: {over: {weight: 0:1, parameters.weight: 0:1}, score: a}\n", "tuned twice", 5),
        ("tune: {over: {weight: 0:1}, data: {path: v.csv, lable: y}}\n", "unknown key 'lable'", 5),
        ("tune: {over: {weight: 0:1}, data: nowhere.csv}\n", "no such data", None),
        ("tune: {over: {weight: 0:1}, score: 'false'}\n", "failed", None),
    ],
)
def test_what_is_wrong_with_it_is_told_with_its_place(
    here: Path, tune: str, what: str, line: int | None
) -> None:
    with pytest.raises(MergeError) as caught:
        merge.apply(one(tune), "out")
    assert what in caught.value.what
    if line is not None:
        assert caught.value.where["line"] == str(line), caught.value.where
    assert not Path("out").exists()


def test_only_the_result_is_tuned(here: Path) -> None:
    Path("r.yml").write_text(
        f"name: inner\n{ONE}tune: {{over: {{weight: 0:1}}, score: a}}\n---\n"
        "merge_method: linear\nmodels: [{model: inner}, {model: y}]\nparameters: {weight: 1}\n"
    )
    with pytest.raises(RecipeError, match="only the result") as caught:
        merge.apply("r.yml", "out")
    assert "inner:parameters.t" in str(caught.value.do)


def test_words_of_it_are_in_the_schema() -> None:
    schema = json_schema()
    assert "tune" in schema["properties"]
    assert "over" in keys_at(("tune", "")) and "knots" in keys_at(("tune", "over", "weight", ""))
    assert "validate" in keys_at(("tune", "data", ""))


# -- by data ---------------------------------------------------------------------------------------
DATA = """
import merge, torch
from safetensors.torch import load_file
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 6))

    def forward(self, x):
        return x @ self.weight.T


def task(validate=True):
    torch.manual_seed(0)
    x = torch.randn(90, 6)
    base, tuned = (load_file(f"{n}/model.safetensors")["weight"] for n in ("base", "x"))
    y = (x @ (base + 0.6 * (tuned - base)).T).argmax(-1)
    parts = {"validate": [(x[:60], y[:60])]} if validate else {}
    return merge.Task(
        Net(), nn.functional.cross_entropy, [(x[60:], y[60:])], **parts,
        right=lambda out, y: float((out.argmax(-1) == y).float().mean()),
    )


def train_only():
    return task(False)


def broken():
    raise OSError("the disk is gone")
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "x"):
        write_model(tmp_path / name, {"weight": noise(name, shape=(3, 6))})
    (tmp_path / "tune_data.py").write_text(DATA)
    return one("tune: {over: {weight: 0:1:0.1}, data: 'tune_data:task'}\n")


def test_data_chooses_and_the_result_is_never_worse_on_it(nets: Path) -> None:
    merge.apply(nets, "out")
    said = json.loads(Path("out/tune.json").read_text())
    assert said["judged"] == "accuracy on validate of tune_data:task"
    scores = {t["values"]["weight"]: t["score"] for t in said["trials"]}
    assert said["score"] == max(scores.values()) == 1.0 and scores[1.0] < 1.0
    assert said["values"]["weight"] == pytest.approx(0.6, abs=0.11)
    from merge.analysis.named import called

    task = called("tune_data:task")
    state = load_file("out/model.safetensors")
    assert task.measure(state, task.validate).right == said["score"]
    found = merge.tune(nets, data="tune_data:train_only", metric="loss", method="golden")
    assert "train, there being no part validate" in found.judged
    assert found.score == max(t.score for t in found.trials) < 0


def test_several_tasks_count_alike_and_by_weight(nets: Path) -> None:
    both = {"one": "tune_data:task", "two": {"path": "tune_data:train_only", "weight": 0}}
    found = merge.tune(nets, data=both)
    alone = merge.tune(nets, data="tune_data:task")
    assert [t.score for t in found.trials] == [t.score for t in alone.trials]
    with pytest.raises(SourceError, match="of your own raised") as caught:
        merge.tune(nets, data={"good": "tune_data:task", "bad": "tune_data:broken"})
    assert caught.value.where["task"] == "bad"


def test_the_real_model_is_tuned_on_texts(minilm: Path, tmp_path: Path) -> None:
    """Two changes of all-MiniLM-L6-v2, one of which ruins it: its weight goes to 0."""
    base = load_file(minilm / "model.safetensors")
    for seed, (name, size) in enumerate((("kind", 1e-4), ("cruel", 2.0))):
        shutil.copytree(minilm, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        draw = torch.Generator().manual_seed(seed)
        moved = {
            n: t + size * torch.randn(t.shape, generator=draw) * t.std()
            if t.ndim > 1 and t.is_floating_point()
            else t
            for n, t in base.items()
        }
        from safetensors.torch import save_file

        save_file(moved, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    topics = {
        "animals": "dog cat horse bird wolf cow sheep fish frog bear",
        "money": "bank loan tax debt price wage fund bond cash rent",
        "weather": "rain snow storm wind cloud frost sun fog hail heat",
    }
    rows = [
        {"text": f"something about the {w}", "label": k, "part": "train" if i < 4 else "validate"}
        for k, ws in topics.items()
        for i, w in enumerate(ws.split())
    ]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "r.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {minilm}\nmodels:\n"
        f"  - {{model: {tmp_path / 'kind'}}}\n  - {{model: {tmp_path / 'cruel'}}}\n"
        "parameters: {weight: 1.0}\n"
    )
    found = merge.tune(
        tmp_path / "r.yml",
        over={"weight": {"values": [0, 1], "each": "model"}},
        data=f"{tmp_path / 'v.jsonl'}?label=label&split=part&head=prototypes",
    )
    assert found.merges == 3 and found.start == 0
    assert found.values[1] == 0 and found.score > found.trials[0].score + 0.2
    model = transformers.AutoModel.from_pretrained(minilm)
    assert set(model.state_dict()) >= {"encoder.layer.0.output.dense.weight"}


def test_tasks_of_classifiers_keep_their_own_heads(here: Path) -> None:
    """Each is judged with the classifier of its own model, whatever the merge does with heads."""
    saved_classifier("bert", ["a", "b"], 0)
    saved_classifier("size", ["low", "high"], 1, base="bert")
    saved_classifier("turn", ["zero", "one", "two"], 2, base="bert")
    written_texts("size.jsonl", "label", ["low", "high"], 1)
    written_texts("turn.jsonl", "label", ["zero", "one", "two"], 2)
    Path("b.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: bert\nheads: keep\n"
        "models: [{model: size}, {model: turn}]\nparameters: {weight: 0.5}\n"
    )
    found = merge.tune(
        "b.yml",
        over={"weight": {"values": [0, 1], "each": "model"}},
        data={"size": "size.jsonl?label=label", "turn": "turn.jsonl?label=label"},
        metric="loss",
    )
    for name in ("size", "turn"):
        model = transformers.BertForSequenceClassification.from_pretrained(name)
        alone = next(
            t for t in found.trials if t.values == tuple(float(n == name) for n in ("size", "turn"))
        )
        parts = {n: open_task(f"{n}.jsonl?label=label", n) for n in ("size", "turn")}
        body = {n: t for n, t in model.state_dict().items() if "classifier" not in n}
        losses = [
            p.measure({**p.module.state_dict(), **body}, p.validate).loss for p in parts.values()
        ]
        assert alone.score == pytest.approx(-sum(losses) / 2, rel=1e-4)
    assert found.merges == 3


def test_weights_that_a_library_would_make_up_are_refused(here: Path) -> None:
    saved_classifier("bert", ["a", "b"], 0)
    transformers.BertModel.from_pretrained("bert").save_pretrained("body")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"bert/{file}", "body")
    config = json.loads(Path("body/config.json").read_text())
    Path("body/config.json").write_text(json.dumps({**config, "architectures": None}))
    written_texts("t.jsonl", "label", ["a", "b"], 1)
    with pytest.raises(SourceError, match="lacks weights") as caught:
        open_task("t.jsonl?label=label", "body")
    assert "classifier" in caught.value.where["tensor"]


# -- the command -----------------------------------------------------------------------------------
def invoke(*words: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, [str(w) for w in words])


def test_search_prints_a_curve_keeps_a_study_and_draws(here: Path) -> None:
    by_command()
    words = [
        "search", one(""), "--over", "weight=0:1:0.1", "--score", f"{sys.executable} score.py",
        "--minimize", "--save", "best.yml", "--plot", "c.png",
    ]  # fmt: skip
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    assert "--set parameters.weight=0.7" in done.stdout and "as written" in done.stdout
    assert "weight: 0.7" in Path("best.yml").read_text()
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    calls = len(Path("calls").read_text())
    done = invoke(*words, "--json", "-q")
    data = json.loads(done.stdout)
    assert data["values"] == {"weight": 0.7} and data["method"] == "grid"
    assert len(Path("calls").read_text()) == calls  # all of it was kept
    write_model(here / "z", values_of("z"))
    shutil.rmtree("x")
    shutil.move("z", "x")
    done = invoke(*words)
    assert (done.exit_code == 3 and isinstance(done.exception, SourceError)) or done.exit_code


def test_a_study_of_another_search_is_refused(here: Path) -> None:
    score = nearness(values_of("x"))
    merge.tune(one(""), over={"weight": "0,1"}, score=score, study="s.jsonl")
    with pytest.raises(SourceError, match="of another search"):
        merge.tune(one("seed: 3\n"), over={"weight": "0,1"}, score=score, study="s.jsonl")
    merge.tune("r.yml", over={"weight": "0,1"}, score=score, study="s.jsonl", fresh=True)
    Path("s.jsonl").write_text("no study\n")
    with pytest.raises(SourceError, match="no study"):
        merge.tune("r.yml", over={"weight": "0,1"}, score=score, study="s.jsonl")


def test_more_trials_go_on_where_fewer_stopped(here: Path) -> None:
    """An evolution of populations by CMA-ES, from its seed, in two goes."""
    seen: list[Trial] = []
    over = {"weight": {"low": -1, "high": 2, "each": "model", "knots": 2}}
    wanted = nearness(values_of("x"))
    how: dict[str, Any] = {"over": over, "method": "cmaes", "population": 6, "seed": 4}
    merge.tune(recipe(), **how, score=wanted, study="s.jsonl", trials=12)
    found = merge.tune(
        recipe(), **how, score=wanted, study="s.jsonl", trials=60, progress=seen.append,
        better="best.yml",
    )  # fmt: skip
    assert sum(t.known for t in seen) == 13 and len(seen) == 61
    assert seen[-1].generation == 9 and found.score > seen[12].score
    alone = merge.tune(recipe(), **how, score=wanted, trials=60)
    assert alone.trials[-1].values == found.trials[-1].values and alone.score == found.score
    assert found.score > found.trials[0].score + 1 and found.merges <= 5
    assert (
        parse_recipe(Path("best.yml").read_text()).final.model
        == parse_recipe(found.recipe).final.model
    )


def test_a_score_that_fails_keeps_what_was_tried(here: Path) -> None:
    calls = []

    def score(_: merge.Checkpoint) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise ScoreError("it broke")
        return float(len(calls))

    with pytest.raises(ScoreError, match="it broke"):
        merge.tune(one(""), over={"weight": "0:1:0.5"}, score=score, study="s.jsonl")
    assert len(Path("s.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ScoreError, match="not a number"):
        merge.tune("r.yml", over={"weight": "0:1:0.5"}, score=lambda _: math.nan)


def test_nothing_to_tune_is_told(here: Path) -> None:
    with pytest.raises(RecipeError, match="nothing is said to be tuned"):
        merge.tune(one(""), score=lambda _: 0.0)
    assert invoke("search", "r.yml", "--over", "weight").exit_code == 2


@pytest.mark.parametrize("name", ["c.png", "c.svg"])
def test_pictures_of_one_and_of_many_numbers(here: Path, name: str) -> None:
    score = nearness(values_of("x"))
    many = {"weight": {"low": 0, "high": 1, "each": "model", "knots": 3}}
    for over in ({"weight": "0:1:0.2"}, many):
        found = merge.tune(recipe(), over=over, score=score, trials=12)
        first = found.picture(name).read_bytes()
        assert found.picture(name).read_bytes() == first


def test_a_resolved_recipe_keeps_what_it_does_not_touch(here: Path) -> None:
    text = (
        "# top\nmerge_method: linear\nmodels:\n- model: x # a\n  parameters:\n    weight: 1.50\n"
        "- model: y\nparameters: {weight: 1e-1}\n"
    )
    Path("r.yml").write_text(text)
    made = resolved(read_recipe("r.yml"), ["models.1.parameters.weight=0.25"])
    wanted = text.replace("- model: y\n", "- model: y\n  parameters:\n    weight: 0.25\n")
    assert parse_recipe(made).final.model == parse_recipe(wanted).final.model
    assert "# top" in made and "# a" in made and "weight: 1.50" in made
