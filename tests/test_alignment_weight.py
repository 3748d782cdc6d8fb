"""Weight matching: planted elements are found to the bit, the objective never falls."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import merge
from merge.alignment import matching
from merge.alignment.costs import parts_of, terms_of
from merge.alignment.families import families, members, names_of
from merge.alignment.matching import Scores, identity
from merge.alignment.nested import from_arrays, value_of
from merge.alignment.report import Match
from merge.alignment.weight import match_weights
from merge.errors import PlanError, SourceError
from merge.symmetry.action import apply
from merge.symmetry.elements import compose, random_element
from merge.symmetry.symmetry import Symmetry

from .networks import (
    APART,
    STACKED,
    VIT,
    Recorder,
    ResNet20,
    Tensors,
    apart,
    inner,
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    resnet_spec,
    stacked,
    symmetry_of,
)
from .symmetries import LLAMA, randomised

LLAMA_CONFIG = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "head_dim": 8,
}  # fmt: skip


def matched(symmetry: Symmetry, a: Tensors, b: Tensors, **options: Any) -> Match:
    return match_weights(symmetry, Recorder(a), Recorder(b), **options)


def float_state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in randomised(model).state_dict().items()}


def networks() -> Mapping[str, tuple[Symmetry, dict[str, Tensor]]]:
    """Networks of every kind, each with its symmetry."""
    vit = transformers.ViTConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    llama = transformers.LlamaConfig(**LLAMA_CONFIG)
    states = {
        "mlp": (mlp_spec(4), float_state(mlp([12, 32, 24, 16, 5])), None),
        "resnet": (resnet_spec(), float_state(ResNet20(4)), None),
        "vit": (VIT, float_state(transformers.ViTForImageClassification(vit)), vit.to_dict()),
        "llama": (LLAMA, float_state(transformers.LlamaForCausalLM(llama)), LLAMA_CONFIG),
        "experts": (STACKED, stacked(), None),
        "experts apart": (APART, apart(stacked()), None),
    }
    return {
        name: (symmetry_of(spec, tensors, config), tensors)
        for name, (spec, tensors, config) in states.items()
    }


KINDS = ["mlp", "resnet", "vit", "llama", "experts", "experts apart"]


@pytest.fixture(scope="module")
def nets() -> Mapping[str, tuple[Symmetry, dict[str, Tensor]]]:
    return networks()


Nets = Mapping[str, tuple[Symmetry, dict[str, Tensor]]]


# -- what a pair of coordinates is worth -----------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_scores_add_up_to_the_inner_product_of_the_moved_network(kind: str, nets: Nets) -> None:
    """For every group and random moves of all: the definition of the cost matrices."""
    symmetry, a = nets[kind]
    b = {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in a.items()}
    element = {**identity(*families(symmetry)), **random_element(symmetry, 5)}
    moved = apply(symmetry, b, element)
    for tree in families(symmetry):
        names = [n for n in a if names_of(tree) & {*symmetry.tensors[n].groups()}]
        without = {g: m for g, m in element.items() if g not in names_of(tree)}
        if symmetry.tensors[names[-1]].stack:  # tensors of experts are piled up: see below
            continue
        terms = [
            term
            for n in names
            for term in terms_of(
                symmetry.tensors[n], a[n], apply(symmetry, b, without)[n], tree, element
            )
        ]
        wanted = inner(a, moved, names)
        if tree.below:
            found = value_of([tree], parts_of(terms), {tree.group: from_arrays(tree, element)})
        else:
            scores = Scores.of(tree, signed=False)
            scores.add(terms)
            found = scores.worth(element[tree.group])
        assert found == pytest.approx(wanted, rel=1e-9)


# -- what is found ---------------------------------------------------------------------------------
@pytest.mark.parametrize("hold", [1 << 26, 64], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_element_is_found_to_the_bit(kind: str, hold: int, nets: Nets) -> None:
    symmetry, a = nets[kind]
    b, element = planted(symmetry, a)
    found = matched(symmetry, a, b, hold=hold)
    back = apply(symmetry, b, found.element)
    assert all(torch.equal(back[n], a[n]) for n in a)
    undone = compose(symmetry, element, found.element)
    for name, move in undone.items():
        assert (move == np.arange(symmetry.groups[name].size)).all()
    assert found.report.converged and found.report.after == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_a_tenth_of_the_weights_changes_no_index(kind: str, nets: Nets) -> None:
    symmetry, a = nets[kind]
    b, element = planted(symmetry, a)
    torch.manual_seed(0)
    noisy = {
        n: t + 0.1 * t.std() * torch.randn_like(t) if t.is_floating_point() and t.ndim > 1 else t
        for n, t in b.items()
    }
    undone = compose(symmetry, element, matched(symmetry, a, noisy).element)
    right = [(m == np.arange(m.shape[-1])).mean() for m in undone.values()]
    assert min(right) >= 0.99


def test_the_real_minilm_is_found_again(minilm: Path) -> None:
    """Feed-forward units, heads, their dimensions, the residual stream, the pooler: all of them."""
    a = load_file(minilm / "model.safetensors")
    symmetry = merge.symmetry_of(minilm, outputs="free")
    b, _ = planted(symmetry, a)
    found = matched(symmetry, a, b, hold=1 << 20)
    back = apply(symmetry, b, found.element)
    assert all(torch.equal(back[n], a[n]) for n in a)
    assert {"d", "h0", "qk0", "v0", "f0"} <= {g.group for g in found.report.groups if g.moved > 0.5}
    size = sum(t.numel() * t.element_size() for t in a.values() if t.is_floating_point())
    assert found.report.bytes_read == 2 * size  # once


@pytest.mark.parametrize("kind", KINDS)
def test_a_finetune_stays_where_it_is_and_is_read_once(kind: str, nets: Nets) -> None:
    symmetry, a = nets[kind]
    torch.manual_seed(0)
    b = {n: t + 0.02 * torch.randn_like(t) if t.ndim else t for n, t in a.items()}
    readers = Recorder(a), Recorder(b)
    found = match_weights(symmetry, *readers, hold=64)
    assert found.report.moved == 0.0 and len(found.report.objective) == 1
    if kind in ("vit", "llama", "experts", "experts apart"):  # one stream, as transformers have
        size = sum(
            t.numel() * t.element_size() for n, t in a.items() if symmetry.tensors[n].groups()
        )
        assert [r.bytes_read for r in readers] == [size, size]


@pytest.mark.parametrize("hold", [1 << 26, 64], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_never_falls_and_is_what_it_says(kind: str, hold: int, nets: Nets) -> None:
    symmetry, a = nets[kind]
    torch.manual_seed(1)
    b = {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in a.items()}
    found = matched(symmetry, a, b, hold=hold)
    names = [n for n in a if symmetry.tensors[n].groups() and "running" not in n]
    steps = found.report.objective
    assert all(y >= x - 1e-9 * abs(x) for x, y in itertools.pairwise(steps))
    aligned = apply(symmetry, b, found.element)
    assert steps[-1] == pytest.approx(inner(a, aligned, names))
    assert steps[-1] >= inner(a, b, names)
    scale = (inner(a, a, names) * inner(b, b, names)) ** 0.5
    assert found.report.after == pytest.approx(steps[-1] / scale)
    assert found.report.before == pytest.approx(inner(a, b, names) / scale)


@pytest.mark.parametrize("kind", KINDS)
def test_no_exchange_of_two_coordinates_gains_anything(kind: str, nets: Nets) -> None:
    symmetry, a = nets[kind]
    torch.manual_seed(1)
    b = {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in a.items()}
    element = dict(matched(symmetry, a, b).element)
    names = [n for n in a if symmetry.tensors[n].groups() and "running" not in n]
    best = inner(a, apply(symmetry, b, element), names)
    draw = np.random.default_rng(0)
    for tree in families(symmetry):
        for each in members(tree):
            i, j = draw.choice(each.size, 2, replace=False)
            move = element[each.group].copy()
            row = move.reshape(-1, each.size)[-1]
            row[[i, j]] = row[[j, i]]
            changed = {**element, each.group: move}
            assert inner(a, apply(symmetry, b, changed), names) <= best + 1e-9 * abs(best)


def test_a_start_from_an_element_is_at_least_as_good(nets: Nets) -> None:
    symmetry, a = nets["mlp"]
    torch.manual_seed(1)
    b = {n: torch.randn_like(t) for n, t in a.items()}
    start = random_element(symmetry, 4)
    found = matched(symmetry, a, b, start=start)
    assert found.report.objective[0] >= inner(a, apply(symmetry, b, start))


def test_more_starts_are_never_worse_and_leave_kept_groups_alone(nets: Nets) -> None:
    symmetry, a = nets["mlp"]
    draw = torch.Generator().manual_seed(3)
    b = {n: torch.randn(t.shape, generator=draw).to(t.dtype) for n, t in a.items()}
    one, more = (matched(symmetry, a, b, restarts=k) for k in (0, 10))
    assert more.report.objective[-1] > one.report.objective[-1]
    assert more.report.bytes_read == one.report.bytes_read  # nothing is read again
    kept = next(iter(symmetry.groups))
    held = matched(symmetry, a, b, restarts=10, keep=[kept]).element
    still = np.arange(symmetry.groups[kept].size)
    assert np.array_equal(held.get(kept, still), still)
    assert any((m != np.arange(m.shape[-1])).any() for m in held.values())


def test_networks_of_two_precisions_are_matched(nets: Nets) -> None:
    symmetry, a = nets["llama"]
    b, element = planted(symmetry, a)
    wide = {n: t.double() for n, t in a.items()}
    found = matched(symmetry, wide, {n: t.float() for n, t in b.items()})
    for name, move in compose(symmetry, element, found.element).items():
        assert (move == np.arange(symmetry.groups[name].size)).all()


def test_groups_that_are_kept_stay(nets: Nets) -> None:
    symmetry, a = nets["llama"]
    b, _ = planted(symmetry, a)
    found = matched(symmetry, a, b, keep=["d", "kv0"])
    assert not {"d", "kv0"} & {g.group for g in found.report.groups if g.moved}


def test_statistics_of_batchnorm_are_moved_but_not_judged_by(nets: Nets) -> None:
    symmetry, a = nets["resnet"]
    b, _ = planted(symmetry, a)
    wild = {n: t * 1e6 if "running_mean" in n else t for n, t in b.items()}
    found = matched(symmetry, a, wild)
    back = apply(symmetry, wild, found.element)
    assert torch.equal(back["bn.running_mean"], a["bn.running_mean"] * 1e6)


# -- signs, squares, experts -----------------------------------------------------------------------
def test_signs_are_found_where_they_are_asked_for() -> None:
    a = float_state(mlp([6, 12, 9, 3], nn.Tanh))
    symmetry = symmetry_of(mlp_spec(3, "PS"), a)
    b, _ = planted(symmetry, a, kinds="PS")
    found = matched(symmetry, a, b, signed=True)
    back = apply(symmetry, b, found.element)
    for name in a:
        torch.testing.assert_close(back[name], a[name], rtol=0, atol=1e-15)
    unsigned = apply(symmetry, b, matched(symmetry, a, b).element)
    assert inner(a, unsigned) < 0.9 * inner(a, a)


def test_gains_that_no_sign_changes_count_for_the_order() -> None:
    spec = {"model": "gains", "groups": {"d": {"flags": "PS"}},
            "tensors": {"in": ["d", "_"], "gain": ["|d|"], "out": ["_", "d*"]}}  # fmt: skip
    torch.manual_seed(0)
    a = {"in": torch.randn(8, 3), "gain": torch.rand(8), "out": torch.randn(2, 8)}
    symmetry = symmetry_of(spec, a)
    b, _ = planted(symmetry, a, kinds="PS")
    back = apply(symmetry, b, matched(symmetry, a, b, signed=True).element)
    assert all(torch.equal(back[n], a[n]) for n in a)


@pytest.mark.parametrize("hold", [1 << 26, 64], ids=["held", "streamed"])
def test_a_map_of_the_stream_to_itself_counts_and_never_misleads(hold: int) -> None:
    spec = {"model": "square", "groups": {"d": {"flags": "P"}, "f": {"flags": "P"}},
            "tensors": {"embed": ["_", "d"], "map": ["d", "d*"], "up": ["f", "d"]}}  # fmt: skip
    torch.manual_seed(0)
    a = {"embed": 0.1 * torch.randn(3, 10), "map": torch.randn(10, 10), "up": torch.randn(7, 10)}
    a = {n: t.double() for n, t in a.items()}
    symmetry = symmetry_of(spec, a)
    b, _ = planted(symmetry, a)
    back = apply(symmetry, b, matched(symmetry, a, b, hold=hold).element)
    assert all(torch.equal(back[n], a[n]) for n in a)
    other = {n: torch.randn_like(t) for n, t in a.items()}
    steps = matched(symmetry, a, other, hold=hold).report.objective
    assert all(y >= x - 1e-9 * abs(x) for x, y in itertools.pairwise(steps))


@pytest.mark.parametrize("kind", ["experts", "experts apart"])
def test_wide_experts_are_told_by_what_a_random_match_is_worth(
    kind: str, nets: Nets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "DENSE", 0)
    symmetry, a = nets[kind]
    b, _ = planted(symmetry, a)
    found = matched(symmetry, a, b)
    back = apply(symmetry, b, found.element)
    assert all(torch.equal(back[n], a[n]) for n in a)


def test_experts_apart_are_matched_as_if_they_were_stacked(nets: Nets) -> None:
    one, two = stacked(seed=1), stacked(seed=2)
    together = matched(symmetry_of(STACKED, one), one, two)
    alone = matched(symmetry_of(APART, apart(one)), apart(one), apart(two))
    assert alone.report.objective == pytest.approx(together.report.objective)
    for name, move in together.element.items():
        assert np.array_equal(move, alone.element[name])


# -- memory, order, errors -------------------------------------------------------------------------
def test_no_more_than_a_layer_is_held(nets: Nets) -> None:
    """Of a decoder's tensors, read one after the other, all but those of a layer are let go."""
    config = {**LLAMA_CONFIG, "num_hidden_layers": 6}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    a = float_state(model)
    symmetry = symmetry_of(LLAMA, a, config)
    alive: list[tuple[weakref.ref[Tensor], int]] = []
    most = 0

    class Watched(Recorder):
        def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
            nonlocal most
            found = super().read(name, first, last)
            alive.append((weakref.ref(found), found.numel()))
            most = max(most, sum(n for ref, n in alive if ref() is not None))
            return found

    match_weights(symmetry, Watched(a), Watched(planted(symmetry, a)[0]), hold=64)
    layer = sum(t.numel() for n, t in a.items() if ".layers.0." in n)
    assert most <= 2 * layer + 2 * max(a["model.embed_tokens.weight"].numel(), 1)


