"""Matching on data: by activations, by a loss, of many at once; statistics put right after it."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from merge.alignment import activation
from merge.alignment.activation import match_activations
from merge.alignment.families import families
from merge.alignment.frank_wolfe import frank_wolfe, pairs
from merge.alignment.many import match_many
from merge.alignment.matching import identity
from merge.alignment.moments import Moments
from merge.alignment.repair import repair
from merge.alignment.ste import InMemory, match_straight_through
from merge.alignment.weight import match_weights
from merge.errors import PlanError
from merge.symmetry.action import apply
from merge.symmetry.elements import compose, inverse, random_element
from merge.symmetry.symmetry import Symmetry

from .networks import (
    VIT,
    ResNet20,
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    resnet_spec,
    symmetry_of,
)
from .symmetries import LLAMA, randomised

State = dict[str, Tensor]


LLAMA_CONFIG = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "head_dim": 8,
}  # fmt: skip


# -- moments ---------------------------------------------------------------------------------------
@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.floats(-1e4, 1e4))
def test_moments_of_batches_are_those_of_all_samples(sizes: list[int], offset: float) -> None:
    draw = torch.Generator().manual_seed(sum(sizes))
    a, b = (
        torch.randn(sum(sizes) + 1, n, generator=draw, dtype=torch.float64) + offset for n in (3, 4)
    )
    moments = Moments()
    for part in zip(a.split([*sizes, 1]), b.split([*sizes, 1]), strict=True):
        moments.add(*part)
    both = np.corrcoef(a.T.numpy(), b.T.numpy())[:3, 3:]
    np.testing.assert_allclose(moments.correlation().numpy(), both, atol=1e-7)
    cov = np.cov(a.T.numpy(), b.T.numpy(), ddof=0)[:3, 3:]
    np.testing.assert_allclose(moments.covariance().numpy(), cov, rtol=1e-6, atol=1e-9)


def test_a_unit_that_never_changes_correlates_with_nothing() -> None:
    moments = Moments()
    a = torch.cat([torch.randn(50, 1), torch.full((50, 1), 0.1)], 1)
    moments.add(a, a)
    found = moments.correlation()
    assert found[0, 0] == pytest.approx(1.0) and found[1].abs().max() == 0


# -- activations -----------------------------------------------------------------------------------
def cases() -> Mapping[str, Callable[[], tuple[nn.Module, Any, Any, list[Any]]]]:
    """Networks with a spec, a config and inputs."""

    def of_vit() -> Any:
        config = transformers.ViTConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
            image_size=16, patch_size=4, num_labels=5,
        )  # fmt: skip
        inputs = {"pixel_values": torch.randn(32, 3, 16, 16).double()}
        return transformers.ViTForImageClassification(config), VIT, config.to_dict(), [inputs]

    def of_llama() -> Any:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_CONFIG))
        inputs = {"input_ids": torch.randint(0, 60, (16, 20))}
        return model, LLAMA, LLAMA_CONFIG, [inputs]

    def of_mlp() -> Any:
        return mlp([12, 32, 24, 16, 5]), mlp_spec(4), None, list(torch.randn(4, 50, 12).double())

    def of_resnet() -> Any:
        images = [(x,) for x in torch.randn(2, 8, 3, 16, 16).double()]
        return ResNet20(4), resnet_spec(), None, images

    return {"mlp": of_mlp, "resnet": of_resnet, "vit": of_vit, "llama": of_llama}


CASES = cases()


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("covariance", [False, True])
def test_a_planted_element_is_found_by_what_units_answer(kind: str, covariance: bool) -> None:
    torch.manual_seed(0)
    module, spec, config, batches = CASES[kind]()
    module = randomised(module)
    a = module.state_dict()
    symmetry = symmetry_of(spec, a, config)
    b, _ = planted(symmetry, a)
    other = copy.deepcopy(module)
    other.load_state_dict(b)
    found = match_activations(symmetry, module, other, batches, covariance=covariance)
    back = apply(symmetry, b, found.element)
    assert all(torch.equal(back[n], a[n]) for n in a)
    if not covariance:
        scores = [g.score for g in found.report.groups if g.score is not None]
        assert min(scores) == pytest.approx(1.0, abs=1e-6)


def test_scales_of_units_do_not_change_their_correlation() -> None:
    """A rectified unit may answer a thousandfold where its readers divide by as much."""
    torch.manual_seed(0)
    module = randomised(mlp([12, 32, 24, 5]))
    a = module.state_dict()
    symmetry = symmetry_of(mlp_spec(3, "PD"), a)
    b, _ = planted(symmetry, a)
    factor = 10.0 ** torch.randint(-3, 4, (32,)).double()
    b["0.weight"] *= factor[:, None]
    b["0.bias"] *= factor
    b["2.weight"] /= factor
    other = copy.deepcopy(module)
    other.load_state_dict(b)
    batches = [torch.randn(200, 12).double()]
    right = random_element(symmetry, 1)["f0"]
    found = match_activations(symmetry, module, other, batches)
    assert (right[found.element["f0"]] == np.arange(32)).all()
    assert all(g.score == pytest.approx(1.0) for g in found.report.groups)


def test_accumulators_that_do_not_fit_go_over_the_data_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    module, spec, config, batches = CASES["vit"]()
    a = {n: t.detach() for n, t in randomised(module).state_dict().items()}
    symmetry = symmetry_of(spec, a, config)
    other = copy.deepcopy(module)
    other.load_state_dict({n: torch.randn_like(t) for n, t in a.items()})
    one = match_activations(symmetry, module, other, batches)
    runs = []
    plain = activation.run
    monkeypatch.setattr(activation, "run", lambda m, x: runs.append(plain(m, x)))
    two = match_activations(symmetry, module, other, batches, memory=1)
    assert len(runs) == 2 * len(families(symmetry))
    assert all(np.array_equal(m, two.element[n]) for n, m in one.element.items())


def test_no_data_is_an_error_that_says_what_to_do() -> None:
    module = mlp([3, 4, 2])
    symmetry = symmetry_of(mlp_spec(2), module.state_dict())
    state = module.state_dict()
    for call in (
        lambda: match_activations(symmetry, module, module, []),
        lambda: match_straight_through(symmetry, state, state, [], lambda p, b: p["0.bias"].sum()),
        lambda: repair(module, state, [state, state], iter(())),
    ):
        with pytest.raises(PlanError, match="no data") as caught:
            call()
        assert caught.value.found == "no batches" and caught.value.do


def test_a_network_whose_layers_show_nothing_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x @ self.a.T) @ self.b.T

    spec = {"model": "own", "groups": {"f": {"flags": "P"}},
            "tensors": {"a": ["f", "_"], "b": ["_", "f"]}}  # fmt: skip
    module = Own()
    with pytest.raises(PlanError, match="no layer shows"):
        match_activations(
            symmetry_of(spec, module.state_dict()), module, module, [torch.randn(5, 3)]
        )


# -- digits ----------------------------------------------------------------------------------------
def digits() -> tuple[Tensor, Tensor]:
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    scaled = (images - images.mean()) / images.std()
    return torch.tensor(scaled[order], dtype=torch.float32), torch.tensor(classes[order])


X, Y = digits()


def trained(make: Callable[[int], nn.Module], seed: int, epochs: int = 12) -> State:
    """A classifier of digits after some epochs of Adam."""
    module = make(seed)
    draw = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(module.parameters(), 3e-3, weight_decay=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(1300, generator=draw).split(64):
            adam.zero_grad()
            nn.functional.cross_entropy(module(X[batch]), Y[batch]).backward()
            adam.step()
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def test_loss(module: nn.Module, state: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        out = torch.func.functional_call(module, dict(state), (X[1300:],))
        return float(nn.functional.cross_entropy(out, Y[1300:]))


test_loss.__test__ = False  # type: ignore[attr-defined]


def small(seed: int) -> nn.Module:
    return mlp([64, 48, 48, 10], seed=seed)


@pytest.fixture(scope="module")
def parents() -> list[State]:
    return [trained(small, seed) for seed in range(4)]


def middle(*states: State) -> State:
    return {n: sum(s[n] for s in states) / len(states) for n in states[0]}


def digit_symmetry(parents: list[State]) -> Symmetry:
    return symmetry_of(mlp_spec(3), parents[0])


def test_networks_trained_apart_meet_in_the_middle_once_aligned(parents: list[State]) -> None:
    """By weights and by activations: the loss of the mid-point comes down to near the parents'."""
    module, symmetry = small(0), digit_symmetry(parents)
    a, b = parents[:2]
    other = small(1)
    module.load_state_dict(a)
    other.load_state_dict(b)
    own = max(test_loss(module, a), test_loss(module, b))
    naive = test_loss(module, middle(a, b))
    assert naive > own + 0.2
    by_weight = match_weights(symmetry, InMemory(a), InMemory(b)).element
    by_answer = match_activations(symmetry, module, other, [X[:1300]]).element
    for element in (by_weight, by_answer):
        aligned = test_loss(module, middle(a, apply(symmetry, b, element)))
        assert aligned - own < (naive - own) / 4


