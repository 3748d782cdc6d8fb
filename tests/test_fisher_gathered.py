"""Fisher information of networks against its formula by batched Jacobians."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from merge_cli.app import cli
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

import merge


def classifier(classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, classes))


def batches(count: int = 9) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=draw)
    y = torch.randint(0, 4, (count,), generator=draw)
    return list(zip(x.split(4), y.split(4), strict=True))


def jacobians(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """d log p(y | x) / d theta for all x and y at once, (examples, classes, ...), and p."""
    weights = {n: p.detach().double() for n, p in model.named_parameters()}

    def logs(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.log_softmax(functional_call(model, weights, (x[None],)), -1)[0]

    model.double()
    slopes = vmap(jacrev(logs), in_dims=(None, 0))(weights, x.double())
    shares = vmap(logs, in_dims=(None, 0))(weights, x.double()).exp()
    model.float()
    return slopes, shares


def test_it_expects_over_the_models_own_labels() -> None:
    model = classifier()
    task = merge.Task(model, functional.cross_entropy, batches())
    found = merge.gather_statistics(model, task, kind="fisher").state_dict()
    slopes, shares = jacobians(model, torch.cat([x for x, _ in batches()]))
    for name, slope in slopes.items():
        weights = shares.reshape(*shares.shape, *[1] * (slope.ndim - 2))
        expected = (weights * slope.square()).sum(1).mean(0)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-9)


def test_with_labels_of_the_data_it_is_the_mean_of_squares_not_the_square_of_the_mean() -> None:
    model = classifier()
    task = merge.Task(model, functional.cross_entropy, batches())
    found = merge.gather_statistics(model, task, kind="fisher", labels="data").state_dict()
    y = torch.cat([y for _, y in batches()])
    slopes, _ = jacobians(model, torch.cat([x for x, _ in batches()]))
    for name, slope in slopes.items():
        own = slope[torch.arange(len(y)), y]
        torch.testing.assert_close(found[name].double(), own.square().mean(0), rtol=1e-4, atol=1e-9)
        assert float(found[name].sum()) > 2 * float(own.mean(0).square().sum())


def test_how_examples_are_batched_and_memory_change_nothing() -> None:
    model = classifier()
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    cut = [batches(), [(x, y)], [(x[:8], y[:8])], [(x[i : i + 1], y[i : i + 1]) for i in range(8)]]
    tasks = [merge.Task(model, functional.cross_entropy, b) for b in cut]
    found = [
        merge.gather_statistics(model, t, kind="fisher", samples=8, memory=m).state_dict()
        for t in tasks
        for m in ("1GiB", 100)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-10)


class Tagger(nn.Module):
    """Logits of 80 classes for each of some tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(3, 80)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


def test_of_many_classes_one_is_drawn_and_that_is_right_in_the_mean() -> None:
    model = Tagger()
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    task = merge.Task(model, functional.cross_entropy, [({"x": x, "attention_mask": mask}, None)])
    drawn = [
        merge.gather_statistics(model, task, kind="fisher", seed=seed).state_dict()["linear.bias"]
        for seed in range(300)
    ]
    shares = model(x, mask).softmax(-1).detach()
    # of the bias: d log p(y) / d b = [y] - p, whose square's mean is p (1 - p) at each token
    expected = (shares * (1 - shares) * mask[..., None]).sum(1).mean(0)
    mean, spread = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 300**0.5
    assert float(((mean - expected) / spread.clamp_min(1e-4)).abs().mean()) < 1.3
    assert torch.equal(
        drawn[7],
        merge.gather_statistics(model, task, kind="fisher", seed=7).state_dict()["linear.bias"],
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("ticks", torch.arange(3))
        self.register_buffer("running", torch.ones(2))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(ids))
        return out


def test_tied_weights_add_their_gradients_before_they_are_squared() -> None:
    model = Tied()
    ids = torch.tensor([0, 2, 2, 3])
    task = merge.Task(model, functional.cross_entropy, [(ids, None)])
    gathered = merge.gather_statistics(model, task, kind="fisher")
    found = gathered.state_dict()
    expected = torch.zeros(4, 4)
    for i in ids:
        logs = model(i[None]).log_softmax(-1)[0]
        for y in range(4):
            (slope,) = torch.autograd.grad(logs[y], model.table.weight, retain_graph=True)
            expected += logs[y].detach().exp() * slope.square() / 4
    torch.testing.assert_close(found["table.weight"], expected)
    assert torch.equal(found["head.weight"], found["table.weight"])
    assert not found["running"].any()
    merged = merge.fisher([model, model], statistics=[gathered, gathered]).state_dict()
    assert all(torch.equal(merged[n], t) for n, t in model.state_dict().items())


def test_networks_without_logits_and_wrong_words_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.linear(x)}

    task = merge.Task(Odd(), functional.cross_entropy, batches())
    with pytest.raises(merge.PlanError, match="no distribution of labels"):
        merge.gather_statistics(task.module, task, kind="fisher").state_dict()
    bad = merge.Task(classifier(), functional.cross_entropy, [(torch.ones(2, 3), None)])
    for kind in ("gram", "fisher"):
        with pytest.raises(merge.PlanError, match="cannot be run on the data"):
            merge.gather_statistics(bad.module, bad, kind=kind).state_dict()
    with pytest.raises(merge.RecipeError, match="'kind' is no known word"):
        merge.gather_statistics(bad.module, bad, kind="hessian")
    with pytest.raises(merge.RecipeError, match="'labels' is no known word"):
        merge.gather_statistics(bad.module, bad, kind="fisher", labels="none")


def test_the_command_writes_what_the_method_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    for name in ("a", "b"):
        BertForSequenceClassification(config).save_pretrained(name)
    rng = np.random.default_rng(0)
    np.savez("data.npz", x=rng.integers(0, 60, (12, 7)), y=rng.integers(0, 3, 12))
    for name in ("a", "b"):
        arguments = ["statistics", name, "--data", "data.npz", "-o", f"{name}-f"]
        done = CliRunner().invoke(cli, [*arguments, "--kind", "fisher", "--json", "-q"])
        assert done.exit_code == 0, done.output
        facts = json.loads(done.output)
        assert facts["kind"] == "fisher"
    said = json.loads((tmp_path / "a-f" / "merge_statistics.json").read_text())
    assert said["data"] == "data.npz"
    Path("r.yml").write_text(
        "merge_method: fisher\nmodels:\n- {model: a, statistics: a-f}\n"
        "- {model: b, statistics: b-f}\n"
    )
    merge.apply("r.yml", "out")
    a, known = merge.open("a").state_dict(), merge.open("a-f").state_dict()
    assert set(a) == set(known)
    assert all(known[n].shape == t.shape for n, t in a.items())
    moved = [n for n, t in known.items() if t.any()]
    assert len(moved) > 30
    BertForSequenceClassification.from_pretrained("out")
