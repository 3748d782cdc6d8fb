"""Alignment by the shipped symmetries: a planted element of every family is found from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merge
from merge.alignment.moved import moved
from merge.symmetry.elements import random_element
from merge.tracing.shipped import FAMILIES
from merge.tracing.twins import make_twin, model_class

from .networks import one_thread  # noqa: F401  (a fixture)
from .symmetries import randomised
from .test_symmetry_templates import config_of


@pytest.mark.parametrize("model", FAMILIES)
def test_a_planted_element_of_a_family_is_found_to_the_bit(model: str, tmp_path: Path) -> None:
    """No symmetry is given: it is the model type's."""
    family = FAMILIES[model]
    name = (*family.heads, *family.bodies)[0]
    module = make_twin(model_class(name), config_of(model, name)).module
    randomised(module).float().save_pretrained(tmp_path / "a")
    a = merge.open(tmp_path / "a")
    symmetry = merge.symmetry_of(a, outputs="free")
    moved(a, symmetry, random_element(symmetry, 1)).save(tmp_path / "b")
    aligned = merge.align(tmp_path / "b", to=tmp_path / "a")
    assert merge.alignment_report(aligned).moved > 0.3
    wanted = load_file(tmp_path / "a" / "model.safetensors")
    found = aligned.state_dict()
    assert [n for n in wanted if not torch.equal(found[n], wanted[n])] == []
