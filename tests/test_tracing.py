"""Symmetries derived by tracing: what is found may be done, and nothing larger."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merge.errors import SourceError
from merge.symmetry.action import apply
from merge.symmetry.axes import Axis, Factor
from merge.symmetry.elements import Element, random_element
from merge.symmetry.resolve import resolve
from merge.symmetry.symmetry import Group, Layout, Symmetry
from merge.tracing.derive import Derived, derive
from merge.tracing.generalise import generalised
from merge.tracing.mode import plain_operators
from merge.tracing.rules import registry, rule_of

from .symmetries import distance, randomised
from .zoo import NETWORKS, TOKENS, Experts, ResNet20, rows


@cache
def found(called: str) -> Derived:
    """The derivation for one of the networks, made once."""
    make, inputs = NETWORKS[called]
    torch.manual_seed(0)
    return derive(make(), inputs)


@cache
def trial(called: str) -> tuple[nn.Module, tuple[Any, ...], Tensor]:
    """The network with other weights than it was derived with, its inputs and its outputs."""
    make, inputs = NETWORKS[called]
    net = randomised(make(), seed=7)
    inputs = tuple(i.double() if i.is_floating_point() else i for i in inputs)
    with plain_operators():
        return net, inputs, net(*inputs)


def deviation(called: str, symmetry: Symmetry, element: Element) -> float:
    """How much the outputs change when the element is applied to the weights."""
    net, inputs, expected = trial(called)
    with plain_operators():
        moved = apply(symmetry, net.state_dict(), element)
        return distance(torch.func.functional_call(net, moved, inputs), expected)


def flags(symmetry: Symmetry) -> dict[str, str]:
    return {g.name: g.flags for g in symmetry.groups.values() if g.flags}


# -- the universal test --------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["P", "PSDR", "S", "D"])
@pytest.mark.parametrize("called", NETWORKS)
def test_an_element_of_all_groups_keeps_the_function(called: str, kinds: str) -> None:
    symmetry = found(called).symmetry
    element = random_element(symmetry, 3, kinds)
    assert deviation(called, symmetry, element) < 1e-10
    assert not symmetry.notes
    if kinds == "P" and called != "bottleneck":
        state = trial(called)[0].state_dict()
        moved = apply(symmetry, state, element)
        still = sum(v.numel() for n, v in state.items() if torch.equal(v, moved[n]))
        assert still < 0.05 * sum(v.numel() for v in state.values()), "most weights were moved"


def alone(symmetry: Symmetry, layouts: dict[str, Layout], group: Group) -> Element:
    """A random permutation of one group, nothing else moving."""
    larger = replace(symmetry, groups={**symmetry.groups, group.name: group}, tensors=layouts)
    element = random_element(larger, 5)
    return {group.name: element[group.name]}


def unfrozen(symmetry: Symmetry) -> list[tuple[Symmetry, Element]]:
    """For each fixed axis and each frozen group a permutation of it alone."""
    out = []
    for group in symmetry.groups.values():
        if not group.flags:
            free = replace(group, flags="P")
            larger = replace(symmetry, groups={**symmetry.groups, group.name: free})
            out.append((larger, alone(symmetry, dict(symmetry.tensors), free)))
    for name, layout in symmetry.tensors.items():
        for number, axis in enumerate(layout.axes):
            whole = axis.parts == ((axis.parts[0][0],),) and axis.parts[0][0]
            if isinstance(whole, Factor) and whole.group is None and axis.size > 1:
                axes = list(layout.axes)
                axes[number] = Axis(((Factor("free", axis.size),),))
                layouts = {**symmetry.tensors, name: replace(layout, axes=tuple(axes))}
                free = Group("free", axis.size)
                larger = Symmetry({**symmetry.groups, "free": free}, layouts)
                out.append((larger, alone(symmetry, layouts, free)))
    return out


@pytest.mark.parametrize("called", [n for n in NETWORKS if n != "loop"])
def test_what_is_frozen_may_not_be_permuted(called: str) -> None:
    """Each frozen thing alone: kernels, inputs, outputs, tokens, places of a grid."""
    controls = unfrozen(found(called).symmetry)
    assert controls
    for symmetry, element in controls:
        assert deviation(called, symmetry, element) > 1e-2, (element, symmetry.tensors)


def mixed(symmetry: Symmetry, child: str, parent: str) -> tuple[Symmetry, Element]:
    """A permutation of all pairs of parent and child, where they stand next to each other."""
    size = symmetry.groups[child].size * symmetry.groups[parent].size

    def product(factors: tuple[Factor | Axis, ...]) -> tuple[Factor | Axis, ...]:
        names = [f.group if isinstance(f, Factor) else None for f in factors]
        at = next((k for k in range(len(names) - 1) if names[k : k + 2] == [parent, child]), None)
        if at is None:
            inner = (
                Axis(tuple(map(product, f.parts))) if isinstance(f, Axis) else f for f in factors
            )
            return tuple(inner)
        return (*factors[:at], Factor("mixed", size), *factors[at + 2 :])

    tensors = {
        name: replace(layout, axes=tuple(Axis(tuple(map(product, a.parts))) for a in layout.axes))
        for name, layout in symmetry.tensors.items()
    }
    group = Group("mixed", size)
    larger = Symmetry({**symmetry.groups, "mixed": group}, tensors)
    return larger, alone(symmetry, tensors, group)


@pytest.mark.parametrize(
    ("called", "child", "parent"),
    [("vit chunk", "v0", "h0"), ("encoder", "v1", "h1"), ("convolutions", "c_e", "c_a")],
)
def test_units_may_not_be_mixed_across_what_they_depend_on(
    called: str, child: str, parent: str
) -> None:
    larger, element = mixed(found(called).symmetry, child, parent)
    assert deviation(called, larger, element) > 1e-2


@pytest.mark.parametrize(
    ("called", "group", "kind"),
    [("vit chunk", "f0", "S"), ("vit chunk", "f0", "D"), ("vit chunk", "d", "S"),
     ("resnet20", "c0", "S"), ("lstm", "c_a", "D"), ("mlp", "d_a", "S"), ("mlp", "d_a", "R"),
     ("mamba", "c_c", "R"), ("encoder", "d", "S")],
)  # fmt: skip
def test_moves_without_a_flag_change_the_function(called: str, group: str, kind: str) -> None:
    symmetry = found(called).symmetry
    assert kind not in flags(symmetry)[group]
    larger = replace(symmetry.groups[group], flags=flags(symmetry)[group] + kind)
    symmetry = replace(symmetry, groups={**symmetry.groups, group: larger})
    element = {group: random_element(symmetry, 5, kind)[group]}
    assert deviation(called, symmetry, element) > 1e-2


# -- what is found, against what is known by hand ------------------------------------------------


def test_a_multilayer_perceptron_has_a_group_for_each_hidden_layer() -> None:
    symmetry = found("mlp").symmetry
    assert [(g.size, g.flags) for g in symmetry.groups.values()] == [(8, "PD"), (6, "PD")]
    assert [str(a) for a in symmetry.tensors["2.weight"].axes][1].endswith("*")


def test_a_resnet_has_three_streams_and_nine_interiors() -> None:
    symmetry = found("resnet20").symmetry
    assert sorted(g.size for g in symmetry.groups.values()) == [4] * 4 + [8] * 4 + [16] * 4
    assert set(flags(symmetry).values()) == {"PD"}  # ReLU lets scales pass, and BatchNorm's gain
    stream = symmetry.tensors["conv.weight"].axes[0].parts[0][0]
    assert isinstance(stream, Factor) and stream.form == "|"  # what is normalised has no scale
    shared = symmetry.places(str(stream.group))
    assert {"bn.running_var", "layers.0.bn2.bias", "layers.3.shortcut.0.weight"} <= set(shared)


@pytest.mark.parametrize("layout", ["chunk", "unbind"])
def test_both_layouts_of_queries_keys_and_values_give_the_same_groups(layout: str) -> None:
    symmetry = found(f"vit {layout}").symmetry
    assert {g.name: (g.size, g.flags, g.per) for g in symmetry.groups.values()} == {
        "d": (12, "P", ()),
        **{f"f{i}": (20, "P", ()) for i in (0, 1)},
        **{f"h{i}": (3, "P", ()) for i in (0, 1)},
        **{f"qk{i}": (4, "PSDR", (f"h{i}",)) for i in (0, 1)},
        **{f"v{i}": (4, "PSDR", (f"h{i}",)) for i in (0, 1)},
    }
    qkv = symmetry.tensors["blocks.1.attn.qkv.weight"].axes[0]
    assert str(qkv) == "h1.qk1+h1.qk1*+h1.v1"


def test_flattened_places_are_the_inner_factor() -> None:
    weight = found("vgg").symmetry.tensors["classifier.0.weight"]
    inner = weight.axes[1].parts[0]
    assert isinstance(inner[0], Factor) and inner[0].size == 6
    assert {g.reason for g in found("vgg").symmetry.groups.values() if not g.flags} == {
        "places of a grid"
    }


def test_hidden_units_of_experts_go_by_the_expert() -> None:
    symmetry = found("experts").symmetry
    experts = symmetry.tensors["router.weight"].axes[0].parts[0][0]
    units = symmetry.tensors["up"].axes[1].parts[0][0]
    assert isinstance(experts, Factor) and isinstance(units, Factor)
    assert symmetry.groups[str(units.group)].per == (experts.group,)


def test_gates_of_recurrent_layers_are_parts_of_a_sum() -> None:
    symmetry = found("lstm").symmetry
    rows_of = symmetry.tensors["rnn.weight_hh_l1"].axes[0]
    names = {f.group for product in rows_of.parts for f in product if isinstance(f, Factor)}
    assert len(rows_of.parts) == 4 and len(names) == 1
    both = symmetry.tensors["rnn.weight_ih_l1"].axes[1]
    assert len(both.parts) == 2  # the two directions, one after the other
    assert len(symmetry.groups) == 4


def test_a_linear_bottleneck_takes_any_invertible_matrix() -> None:
    symmetry = found("bottleneck").symmetry
    assert flags(symmetry) == {"c": "PSDR"}
    assert [str(a) for a in symmetry.tensors["up.weight"].axes] == ["_6input", "c*"]


class Tied(nn.Module):
    """Embeddings that are also the output map, with a map between them or beside the stream."""

    def __init__(self, stream: bool) -> None:
        super().__init__()
        self.embed, self.map = nn.Embedding(9, 5), nn.Linear(5, 5)
        self.stream = stream

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return (self.map(x) + x if self.stream else self.map(x)) @ self.embed.weight.T


@pytest.mark.parametrize(("stream", "moves"), [(True, "PSR"), (False, "PSDR")])
def test_a_tied_stream_can_be_rotated_and_not_stretched(stream: bool, moves: str) -> None:
    """With a map between, what stretches the embeddings can be taken back in the map."""
    symmetry = derive(Tied(stream), [TOKENS]).symmetry
    assert flags(symmetry) == {symmetry.tensors["embed.weight"].groups()[0]: moves}


class Unknown(nn.Module):
    """An operator that there is no rule for, between two maps; and two maps without it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 4)
        self.three, self.four = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.fft.fft(self.one(x)).real)
        return self.four(torch.tanh(self.three(x)))