# -- by a loss -------------------------------------------------------------------------------------
def test_straight_through_matching_is_never_worse_than_by_weights(parents: list[State]) -> None:
    module, symmetry = small(0), digit_symmetry(parents)
    a, b = parents[:2]

    def loss(state: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        out = torch.func.functional_call(module, dict(state), (batch[0],))
        return nn.functional.cross_entropy(out, batch[1])

    batches = [(X[i], Y[i]) for i in torch.arange(1300).split(325)]
    found = match_straight_through(symmetry, a, b, batches, loss, steps=20, every=4)
    by_weight = match_weights(symmetry, InMemory(a), InMemory(b)).element
    judge = batches[-1]
    with torch.no_grad():
        value, start = (
            float(loss(middle(a, apply(symmetry, b, e)), judge)) for e in (found.element, by_weight)
        )
    steps = found.report.objective
    assert value <= start + 1e-6
    assert steps[0] == pytest.approx(-start) and steps[-1] == pytest.approx(-value)
    assert all(y >= x for x, y in itertools.pairwise(steps))
    assert "by weights" in found.report.notes[0]


def test_one_batch_that_judges_itself_is_told(parents: list[State]) -> None:
    a = parents[0]
    found = match_straight_through(
        digit_symmetry(parents), a, a, [None], lambda p, _: p["0.weight"].square().sum(), steps=1
    )
    assert any("one batch" in note for note in found.report.notes)


# -- many ------------------------------------------------------------------------------------------
def test_going_round_changes_nothing(parents: list[State]) -> None:
    """Maps through the common frame make the identity around any circle; matched in pairs not."""
    symmetry = digit_symmetry(parents)
    many = match_many(symmetry, parents)
    to = [inverse(symmetry, e) for e in many.elements]
    for circle in itertools.permutations(range(4), 3):
        around = identity(*families(symmetry))
        for i, k in zip(circle, (*circle[1:], circle[0]), strict=True):
            step = compose(symmetry, many.elements[i], to[k])
            around = compose(symmetry, around, step)
        assert all((m == np.arange(len(m))).all() for m in around.values())
    apart = identity(*families(symmetry))
    for i, k in ((0, 1), (1, 2), (2, 0)):
        step = match_weights(symmetry, InMemory(parents[k]), InMemory(parents[i])).element
        apart = compose(symmetry, apart, step)
    assert any((m != np.arange(len(m))).any() for m in apart.values())


def test_many_are_nearer_to_one_another_than_when_matched_to_the_first(
    parents: list[State],
) -> None:
    symmetry, module = digit_symmetry(parents), small(0)
    many = match_many(symmetry, parents)
    steps = many.report.objective
    assert all(y >= x for x, y in itertools.pairwise(steps))
    assert all((m == np.arange(len(m))).all() for m in many.elements[0].values())
    together = [apply(symmetry, p, e) for p, e in zip(parents, many.elements, strict=True)]
    first = [parents[0]] + [
        apply(symmetry, p, match_weights(symmetry, InMemory(parents[0]), InMemory(p)).element)
        for p in parents[1:]
    ]
    free = pairs([{"4.bias": p["4.bias"]} for p in parents])  # which nothing moves
    assert steps[-1] == pytest.approx(pairs(together) - free, rel=1e-5)
    assert pairs(together) >= pairs(first)
    assert test_loss(module, middle(*together)) < test_loss(module, middle(*parents)) / 3


def test_planted_networks_are_brought_together_to_the_bit() -> None:
    a = {n: t.float() for n, t in randomised(mlp([6, 12, 9, 3])).state_dict().items()}
    symmetry = symmetry_of(mlp_spec(3), a)
    networks = [planted(symmetry, a, seed)[0] for seed in range(3)]
    many = match_many(symmetry, networks)
    for network, element in zip(networks, many.elements, strict=True):
        back = apply(symmetry, network, element)
        assert all(torch.equal(back[n], networks[0][n]) for n in a)


def test_heads_are_brought_together_too() -> None:
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_CONFIG))
    a = {n: t.float() for n, t in randomised(module).state_dict().items()}
    symmetry = symmetry_of(LLAMA, a, LLAMA_CONFIG)
    networks = [planted(symmetry, a, seed)[0] for seed in range(3)]
    many = match_many(symmetry, networks, steps=1)
    for network, element in zip(networks, many.elements, strict=True):
        back = apply(symmetry, network, element)
        assert all(torch.equal(back[n], networks[0][n]) for n in a)


