"""Settings that add to the loss or scale it: norms of coefficients, temperatures of scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import merge
from merge.errors import RecipeError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


State = dict[str, Tensor]


@pytest.fixture
def models() -> tuple[State, dict[str, State], dict[str, tuple[Tensor, Tensor]]]:
    """A base, two experts, and a labelled batch for each, in float64."""
    torch.manual_seed(3)
    base = {n: t.detach().double() for n, t in Net().state_dict().items()}
    experts = {k: {n: t + 0.4 * torch.randn_like(t) for n, t in base.items()} for k in "ab"}
    data = {k: (torch.randn(9, 5).double(), torch.randint(4, (9,))) for k in "ab"}
    return base, experts, data


def learned(models: Any, **how: Any) -> merge.Learned:
    base, experts, data = models
    net = Net().double()
    tasks = {k: merge.Task(net, F.cross_entropy, [batch]) for k, batch in data.items()}
    settings: dict[str, Any] = {
        "objective": "cross_entropy", "optimiser": "sgd", "link": "identity", "holdout": 0,
        "granularity": "tensor", **how,
    }  # fmt: skip
    return merge.learn(experts, base=base, tasks=tasks, **settings)


def loss_of(models: Any, lam: dict[str, Tensor], logs: dict[str, Tensor] | None = None) -> Tensor:
    """The sum over tasks of the cross-entropy of the merge, written out."""
    base, experts, data = models
    theta = {
        n: t + sum(c * (experts[k][n] - t) for k, c in zip("ab", lam[n], strict=True))
        for n, t in base.items()
    }
    total = torch.zeros((), dtype=torch.float64)
    for k, (x, y) in data.items():
        scores = torch.func.functional_call(Net().double(), theta, (x,))
        scale = torch.ones(()) if logs is None else logs[k].exp()
        total = total + F.cross_entropy(scores / scale, y)
    return total


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_a_norm_of_coefficients_is_added_to_the_loss(models: Any, p: int, weight: float) -> None:
    """One step of plain descent on the loss and 0.5 mean over blocks of ||lambda||_p."""
    start = {"a": 0.6, "b": -0.2}
    found = learned(models, steps=1, rate=0.1, lp=p, lp_weight=weight, init=start)
    lam = {n: torch.tensor([0.6, -0.2], dtype=torch.float64).requires_grad_() for n in models[0]}
    norms = torch.stack([c.norm(p) for c in lam.values()])
    (loss_of(models, lam) + weight * norms.mean()).backward()
    for name, c in lam.items():
        assert c.grad is not None
        wanted = (c.detach() - 0.1 * c.grad).tolist()
        rows = [v for (v,) in found.coefficients.block_of(name).values]
        assert rows == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("granularity", ["task", "layer", "row", "partition:3"])
def test_a_large_norm_leaves_few_experts_or_none(models: Any, granularity: str) -> None:
    """From 0 it has no slope; with a weight beyond the loss's slopes coefficients shrink to 0."""
    at = learned(models, steps=1, rate=0.1, lp=2, lp_weight=100.0, init=0.0,
                 granularity=granularity)  # fmt: skip
    free = learned(models, steps=1, rate=0.1, init=0.0, granularity=granularity)
    assert at.coefficients == free.coefficients
    many = {"steps": 200, "rate": 2e-3, "init": 0.3, "granularity": granularity}
    sizes = []
    for weight in (0.0, 60.0):
        found = learned(models, lp=1, lp_weight=weight, schedule="linear", **many)
        rows = [v for b in found.coefficients.blocks.values() for row in b.values for v in row]
        sizes.append(max(map(abs, rows)))
    assert sizes[1] < 0.05 < sizes[0]


def test_there_are_two_norms(models: Any) -> None:
    with pytest.raises(RecipeError, match="'lp' cannot be") as caught:
        learned(models, lp=3)
    assert caught.value.where["key"] == "lp"


def test_a_temperature_is_learned_with_the_coefficients(models: Any) -> None:
    """One step of plain descent; the network itself is returned without it."""
    found = learned(models, steps=1, rate=0.1, free_rate=0.7, temperature=True, init=0.4)
    lam = {n: torch.tensor([0.4, 0.4], dtype=torch.float64).requires_grad_() for n in models[0]}
    logs = {k: torch.zeros((), dtype=torch.float64, requires_grad=True) for k in "ab"}
    loss_of(models, lam, logs).backward()
    for k, log in logs.items():
        assert log.grad is not None
        assert found.temperatures[k] == pytest.approx(math.exp(-0.7 * float(log.grad)), rel=1e-6)
        assert found.temperatures[k] != 1.0
        module = found.module(k)
        assert module.state_dict().keys() == models[0].keys()
    assert not found.heads and not found.own() and found.coefficients.tasks == ()
    for name, c in lam.items():
        assert c.grad is not None
        wanted = (c.detach() - 0.1 * c.grad).tolist()
        rows = [v for (v,) in found.coefficients.block_of(name).values]
        assert rows == pytest.approx(wanted, rel=1e-10)
    assert "temperature of a" in found.report()


def test_a_soup_learns_its_temperature_and_is_resumed(models: Any, tmp_path: Path) -> None:
    base, experts, data = models
    x, y = data["a"]
    task = merge.Task(Net().double(), F.cross_entropy, [(20 * x, y)], validate=[(20 * x, y)])

    def soup(**how: Any) -> merge.Learned:
        given = {"steps": 40, "every": 10, "rebuild": 10, "candidates": (), **how}
        return merge.learn(experts, base=base, tasks=[task], preset="soup", **given)

    whole = soup()
    assert whole.temperatures["task 1"] > 1.05  # such large scores are too sure
    assert soup(temperature=False).temperatures == {}

    def stop(step: Any) -> None:
        if step.number == 23:
            raise KeyboardInterrupt

    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        soup(state=state, progress=stop)
    again = soup(state=state)
    assert again.history == whole.history and again.temperatures == whole.temperatures
    assert again.coefficients == whole.coefficients
    with pytest.raises(RecipeError, match="no scores of classes") as caught:
        soup(objective="language_model")
    assert caught.value.where["key"] == "temperature"
