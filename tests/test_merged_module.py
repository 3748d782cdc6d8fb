"""Networks with coefficients to train: gradients equal those of autograd through the merge."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import merge
from merge.learning.coefficients import Coefficients
from merge.learning.parts import Factored, part_ids

State = dict[str, Tensor]


class Net(nn.Module):
    """Layers in a stack, a tied head, BatchNorm, and a weight that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight
        self.idle = nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = torch.tanh(self.drop(layer(x)))
        out: Tensor = self.head(self.norm(x))
        return out


def family(dtype: torch.dtype) -> tuple[Net, State, dict[str, State]]:
    torch.manual_seed(0)
    net = Net().to(dtype)
    base = {n: t.clone() for n, t in net.state_dict().items()}
    deltas = {
        k: {n: 0.3 * torch.randn_like(t) for n, t in base.items() if t.is_floating_point()}
        for k in ("a", "b", "c")
    }
    for delta in deltas.values():
        delta["head.weight"] = delta["table.weight"]
        delta["norm.running_var"].zero_()
    return net, base, deltas


IDS = torch.arange(12) % 7
TARGET = (torch.arange(12) * 3) % 7


def loss_of(out: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out, TARGET)


def by_autograd(net: Net, base: State, deltas: dict[str, State], merged: nn.Module) -> list[Tensor]:
    """Gradients of the latent rows, autograd going through every operation of the merge."""
    latents = merged.latents
    state = {}
    for name, origin in base.items():
        if name not in latents.layout.members or name == "head.weight":
            state[name] = origin
            continue
        numbers, kind = latents.coefficients_of(name), latents.layout.kinds[name]
        out = origin
        for row, delta in zip(numbers, deltas.values(), strict=True):
            scale = row.to(origin.dtype)
            if kind == "row":
                scale = scale.reshape(-1, *[1] * (origin.ndim - 1))
            elif kind == "partition":
                ids = torch.cat([i for _, i in part_ids(name, 0, origin, len(scale))])
                scale = scale[ids].reshape(origin.shape)
            out = out + scale * delta[name]
        state[name] = out
    state["head.weight"] = state["table.weight"]
    loss = loss_of(functional_call(net, state, IDS))
    rows = list(latents.rows.values())
    found = torch.autograd.grad(loss, rows, allow_unused=True)
    return [torch.zeros_like(r) if g is None else g for r, g in zip(rows, found, strict=True)]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("link", ["identity", "clamp", "sigmoid", "softmax", "abs"])
@pytest.mark.parametrize(
    "granularity", ["scalar", "task", "layer", "tensor", "group", "row", "partition:4"]
)
def test_gradients_are_those_of_autograd(
    granularity: str, link: str, dtype: torch.dtype, close: float
) -> None:
    if (granularity, link) == ("scalar", "softmax"):
        pytest.skip("one number leaves a softmax nothing to choose")
    net, base, deltas = family(dtype)
    merged = merge.MergedModule(
        net,
        base,
        deltas,
        granularity=granularity,
        link=link,
        groups=[(r"layers\.\d", "all")],
    )
    loss_of(merged(IDS)).backward()
    expected = by_autograd(net, base, deltas, merged)
    for parameter, wanted in zip(merged.parameters(), expected, strict=True):
        found = torch.zeros_like(wanted) if parameter.grad is None else parameter.grad
        assert float((found - wanted).norm()) <= close * (float(wanted.norm()) + 1e-3)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_singular_directions_have_gradients_of_their_own(dtype: torch.dtype, close: float) -> None:
    torch.manual_seed(1)
    net = nn.Linear(5, 4).to(dtype)
    factors = [
        {"weight": Factored(torch.randn(4, 2), torch.rand(2), torch.randn(5, 2))} for _ in range(2)
    ]
    factors = [
        {n: Factored(f.left.to(dtype), f.s.to(dtype), f.right.to(dtype)) for n, f in d.items()}
        for d in factors
    ]
    merged = merge.MergedModule(net, net.state_dict(), factors, granularity="singular")
    x, y = torch.randn(6, 5).to(dtype), torch.randn(6, 4).to(dtype)
    (merged(x) - y).square().mean().backward()
    numbers = torch.full((2, 2), 0.3, dtype=torch.float64, requires_grad=True)
    weight = net.weight.detach()
    for row, delta in zip(numbers, factors, strict=True):
        f = delta["weight"]
        weight = weight + (f.left * (f.s * row.to(dtype))) @ f.right.T
    loss = (functional_call(net, {"weight": weight}, x) - y).square().mean()
    (wanted,) = torch.autograd.grad(loss, numbers)
    (parameter,) = merged.parameters()
    assert parameter.grad is not None
    assert float((parameter.grad - wanted).norm()) <= close * float(wanted.norm())