def test_frank_and_wolfe_gain_from_where_they_begin(parents: list[State]) -> None:
    symmetry = digit_symmetry(parents)
    trees = families(symmetry)
    still = [identity(*trees) for _ in parents]
    found = frank_wolfe(symmetry, parents, still, trees, steps=20)
    moved = [apply(symmetry, p, e) for p, e in zip(parents, found, strict=True)]
    assert pairs(moved) > 2 * pairs(parents)


def test_one_network_is_no_many() -> None:
    a = mlp([3, 4, 2]).state_dict()
    with pytest.raises(PlanError, match="nothing to be aligned with"):
        match_many(symmetry_of(mlp_spec(2), a), [a])


# -- statistics ------------------------------------------------------------------------------------
def statistics(module: nn.Module, state: State, data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the first layer's answers."""
    out = nn.functional.linear(data, state["0.weight"], state["0.bias"])
    return out.mean(0), out.std(0, correction=0)


def test_a_repaired_layer_has_its_parents_statistics(parents: list[State]) -> None:
    module, (a, b) = small(0), parents[:2]
    merged = middle(a, b)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    found = repair(module, merged, [a, b], X[:1300].split(400))
    mean, deviation = statistics(module, {**merged, **found.tensors}, X[:1300])
    for k, now in enumerate((mean, deviation)):
        goal = (statistics(module, a, X[:1300])[k] + statistics(module, b, X[:1300])[k]) / 2
        torch.testing.assert_close(now, goal, rtol=1e-4, atol=1e-5)
    assert found.layers == ("0", "2") and found.kind == "REPAIR"
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in before.items())


