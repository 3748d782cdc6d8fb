"""The rooms of learning one by one: data, layouts, links, names in modules, files of numbers."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import merge
from merge.learning.batches import Batches, joined
from merge.learning.latents import SCALE, Latents
from merge.learning.layout import Link, layout_of
from merge.learning.objectives import Distill, Entropy, PseudoLabels, View
from merge.learning.parts import Dense, quantised
from merge.learning.places import places_of

# -- data ------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    rows=st.integers(1, 7),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_all_rows_come_once_before_any_comes_again(sizes: list[int], rows: int, seed: int) -> None:
    total = sum(sizes)
    numbers = list(torch.arange(total).split(sizes))
    data = Batches.read("t", numbers, 1 << 20)
    each = min(rows, total)
    seen: list[int] = []
    for step in range(total):
        drawn = data.drawn(seed, step, rows)
        assert drawn == data.drawn(seed, step, rows)
        inputs, target, answers = data.take(drawn, lambda i: numbers[i] * 10)
        assert target is None
        assert len(inputs) == each
        assert torch.equal(answers, inputs * 10)
        seen += inputs.tolist()
        counts = torch.bincount(torch.tensor(seen), minlength=total)
        assert int(counts.max()) - int(counts.min()) <= 1
    assert set(counts.tolist()) == {each}


def test_texts_of_different_lengths_are_padded_behind_a_mask() -> None:
    short = {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 2).long()}
    long = {"input_ids": torch.ones(2, 4).long() * 5, "attention_mask": torch.ones(2, 4).long()}
    both = joined([short, long])
    assert both["input_ids"].tolist()[0] == [1, 1, 0, 0]
    assert both["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_an_iterator_is_kept_but_not_without_bound() -> None:
    kept = Batches.read("t", (torch.zeros(10) for _ in range(3)), 1000)
    assert kept.sizes == (10, 10, 10)
    assert len(kept.batch(2)[0]) == 10
    with pytest.raises(merge.PlanError, match="more than is kept") as caught:
        Batches.read("t", (torch.zeros(100) for _ in range(30)), 1000)
    assert caught.value.where["task"] == "t"


def test_rows_of_other_shapes_are_refused_with_the_way_out() -> None:
    data = Batches.read("t", [torch.zeros(2, 3), torch.zeros(2, 4)], 1000)
    with pytest.raises(merge.PlanError, match="do not fit into one") as caught:
        data.take(data.drawn(0, 0, 4))
    assert "batch: null" in (caught.value.do or "")


# -- blocks and links ------------------------------------------------------------------------------
SHAPES = {f"h.{i}.{k}": s for i in range(5) for k, s in (("w", (4, 3)), ("b", (4,)))}


def of_layer(name: str) -> str:
    return name.rpartition(".")[0]


def test_layers_between_knots_mix_the_two_nearest() -> None:
    layout = layout_of(["a"], SHAPES, "layer", Link(), layer_of=of_layer, knots=3)
    assert set(layout.widths) == {"knot 0", "knot 1", "knot 2"}
    assert layout.members["h.1.w"] == (("knot 0", 0.5), ("knot 1", 0.5))
    latents = Latents(layout, 0.0)
    with torch.no_grad():
        for value, row in enumerate(latents.rows.values()):
            row.fill_(float(value))
    found = [float(latents.coefficients_of(f"h.{i}.b").detach()) for i in range(5)]
    assert found == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert len(layout.units()) == 1


def test_units_are_tensors_that_share_numbers() -> None:
    layers = layout_of(["a"], SHAPES, "layer", Link(), layer_of=of_layer)
    assert [u.tensors for u in layers.units()] == [(f"h.{i}.w", f"h.{i}.b") for i in range(5)]
    tensors = layout_of(["a"], SHAPES, "tensor", Link())
    assert [u.tensors for u in tensors.units()] == [(n,) for n in SHAPES]
    soft = layout_of(["a", "b"], SHAPES, "tensor", Link("softmax"))
    assert len(soft.units()) == 1


def test_groups_take_their_names_from_patterns() -> None:
    groups = [(r"h\.(\d+)\.w", "weights {1}"), (r"\.b$", "biases")]
    layout = layout_of(["a"], SHAPES, "group", Link(), groups=groups)
    assert layout.blocks["h.3.w"] == "weights 3"
    assert layout.blocks["h.3.b"] == layout.blocks["h.0.b"] == "biases"


@pytest.mark.parametrize("kind", ["identity", "clamp", "sigmoid", "softmax", "abs"])
def test_links_begin_where_they_are_told(kind: str) -> None:
    layout = layout_of(["a", "b"], SHAPES, "tensor", Link(kind, 0.0, 1.0))
    start = {"a": 0.3, "b": 0.6}
    latents = Latents(layout, start)
    for name in SHAPES:
        found = latents.coefficients_of(name).detach().reshape(-1).tolist()
        assert found == pytest.approx([0.3, 0.6], abs=1e-6)
    assert (SCALE in latents.rows) == (kind == "softmax")
    known = latents.coefficients({})
    again = Latents(layout, known)
    for name in SHAPES:
        torch.testing.assert_close(again.coefficients_of(name), latents.coefficients_of(name))


# -- parts -----------------------------------------------------------------------------------------
@given(st.integers(1, 1000), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_bytes_are_within_half_a_step(count: int, seed: int) -> None:
    value = torch.randn(count, generator=torch.Generator().manual_seed(seed)) ** 3
    value[: count // 3] = 0.0
    found = quantised(Dense(value, "w")).dense().value
    for at in range(0, count, 256):
        step = float(value[at : at + 256].abs().max()) / 127
        error = (found - value)[at : at + 256].abs().max()
        assert float(error) <= step * 0.5001 + 1e-12


# -- objectives ------------------------------------------------------------------------------------
def view(logits: torch.Tensor, expert: object = None) -> View:
    return View(None, "t", None, None, logits, expert, lambda x: x, lambda out: out)


def test_objectives_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double()
    p = logits.softmax(1)
    entropy = float(-(p * p.log()).sum(1).mean())
    assert float(Entropy().loss(view(logits))) == pytest.approx(entropy)
    whole = float(Entropy(normalise=True).loss(view(logits)))
    assert whole == pytest.approx(entropy / torch.log(torch.tensor(2.0)).item())
    mean = p.mean(0)
    spread = float(Entropy(diversity=1.0).loss(view(logits)))
    assert spread == pytest.approx(entropy + float((mean * mean.log()).sum()))
    expert = torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double()
    q = expert.softmax(1)
    kl = float((q * (q.log() - p.log())).sum(1).mean())
    assert float(Distill().loss(view(logits, expert))) == pytest.approx(kl)
    assert float(Distill().loss(view(logits, logits))) == pytest.approx(0.0, abs=1e-12)
    top = float(Distill("mse", top=1).loss(view(logits, expert)))
    assert top == pytest.approx(((2 - 1) ** 2 + (0 - 3) ** 2) / 2)


def test_the_gate_drops_rows_on_which_the_expert_is_less_sure() -> None:
    """Row 0: they agree. Row 1: they differ, the expert is surer. Row 2: they differ, it is not."""
    ours = torch.tensor([[3.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    sure = torch.tensor([0.6, 0.9, 0.6])
    expert = {"label": torch.tensor([0, 1, 1]), "sure": sure}
    each = torch.nn.functional.cross_entropy(ours, expert["label"], reduction="none")
    found = PseudoLabels().loss(view(ours, expert))
    torch.testing.assert_close(found, each[:2].mean())
    torch.testing.assert_close(PseudoLabels("none").loss(view(ours, expert)), each.mean())


# -- names in modules ------------------------------------------------------------------------------
def test_tensors_are_found_in_modules_under_other_names() -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    shapes = {n: tuple(t.shape) for n, t in body.state_dict().items()}
    whole = nn.ModuleDict({"model": nn.ModuleDict({"body": body}), "head": nn.Linear(4, 2)})
    found = places_of("t", shapes, whole, None, {}, ())
    assert found["1.bias"] == ("model.body.1.bias",)
    longer = {f"encoder.{n}": s for n, s in shapes.items()}
    assert places_of("t", longer, body, None, {}, ())["encoder.0.weight"] == ("0.weight",)
    assert places_of("t", shapes, whole, "model.body.", {}, ()) == found
    assert places_of("t", shapes, whole, lambda n: f"model.body.{n}", {}, ()) == found
    part = places_of("t", shapes, whole, None, {}, ("model.body.1",))
    assert set(part) == {"0.weight", "0.bias"}
    with pytest.raises(merge.PlanError, match="none of the merged tensors"):
        places_of("t", shapes, whole, "model.tail.", {}, ())
    with pytest.raises(merge.PlanError, match="another shape") as caught:
        places_of("t", {"0.weight": (3, 4)}, body, None, {}, ())
    assert caught.value.where == {"task": "t", "tensor": "0.weight"}


# -- files of coefficients -------------------------------------------------------------------------
def test_damaged_files_of_coefficients_are_refused() -> None:
    text = merge.Coefficients.uniform(["a", "b"], ["w", "v"], [0.1, 1 / 3]).to_json()
    found = merge.Coefficients.from_json(text)
    assert found.block_of("v").values == ((0.1,), (1 / 3,))
    assert found.table() == {"all": {"a": 0.1, "b": 1 / 3}}
    document = json.loads(text)

    def changed(**more: object) -> str:
        return json.dumps({**document, **more})

    block = document["blocks"]["all"]
    for bad, match in (
        ("[1]", "no file of coefficients"),
        ("{", "no JSON"),
        (changed(version=2), "another version"),
        (changed(operands=["a", "c"]), "incomplete or damaged"),
        (changed(blocks={"x": block, "y": block}), "in two blocks"),
        (changed(blocks={"x": {**block, "kind": "odd"}}), "unknown kind"),
        (changed(blocks={"x": {**block, "values": {"a": 1, "b": [1, 2]}}}), "different lengths"),
        (changed(blocks={"x": {**block, "values": {"a": 1, "b": float("nan")}}}), "not finite"),
    ):
        with pytest.raises(merge.SourceError) as caught:
            merge.Coefficients.from_json(bad)
        assert match in str(caught.value), bad
