"""Whether networks learned the same features: assignments, gaps, few-to-one maps, clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import sklearn.linear_model
import torch
import torch.nn.functional as F  # noqa: N812
from merge_cli.app import cli
from safetensors.torch import save_file
from torch import nn

import merge
from merge.alignment.convergent import Joint, convergence_of, lasso
from merge.errors import PlanError

from .networks import (
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    symmetry_of,
)
from .symmetries import randomised

SAMPLES = 400


def joint(a: Any, b: Any) -> Joint:
    found = Joint.empty()
    for x, y in zip(a.split(97), b.split(97), strict=True):
        found.add(x, y)
    return found


def units(count: int, seed: int = 0) -> Any:
    return torch.randn(SAMPLES, count, generator=torch.Generator().manual_seed(seed))


def test_lasso_is_that_of_scikit_learn() -> None:
    x, noise = units(8).double().numpy(), units(3, 1).double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    y = x[:, :3] @ np.array([[1, 0, 0], [0.5, 1, 0], [0, 0, -0.3]]) + 0.1 * noise
    y = y - y.mean(0)
    for penalty in (0.3, 0.05, 0.001):
        found = lasso(x.T @ x / SAMPLES, x.T @ y / SAMPLES, penalty)
        wanted = sklearn.linear_model.Lasso(penalty, fit_intercept=False, tol=1e-10).fit(x, y)
        np.testing.assert_allclose(found, wanted.coef_.T, atol=1e-5)


def test_the_same_units_in_another_order_converge_one_to_one() -> None:
    a = units(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    found = convergence_of("f", "layer", joint(a, 3 * a[:, order] - 1))
    assert found.matched == pytest.approx([1.0] * 12) and found.gap == pytest.approx(0, abs=1e-9)
    assert found.sparse[-1].units == pytest.approx(1, abs=1.5) and found.sparse[-1].left < 1e-3
    assert dict(found.kinds) == {
        "one to one": 12, "one to many": 0, "many to many": 0, "in one only": 0, "alone": 0,
    }  # fmt: skip
    assert {(c.first[0], c.second[0]) for c in found.clusters} == {
        (int(j), i) for i, j in enumerate(order)
    }


def test_shared_partners_open_a_gap() -> None:
    """Units of the first that all are one of the second cannot each be assigned to it."""
    b = units(4)
    a = b[:, [0, 0, 0, 1]] + 0.01 * units(4, 2)
    found = convergence_of("f", "layer", joint(a, b))
    assert found.gap > 0.4 and min(found.best) > 0.99
    assert found.clusters[0].first == (0, 1, 2) and found.clusters[0].second == (0,)
    kinds = dict(found.kinds)
    assert (kinds["one to many"], kinds["one to one"], kinds["alone"]) == (1, 1, 2)


def test_mixtures_are_predicted_by_few() -> None:
    a = units(20)
    b = (a[:, :10] + a[:, 10:]) / 2**0.5
    found = convergence_of("f", "layer", joint(a, b))
    assert max(found.matched) < 0.9
    assert found.sparse[-1].left < 0.01 and found.sparse[-1].units < 4
    shares = [s.left for s in found.sparse]
    assert shares == sorted(shares, reverse=True)


def test_networks_of_two_widths_are_compared() -> None:
    base, wide = (randomised(mlp([6, n, 9, 3])).float() for n in (12, 20))
    x = torch.randn(SAMPLES, 6)
    tasks = [
        merge.Task(m, F.cross_entropy, [(x, torch.zeros(SAMPLES).long())]) for m in (base, wide)
    ]
    first, second = merge.convergence(base, wide, tasks)
    assert len(first.matched) == 12 and len(second.matched) == 9
    assert first.layer == "0" and first.samples == SAMPLES
    same = merge.convergence(base, base, tasks[0])
    assert all(g.gap == pytest.approx(0, abs=1e-9) for g in same)
    odd = nn.Sequential(nn.Flatten())
    with pytest.raises(PlanError):
        merge.convergence(odd, odd, merge.Task(odd, F.cross_entropy, [(x, x)]))


def test_the_command_line_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = mlp([6, 12, 9, 3])
    moved, _ = planted(symmetry_of(mlp_spec(3), base.state_dict()), base.state_dict())
    save_file(base.state_dict(), tmp_path / "a.safetensors")
    save_file({n: t.contiguous() for n, t in moved.items()}, tmp_path / "b.safetensors")
    (tmp_path / "spec.json").write_text(json.dumps(mlp_spec(3)))
    (tmp_path / "convergence_task.py").write_text(
        "import torch, merge\nfrom torch import nn\n"
        "def data():\n"
        "    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(),"
        " nn.Linear(9, 3))\n"
        "    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))\n"
        "    return merge.Task(net, nn.functional.cross_entropy, [(x, torch.zeros(200).long())])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    args = ["align", "b.safetensors", "--to", "a.safetensors", "--method", "activation", "--data",
            "convergence_task:data", "--symmetry", "spec.json", "--report", "-q"]  # fmt: skip
    shown = click.testing.CliRunner().invoke(cli, args, catch_exceptions=False)
    assert "f0 at 0: correlation 1.000 one to one" in shown.stdout
    told = click.testing.CliRunner().invoke(cli, [*args, "--json"], catch_exceptions=False)
    groups = json.loads(told.stdout)["convergence"]
    assert [g["group"] for g in groups] == ["f0", "f1"] and groups[0]["gap"] < 1e-6
