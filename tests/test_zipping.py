"""`merge.zip_models`: clusters within and across networks, all of them or up to a cut."""

from __future__ import annotations

import copy
import json
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

import merge
from merge.errors import PlanError, RecipeError
from merge.partial.clusters import clustered
from merge.partial.joined import Membership
from merge.training.zipped import ZippedNetwork

from .networks import (
    ResNet20,
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    symmetry_of,
)
from .symmetries import distance, randomised
from .test_parting import (
    SIZES,
    accuracy,
    batches,
    bert,
    halves,  # noqa: F401  (a fixture)
    net,
)


# -- clusters --------------------------------------------------------------------------------------
def slowly(alike: Any, models: int, count: int, factor: float, inside: float) -> list[list[int]]:
    """The same greedy joins by looking at all pairs each time."""
    size = len(alike) // models
    clusters = {i: [i] for i in range(len(alike))}
    scores = {(i, j): alike[i, j] for i in clusters for j in clusters if i < j}
    left = [int((len(alike) - count) / models * inside)] * models

    def held(k: int) -> set[int]:
        return {i // size for i in clusters[k]}

    while len(clusters) > count:
        allowed = {
            pair: score
            for pair, score in scores.items()
            if all(left[m] > 0 for m in held(pair[0]) & held(pair[1]))
        }
        if max(allowed.values(), default=-np.inf) == -np.inf:
            return []
        (first, second) = max(allowed, key=lambda pair: allowed[pair])
        for model in held(first) & held(second):
            left[model] -= 1
        clusters[first] += clusters.pop(second)
        for other in clusters:
            if other == first:
                continue
            pairs = [(min(other, k), max(other, k)) for k in (first, second)]
            scores[pairs[0]] = min(scores[p] for p in pairs) * factor
        scores = {p: s for p, s in scores.items() if second not in p}
    return sorted(sorted(c) for c in clusters.values())


def gathered(found: Membership) -> list[list[int]]:
    flat = found.index.reshape(-1)
    return sorted(np.flatnonzero(flat == unit).tolist() for unit in range(found.count))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(2, 3),
    st.integers(2, 6),
    st.sampled_from([0.3, 0.9, 1.0]),
    st.sampled_from([0.0, 0.125, 0.5, 1.0]),
)
def test_clusters_are_those_of_the_plain_search(
    seed: int, models: int, size: int, factor: float, inside: float
) -> None:
    draw = np.random.default_rng(seed)
    answers = draw.normal(size=(30, models * size))
    alike = np.corrcoef(answers.T)
    count = int(draw.integers(size, models * size + 1))
    expected = slowly(alike, models, count, factor, inside)
    if not expected:
        with pytest.raises(PlanError, match="cannot be joined to that few"):
            clustered(alike, models, count, factor=factor, inside=inside)
        return
    found = clustered(alike, models, count, factor=factor, inside=inside)
    assert found.count == count == len(np.unique(found.index))
    assert gathered(found) == expected


def test_pairs_across_two_networks_are_found() -> None:
    """Units that answer alike in two networks, in another order, without joins within one."""
    draw = np.random.default_rng(0)
    answers, order = draw.normal(size=(50, 8)), draw.permutation(8)
    both = np.concatenate([answers, answers[:, order] + 0.01 * draw.normal(size=(50, 8))], 1)
    found = clustered(np.corrcoef(both.T), 2, 8, inside=0.0)
    assert (found.index[0][order] == found.index[1]).all()


def test_what_cannot_be_joined_is_said() -> None:
    alike = np.eye(6)
    with pytest.raises(PlanError, match="cannot be joined to that few"):
        clustered(alike, 2, 2, inside=0.0)
    with pytest.raises(PlanError, match="no finite numbers"):
        clustered(np.full((4, 4), np.nan), 2, 2)
    for options in ({"factor": 0.0}, {"inside": 2.0}):
        with pytest.raises(RecipeError):
            clustered(alike, 2, 3, **options)


# -- networks --------------------------------------------------------------------------------------
@pytest.mark.parametrize("models", [2, 3])
def test_permuted_copies_zip_to_the_same_function(models: int) -> None:
    a = net(0)
    nets = [a]
    for seed in range(1, models):
        moved, _ = planted(symmetry_of(mlp_spec(3), a.state_dict()), a.state_dict(), seed)
        nets.append(mlp(SIZES))
        nets[-1].load_state_dict(moved)
    x = torch.randn(20, 6)
    for until in (None, "1", "3"):
        zipped = merge.zip_models(nets, batches(), until=until, inside=0.0, factor=1.0)
        assert distance(zipped.network("mean")(x), a(x)) < 1e-5
    assert all(share == 0 for share in zipped.within().values())


