"""Between an old and a new model: flips, calibration, and the choice under a bound."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cli.app import cli
from torch import Tensor, nn
from torch.nn import functional

import merge
from merge.analysis.interpolation import along_line


def line(rights: dict[float, list[int]], most: float | None = None) -> merge.Interpolation:
    """Networks that are right (1) or wrong (0) on each example; all labels are 1."""
    labels = torch.ones(len(rights[0.0]), dtype=torch.long)
    state = {a: {"w": torch.tensor(r)} for a, r in rights.items()}
    return along_line(lambda a: state[a], lambda s: s["w"], labels, list(rights), most)


RIGHTS = {
    0.0: [1, 1, 1, 0, 0, 0, 0, 0],
    0.5: [1, 1, 0, 1, 1, 0, 0, 0],
    0.75: [1, 0, 0, 1, 1, 1, 1, 0],
    1.0: [0, 0, 0, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize(
    ("most", "alpha"), [(None, 0.75), (0.25, 0.75), (0.2, 0.5), (0.1, 0.0), (0.0, 0.0), (1.0, 0.75)]
)
def test_the_most_accurate_under_the_bound_is_chosen(most: float | None, alpha: float) -> None:
    found = line(RIGHTS, most)
    assert found.chosen.alpha == alpha
    assert [p.negative for p in found.points] == [0.0, 0.125, 0.25, 0.375]
    assert [p.positive for p in found.points] == [0.0, 0.25, 0.5, 0.625]
    assert "<- chosen" in str(found)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_accuracy_is_the_old_one_plus_positive_less_negative_flips(data: st.DataObject) -> None:
    bits = st.lists(st.integers(0, 1), min_size=5, max_size=5)
    found = line({a: data.draw(bits) for a in (0.0, 0.3, 1.0)}, data.draw(st.floats(0, 1)))
    old = found.points[0]
    for p in found.points:
        assert p.accuracy == pytest.approx(old.accuracy + p.positive - p.negative)
    assert found.most is not None
    assert found.chosen.negative <= found.most
    assert found.chosen.accuracy >= old.accuracy


def test_bounds_and_points_out_of_range_are_refused() -> None:
    with pytest.raises(merge.RecipeError, match="a share is out of range"):
        line(RIGHTS, 1.5)
    with pytest.raises(merge.RecipeError, match="alpha is out of range"):
        line({**RIGHTS, 1.2: RIGHTS[1.0]})
    with pytest.raises(merge.PlanError, match="one answer for each label"):
        along_line(lambda a: {}, lambda s: torch.ones(3), torch.ones(4), [0.5])


# -- calibration -----------------------------------------------------------------------------------
def expected_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """Written out bin by bin."""
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    top, right = shares.max(1), shares.argmax(1) == labels
    total = 0.0
    for k in range(15):
        inside = (top > k / 15) & (top <= (k + 1) / 15)
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - top[inside].mean())
    return total / len(labels)


def test_the_calibration_error_is_that_of_its_bins() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 4)) * 2, rng.integers(0, 4, 300)
    found = merge.confidence(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found.error == pytest.approx(expected_error(logits, labels), rel=1e-9)
    nll = functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found.loss == pytest.approx(float(nll))


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_the_temperature_undoes_what_made_a_classifier_too_sure(factor: float) -> None:
    """Labels drawn from the softmax of logits are calibrated; scaled logits are not."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, 5, generator=draw, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
    found = merge.confidence(factor * logits, labels)
    assert found.temperature == pytest.approx(factor, rel=0.05)
    calm = merge.confidence(factor * logits / found.temperature, labels)
    assert calm.error < 0.02
    if factor > 1:
        assert found.mean > found.accuracy + 0.1


# -- checkpoints -----------------------------------------------------------------------------------
def problem() -> tuple[nn.Module, nn.Module, merge.Task]:
    torch.manual_seed(0)
    old, new = nn.Linear(5, 3), nn.Linear(5, 3)
    x, y = torch.randn(90, 5), torch.randint(0, 3, (90,))
    pairs = list(zip(x.split(40), y.split(40), strict=True))
    return old, new, merge.Task(old, functional.cross_entropy, pairs, pairs)


def accuracy(task: merge.Task, state: dict[str, Tensor]) -> float:
    right = [(x @ state["weight"].T + state["bias"]).argmax(-1) == y for x, y in task.test]
    return float(torch.cat(right).float().mean())


def test_checkpoints_are_judged_as_they_would_be_saved() -> None:
    old, new, task = problem()
    found = merge.interpolate(old, new, task, max_flips=0.1)
    assert len(found.report.points) == 21
    assert accuracy(task, found.checkpoint.state_dict()) == pytest.approx(
        found.report.chosen.accuracy
    )
    for point in found.report.points:
        mixed = {
            n: t + point.alpha * (new.state_dict()[n] - t) for n, t in old.state_dict().items()
        }
        assert point.accuracy == pytest.approx(accuracy(task, mixed), abs=1e-6)
        assert point.confidence is not None


def test_fisher_information_moves_each_weight_as_far_as_it_knows() -> None:
    old, new, task = problem()
    zeros = {n: torch.zeros_like(t) for n, t in old.state_dict().items()}
    known = [{**zeros, "bias": torch.ones(3)}, {**zeros, "weight": torch.ones(3, 5)}]
    found = merge.interpolate(old, new, task, alphas=[0.5], statistics=known)
    wise = merge.interpolate(old, new, task, alphas=[0.5])
    mixed = merge.fisher([old, new], statistics=known, weight=[0.5, 0.5]).state_dict()
    torch.testing.assert_close(mixed["weight"], new.weight.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed["bias"], old.bias.detach(), rtol=1e-4, atol=1e-4)
    assert found.report.points[1].accuracy == pytest.approx(accuracy(task, mixed))
    assert found.report.points[0] == wise.report.points[0]


def test_data_without_tests_or_labels_is_refused() -> None:
    old, new, task = problem()
    with pytest.raises(merge.PlanError, match="no data to judge by"):
        merge.interpolate(old, new, merge.Task(old, functional.cross_entropy, task.train))
    floats = [(x, y.float()[:, None]) for x, y in task.test]
    with pytest.raises(merge.PlanError, match="targets are no labels"):
        merge.interpolate(old, new, merge.Task(old, functional.mse_loss, floats, floats))


def test_the_command_shows_the_line_and_saves_the_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    for name in ("old", "new"):
        BertForSequenceClassification(config).save_pretrained(name)
    rng = np.random.default_rng(0)
    np.savez("data.npz", x=rng.integers(0, 40, (30, 7)), y=rng.integers(0, 3, 30))
    arguments = ["interpolate", "old", "new", "--data", "data.npz", "--points", "5", "-o", "out"]
    done = CliRunner().invoke(cli, [*arguments, "--max-flips", "0.5", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert [p["alpha"] for p in found["points"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found["max_flips"] == 0.5
    BertForSequenceClassification.from_pretrained("out")
    shown = CliRunner().invoke(cli, arguments[:-2])
    assert "neg. flips" in shown.output
