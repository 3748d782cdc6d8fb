"""Transport: plans held against POT and scipy, and maps between widths that keep functions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import ot
import pytest
import scipy.optimize
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import merge
from merge import symmetries
from merge.errors import PlanError, RecipeError
from merge.symmetry.elements import random_element
from merge.symmetry.roles import counted, inputs_of, resized, starred_writers
from merge.transport.coupling import Coupling, Couplings, through
from merge.transport.mapped import carried, roles_of
from merge.transport.plans import Plan, entropic, exact, importance, of_index
from merge.transport.scales import rescaled

from .networks import (
    APART,
    STACKED,
    apart,
    mlp,
    mlp_spec,
    one_thread,  # noqa: F401  (a fixture)
    stacked,
    symmetry_of,
)
from .symmetries import distance, randomised


# -- plans -----------------------------------------------------------------------------------------
def costs(n: int, m: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).random((n, m))


def weights(n: int, seed: int = 0) -> Any:
    return importance(np.random.default_rng(seed).random(n) + 0.1)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 99), uniform=st.booleans())
def test_exact_plans_are_those_of_pot(n: int, m: int, seed: int, uniform: bool) -> None:
    cost = costs(n, m, seed)
    a, b = (None, None) if uniform else (weights(n, seed), weights(m, seed + 1))
    found = exact(cost, a, b)
    full = [np.full(k, 1 / k) if x is None else x for k, x in ((n, a), (m, b))]
    assert (found.mass * cost).sum() == pytest.approx(ot.emd2(*full, cost), abs=1e-9)
    np.testing.assert_allclose(found.mass.sum(1), full[0], atol=1e-9)
    np.testing.assert_allclose(found.mass.sum(0), full[1], atol=1e-9)


def test_equal_widths_give_scipys_assignment() -> None:
    cost = costs(17, 17)
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    index = exact(cost).index
    assert index is not None and (index[columns] == rows).all()


def test_entropic_plans_are_those_of_pot() -> None:
    cost, a, b = costs(7, 5), weights(7), weights(5, 1)
    for regularisation in (1.0, 0.1, 0.02):
        found = entropic(cost, regularisation, a, b)
        wanted = ot.bregman.sinkhorn_log(
            a, b, cost, regularisation, numItermax=20000, stopThr=1e-14
        )
        np.testing.assert_allclose(found.mass, wanted, atol=1e-7)
        np.testing.assert_allclose(found.mass.sum(1), a, atol=1e-12)
        np.testing.assert_allclose(found.mass.sum(0), b, atol=1e-12)


def test_entropic_plans_become_exact_ones_as_the_regularisation_vanishes() -> None:
    cost = costs(12, 12, 3)
    best = (exact(cost).mass * cost).sum()
    values = [(entropic(cost, r).mass * cost).sum() for r in (1.0, 0.1, 0.01, 1e-3, 1e-5)]
    assert all(a > b - 1e-9 for a, b in itertools.pairwise(values))
    assert values[0] > best + 1e-3
    assert values[-1] == pytest.approx(best, abs=1e-4)


def test_the_two_maps_of_a_plan() -> None:
    plan = exact(costs(6, 4), weights(6), weights(4, 1))
    np.testing.assert_allclose(plan.out.sum(1), 1)
    np.testing.assert_allclose(plan.into.sum(0), 1)
    index = np.array([2, 0, 1])
    assert (of_index(index).out == np.eye(3)[index]).all()
    assert (of_index(index).into == np.eye(3)[index]).all()


def test_exact_plans_are_kept_by_their_entries() -> None:
    plan = exact(costs(60, 40), weights(60), weights(40, 1))
    assert plan.entries is not None and len(plan.entries[0]) < 100
    assert plan.mass.shape == (60, 40) and plan.mass.sum() == pytest.approx(1)
    assert [plan.source_of(i) for i in range(40)] == plan.mass.argmax(0).tolist()
    assert entropic(costs(60, 40), 0.1).entries is None
    x = torch.randn(3, 60, 2, dtype=torch.float64)
    for read, matrix in ((False, plan.out), (True, plan.into)):
        found = through(x, (None, "f", None), (False, read, False), {"f": Coupling(plan)})
        wanted = torch.einsum("ij,ajb->aib", torch.from_numpy(matrix), x)
        torch.testing.assert_close(found, wanted)


def test_a_unit_of_no_weight_still_has_an_image() -> None:
    found = importance(np.array([0.0, 1.0, 3.0]))
    assert found.sum() == pytest.approx(1) and found.min() > 0
    assert (importance(np.zeros(4)) == 0.25).all()


def test_plans_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="no finite numbers"):
        exact(np.array([[np.nan]]))
    with pytest.raises(PlanError, match="no marginal"):
        exact(costs(2, 2), np.array([0.5, 0.6]))
    with pytest.raises(RecipeError, match="positive"):
        entropic(costs(2, 2), 0.0)
    monkeypatch.setitem(__import__("sys").modules, "ot", None)
    assert exact(costs(4, 2)).mass.shape == (4, 2)  # a multiple needs no POT
    with pytest.raises(PlanError, match=r"POT(.|\n)*pip install 'hf-merge\[ot\]'"):
        exact(costs(3, 2))


# -- roles -----------------------------------------------------------------------------------------
def test_a_linear_map_reads_its_columns() -> None:
    symmetry = symmetry_of(mlp_spec(3), mlp([6, 12, 9, 3]).state_dict())
    inputs = inputs_of(symmetry)
    assert inputs["2.weight"] == {1} and inputs["4.weight"] == {1} and inputs["2.bias"] == set()
    assert not starred_writers(symmetry) and not counted(symmetry)


def test_stars_on_writers_are_seen() -> None:
    spec = mlp_spec(3)
    for name, axes in spec["tensors"].items():
        swapped = {"f0": "f0*", "f0*": "f0"}
        spec["tensors"][name] = [swapped.get(a, a) for a in axes]
    symmetry = symmetry_of(spec, mlp([6, 12, 9, 3]).state_dict())
    assert starred_writers(symmetry) == {"f0"}


def test_experts_are_counted() -> None:
    for spec, tensors in ((STACKED, stacked()), (APART, apart(stacked()))):
        assert counted(symmetry_of(spec, tensors)) == {"ex"}


# -- widths ----------------------------------------------------------------------------------------
def copies(symmetry: Any, factors: dict[str, int], seed: int = 0) -> tuple[Couplings, Any]:
    """Couplings that copy each unit of some groups so many times, shuffled; and the new sizes."""
    draw = np.random.default_rng(seed)
    sizes = {g: symmetry.groups[g].size * f for g, f in factors.items()}
    parents = {p: c for c in factors for p in symmetry.groups[c].per}
    for name in list(parents):
        factors.setdefault(name, 1)

    def coupling(name: str) -> Coupling:
        size = symmetry.groups[name].size
        index = draw.permutation(np.repeat(np.arange(size), factors[name]))
        plan = of_index(index, size)
        level = len(symmetry.groups[name].per)
        inner = [
            g
            for g in factors
            if name in symmetry.groups[g].per and len(symmetry.groups[g].per) == level + 1
        ]
        below = {(int(j), i): {g: coupling(g) for g in inner} for i, j in enumerate(index) if inner}
        return Coupling(plan, below)

    roots = [g for g in factors if not symmetry.groups[g].per]
    return {g: coupling(g) for g in roots}, resized(symmetry, sizes)


def transposed(couplings: Couplings) -> Couplings:
    """The same plans the other way."""
    out = {}
    for name, c in couplings.items():
        below = {(i, j): transposed(inner) for (j, i), inner in c.below.items()}
        out[name] = Coupling(Plan(c.plan.mass.T, c.plan.b, c.plan.a), below)
    return out


def test_copied_units_keep_an_mlp_and_join_again() -> None:
    net = randomised(mlp([6, 12, 9, 3])).float()
    checkpoint = merge.open(net)
    symmetry = symmetry_of(mlp_spec(3), net.state_dict())
    couplings, wide = copies(symmetry, {"f0": 2, "f1": 3})
    x = torch.randn(20, 6)
    widened = carried(checkpoint, symmetry, wide, couplings)
    other = mlp([6, 24, 27, 3])
    other.load_state_dict(widened.state_dict())
    assert distance(other(x), net(x)) < 1e-6
    joined = carried(widened, wide, symmetry, transposed(couplings)).state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(joined[name], value, rtol=0, atol=1e-6)


def test_one_map_for_both_sides_is_another_function() -> None:
    """What the pair of maps is for: with either alone a wider network computes something else."""
    net = randomised(mlp([6, 12, 9, 3])).float()
    symmetry = symmetry_of(mlp_spec(3), net.state_dict())
    couplings, wide = copies(symmetry, {"f0": 2, "f1": 3})
    other, x = mlp([6, 24, 27, 3]), torch.randn(20, 6)
    for marginal in ("a", "b"):
        one_sided = {}
        for name, c in couplings.items():
            plan = c.plan
            scale = plan.mass.sum() * getattr(plan, marginal)[0]
            one_sided[name] = Coupling(
                Plan(plan.mass, np.full_like(plan.a, scale), np.full_like(plan.b, scale))
            )
        other.load_state_dict(carried(merge.open(net), symmetry, wide, one_sided).state_dict())
        assert distance(other(x), net(x)) > 0.5


TINY = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2}  # fmt: skip
CASES: list[tuple[str, Any, dict[str, Any], dict[str, int], dict[str, Any]]] = [
    ("ViTForImageClassification", transformers.ViTConfig,
     {**TINY, "image_size": 8, "patch_size": 4}, {"f": 2}, {"intermediate_size": 24}),
    ("ViTForImageClassification", transformers.ViTConfig,
     {**TINY, "image_size": 8, "patch_size": 4}, {"d": 2, "qk": 2, "v": 2},
     {"hidden_size": 32}),
    ("BertForMaskedLM", transformers.BertConfig,
     {**TINY, "vocab_size": 20}, {"d": 2, "f": 3, "h": 2},
     {"hidden_size": 32, "intermediate_size": 36, "num_attention_heads": 4}),
    ("GPT2LMHeadModel", transformers.GPT2Config,
     {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 20, "n_positions": 12,
      "bos_token_id": 0, "eos_token_id": 0},
     {"d": 2, "f": 2, "qk": 2, "v": 2}, {"n_embd": 32}),
    ("LlamaForCausalLM", transformers.LlamaConfig,
     {**TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20,
      "head_dim": 8}, {"d": 3, "f": 2, "kv": 2, "slot": 2},
     {"hidden_size": 48, "intermediate_size": 24, "num_attention_heads": 16,
      "num_key_value_heads": 4}),
    ("LlamaForCausalLM", transformers.LlamaConfig,
     {**TINY, "num_key_value_heads": 2, "vocab_size": 20, "head_dim": 8,
      "tie_word_embeddings": True}, {"d": 2}, {"hidden_size": 32}),
    ("GemmaForCausalLM", transformers.GemmaConfig,
     {**TINY, "num_key_value_heads": 2, "vocab_size": 20, "head_dim": 8}, {"d": 2, "f": 2},
     {"hidden_size": 32, "intermediate_size": 24}),
    ("T5ForConditionalGeneration", transformers.T5Config,
     {"vocab_size": 20, "d_model": 16, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0},
     {"d": 2, "f_encoder": 2, "f_decoder": 2, "qk_EncDecAttention": 2,
      "v_EncDecAttention": 2, "qk_encoder": 2, "v_encoder": 2, "qk_decoder_SelfAttention": 2,
      "v_decoder_SelfAttention": 2},
     {"d_model": 32, "d_ff": 24, "d_kv": 8}),
]  # fmt: skip


def inputs_for(model: Any) -> dict[str, Any]:
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(3, 3, 8, 8, dtype=torch.float64)}
    tokens = {"input_ids": torch.arange(14).reshape(2, 7) % 20}
    if model.config.model_type == "t5":
        tokens["decoder_input_ids"] = torch.arange(8).reshape(2, 4)
    return tokens


@pytest.mark.parametrize(("kind", "config", "small", "times", "large"), CASES)
def test_copied_units_keep_a_transformer(
    kind: str, config: Any, small: Any, times: dict[str, int], large: Any
) -> None:
    """Residual streams, heads, dimensions inside heads, experts' and feed-forward units."""
    net = randomised(getattr(transformers, kind)(config(**small)))
    checkpoint = merge.open(net)
    symmetry = symmetries.symmetry_of(net, outputs="free")
    factors = {
        g: f for stem, f in times.items() for g in symmetry.groups if g.rstrip("0123456789") == stem
    }
    assert {g.rstrip("0123456789") for g in factors} == set(times)
    couplings, wide = copies(symmetry, factors)
    other = getattr(transformers, kind)(config(**{**small, **large})).double().eval()
    configs = net.config.to_dict(), other.config.to_dict()
    scales = rescaled(
        symmetry, wide, couplings, roles_of(symmetry), configs, tied=bool(checkpoint.tied)
    )
    found = carried(checkpoint, symmetry, wide, couplings, scales).state_dict()
    other.load_state_dict(found)
    given = inputs_for(net)
    with torch.no_grad():
        wanted, value = net(**given).logits, other(**given).logits
    limit = 1e-6 if kind in ("LlamaForCausalLM", "GemmaForCausalLM") or "T5" in kind else 1e-9
    assert distance(value, wanted) < limit


# -- permutations ----------------------------------------------------------------------------------
def test_a_permutation_moves_bytes_as_a_reordering_does() -> None:
    from merge.alignment.moved import moved

    net = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**CASES[4][2], "torch_dtype": "bfloat16"})
    ).bfloat16()
    checkpoint, symmetry = merge.open(net), symmetries.symmetry_of(net, outputs="free")
    element = random_element(symmetry, 3)

    def coupling(name: str, index: Any) -> Coupling:
        inner = [
            g
            for g, group in symmetry.groups.items()
            if group.per and group.per[-1] == name and g in element
        ]
        below = {
            (int(j), i): {g: coupling(g, element[g][int(j)]) for g in inner}  # type: ignore[index]
            for i, j in enumerate(index)
        }
        return Coupling(of_index(index), below if inner else {})

    roots = {g: m for g, m in element.items() if not symmetry.groups[g].per}
    couplings = {g: coupling(g, m) for g, m in roots.items()}
    found = carried(checkpoint, symmetry, symmetry, couplings).state_dict()
    wanted = moved(checkpoint, symmetry, element).state_dict()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