def test_nothing_joined_is_the_mean_of_the_networks() -> None:
    a, b = net(0), net(1)
    zipped = merge.zip_models([a, b], batches(), ratio=0.0)
    x = torch.randn(20, 6)
    assert zipped.sizes == {"d_a": 24, "d_b": 18}
    assert distance(zipped.network()(x), (a(x) + b(x)) / 2) < 1e-5
    each = merge.zip_models([a, b], batches(), ratio=0.0, until="1").network()(x)
    assert distance(each[0], a(x)) < 1e-5 and distance(each[1], b(x)) < 1e-5
    joined = merge.zip_models([a, b], batches(), ratio=0.0, until="1").network("cat")(x)
    assert joined.shape == (20, 6)


def residuals() -> list[Any]:
    nets = [randomised(ResNet20(2), s).float().eval() for s in (0, 1)]
    for part in (p for m in nets for p in m.modules()):
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_var.abs_().add_(0.5)
    return nets


def test_a_residual_network_up_to_a_block() -> None:
    """The rest of each behind a block is its own, and holds none of what comes before."""
    nets = residuals()
    x = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    zipped = merge.zip_models(nets, x, until="stages.1.0")
    module = zipped.network()
    assert isinstance(module, ZippedNetwork) and module.apart
    names = [n for n, _ in module.named_parameters()]
    assert any(n.startswith("front.stages.1.0") for n in names)
    assert not any(
        n.startswith(("front.stages.1.1", "front.fc", "rests.0.stages.0")) for n in names
    )
    outputs = module(x[0])
    assert [o.shape for o in outputs] == [(8, 10), (8, 10)]
    again = copy.deepcopy(module)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x[0])[1], outputs[1])
    with pytest.raises(PlanError, match="several heads"):
        zipped.save("nowhere")


class Twisted(torch.nn.Module):
    """Its code cannot be traced: it looks at values."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        found = self.inner(x)
        return found if bool(found.isfinite().all()) else found * 0


def test_code_that_cannot_be_cut_gives_the_same() -> None:
    plain = [net(0), net(1)]
    whole = merge.zip_models(plain, batches(), until="1").network()
    spec = mlp_spec(3)
    spec["tensors"] = {f"inner.{n}": axes for n, axes in spec["tensors"].items()}
    twisted = [Twisted(m) for m in plain]
    other = merge.zip_models(twisted, batches(), until="inner.1", symmetry=spec).network()
    assert not other.apart and whole.apart
    x = torch.randn(9, 6)
    for one, two in zip(whole(x), other(x), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


# -- digits ----------------------------------------------------------------------------------------
def test_networks_of_other_classes(halves: Any) -> None:  # noqa: F811
    """Zipped they are better than permuted and than averaged; zipped in part at least as good as
    zipped as a whole."""
    a, b, data, x, y = halves
    average = mlp([64, 48, 48, 10])
    average.load_state_dict(merge.average([a, b]).state_dict())
    permuted = merge.pleas(a, b, 1.0, data=data, least_squares=False).module(a)
    zipped = merge.zip_models([a, b], data).network()
    part = merge.zip_models([a, b], data, until="1").network("mean")
    found = [accuracy(m, x, y) for m in (average, permuted, zipped, part)]
    assert found[2] >= max(found[:2]) + 0.03
    assert found[3] >= found[2] - 0.01


# -- the command line ------------------------------------------------------------------------------
def test_folders_are_merged_by_command(tmp_path: Path) -> None:
    a, b = bert(0, tmp_path / "a"), bert(1, tmp_path / "b")
    runner = click.testing.CliRunner()
    done = runner.invoke(
        cli, ["pleas", str(a), str(b), "-o", str(tmp_path / "p"), "--budget", "1.1", "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["cost"] <= 1.1 and set(told["apart"]) == {"f0", "f1"}
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["intermediate_size"] == told["sizes"]["f0"] > 12
    transformers.AutoModel.from_pretrained(tmp_path / "p")
    refused = runner.invoke(cli, ["pleas", str(a), str(b), "-o", "x", "--by", "activations"])
    assert isinstance(refused.exception, RecipeError)


# -- errors ----------------------------------------------------------------------------------------
def test_what_cannot_be_joined_is_said_of_its_group() -> None:
    with pytest.raises(PlanError, match="cannot be joined to that few"):
        merge.zip_models([net(0), net(1)], batches(), ratio=0.7, inside=0.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, "joined away"),
        ({"until": "7"}, "no module of that name"),
        ({"until": "4"}, "cannot be zipped up to there"),
        ({"factor": 3.0}, "multiplied by a factor"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises((RecipeError, PlanError), match=words):
        merge.zip_models([net(0), net(1)], batches(), **options)


def test_one_network_is_nothing_to_zip() -> None:
    with pytest.raises(RecipeError, match="nothing to zip"):
        merge.zip_models([net(0)], batches())
    with pytest.raises(RecipeError, match="needs data"):
        merge.zip_models([net(0), net(1)], None)
    zipped = merge.zip_models([net(0), net(1)], batches(), until="1")
    with pytest.raises(PlanError, match="nothing a zipped network can return"):
        zipped.network("sum")
