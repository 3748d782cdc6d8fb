"""`merge.pleas`: partial matching, budgets, least squares in blocks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import merge
from merge.errors import MergeError, PlanError, RecipeError
from merge.partial.budget import Place, chosen, cost
from merge.partial.fit import Normal, error_of, fitted
from merge.partial.joined import couplings_of, joined, kinds_of, parted
from merge.partial.modules import resized_module
from merge.transport.mapped import roles_of

from .networks import (
    ResNet20,
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    resnet_spec,
    symmetry_of,
)
from .symmetries import distance, randomised

SIZES = [6, 12, 9, 3]


def net(seed: int, sizes: list[int] = SIZES) -> Any:
    return randomised(mlp(sizes), seed).float()


def batches(count: int = 3, size: int = 40, seed: int = 0) -> list[Any]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, SIZES[0], generator=draw) for _ in range(count)]


# -- blocks ----------------------------------------------------------------------------------------
def test_blocks_are_those_of_partial_matching() -> None:
    """Common units are means, own ones copies, and each takes half of what leads to common ones."""
    a, b = (torch.arange(4.0).reshape(2, 2) + k for k in (1.0, 11.0))
    symmetry = symmetry_of(
        {"model": "m", "groups": {"x": {"flags": "P"}, "y": {"flags": "P"}}, "frozen": {"o": ""},
         "tensors": {"w": ["x", "y*"], "head": ["_o", "x*"], "w.bias": ["x"], "bias": ["_o"]}},
        {"w": a, "head": a, "w.bias": a[0], "bias": a[0]},
    )  # fmt: skip
    members = {g: parted(2, np.array([1])) for g in ("x", "y")}
    couplings, roles = couplings_of(members, 2), roles_of(symmetry)

    def both(name: str, x: Any, y: Any) -> Any:
        return joined(name, (x, y), symmetry.tensors[name], couplings, roles)

    ((a00, a01), (a10, a11)), ((b00, b01), (b10, b11)) = a.tolist(), b.tolist()
    assert both("w", a, b).tolist() == [
        [(a00 + b00) / 2, a01 / 2, b01 / 2],
        [a10, a11, 0.0],
        [b10, 0.0, b11],
    ]
    assert both("head", a, b).tolist() == [
        [(a00 + b00) / 2, a01 / 2, b01 / 2],
        [(a10 + b10) / 2, a11 / 2, b11 / 2],
    ]
    assert both("w.bias", a[0], b[0]).tolist() == [(a00 + b00) / 2, a01, b01]
    assert both("bias", a[0], b[0]).tolist() == [(a00 + b00) / 2, (a01 + b01) / 2]
    assert kinds_of([torch.tensor(p.out) for p in members["x"].plans()]).tolist() == [3, 1, 2]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 1000))
def test_all_apart_is_the_mean_of_both_networks(seed: int) -> None:
    a, b = net(seed), net(seed + 1)
    merged = merge.pleas(a, b, ratios=1.0, symmetry=mlp_spec(3))
    x = torch.randn(20, 6)
    assert distance(merged.module(a)(x), (a(x) + b(x)) / 2) < 1e-5
    assert merged.sizes == {"f0": 24, "f1": 18}


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_permuted_copy_merges_to_the_same_function(ratio: float) -> None:
    """Whatever stays apart, and also after least squares on data."""
    a = net(0)
    moved, _ = planted(symmetry_of(mlp_spec(3), a.state_dict()), a.state_dict())
    b = mlp(SIZES)
    b.load_state_dict(moved)
    x = torch.randn(20, 6)
    for data in (None, batches()):
        merged = merge.pleas(a, b, ratios=ratio, symmetry=mlp_spec(3), data=data)
        assert distance(merged.module(a)(x), a(x)) < 1e-4


def test_a_residual_network_with_batch_norm() -> None:
    """Its symmetry is derived from the data; all apart is the mean; in between it is as wide as
    said."""
    a, b = (randomised(ResNet20(2), s).float().eval() for s in (0, 1))
    for part in (*a.modules(), *b.modules()):
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_var.abs_().add_(0.5)
    x = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    both = merge.pleas(a, b, 2.0, data=x, symmetry=resnet_spec())
    assert distance(both.module(a).eval()(x[0]), (a(x[0]) + b(x[0])) / 2) < 1e-5
    assert not both.errors and both.cost < 2
    part_of = merge.pleas(a, b, 1.4, by="activations", count="operations", data=x)
    assert 1.3 < part_of.cost <= 1.4
    module = part_of.module(a).eval()
    assert module(x[0]).isfinite().all()
    assert module.conv.out_channels == len(module.conv.weight) == module.bn.num_features
    assert all(after <= before + 1e-9 for before, after in part_of.errors.values())
    norms = [n for n in module.state_dict() if n.endswith("running_mean")]
    fresh = resized_module(module, module.state_dict())
    for name, layer in fresh.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert f"{name}.running_mean" in norms
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
    with torch.no_grad():
        for batch in x:
            fresh(batch)
    for name in norms:
        assert torch.allclose(fresh.state_dict()[name], module.state_dict()[name], atol=1e-5)


# -- budgets ---------------------------------------------------------------------------------------
def test_costs_count_what_need_not_be_zero() -> None:
    a, b = net(0), net(1)
    merged = merge.pleas(a, b, ratios={"f0": 0.25, "f1": 1 / 3}, symmetry=mlp_spec(3))
    state = merged.checkpoint.state_dict()
    assert merged.apart == {"f0": 3, "f1": 3}
    whole = sum(t.numel() for t in a.state_dict().values())
    assert merged.cost == pytest.approx(sum(int((t != 0).sum()) for t in state.values()) / whole)
    assert merged.stored == pytest.approx(sum(t.numel() for t in state.values()) / whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.0, 2.0))
def test_the_chosen_widths_are_nearly_the_best(seed: int, budget: float) -> None:
    """Against all choices for three groups in a chain; never above the budget."""
    draw = np.random.default_rng(seed)
    sizes = dict(zip("xyz", draw.integers(2, 7, 3).tolist(), strict=True))
    places = [
        Place((("x", sizes["x"]),), 5),
        Place((("x", sizes["x"]), ("y", sizes["y"])), 1),
        Place((("y", sizes["y"]), ("z", sizes["z"])), 2),
        Place((("z", sizes["z"]),), 3),
    ]
    gains = {k: np.sort(draw.random(n))[::-1] for k, n in sizes.items()}
    found = chosen(places, gains, budget)

    def value(counts: dict[str, int]) -> float:
        return float(sum(gains[k][:n].sum() for k, n in counts.items()))

    most = budget * cost(places, {})
    assert cost(places, found) <= most * (1 + 1e-9)
    every = (
        dict(zip(sizes, c, strict=True))
        for c in itertools.product(*(range(n + 1) for n in sizes.values()))
    )
    best = max(value(c) for c in every if cost(places, c) <= most * (1 + 1e-9))
    assert value(found) >= 0.85 * best
    assert chosen(places, gains, 2.0) == sizes


# -- least squares ---------------------------------------------------------------------------------
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_blocks_of_rows_are_fitted_to_their_own_inputs(seed: int, bias: bool) -> None:
    """The least-squares solution of each block by numpy, zeros elsewhere."""
    draw = torch.Generator().manual_seed(seed)
    columns, rows = torch.tensor([3, 3, 1, 2, 2]), torch.tensor([3, 1, 1, 2])
    z = torch.randn(60, 5, generator=draw, dtype=torch.float64) + 1
    y = torch.randn(60, 4, generator=draw, dtype=torch.float64) + 2
    start = torch.zeros(4, 5)
    ones = torch.cat([z, torch.ones(60, 1, dtype=torch.float64)], 1)
    normal = Normal(ones.T @ ones / 60, y.T @ ones / 60, (y * y).mean(0))
    shift = torch.zeros(4) if bias else None
    weight, own = fitted(start, shift, normal, rows, columns, 0.0)
    for i, row in enumerate(rows.tolist()):
        read = [j for j, c in enumerate(columns.tolist()) if c & row]
        used = ones[:, [*read, 5]] if bias else z[:, read]
        best = np.linalg.lstsq(used.numpy(), y[:, i].numpy(), rcond=None)[0]
        assert np.allclose(weight[i, read], best[: len(read)], atol=1e-8)
        assert all(weight[i, j] == 0 for j in range(5) if j not in read)
        if own is not None:
            assert np.isclose(own[i], best[-1], atol=1e-8)
    left = z @ weight.T + (0 if own is None else own) - y
    expected = float(left.square().sum() / y.square().sum())
    assert error_of(weight, own, normal) == pytest.approx(expected, rel=1e-8)


def test_nothing_changes_without_a_signal() -> None:
    """Inputs that never change leave the weights where they were."""
    start = torch.randn(3, 2, dtype=torch.float64)
    gram = torch.zeros(3, 3, dtype=torch.float64)
    gram[2, 2] = 1.0
    normal = Normal(gram, torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3))
    both = torch.full((3,), 3), torch.full((2,), 3)
    assert torch.equal(fitted(start, None, normal, *both)[0], start)


# -- digits ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def halves() -> tuple[Any, Any, Any, Any, Any]:
    """Two perceptrons that saw the digits 0 to 4 and 5 to 9, and what they are judged by."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor((images - images.mean(0))[order] / images.std(), dtype=torch.float32)
    y = torch.tensor(labels[order])
    nets = []
    for k in range(2):
        module = mlp([64, 48, 48, 10], seed=k)
        mask = (y[:1300] < 5) == (k == 0)
        adam = torch.optim.Adam(module.parameters(), 1e-3, weight_decay=1e-4)
        draw = torch.Generator().manual_seed(k)
        inputs, targets = x[:1300][mask], y[:1300][mask]
        for _ in range(30):
            for at in torch.randperm(len(inputs), generator=draw).split(64):
                adam.zero_grad()
                torch.nn.functional.cross_entropy(module(inputs[at]), targets[at]).backward()
                adam.step()
        nets.append(module.eval())
    return nets[0], nets[1], list(x[:1300].split(130)), x[1300:], y[1300:]


