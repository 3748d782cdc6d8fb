"""Learning coefficients: gradients against autograd, trajectories, what is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import merge
from merge.learning.coefficients import BASE, Coefficients
from merge.learning.latents import Latents
from merge.learning.layout import Link, layout_of
from merge.learning.network import Network
from merge.learning.parts import Dense, Factored, part_ids
from merge.learning.prepare import preparation
from merge.learning.store import InMemory, Store
from merge.learning.threshold import thresholds

LAYERS = ("0", "2")


class Net(nn.Module):
    def __init__(self, classes: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 12, dtype=dtype), nn.Tanh(), nn.Linear(12, 8, dtype=dtype), nn.Tanh()
        )
        self.head = nn.Linear(8, classes, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def models(
    count: int = 3, dtype: torch.dtype = torch.float64, scale: float = 0.3
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(7)
    base = {n: t.detach().clone() for n, t in Net(dtype=dtype).body.state_dict().items()}
    experts = [
        {n: t + scale * torch.randn_like(t) * t.std() for n, t in base.items()}
        for _ in range(count)
    ]
    return base, experts


FAMILIES: list[dict[str, Any]] = [
    {"granularity": "scalar"},
    {"granularity": "task"},
    {"granularity": "group", "groups": [("weight$", "weights"), ("bias$", "biases")]},
    {"granularity": "layer"},
    {"granularity": "layer", "knots": 2},
    {"granularity": "tensor"},
    {"granularity": "tensor", "link": Link("sigmoid", -0.5, 1.5)},
    {"granularity": "tensor", "link": Link("softmax")},
    {"granularity": "layer", "link": Link("abs")},
    {"granularity": "row"},
    {"granularity": "partition:4"},
    {"granularity": "tensor", "base": True},
    {"granularity": "singular", "prepare": "tsv"},
    {"granularity": "singular+row", "prepare": "tsv"},
    {"granularity": "singular+row", "prepare": "cart:0.4"},
    {"granularity": "tensor", "prepare": "tsv"},
    {"granularity": "row", "prepare": "tsv"},
    {"granularity": "singular", "prepare": "cart:0.4"},
    {"granularity": "tensor", "prepare": "ties:0.5"},
    {"granularity": "row", "prepare": "dare:0.5"},
    {"granularity": "singular", "prepare": "svd"},
    {"granularity": "partition:3", "prepare": "svd:0.5"},
]


def settled(
    family: Mapping[str, Any], dtype: torch.dtype, memory: str = "resident"
) -> tuple[Store, Latents, Network]:
    """Everything of one parametrisation, built at uneven coefficients."""
    base, experts = models(dtype=dtype)
    prepare = preparation(family.get("prepare", "none"), seed=3)
    own = family.get("base", False)
    store = Store(InMemory(base, experts), prepare, memory, learns_base=own)
    shapes = {n: tuple(t.shape) for n, t in base.items()}
    directions = {
        n: d for n, s in shapes.items() if (d := prepare.directions(s, 3, None)) is not None
    }
    names = ["a", "b", "c"]
    layout = layout_of(
        names,
        shapes,
        family["granularity"],
        family.get("link", Link()),
        layer_of=lambda n: n.partition(".")[0],
        groups=family.get("groups", ()),
        directions=directions,
        knots=family.get("knots"),
        base=own,
    )
    latents = Latents(layout, {"a": 0.3, "b": 0.2, "c": 0.5})
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for row in latents.rows.values():
            row += 0.1 * torch.rand(row.shape, generator=draw, dtype=row.dtype)
    network = Network(store, layout.tensors)
    network.build(network.wanted(latents, {}), layout.kinds)
    return store, latents, network


def expanded(store: Store, latents: Latents, name: str, dtype: torch.dtype) -> Tensor:
    """The merged tensor as an expression that autograd sees through: the independent truth."""
    coefficients = latents.coefficients_of(name)
    kind = latents.layout.kinds[name]
    out = store.origin(name)
    for row, part in zip(coefficients, store.parts(name), strict=True):
        row = row.to(dtype)
        if isinstance(part, Factored):
            if kind == "partition":
                dense = part.left @ torch.diag(part.s) @ part.right.T
                ids = torch.cat([i for _, i in part_ids(name, 3, dense, len(row))])
                dense = row[ids].view_as(dense) * dense
            elif kind == "singular":
                dense = part.left @ torch.diag(part.s * row[: len(part.s)]) @ part.right.T
            elif kind == "singular+row":
                each = row[None, : len(part.s)] + row[-len(part.left) :, None] / 5
                dense = (part.left * each) @ torch.diag(part.s) @ part.right.T
            else:
                dense = part.left @ torch.diag(part.s) @ part.right.T
                dense = dense * (row[:, None] if kind == "row" else row)
            out = out + dense.reshape(out.shape)
            continue
        assert isinstance(part, Dense)
        if kind == "partition":
            ids = torch.cat([i for _, i in part_ids(name, 3, part.value, len(row))])
            out = out + row[ids].view_as(part.value) * part.value
        elif kind == "row":
            out = out + row.reshape(-1, *[1] * (out.dim() - 1)) * part.value
        else:
            out = out + row * part.value
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: "-".join(str(v) for v in f.values()))
def test_gradients_are_those_of_autograd(family: dict[str, Any], dtype: torch.dtype) -> None:
    """The same as differentiating through the merge: 1e-5 in float32, 1e-10 in float64."""
    store, latents, network = settled(family, dtype)
    body = Net(dtype=dtype).body
    x = torch.randn(16, 6, dtype=dtype, generator=torch.Generator().manual_seed(2))
    y = torch.randint(0, 8, (16,), generator=torch.Generator().manual_seed(2))

    def loss_of(state: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(body, dict(state), (x,)), y)

    whole = {n: expanded(store, latents, n, dtype) for n in network.tensors}
    for name, value in whole.items():
        torch.testing.assert_close(network.theta[name].detach(), value.detach())
    truth = torch.autograd.grad(loss_of(whole), list(latents.rows.values()), allow_unused=True)

    loss_of(network.theta).backward()  # type: ignore[no-untyped-call]
    found = {}
    for name in network.tensors:
        gradient = network.theta[name].grad
        assert gradient is not None
        kind, width = latents.layout.kinds[name], latents.layout.width(name)
        found[name] = torch.stack(
            [part.pull_back(gradient, kind, width) for part in store.parts(name)]
        )
    latents.pull_back(found)
    limit = 1e-5 if dtype == torch.float32 else 1e-10
    for row, wanted in zip(latents.rows.values(), truth, strict=True):
        assert wanted is not None
        assert row.grad is not None
        assert float((row.grad - wanted).norm()) <= limit * float(wanted.norm())


def test_a_partition_is_a_hash_of_indices() -> None:
    """The same parts from any run of the tensor; nothing is stored; every part has its share."""
    whole = torch.cat([i for _, i in part_ids("w", 5, torch.zeros(3_000_000), 8)])
    again = torch.cat([i for _, i in part_ids("w", 5, torch.zeros(3_000_000), 8)])
    assert torch.equal(whole, again)
    assert not torch.equal(whole[:1000], next(i for _, i in part_ids("w", 6, torch.zeros(1000), 8)))
    counts = torch.bincount(whole, minlength=8) / len(whole)
    assert float((counts - 1 / 8).abs().max()) < 1e-3


def test_a_clamped_coefficient_can_come_back() -> None:
    """Pushed out of its box by momentum it stays at the edge, and moves as soon as it is pulled."""
    layout = layout_of(["a"], {"w": (2,)}, "tensor", Link("clamp", 0.0, 1.0))
    latents = Latents(layout, 0.05)
    (row,) = latents.rows.values()
    adam = torch.optim.Adam([row], lr=0.1)
    for sign in (1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0):
        row.grad = torch.full_like(row, sign)
        adam.step()
        latents.project()
        assert 0.0 <= float(row.detach()) <= 1.0
    assert float(row.detach()) > 0.0


def test_tsv_parts_add_up_to_its_merge() -> None:
    base, experts = models(dtype=torch.float64)
    store = Store(InMemory(base, experts), preparation("tsv:0.15"))
    name = "2.weight"
    total = torch.zeros_like(base[name])
    for part in store.parts(name):
        part.add_to(total, torch.ones(1, dtype=torch.float64), "whole")
    truth = merge.tsv(experts, base=base, lambda_=1.0).state_dict()[name] - base[name]
    torch.testing.assert_close(total, truth)


def test_ties_parts_add_up_to_its_sum() -> None:
    """Exactly k entries of each tensor, election, no averaging: what `merge.ties` sums up."""
    base, experts = models(dtype=torch.float64)
    store = Store(InMemory(base, experts), preparation("ties:0.3"))
    whole = merge.ties(experts, base=base, weight=1.0, density=0.3, normalize=False).state_dict()
    for name, value in base.items():
        parts = [p.value for p in store.parts(name) if isinstance(p, Dense)]
        assert len(parts) == len(experts)
        torch.testing.assert_close(sum(parts), whole[name] - value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.2, 0.77, 1.0])
def test_a_global_threshold_is_the_order_statistic_of_all_entries(
    dtype: torch.dtype, density: float
) -> None:
    base, experts = models(dtype=dtype)
    found = thresholds(InMemory(base, experts), list(base), density)
    for expert, threshold in zip(experts, found, strict=True):
        every = torch.cat([(expert[n] - base[n]).abs().reshape(-1) for n in base])
        kept = max(1, int(density * len(every))) if density else 0
        assert int((every >= threshold).sum()) == kept


# -- learning ----------------------------------------------------------------------------------
def tasks_of(
    experts: list[dict[str, Tensor]], dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, merge.Task]:
    """A task for each expert: inputs of its own kind, a head of its own, labels that it gives."""
    out = {}
    for i, expert in enumerate(experts):
        torch.manual_seed(100 + i)
        net = Net(dtype=dtype)
        x = torch.randn(96, 6, dtype=dtype) + i
        state = {f"body.{n}": t for n, t in expert.items()}
        with torch.no_grad():
            y = torch.func.functional_call(net, state, (x,)).argmax(1)
        out[f"task {i}"] = merge.Task(
            net,
            F.cross_entropy,
            train=[(x[k : k + 16], y[k : k + 16]) for k in (0, 16)],
            adapt=[x[k : k + 16] for k in (0, 16, 32, 48)],
            validate=[(x[64:], y[64:])],
            **more,
        )
    return out


def learned(memory: str = "resident", **how: Any) -> merge.Learned:
    base, experts = models(dtype=torch.float32, scale=1.0)
    settings = {"steps": 12, "every": 4, "rebuild": 5, "granularity": "tensor", **how}
    named = {f"task {i}": e for i, e in enumerate(experts)}
    return merge.learn(named, base=base, tasks=tasks_of(experts), memory=memory, **settings)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"granularity": "task"},
        {"granularity": "row", "link": "sigmoid"},
        {"prepare": "ties:0.5", "clip": 0.5},
        {"preset": "spectral_gates", "batch": 8},
    ],
    ids=str,
)
def test_streamed_and_resident_trajectories_are_equal_to_the_bit(how: dict[str, Any]) -> None:
    one, other = learned("resident", **how), learned("stream", **how)
    assert one.history == other.history
    assert one.coefficients == other.coefficients
    assert one.scores == other.scores


def test_the_same_seed_gives_the_same_result_and_another_does_not() -> None:
    assert learned(batch=8).history == learned(batch=8).history
    assert learned(batch=8).history != learned(batch=8, seed=1).history


@pytest.mark.parametrize("memory", ["int8", "lowrank:4"])
def test_smaller_parts_lead_nearly_the_same_way(memory: str) -> None:
    exact, rounded = learned(rebuild=1), learned(memory, rebuild=1)
    assert rounded.history[1:] != exact.history[1:]  # it is not the differences as they are
    assert rounded.scores[:3] == exact.scores[:3]  # but what is scored is made of those
    for name, row in exact.coefficients.table().items():
        for task, value in row.items():
            assert abs(rounded.coefficients.table()[name][task] - value) < 0.1


@pytest.mark.parametrize("how", [{"rate": 10.0}, {"objective": "entropy"}, {"init": 1.0}], ids=str)
def test_nothing_worse_than_its_candidates_is_returned(how: dict[str, Any]) -> None:
    found = learned(**how)
    best = max(found.scores, key=lambda c: c.score)
    names = {c.name for c in found.scores}
    assert {"base", "start", "task arithmetic at 0.3"} <= names
    (chosen,) = [c for c in found.scores if c.name == found.chosen]
    assert chosen.score == best.score
    state = found.checkpoint.state_dict()
    for name, task in tasks_of(models(dtype=torch.float32, scale=1.0)[1]).items():
        x, y = task.validate[0]  # type: ignore[index]
        own = {f"body.{n}": t for n, t in state.items()}
        with torch.no_grad():
            right = torch.func.functional_call(task.module, own, (x,)).argmax(1) == y
        assert abs(float(right.float().mean()) - chosen.tasks[name]) < 0.05


def test_learning_lowers_the_loss() -> None:
    found = learned(steps=60, rate=3e-2)
    losses = [math.fsum(s.losses.values()) for s in found.history]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_coefficients_make_the_same_merge_again() -> None:
    base, experts = models(dtype=torch.float32, scale=1.0)
    named = {f"task {i}": e for i, e in enumerate(experts)}
    found = learned(granularity="partition:3", candidates=())
    text = found.coefficients.to_json()
    assert merge.Coefficients.from_json(text) == found.coefficients
    again = merge.apply_coefficients(merge.Coefficients.from_json(text), named, base).state_dict()
    for name, value in found.checkpoint.state_dict().items():
        assert torch.equal(again[name], value)


def test_a_learned_base_has_coefficients() -> None:
    found = learned(learn_base=True, candidates=())
    assert found.coefficients.operands[-1] == BASE
    assert found.checkpoint.space == "weight"


@pytest.mark.parametrize("prepare", ["tsv:0.15", "svd:0.5", "cart:0.3"])
def test_a_vocabulary_is_merged_tile_by_tile(prepare: str) -> None:
    torch.manual_seed(3)
    shapes = {"table": (400, 8), "layer.weight": (12, 8)}
    base, *experts = ({n: torch.randn(s) for n, s in shapes.items()} for _ in range(4))
    names = ["a", "b", "c"]
    how = Coefficients.uniform(names, list(shapes), 1.7, prepare, 0)
    merged = merge.apply_coefficients(how, dict(zip(names, experts, strict=True)), base)
    grains = {step.output.name: step.grain for step in merged.plan().steps}
    assert grains["table"] == 1
    assert grains["layer.weight"] > 1
    state = merged.state_dict()
    for name, value in base.items():
        deltas = [e[name] - value for e in experts]
        made = preparation(prepare)(name, deltas)
        truth = value.double() + (0.0 if made.origin is None else made.origin.double())
        for part in made.parts:
            update = torch.zeros_like(value)
            part.add_to(update, torch.tensor([1.7], dtype=torch.float64), "whole")
            truth = truth + update.double()
        torch.testing.assert_close(state[name].double(), truth, rtol=1e-5, atol=1e-5)


# -- directions and rows together -----------------------------------------------------------------
def test_rows_start_at_nothing_and_are_told_apart_from_directions() -> None:
    _, latents, _ = settled({"granularity": "singular+row", "prepare": "tsv"}, torch.float64)
    fresh = Latents(latents.layout, 0.7)
    found = fresh.coefficients({}, "tsv")
    block = found.block_of("0.weight")
    assert block.kind == "singular+row" and block.gates == 2  # 6 directions for 3 experts
    assert block.values[0] == (0.7,) * 2 + (0.0,) * 12  # and 12 rows
    assert found.block_of("0.bias").values[0] == (0.7,) * 12
    assert found.table()["0.weight"]["a"] == pytest.approx(0.7)  # of directions alone
    again = Coefficients.from_json(found.to_json())
    assert again == found
    assert {n: t.tolist() for n, t in Latents(latents.layout, again).rows.items()} == {
        n: t.tolist() for n, t in fresh.rows.items()
    }


def test_other_coefficients_start_directions_and_leave_rows_at_nothing() -> None:
    _, latents, _ = settled({"granularity": "singular+row", "prepare": "tsv"}, torch.float64)
    other = Coefficients.uniform(["a", "b", "c"], list(latents.layout.tensors), [0.1, 0.2, 0.3])
    block = Latents(latents.layout, other).coefficients({}).block_of("0.weight")
    assert [row[:3] for row in block.values] == [(0.1, 0.1, 0.0), (0.2, 0.2, 0.0), (0.3, 0.3, 0.0)]


def test_rows_beside_directions_want_a_plain_link() -> None:
    with pytest.raises(merge.RecipeError, match="start at 0"):
        settled(
            {"granularity": "singular+row", "prepare": "tsv", "link": Link("clamp")}, torch.float64
        )
    with pytest.raises(merge.RecipeError, match="start at 0"):
        settled({"granularity": "singular+row", "prepare": "tsv", "base": True}, torch.float64)
