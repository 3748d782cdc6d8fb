"""Every case of every method once more, on checkpoints shaped as BERT and GPT-2, in float32.

BERT has biases, several embeddings and a pooler; GPT-2 stores its matrices transposed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import merge
from merge import methods
from merge.methods.core.shapes import not_a_matrix
from tests import (
    test_numbers,
    test_numbers_geometry,
    test_numbers_masks,
    test_numbers_selection,
    test_numbers_spectral,
)

State = dict[str, Tensor]
PLAIN = [*test_numbers.CASES, *test_numbers_geometry.CASES, *test_numbers_masks.CASES]
FORMULAS: dict[str, Any] = {}  # none of its own


def family(name: str) -> list[State]:
    """A base and three fine-tunes of it, whose differences to it are exact in float32."""
    torch.manual_seed(3)
    model = {
        "bert": lambda: BertModel(
            BertConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                vocab_size=120,
                type_vocab_size=8,
                max_position_embeddings=40,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=120, n_positions=40)
        ),
    }[name]()
    base = {n: t + 0.02 * torch.randn(t.shape) for n, t in model.state_dict().items()}
    base.pop("lm_head.weight", None)  # tied to the embeddings
    # with something in common, so that no two are opposite in a column of few elements
    common = {n: t + 0.03 * torch.randn(t.shape).abs() for n, t in base.items()}
    tuned = [{n: t + 0.01 * torch.randn(t.shape) for n, t in common.items()} for _ in range(3)]
    return [{n: t.bfloat16().float() for n, t in state.items()} for state in (base, *tuned)]


FAMILIES = {name: family(name) for name in ("bert", "gpt2")}
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_it_is_the_formula(case: test_numbers.Case, name: str) -> None:
    base, *tuned = FAMILIES[name]
    merged = case.lazy(base, tuned).state_dict()
    test_numbers.nearness(case, "float32", merged, FAMILIES[name]).check()


@every_family
@pytest.mark.parametrize("case", test_numbers_selection.CASES, ids=str)
def test_selection_is_the_formula(case: test_numbers_selection.Case, name: str) -> None:
    base, *tuned = FAMILIES[name]
    merged = case.lazy(base, tuned).state_dict()
    test_numbers_selection.nearness(case, "float32", merged, FAMILIES[name]).check()


TABLES = ("word_embeddings.weight", "token_type_embeddings.weight", "wte.weight")
"""What has a row a token: averaged, whatever its shape."""


@every_family
@pytest.mark.parametrize("method", test_numbers_spectral.FORMULAS)
def test_spectral_merges_are_the_formula_on_matrices_and_the_mean_elsewhere(
    method: str, name: str
) -> None:
    base, *tuned = FAMILIES[name]
    merged = getattr(merge, method)(tuned, base=base).state_dict()
    matrices = 0
    for tensor, out in merged.items():
        root = base[tensor].double().numpy()
        deltas = [t[tensor].double().numpy() - root for t in tuned]
        if not_a_matrix(root.shape, {}, vocabulary=tensor.endswith(TABLES)):
            expected = np.mean(deltas, axis=0)
        else:
            expected = test_numbers_spectral.FORMULAS[method](deltas)
            matrices += 1
        off = np.linalg.norm(out.double().numpy() - root - expected)
        # the last rounding is that of the weights, not of the differences; and directions that are
        # nearly one in two models are known to fewer digits once they are made orthogonal
        digits = 1e-5 if method == "iso_cts" else 1e-6
        assert off <= digits * (np.linalg.norm(expected) + np.linalg.norm(root)), tensor
    assert matrices >= 8


def test_every_method_is_here() -> None:
    plain = {c.method for c in PLAIN}
    selected = {c.formula.__name__ for c in test_numbers_selection.CASES}
    spectral = set(test_numbers_spectral.FORMULAS)
    # pcb's cut and methods with statistics have tests of their own
    assert plain | selected | spectral | {"pcb", "fisher", "regmean"} == set(methods.registry())