def test_an_unknown_operator_freezes_what_it_touches_and_is_named() -> None:
    symmetry = derive(Unknown(), [rows(5, 3)]).symmetry
    assert len(flags(symmetry)) == 2  # before and after tanh
    assert str(symmetry.tensors["one.weight"].axes[0]) == "_8operator"
    assert "has no rule" in symmetry.reasons["operator"]
    assert any("fft" in note for note in symmetry.notes)


class Masked(nn.Module):
    """Heads under one mask that was expanded to all of them, in two layers; rows put in by a mask.

    What is looked up by a mask, and only asked for its shape, freezes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 2)
        self.maps = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        where = (tokens > 4)[..., None]
        assert x[where.expand_as(x)].numel() % 6 == 0
        x = x.masked_scatter(where, 2 * self.embed.weight[:7] - 1)
        mask = torch.zeros(1, 3, 1) + torch.arange(2.0)
        for linear in self.maps:
            scores = torch.tanh(linear(x)).unflatten(-1, (3, 2)) + mask
            x = x + scores.flatten(-2)
        return self.out(x)


def test_values_that_are_the_same_for_all_heads_tie_no_layers() -> None:
    symmetry = derive(Masked(), [TOKENS]).symmetry
    assert not symmetry.notes
    kept = [g for g in symmetry.groups.values() if g.flags]
    assert kept, "the stream is of heads whose places are frozen by the mask"


class Wrong(nn.Module):
    """Units whose order counts, in a way that tracing does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = torch.relu(self.two(x * float(1 + self.one.weight.detach().numpy()[0, 0])))
        return self.three(x)


