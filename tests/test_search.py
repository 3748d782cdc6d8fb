"""Soups and sweeps: what is tried, what is kept, what happens when a score fails."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from merge_cli.app import cli

import merge
from merge.learning.score import Score
from merge.score import score_by_command

from .conftest import MakeModel


def model(*values: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values)}


def nearness(*target: float) -> Score:
    """Minus the squared distance to ``target``."""

    def score(checkpoint: merge.Checkpoint) -> float:
        return -float((checkpoint.state_dict()["w"] - torch.tensor(target)).square().sum())

    return score


def test_a_greedy_soup_takes_what_helps() -> None:
    models = [model(0.0, 0.0), model(4.0, 1.0), model(2.0, -1.0), model(40.0, 40.0)]
    found = merge.greedy_soup(models, nearness(3.0, 0.0))
    assert found.members == (1, 2)  # equal alone; the first of them is the start
    assert found.score == 0.0
    assert found.checkpoint.state_dict()["w"].tolist() == [3.0, 0.0]
    assert [t.members for t in found.trials] == [
        (0,), (1,), (2,), (3,), (1, 2), (1, 2, 0), (1, 2, 3)
    ]  # fmt: skip


def test_a_greedy_soup_is_never_worse_than_its_best_member() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        models = [{"w": torch.randn(3, generator=draw)} for _ in range(5)]
        score = nearness(*torch.randn(3, generator=draw).tolist())
        found = merge.greedy_soup(models, score)
        alone = [t.score for t in found.trials if len(t.members) == 1]
        assert found.score >= max(alone)
        assert found.score == pytest.approx(score(found.checkpoint))


def test_an_equal_score_is_taken() -> None:
    found = merge.greedy_soup([model(1.0), model(2.0)], lambda _: 0.5)
    assert found.members == (0, 1)


@pytest.mark.parametrize(
    "make", [lambda: merge.greedy_soup([], len), lambda: merge.sweep(len, [], len)]
)
def test_nothing_to_choose_from_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(merge.PlanError):
        make()


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(merge.ScoreError, match="not a number"):
        merge.greedy_soup([model(1.0)], lambda _: float("nan"))


def test_a_sweep_finds_the_best_alpha() -> None:
    base, tuned = merge.open(model(0.0)), merge.open(model(1.0))
    seen = []
    found = merge.sweep(
        lambda alpha: base + alpha * (tuned - base),
        [i / 20 for i in range(21)],
        nearness(0.37),
        progress=lambda value, _: seen.append(value),
    )
    assert found.value == 0.35
    assert [v for v, _ in found.curve] == seen == [i / 20 for i in range(21)]
    assert found.checkpoint.state_dict()["w"].tolist() == [pytest.approx(0.35)]


SCORE = """
import sys
from safetensors.torch import load_file
w = load_file(sys.argv[1] + "/model.safetensors")["w"]
print("loss of", sys.argv[1], "is")
print(float((w - 3).square().sum()))
"""


@pytest.fixture
def command(tmp_path: Path) -> str:
    (tmp_path / "score.py").write_text(SCORE)
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'score.py'))} {{}}"


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(w) for w in words], catch_exceptions=False)


def test_soup_on_the_command_line(make_model: MakeModel, tmp_path: Path, command: str) -> None:
    a, b, c = (make_model(n, model(v)) for n, v in (("a", 0.0), ("b", 5.0), ("c", 1.5)))
    (tmp_path / "scratch").mkdir()
    done = run(
        "soup", a, b, c, "-o", tmp_path / "out", "--score", command, "--minimize", "--json", "-q",
        "--scratch", tmp_path / "scratch",
    )  # fmt: skip
    data = json.loads(done.stdout)
    assert data["members"] == [str(c), str(b)]
    assert data["score"] == pytest.approx(-0.0625)
    assert merge.open(tmp_path / "out").state_dict()["w"].tolist() == [3.25]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_sweep_on_the_command_line(make_model: MakeModel, tmp_path: Path, command: str) -> None:
    make_model("a", model(0.0))
    make_model("b", model(10.0))
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/a\n"
        f"models: [{{model: {tmp_path}/b}}]\nparameters: {{weight: 1}}\n"
    )
    done = run(
        "sweep", recipe, "parameters.weight", "0:1:0.1", "--score", command, "--minimize",
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.stdout == "parameters.weight=0.3\n"
    assert merge.open(tmp_path / "out").state_dict()["w"].tolist() == [pytest.approx(3.0)]
    assert "parameters.weight=0.3" in (tmp_path / "out" / "merge_recipe.yml").read_text()


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("", "empty"),
        ("/nonexistent {}", "cannot be run"),
        ("false", "failed"),
        ("true", "printed no number"),
    ],
)
def test_a_scoring_command_that_fails_is_named(command: str, what: str) -> None:
    with pytest.raises(merge.ScoreError, match=what):
        score_by_command(command)(merge.open(model(1.0)))


@pytest.mark.parametrize(
    ("printed", "number"),
    [
        ("0.25", 0.25), ("accuracy: 0.8125.", 0.8125), ("loss=-1.5e-3", -0.0015), ("-.5", -0.5),
        ("3 of 4 right: 75.0%", 75.0), ('{"step": 100, "score": 2}', 2.0), ("0.5\nin v2/3", 0.5),
        ("0.5 of /tmp/merge-17/model", 0.5), ("(12.)", 12.0), ("1E3", 1000.0),
    ],
)  # fmt: skip
def test_the_last_number_that_is_printed_is_the_score(printed: str, number: float) -> None:
    score = score_by_command(f"printf {shlex.quote(printed.replace('%', '%%'))} # {{}}")
    assert score(merge.open(model(1.0))) == number


def test_a_score_that_is_not_finite_is_no_number_before_it() -> None:
    with pytest.raises(merge.ScoreError, match="not a number") as caught:
        merge.greedy_soup([model(1.0)], score_by_command("echo step 100 loss nan"))
    assert "inf" in str(caught.value.do)
    score = score_by_command("echo 1.0 inf", minimize=True)
    assert score(merge.open(model(1.0))) == float("-inf")  # the worst, and the search goes on


@pytest.mark.parametrize("printed", ["nothing", "model-12", "v1.2", "7b"])
def test_digits_in_words_are_no_score(printed: str) -> None:
    with pytest.raises(merge.ScoreError, match="printed no number"):
        score_by_command(f"echo {printed}")(merge.open(model(1.0)))


@pytest.mark.parametrize("values", ["", "a", "0:1", "0:1:0", "0:1:0.1:2"])
def test_values_that_are_none_are_refused(values: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["sweep", "r.yml", "parameters.t", values, "--score", "true"])
    assert done.exit_code == 2
    assert "first:last:step" in done.output
