"""Checkpoints after a group element, lazily: what the engine writes is what the element says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import merge
from merge.alignment.moved import moved
from merge.ir.derived import Reorder, Whole
from merge.symmetry.action import apply
from merge.symmetry.elements import compose, identity, inverse, random_element
from merge.symmetry.symmetry import Symmetry

from .networks import APART, STACKED, apart, mlp, mlp_spec, stacked, symmetry_of
from .symmetries import LLAMA, randomised

CONFIG = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "head_dim": 8,
}  # fmt: skip

EINSUM: Mapping[str, Any] = {
    "model": "einsum",
    "groups": {"d": {"flags": "P"}, "h": {"flags": "P"}, "v": {"flags": "P", "per": ["h"]},
               "s": {"flags": "P", "per": ["h"]}},
    "tensors": {"value": ["d", "h", "v"], "out": ["h", "v", "d"], "mixed": ["v", "d", "h"],
                "both": ["h", "s", "v"], "far": ["h", "_", "v"]},
}  # fmt: skip
"""Heads on axes of their own, in every order."""


def networks() -> dict[str, tuple[Symmetry, dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(0)
    sizes = {"value": (5, 3, 4), "out": (3, 4, 5), "mixed": (4, 5, 3), "both": (3, 2, 4),
             "far": (3, 2, 4)}  # fmt: skip
    heads = {n: torch.randn(s, generator=draw) for n, s in sizes.items()}
    small = randomised(mlp([6, 12, 9, 3])).float().state_dict()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    llama = {n: t.bfloat16() for n, t in randomised(model).state_dict().items()}
    experts = {n: t.float() for n, t in stacked().items()}
    return {
        "mlp": (symmetry_of(mlp_spec(3, "PSD"), small), dict(small)),
        "llama": (symmetry_of(LLAMA, llama, CONFIG), llama),
        "experts": (symmetry_of(STACKED, experts), experts),
        "experts apart": (symmetry_of(APART, apart(experts)), apart(experts)),
        "einsum": (symmetry_of(EINSUM, heads), heads),
    }


NETS = networks()


@pytest.mark.parametrize("kind", NETS)
def test_a_permuted_checkpoint_is_what_the_element_makes_to_the_bit(kind: str) -> None:
    symmetry, tensors = NETS[kind]
    element = random_element(symmetry, 2)
    made = moved(merge.open(tensors), symmetry, element).state_dict()
    wanted = apply(symmetry, tensors, element)
    assert list(made) == list(tensors)
    for name, value in wanted.items():
        assert made[name].dtype == value.dtype and torch.equal(made[name], value)


@pytest.mark.parametrize("kind", NETS)
def test_moving_there_and_back_is_no_work_at_all(kind: str) -> None:
    symmetry, tensors = NETS[kind]
    source = merge.open(tensors)
    element = random_element(symmetry, 2)
    back = moved(moved(source, symmetry, element), symmetry, inverse(symmetry, element))
    steps = back.plan().to_json(tensors=True)["steps"]
    assert all("reordered" not in s["formula"] for s in steps)
    assert moved(source, symmetry, identity(symmetry)).tensors == source.tensors


def test_two_elements_are_one_order() -> None:
    symmetry, tensors = NETS["llama"]
    source = merge.open(tensors)
    one, two = random_element(symmetry, 2), random_element(symmetry, 3)
    twice = moved(moved(source, symmetry, one), symmetry, two)
    once = moved(source, symmetry, compose(symmetry, one, two))
    assert twice.tensors == once.tensors
    assert all(
        not isinstance(e, Reorder) or not isinstance(e.operands[0], Reorder)
        for e in twice.tensors.values()
    )


@pytest.mark.parametrize("kinds", ["PS", "PSD"])
def test_signs_and_scales_are_computed(kinds: str) -> None:
    symmetry, tensors = NETS["mlp"]
    element = random_element(symmetry, 2, kinds)
    made = moved(merge.open(tensors), symmetry, element)
    assert any(isinstance(e, Whole) for e in made.tensors.values())
    wanted = apply(symmetry, tensors, element)
    for name, value in made.state_dict().items():
        torch.testing.assert_close(value, wanted[name])


def test_matrices_are_computed_in_float32_and_rounded_once() -> None:
    symmetry, tensors = NETS["llama"]
    element = random_element(symmetry, 2, "R")
    made = moved(merge.open(tensors), symmetry, element).state_dict()
    wanted = apply(symmetry, {n: t.double() for n, t in tensors.items()}, element)
    for name, value in made.items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), wanted[name], rtol=2**-8, atol=1e-6)


def test_a_merge_of_a_moved_model_moves_nothing_twice() -> None:
    symmetry, tensors = NETS["llama"]
    source = merge.open(tensors)
    there = moved(source, symmetry, random_element(symmetry, 2))
    plan = (0.5 * source + 0.5 * there).plan()
    assert plan.read_bytes == plan.input_bytes
    mean = (0.5 * source + 0.5 * there).state_dict()
    other = there.state_dict()
    for name, value in mean.items():
        wanted = (tensors[name].float() + other[name].float()) / 2
        assert torch.equal(value, wanted.bfloat16())