@pytest.mark.parametrize("granularity", ["task", "layer", "tensor", "row", "partition:3"])
def test_coefficient_gradients_need_only_the_gradients_of_weights(granularity: str) -> None:
    net, base, deltas = family(torch.float64)
    net.eval()
    merged = merge.MergedModule(net, base, deltas, granularity=granularity)
    loss_of(merged(IDS)).backward()
    net.load_state_dict(merged.merged_state())
    loss_of(net(IDS)).backward()
    found = merge.coefficient_gradients(net, deltas, granularity=granularity)
    rows = merged.latents.rows
    assert set(found) <= set(rows)
    assert set(rows) - set(found) <= {n for n in rows if "idle" in n or "running" in n}
    for block, own in found.items():
        if "idle" in block or "norm" in block:
            continue
        for k, expert in enumerate(deltas):
            grad = rows[block].grad
            assert grad is not None
            torch.testing.assert_close(own[expert], grad[k], rtol=1e-9, atol=1e-12)


def test_any_optimiser_drives_it_and_only_the_coefficients_move() -> None:
    net, base, deltas = family(torch.float32)
    merged = merge.MergedModule(net, base, deltas, granularity="layer", init=0.0)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    assert sum(p.numel() for p in merged.parameters()) < 30
    torch.testing.assert_close(merged.merged_state(), before)
    optimiser = torch.optim.Adam(merged.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = loss_of(merged.train()(IDS))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not net.training
    state = merged.merged_state()
    assert torch.equal(state["head.weight"], state["table.weight"])
    net.load_state_dict(state)
    torch.testing.assert_close(net.eval()(IDS), merged(IDS))


def test_a_clamped_coefficient_that_left_its_box_comes_back() -> None:
    net = nn.Linear(1, 1, bias=False)
    base, delta = {"weight": torch.zeros(1, 1)}, {"weight": torch.ones(1, 1)}
    merged = merge.MergedModule(net, base, [delta], link="clamp", granularity="task", init=0.1)
    optimiser = torch.optim.SGD(merged.parameters(), lr=1.0)
    seen = []
    for goal in (-5.0, -5.0, 0.5, 0.5, 0.5):
        optimiser.zero_grad()
        (merged(torch.ones(1, 1)) - goal).square().sum().mul(0.5).backward()
        optimiser.step()
        seen.append(float(merged.merged_state()["weight"]))
    assert seen == [0.0, 0.0, 0.5, 0.5, 0.5]


def test_coefficients_are_named_and_start_another_module() -> None:
    net, base, deltas = family(torch.float64)
    merged = merge.MergedModule(net, base, deltas, init={"a": 0.1, "b": 0.2, "c": 0.3})
    told = Coefficients.from_json(merged.coefficients().to_json())
    assert told.operands == ("a", "b", "c")
    assert told.blocks["layers.1"].values == ((0.1,), (0.2,), (0.3,))
    again = merge.MergedModule(net, base, deltas, init=told, granularity="tensor")
    torch.testing.assert_close(again.merged_state(), merged.merged_state())


def test_it_moves_and_casts_but_its_numbers_stay_double() -> None:
    net, base, deltas = family(torch.float64)
    merged = merge.MergedModule(net, base, deltas).float()
    out = merged(IDS)
    out.sum().backward()
    assert out.dtype == torch.float32
    assert {p.dtype for p in merged.parameters()} == {torch.float64}


def test_what_does_not_fit_is_named() -> None:
    net, base, deltas = family(torch.float32)
    with pytest.raises(merge.PlanError, match="the base does not have") as caught:
        merge.MergedModule(net, {n: t for n, t in base.items() if n != "idle.bias"}, deltas)
    assert caught.value.where["tensor"] == "idle.bias"
    with pytest.raises(merge.PlanError, match="another shape") as caught:
        merge.MergedModule(net, base, {"a": {"idle.bias": torch.ones(5)}})
    assert (caught.value.where["tensor"], caught.value.where["expert"]) == ("idle.bias", "a")
    with pytest.raises(merge.PlanError, match="in common"):
        merge.MergedModule(net, base, [{"x": torch.ones(1)}])
    with pytest.raises(merge.RecipeError, match="granularity"):
        merge.MergedModule(net, base, deltas, granularity="word")


def test_torch_is_imported_only_when_the_class_is_asked_for() -> None:
    code = "import sys, merge; assert 'torch' not in sys.modules; merge.MergedModule"
    subprocess.run([sys.executable, "-c", code], check=True)