def test_what_the_check_refuses_is_frozen_and_said() -> None:
    symmetry = derive(Wrong(), [rows(5, 3)]).symmetry
    assert len(symmetry.notes) == 1 and "the check failed" in symmetry.notes[0]
    kept = [g.size for g in symmetry.groups.values() if g.flags]
    assert kept == [5]


class Blind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


def test_a_network_that_cannot_be_checked_is_refused() -> None:
    with pytest.raises(SourceError, match="nothing that a symmetry could be checked by"):
        derive(nn.Sequential(nn.Linear(3, 4), Blind()), [rows(5, 3)])


def test_free_outputs_are_marked() -> None:
    symmetry = derive(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)), [rows(5, 3)],
                      free_outputs=True).symmetry  # fmt: skip
    assert {g.size: g.output for g in symmetry.groups.values()} == {8: False, 4: True}


def test_the_module_is_left_alone() -> None:
    net = ResNet20()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    derive(net, NETWORKS["resnet20"][1])
    assert net.training and all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert next(net.parameters()).dtype == torch.float32


def test_a_derivation_is_the_same_each_time() -> None:
    one, other = (derive(Experts(), [TOKENS]).symmetry for _ in range(2))
    assert one == other


# -- from one network to a spec ------------------------------------------------------------------


