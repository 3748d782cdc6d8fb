"""Rotations in heads, of rotary planes and of the residual stream: planted ones are undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import merge
from merge.alignment.continuous import rotate, with_phases
from merge.alignment.stream import gains_of
from merge.alignment.weight import match_weights
from merge.errors import MergeError, PlanError
from merge.symmetry.action import apply
from merge.symmetry.elements import random_element
from merge.symmetry.symmetry import Symmetry

from .networks import (
    VIT,
    Recorder,
    one_thread,  # noqa: F401  (a fixture)
    planted,
    symmetry_of,
)
from .symmetries import LLAMA, randomised

State = dict[str, Tensor]
CONFIG = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "head_dim": 8, "attention_bias": True,
}  # fmt: skip
BIASED = {
    **LLAMA,
    "tensors": {
        **LLAMA["tensors"],
        "[model.]layers.{i}.self_attn.q_proj.bias": ["kv{i}.slot{i}._rotary"],
        "[model.]layers.{i}.self_attn.k_proj.bias": ["kv{i}._rotary"],
        "[model.]layers.{i}.self_attn.v_proj.bias": ["kv{i}.v{i}"],
        "[model.]layers.{i}.self_attn.o_proj.bias": ["d"],
    },
}


class Model:
    """A network in float64, its tensors, its symmetry, and what it answers with other tensors."""

    def __init__(
        self, module: nn.Module, spec: Mapping[str, Any], config: Any, inputs: Any
    ) -> None:
        self.module = randomised(module)
        self.state = {n: t.detach().clone() for n, t in self.module.state_dict().items()}
        self.symmetry = symmetry_of(spec, self.state, config)
        self.inputs = inputs

    def answer(self, state: State) -> Tensor:
        with torch.no_grad():
            return torch.func.functional_call(self.module, state, (), self.inputs).logits


def llama() -> Model:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, attn_implementation="eager")
    tokens = torch.randint(0, 60, (2, 9))
    module = transformers.LlamaForCausalLM(config)
    return Model(module, BIASED, CONFIG, {"input_ids": tokens})


def vit() -> Model:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        image_size=16, patch_size=4, num_labels=5, attn_implementation="eager",
    )  # fmt: skip
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16).double()}
    module = transformers.ViTForImageClassification(config)
    return Model(module, VIT, config.to_dict(), inputs)


def distance(a: State, b: State) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def rotated(model: Model, b: State, kinds: Sequence[str]) -> State:
    """The tensors of ``b`` brought to the model's own, by orders and by rotations."""
    readers = Recorder(model.state), Recorder(b)
    match = match_weights(model.symmetry, *readers)
    symmetry, found = rotate(model.symmetry, *readers, match, kinds)
    assert "rotated" in found.report.notes[-1]
    return apply(symmetry, b, found.element)