def test_weights_lean_the_statistics_to_one_parent(parents: list[State]) -> None:
    module, (a, b) = small(0), parents[:2]
    found = repair(module, middle(a, b), [a, b], [X[:500]], weights=[3, 1])
    mean, _ = statistics(module, {**middle(a, b), **found.tensors}, X[:500])
    goal = 0.75 * statistics(module, a, X[:500])[0] + 0.25 * statistics(module, b, X[:500])[0]
    torch.testing.assert_close(mean, goal, rtol=1e-4, atol=1e-5)


def test_a_network_merged_with_itself_needs_no_repair(parents: list[State]) -> None:
    found = repair(small(0), parents[0], [parents[0]] * 2, [X[:200]])
    for name, value in found.tensors.items():
        torch.testing.assert_close(value, parents[0][name], rtol=1e-5, atol=1e-6)


def test_units_that_never_change_are_left_alone(parents: list[State]) -> None:
    a = {n: t.clone() for n, t in parents[0].items()}
    a["0.weight"][3] = 0.0
    found = repair(small(0), a, [parents[0]] * 2, [X[:200]])
    assert found.tensors["0.weight"][3].abs().max() == 0
    assert all(t.isfinite().all() for t in found.tensors.values())


def test_batchnorm_is_measured_anew() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                           nn.Linear(4 * 36, 10))  # fmt: skip
    state = {n: t.clone() for n, t in module.state_dict().items()}
    images = X[:600].reshape(-1, 1, 8, 8)
    found = repair(module, state, [state, state], images.split(200))
    out = nn.functional.conv2d(images, state["0.weight"], state["0.bias"])
    parts = [o.mean((0, 2, 3)) for o in out.split(200)]
    torch.testing.assert_close(found.tensors["1.running_mean"], sum(parts) / 3)
    assert found.kind == "BatchNorm reset" and set(found.tensors) == {
        f"1.{p}" for p in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert module[1].momentum == 0.1 and module.training


def test_a_report_of_activations_is_plain_data(parents: list[State]) -> None:
    module = small(0)
    module.load_state_dict(parents[0])
    report = match_activations(digit_symmetry(parents), module, module, [X[:100]]).report
    data = json.loads(json.dumps(report.to_json()))
    assert data["method"] == "activation matching" and data["moved"] == 0.0
    few = match_activations(digit_symmetry(parents), module, module, [X[:10]]).report
    assert any("only 20 samples" in note for note in few.notes)  # before and after the kink