def accuracy(module: Any, x: Any, y: Any) -> float:
    with torch.no_grad():
        return float((module(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_accuracy_does_not_fall_with_the_budget(halves: Any, by: Any) -> None:
    a, b, data, x, y = halves
    found = [
        accuracy(merge.pleas(a, b, budget, by=by, data=data).module(a), x, y)
        for budget in (1.0, 1.2, 1.55, 2.0)
    ]
    assert all(more >= less - 0.01 for less, more in itertools.pairwise(found))
    plain = merge.pleas(a, b, 1.0, by=by, data=data, least_squares=False).module(a)
    assert found[0] >= accuracy(plain, x, y) + 0.03
    with torch.no_grad():
        mean = (a(x) + b(x)) / 2
        whole = merge.pleas(a, b, 2.0, by=by, data=data).module(a)(x)
    assert float((whole - mean).abs().max()) < 1e-5 * float(mean.abs().max())


def test_no_layer_is_fitted_better_by_400_steps_of_adam(halves: Any) -> None:
    """Of Adam at the paper's rate, from the same start, on the same inputs and targets."""
    a, b, data, _, _ = halves
    merged = merge.pleas(a, b, 1.2, data=data, sequential=False)
    assert len(merged.errors) == 3
    plain = merge.pleas(a, b, 1.2, data=data, least_squares=False)
    moved = merge.align(b, to=a, symmetry=merge.symmetry_of(a, (data[0],)))
    other = mlp([64, 48, 48, 10])
    other.load_state_dict(moved.state_dict())
    start = plain.checkpoint.state_dict()
    inputs = torch.cat(data)
    with torch.no_grad():
        za, zb = a[0](inputs).relu(), other[0](inputs).relu()
        ya, yb = a[2](za), other[2](zb)
    groups = {g: (merged.sizes[g], merged.apart[g]) for g in merged.sizes}
    (n0, k0), (n1, k1) = groups.values()
    blocks0, blocks1 = (_members(merged, w, n) for w, n in (("0", n0), ("2", n1)))
    z, y = _common(za, zb, blocks0, k0), _common(ya, yb, blocks1, k1)
    weight = start["2.weight"].clone().requires_grad_()
    bias = start["2.bias"].clone().requires_grad_()
    mask = (start["2.weight"] != 0).float()
    adam = torch.optim.Adam([weight, bias], 5e-4)
    for _ in range(400):
        adam.zero_grad()
        (z @ (weight * mask).T + bias - y).square().mean().backward()
        adam.step()
    left = float(((z @ (weight * mask).T + bias - y).square().sum() / y.square().sum()).detach())
    assert merged.errors["2.weight"][1] <= left
    before = start["2.weight"], start["2.bias"]
    first = float((z @ before[0].T + before[1] - y).square().sum() / y.square().sum())
    assert merged.errors["2.weight"][0] == pytest.approx(first, rel=1e-3)


def _members(merged: Any, layer: str, size: int) -> Any:
    return merged.members["d_a" if layer == "0" else "d_b"].index


def _common(a: Any, b: Any, index: Any, apart: int) -> Any:
    """Common units as means, and each network's own, by the membership."""
    size = int(index.max()) + 1
    found = torch.zeros(len(a), size)
    count = torch.zeros(size)
    for values, row in zip((a, b), index, strict=True):
        found.index_add_(1, torch.tensor(row), values)
        count.index_add_(0, torch.tensor(row), torch.ones(len(row)))
    assert int((count == 1).sum()) == 2 * apart
    return found / count


# -- models in folders -----------------------------------------------------------------------------
def bert(seed: int, place: Path) -> Path:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16,
    )  # fmt: skip
    randomised(transformers.BertModel(config), seed).float().save_pretrained(place)
    return place


def test_a_transformer_keeps_one_size_for_all_layers(tmp_path: Path) -> None:
    a, b = bert(0, tmp_path / "a"), bert(1, tmp_path / "b")
    merged = merge.pleas(a, b, ratios=1.0)
    assert merged.apart == {"f0": 12, "f1": 12}
    assert any("norm" in note for note in merged.notes)
    out = merged.save(tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 24
    model = transformers.AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        assert model(torch.arange(6)[None]).last_hidden_state.isfinite().all()
    budget = merge.pleas(a, b, 1.1)
    assert len(set(budget.apart.values())) == 1 and 1.0 < budget.cost <= 1.1
    same = merge.pleas(a, a, 1.2).save(tmp_path / "same")
    again, old = (transformers.AutoModel.from_pretrained(p).eval() for p in (same, a))
    x = torch.arange(8)[None]
    with torch.no_grad():
        assert distance(again(x).last_hidden_state, old(x).last_hidden_state) < 1e-5
    with pytest.raises(PlanError, match="one size for groups with different ratios"):
        merge.pleas(a, b, ratios={"f0": 0.5})


def test_a_transformer_is_fitted_on_texts_of_numbers(tmp_path: Path) -> None:
    a, b = bert(0, tmp_path / "a"), bert(1, tmp_path / "b")
    draw = torch.Generator().manual_seed(0)
    inputs = [{"input_ids": torch.randint(0, 30, (8, 10), generator=draw)} for _ in range(2)]
    module = transformers.AutoModel.from_pretrained(a)
    data = merge.Task(
        module, lambda out, _: out.last_hidden_state.sum(), [(x, None) for x in inputs]
    )
    merged = merge.pleas(a, b, 1.1, data=data)
    assert "encoder.layer.0.output.dense.weight" in merged.errors
    assert all(after <= before + 1e-9 for before, after in merged.errors.values())
    model = transformers.AutoModel.from_pretrained(merged.save(tmp_path / "out")).eval()
    state = merged.checkpoint.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


# -- errors ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.5}, "how much larger"),
        ({"by": "weight"}, "did you mean 'weights'"),
        ({"count": "flops"}, "no choice"),
        ({"ratios": 1.5}, "share of units"),
        ({"ratios": {"f9": 0.5}}, "could be taken apart"),
        ({"by": "activations"}, "needs data"),
        ({"least_squares": True}, "needs data"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        merge.pleas(net(0), net(1), **{"symmetry": mlp_spec(3), **options})


def test_networks_of_other_sizes_are_refused() -> None:
    with pytest.raises(MergeError, match="differ"):
        merge.pleas(net(0), net(0, [6, 10, 9, 3]), symmetry=mlp_spec(3))


def test_a_module_takes_only_its_own_tensors() -> None:
    with pytest.raises(PlanError, match="not those of the module"):
        resized_module(net(0), net(0, [6, 9, 3]).state_dict())