def turned(symmetry: Symmetry, seed: int = 0) -> tuple[Symmetry, dict[str, Any]]:
    """A random phase for each plane of each key/value head."""
    wider, planes = with_phases(symmetry)
    draw = np.random.default_rng(seed)
    element = {}
    for name in sorted(planes):
        size = wider.groups[name].size
        heads = wider.groups[wider.groups[name].per[0]].size
        matrix = np.zeros((heads, size, size))
        for head in range(heads):
            for j, angle in enumerate(draw.uniform(0, 2 * np.pi, size // 2)):
                k = j + size // 2
                matrix[head, [j, k], [j, k]] = np.cos(angle)
                matrix[head, k, j], matrix[head, j, k] = np.sin(angle), -np.sin(angle)
        element[name] = matrix
    return wider, element


# -- in heads --------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [llama, vit])
@pytest.mark.parametrize("kinds", ["R", "PSDR"], ids=["orthogonal", "invertible"])
def test_mixtures_within_heads_are_undone_with_their_orders(
    make: Callable[[], Model], kinds: str
) -> None:
    model = make()
    moved, _ = planted(model.symmetry, model.state)
    b = apply(model.symmetry, moved, random_element(model.symmetry, 2, kinds))
    assert (model.answer(b) - model.answer(model.state)).abs().max() < 1e-4
    assert distance(rotated(model, b, ["values"]), model.state) < 1e-10


def test_permutations_alone_do_not_undo_a_rotation() -> None:
    model = vit()
    b = apply(model.symmetry, model.state, random_element(model.symmetry, 2, "R"))
    match = match_weights(model.symmetry, Recorder(model.state), Recorder(b))
    assert distance(apply(model.symmetry, b, match.element), model.state) > 0.1


def test_a_rotation_changes_no_answer_whatever_it_is_aligned_with() -> None:
    model = vit()
    torch.manual_seed(1)
    other = {n: torch.randn_like(t) for n, t in model.state.items()}
    readers = Recorder(other), Recorder(model.state)
    match = match_weights(model.symmetry, *readers)
    symmetry, found = rotate(model.symmetry, *readers, match, ["values"])
    moved = apply(symmetry, model.state, found.element)
    assert distance(moved, model.state) > 0.1
    difference = model.answer(moved) - model.answer(model.state)
    assert difference.abs().max() < 1e-9 * model.answer(model.state).abs().max()


# -- rotary planes ---------------------------------------------------------------------------------
def test_phases_are_a_symmetry_and_other_mixtures_are_not() -> None:
    model = llama()
    wider, element = turned(model.symmetry)
    wanted = model.answer(model.state)
    scale = wanted.abs().max()
    moved = model.answer(apply(wider, model.state, element))
    assert (moved - wanted).abs().max() < 1e-5 * scale
    mixed = {n: np.roll(m, 1, axis=-1) for n, m in element.items()}
    wrong = model.answer(apply(wider, model.state, mixed))
    assert (wrong - wanted).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("kinds", [["phases"], ["values", "phases"]])
def test_phases_are_undone(kinds: list[str]) -> None:
    model = llama()
    wider, element = turned(model.symmetry)
    b, _ = planted(model.symmetry, apply(wider, model.state, element))
    if "values" in kinds:
        b = apply(model.symmetry, b, random_element(model.symmetry, 2, "R"))
    assert distance(rotated(model, b, kinds), model.state) < 1e-10


def test_the_shipped_symmetry_of_llama_has_phases_and_a_stream() -> None:
    model = llama()
    checkpoint = merge.open(model.module)
    shipped = merge.symmetry_of(checkpoint, outputs="free")
    wider, element = turned(shipped)
    assert set(element) == {"phase_kv0", "phase_kv1"}
    b = apply(wider, with_rotated_stream(model), element)
    module = llama().module
    module.load_state_dict(b)
    found = merge.align(module, to=model.module, rotate=["phases", "stream"]).state_dict()
    assert distance(found, model.state) < 1e-3


def test_layers_that_normalise_queries_have_no_phases() -> None:
    model = llama()
    tensors = {**model.state, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}
    spec = {**BIASED, "tensors": {**BIASED["tensors"],
                                  "[model.]layers.{i}.self_attn.q_norm.weight": ["_"]}}  # fmt: skip
    _, planes = with_phases(symmetry_of(spec, tensors, CONFIG))
    assert planes == {"phase_kv1"}


def test_what_the_symmetry_does_not_allow_is_refused() -> None:
    model = vit()
    readers = Recorder(model.state), Recorder(model.state)
    match = match_weights(model.symmetry, *readers)
    with pytest.raises(PlanError, match="allows none"):
        rotate(model.symmetry, *readers, match, ["phases"])


# -- the stream ------------------------------------------------------------------------------------
def with_rotated_stream(model: Model, seed: int = 0) -> State:
    """The same function with the stream rotated, and with other gains."""
    gains = gains_of(model.symmetry)
    draw = np.random.default_rng(seed)
    rotation = torch.tensor(np.linalg.qr(draw.normal(size=(24, 24)))[0])
    norms = {n: torch.tensor(draw.uniform(0.5, 2, 24)) for n in set(gains.values())}
    out = {}
    for name, value in model.state.items():
        if name in norms:
            out[name] = norms[name]
        elif name in gains:
            folded = value * model.state[gains[name]]
            out[name] = folded @ rotation.T / norms[gains[name]]
        elif name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias")):
            out[name] = rotation @ value
        elif "embed_tokens" in name:
            out[name] = value @ rotation.T
        else:
            out[name] = value
    return out


@pytest.mark.parametrize("also", [(), ("values", "phases")])
def test_a_rotated_stream_is_brought_back_with_its_gains(also: tuple[str, ...]) -> None:
    model = llama()
    b = with_rotated_stream(model)
    wanted = model.answer(model.state)
    assert (model.answer(b) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    b, _ = planted(model.symmetry, b)
    if also:
        b = apply(model.symmetry, b, random_element(model.symmetry, 2, "R"))
    aligned = merge.align(b, to=model.state, symmetry=model.symmetry, rotate=("stream", *also))
    assert distance(aligned.state_dict(), model.state) < (1e-3 if also else 1e-9)  # in turns
    report = merge.alignment_report(aligned)
    assert "gains are folded" in " ".join(report.notes)


def test_a_network_aligned_with_another_by_its_stream_does_what_it_did() -> None:
    model = llama()
    torch.manual_seed(1)
    other = {n: t + 0.3 * torch.randn_like(t) for n, t in model.state.items()}
    aligned = merge.align(
        model.state, to=other, symmetry=model.symmetry, rotate=("values", "phases", "stream")
    )
    found = aligned.state_dict()
    assert torch.equal(found["model.norm.weight"], other["model.norm.weight"])
    wanted = model.answer(model.state)
    assert (model.answer(found) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_rotations_bring_networks_nearer_than_orders() -> None:
    model = llama()
    torch.manual_seed(1)
    b = {n: t + 0.02 * torch.randn_like(t) for n, t in with_rotated_stream(model).items()}
    plain, rotated = (
        merge.align(b, to=model.state, symmetry=model.symmetry, rotate=kinds).state_dict()
        for kinds in ((), ("stream",))
    )
    far, near = (
        sum(float((moved[n] - t).square().sum()) for n, t in model.state.items())
        for moved in (plain, rotated)
    )
    assert near < far / 20


def error_of(call: Callable[[], object]) -> MergeError:
    with pytest.raises(MergeError) as caught:
        call()
    return caught.value


def test_streams_that_cannot_be_rotated_are_refused() -> None:
    tied = llama().module
    tied.lm_head.weight = tied.model.embed_tokens.weight
    for source, symmetry in ((tied, llama().symmetry), (vit().state, vit().symmetry)):
        error = error_of(
            lambda s=source, y=symmetry: merge.align(s, to=s, symmetry=y, rotate=["stream"])
        )
        assert "cannot be rotated" in error.what and "leave 'stream' out" in str(error.do)


def test_a_misspelt_rotation_is_told_its_nearest() -> None:
    model = vit()
    error = error_of(
        lambda: merge.align(model.state, to=model.state, symmetry=model.symmetry, rotate=["value"])
    )
    assert "values" in str(error.do)