def test_the_same_networks_give_the_same_element(nets: Nets) -> None:
    symmetry, a = nets["vit"]
    torch.manual_seed(1)
    b = {n: torch.randn_like(t) for n, t in a.items()}
    one, two = (matched(symmetry, a, b) for _ in range(2))
    assert one.report == two.report
    assert all(np.array_equal(m, two.element[n]) for n, m in one.element.items())


def test_a_network_that_nothing_may_move_in_is_refused() -> None:
    a = float_state(mlp([3, 4, 2]))
    symmetry = symmetry_of(mlp_spec(2, ""), a)
    with pytest.raises(PlanError, match="nothing to align"):
        matched(symmetry, a, a)


def test_an_input_that_is_not_finite_is_named(nets: Nets) -> None:
    symmetry, a = nets["mlp"]
    b = {**a, "2.weight": a["2.weight"] * float("inf")}
    with pytest.raises(SourceError, match="not finite") as caught:
        matched(symmetry, a, b)
    assert caught.value.where["tensor"] == "2.weight" and "second" in caught.value.where["model"]


def test_a_report_reads_well(nets: Nets) -> None:
    symmetry, a = nets["mlp"]
    b, _ = planted(symmetry, a)
    report = matched(symmetry, a, b).report
    assert "moved" in str(report) and "cosine of the weights" in str(report)
    assert json.loads(json.dumps(report.to_json()))["groups"][0]["group"] == "f0"