@pytest.mark.parametrize("called", NETWORKS)
def test_a_spec_fitted_to_its_own_network_is_the_symmetry(called: str) -> None:
    derived = found(called)
    spec = generalised(derived.symmetry, derived.names)
    again = resolve(spec, {n: layout.shape for n, layout in derived.symmetry.tensors.items()})
    assert again.groups == derived.symmetry.groups
    for name, layout in derived.symmetry.tensors.items():
        assert list(map(str, again.tensors[name].axes)) == list(map(str, layout.axes))


def test_layers_of_a_stack_share_patterns() -> None:
    derived = found("vit chunk")
    patterns = list(generalised(derived.symmetry, derived.names).tensors)
    assert "blocks.{i}.attn.qkv.weight" in patterns
    assert len([p for p in patterns if "mlp" in p]) == 4  # two maps with biases, in two layers


def test_every_rule_is_of_an_operator_that_torch_has() -> None:
    names = registry.operators()
    assert len(names) > 250
    assert [n for n in names if not hasattr(torch.ops.aten, n)] == []
    assert rule_of("no_such_operator") is None


def test_elements_are_integers_that_index() -> None:
    element = random_element(found("experts").symmetry)
    assert all(isinstance(m, np.ndarray) and m.dtype.kind == "i" for m in element.values())
