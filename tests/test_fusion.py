"""`merge.fuse`: other widths and depths, by weights and by activations; models in folders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers

import merge
from merge import symmetries
from merge.transport.mapped import carried

from .networks import (
    APART,
    STACKED,
    ResNet20,
    apart,
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    resnet_spec,
    stacked,
    symmetry_of,
)
from .symmetries import distance, randomised
from .test_transport import CASES, copies, inputs_for


def net(sizes: list[int], seed: int = 0) -> Any:
    return randomised(mlp(sizes), seed).float()


def task(module: Any, seed: int = 0, samples: int = 200) -> merge.Task:
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))
    return merge.Task(module, F.cross_entropy, train=[(x, torch.zeros(samples, dtype=torch.long))])


def run(state: Any, sizes: list[int], x: Any) -> Any:
    module = mlp(sizes)
    module.load_state_dict(state)
    return module(x)


SMALL, WIDE = [6, 12, 9, 3], [6, 24, 27, 3]


def widened(base: Any, seed: int = 0) -> tuple[Any, Any]:
    """A network with its units copied and shuffled: the same function."""
    symmetry = symmetry_of(mlp_spec(3), base.state_dict())
    couplings, wide = copies(symmetry, {"f0": 2, "f1": 3}, seed)
    state = carried(merge.open(base), symmetry, wide, couplings).state_dict()
    module = mlp(WIDE)
    module.load_state_dict(state)
    return module, state


# -- widths ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("direction", ["narrow", "widen"])
def test_copies_are_found_in_either_direction(by: str, direction: str) -> None:
    """What was widened by copies fuses with the original into that very function."""
    base = net(SMALL)
    wide, _ = widened(base, 3)
    models = [wide, base] if direction == "narrow" else [base, wide]
    data = None if by == "weights" else [task(m) for m in models]
    fused = merge.fuse(models, into=models[1], by=by, data=data, symmetry=mlp_spec(3))
    x = torch.randn(30, 6)
    sizes = SMALL if direction == "narrow" else WIDE
    assert distance(run(fused.state_dict(), sizes, x), base(x)) < 1e-5
    (report,) = merge.fusion_reports(fused)
    assert all(g.score is not None and g.score > 0.999 for g in report.groups)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_equal_widths_give_the_permutation_of_weight_matching(by: str) -> None:
    base = net(SMALL)
    moved, _ = planted(symmetry_of(mlp_spec(3), base.state_dict()), base.state_dict())
    other = mlp(SMALL)
    other.load_state_dict(moved)
    data = None if by == "weights" else task(base)
    found = merge.align(
        other, to=base, method="transport", symmetry=mlp_spec(3), data=data, transport={"by": by}
    )
    state = found.state_dict()
    assert all(torch.equal(state[n], t) for n, t in base.state_dict().items())
    assert merge.alignment_report(found).moved > 0.5


def test_a_network_with_itself_is_itself() -> None:
    base = net(SMALL)
    fused = merge.fuse([base, base.state_dict()], symmetry=mlp_spec(3)).state_dict()
    assert all(torch.allclose(fused[n], t, atol=1e-7) for n, t in base.state_dict().items())


@pytest.mark.parametrize("options", [
    {"regularisation": 0.05}, {"marginals": "l2"}, {"marginals": "l1"}, {"metric": "euclidean"},
    {"metric": "cosine"}, {"features": "incoming"}, {"sweeps": 1},
])  # fmt: skip
def test_every_manner_finds_what_was_moved(options: dict[str, Any]) -> None:
    base = net(SMALL)
    moved, _ = planted(symmetry_of(mlp_spec(3), base.state_dict()), base.state_dict())
    if "regularisation" in options:
        options = {"regularisation": 1e-4}
    fused = merge.fuse([base, moved], weights=[0, 1], symmetry=mlp_spec(3), **options)
    x = torch.randn(30, 6)
    assert distance(run(fused.state_dict(), SMALL, x), base(x)) < 1e-3


def test_soft_plans_mix_units() -> None:
    base, other = net(SMALL), net(SMALL, 1)
    exact, soft = (
        merge.fuse([base, other], weights=[0, 1], symmetry=mlp_spec(3), regularisation=r)
        for r in (0.0, 0.5)
    )
    one, two = exact.state_dict(), soft.state_dict()
    assert set(one["0.bias"].tolist()) == set(other.state_dict()["0.bias"].tolist())
    spread = [float(s["0.bias"].std()) for s in (one, two)]
    assert spread[1] < 0.7 * spread[0]  # means of many units are alike


def test_a_residual_network_with_batch_norms_is_fused_into_one_half_as_wide() -> None:
    small = randomised(ResNet20(4)).float()
    spec = resnet_spec()
    symmetry = symmetry_of(spec, small.state_dict())
    couplings, wide = copies(symmetry, dict.fromkeys(symmetry.groups, 2))
    large = ResNet20(8).eval()
    large.load_state_dict(carried(merge.open(small), symmetry, wide, couplings).state_dict())
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert distance(large(x), small(x)) < 1e-5
        fused = merge.fuse([large, small], into=small, symmetry=spec)
        again = ResNet20(4).eval()
        again.load_state_dict(fused.state_dict())
        assert distance(again(x), small(x)) < 1e-4


def test_experts_are_chosen_among_and_their_units_coupled() -> None:
    tensors = stacked(seed=1)
    for spec, own in ((STACKED, tensors), (APART, apart(tensors))):
        symmetry = symmetry_of(spec, own)
        moved, _ = planted(symmetry, own, 2)
        found = merge.align(moved, to=own, method="transport", symmetry=symmetry).state_dict()
        assert all(torch.equal(found[n], own[n]) for n in own)


@pytest.mark.parametrize(("kind", "config", "small", "times", "large"), CASES[:6])
def test_copies_in_transformers_are_found(
    kind: str, config: Any, small: Any, times: dict[str, int], large: Any
) -> None:
    """A transformer fused with itself, widened by copies, is itself: both ways."""
    base = randomised(getattr(transformers, kind)(config(**small)))
    symmetry = symmetries.symmetry_of(base, outputs="free")
    factors = {
        g: f for stem, f in times.items() for g in symmetry.groups if g.rstrip("0123456789") == stem
    }
    couplings, wide = copies(symmetry, factors)
    other = getattr(transformers, kind)(config(**{**small, **large})).double().eval()
    from merge.transport.mapped import roles_of
    from merge.transport.scales import rescaled

    configs = base.config.to_dict(), other.config.to_dict()
    tied = bool(merge.open(base).tied)
    scales = rescaled(symmetry, wide, couplings, roles_of(symmetry), configs, tied=tied)
    other.load_state_dict(carried(merge.open(base), symmetry, wide, couplings, scales).state_dict())
    given = inputs_for(base)
    for models in ([base, other], [other, base]):
        fused = merge.fuse(models, into=models[1], weights=[1, 0])
        result = type(base)(models[1].config).double().eval()
        result.load_state_dict(fused.state_dict())
        with torch.no_grad():
            assert distance(result(**given).logits, base(**given).logits) < 1e-4
