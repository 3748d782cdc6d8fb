"""RegMean against least squares in float64, and Gram matrices against inputs seen otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cli.app import cli
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import merge

State = dict[str, Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def least_squares(maps: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """The map W that minimises sum_k |X_k (W - W_k)^T|^2 / n_k, by LAPACK on the stacked rows."""
    rows = torch.cat([x / len(x) ** 0.5 for x in inputs])
    goals = torch.cat([x @ w.T / len(x) ** 0.5 for x, w in zip(inputs, maps, strict=True)])
    found, *_ = np.linalg.lstsq(rows.numpy(), goals.numpy(), rcond=None)
    return torch.from_numpy(found).T


def gram(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


# -- the method ------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [2, 3, 5])
def test_it_is_the_least_squares_solution(count: int) -> None:
    maps = [random(7, 11, seed=k) for k in range(count)]
    inputs = [random(40 + 9 * k, 11, seed=10 + k) for k in range(count)]
    out = merge.regmean(
        [{"w": w} for w in maps],
        statistics=[{"w": gram(x)} for x in inputs],
        alpha=1.0,
        ridge=1e-12,
    ).state_dict()
    torch.testing.assert_close(out["w"], least_squares(maps, inputs), rtol=1e-9, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    alpha=st.floats(0.0, 1.0),
    ridge=st.floats(1e-9, 1.0),
    weights=st.lists(st.floats(0.1, 4.0), min_size=2, max_size=3),
)
def test_alpha_ridge_and_weight_are_the_formula(
    alpha: float, ridge: float, weights: list[float]
) -> None:
    maps = [random(4, 6, seed=k) for k in range(len(weights))]
    grams = [gram(random(30, 6, seed=20 + k)) for k in range(len(weights))]
    shrunk = [alpha * c + (1 - alpha) * torch.diag(c.diagonal()) for c in grams]
    total = sum(w * c for w, c in zip(weights, shrunk, strict=True))
    pull = ridge * torch.diagonal(total).mean()
    mean = sum(w * m for w, m in zip(weights, maps, strict=True)) / sum(weights)
    right = sum(w * m @ c for w, m, c in zip(weights, maps, shrunk, strict=True)) + pull * mean
    expected = torch.linalg.solve(total + pull * torch.eye(6, dtype=torch.float64), right.T).T
    out = merge.regmean(
        [{"w": m} for m in maps],
        statistics=[{"w": c} for c in grams],
        alpha=alpha,
        ridge=ridge,
        weight=weights,
    ).state_dict()
    torch.testing.assert_close(out["w"], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rows", [0, 1, 3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_model_is_given_back_to_the_bit(rows: int, dtype: torch.dtype) -> None:
    """Whatever its inputs were: too few of them leave C singular, none leave it zero."""
    model = {"w": random(9, 12).to(dtype), "b": random(9, seed=1).to(dtype)}
    seen = random(rows, 12, seed=2)
    known = {"w": seen.T @ seen}
    for copies in (1, 3):
        out = merge.regmean([model] * copies, statistics=[known] * copies).state_dict()
        assert all(torch.equal(out[n], model[n]) for n in model)


def test_inputs_that_no_model_saw_leave_the_mean_and_the_others_are_exact() -> None:
    """C is singular: each model saw a subspace of its own, and there its map is kept."""
    maps = [random(5, 8, seed=k) for k in range(2)]
    basis = torch.linalg.qr(random(8, 8, seed=5)).Q
    seen = [random(50, 3, seed=6) @ basis[:, :3].T, random(50, 3, seed=7) @ basis[:, 3:6].T]
    out = merge.regmean(
        [{"w": w} for w in maps],
        statistics=[{"w": gram(x)} for x in seen],
        alpha=1.0,
        ridge=1e-8,
    ).state_dict()["w"]
    torch.testing.assert_close(out @ basis[:, :3], maps[0] @ basis[:, :3], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out @ basis[:, 3:6], maps[1] @ basis[:, 3:6], rtol=1e-6, atol=1e-6)
    mean = (maps[0] + maps[1]) / 2
    torch.testing.assert_close(out @ basis[:, 6:], mean @ basis[:, 6:], rtol=1e-6, atol=1e-6)


def test_a_sum_that_rounding_made_indefinite_is_solved_without_its_null_directions() -> None:
    """One direction carries nearly all energy, and float32 cannot hold the others beside it."""
    strong = random(1, 24, seed=3) * 1e4
    grams = [gram(random(6, 24, seed=k) + strong).float() for k in (4, 5)]
    broken = [g - 1e-3 * g.diagonal().mean() * torch.eye(24) for g in grams]
    maps = [random(6, 24, seed=k).float() for k in (6, 7)]
    assert torch.linalg.cholesky_ex(sum(broken).double()).info > 0
    out = merge.regmean(
        [{"w": w} for w in maps], statistics=[{"w": g} for g in broken], alpha=1.0
    ).state_dict()["w"]
    assert out.isfinite().all()
    assert (out - (maps[0] + maps[1]) / 2).norm() < 3 * (maps[0] - maps[1]).norm()


def test_normalising_makes_louder_inputs_count_the_same() -> None:
    maps = [{"w": random(4, 6, seed=k)} for k in range(2)]
    grams = [gram(random(30, 6, seed=2 + k)) for k in range(2)]
    loud = [{"w": grams[0]}, {"w": 1e4 * grams[1]}]
    even = [{"w": g / g.trace()} for g in grams]
    out = merge.regmean(maps, statistics=loud, normalize=True, ridge=1e-9).state_dict()
    expected = merge.regmean(maps, statistics=even, ridge=1e-9).state_dict()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


def test_what_has_no_gram_matrix_is_averaged_by_weight() -> None:
    models = [{"w": random(3, 4, seed=k), "b": random(3, seed=9 + k)} for k in range(2)]
    known = [{"w": gram(random(20, 4, seed=k))} for k in range(2)]
    out = merge.regmean(models, statistics=known, weight=[3.0, 1.0]).state_dict()
    torch.testing.assert_close(out["b"], 0.75 * models[0]["b"] + 0.25 * models[1]["b"])


def test_statistics_that_do_not_belong_are_refused() -> None:
    models = [{"w": random(3, 4, seed=k)} for k in range(2)]
    good = {"w": torch.eye(4)}
    cases: list[tuple[State, str, str]] = [
        ({"w": torch.eye(5)}, "no Gram matrix of the inputs", "w"),
        ({"w": torch.ones(3, 4)}, "no Gram matrix of the inputs", "w"),
        ({"v": torch.eye(4)}, "a tensor that the models do not have", "v"),
        ({"v": torch.eye(4), **good}, "a tensor that the models do not have", "v"),
    ]
    for wrong, said, tensor in cases:
        with pytest.raises(merge.PlanError, match=said) as caught:
            merge.regmean(models, statistics=[good, wrong])
        assert caught.value.where["tensor"] == tensor
    more = [{**m, "v": random(4, 4)} for m in models]
    with pytest.raises(merge.PlanError, match="in some models and not in others") as caught:
        merge.regmean(more, statistics=[{**good, "v": torch.eye(4)}, good])
    assert (caught.value.where["tensor"], caught.value.found) == ("v", "1 of 2")


# -- layers ----------------------------------------------------------------------------------------
class Conv1D(nn.Module):
    """GPT-2's linear map: by its name and its weight of (in, out)."""

    def __init__(self, out: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, out))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (50, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 4), (8, 7, 6)),
    "transposed": (lambda: Conv1D(4, 6), (8, 7, 6)),
    "square transposed": (lambda: Conv1D(6, 6), (8, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, padding=1), (9, 3, 12)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (2, 3), stride=2, padding=1), (9, 3, 9, 10)),
    "conv2d same": (lambda: nn.Conv2d(3, 5, 4, padding="same"), (9, 3, 9, 10)),
    "conv2d dilated": (lambda: nn.Conv2d(2, 5, 3, dilation=2, padding=2), (9, 2, 9, 10)),
    "conv2d reflected": (
        lambda: nn.Conv2d(2, 5, 3, padding=1, padding_mode="reflect"),
        (9, 2, 9, 10),
    ),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (12, 4, 6, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (12, 4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (9, 2, 4, 5, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_the_merged_layer_has_the_least_error_of_all_maps(name: str) -> None:
    """No step from it makes the outputs nearer to the models' own on their own inputs."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layers = [make() for _ in range(2)]
    inputs = [random(*shape, seed=5 + k).float() for k in range(2)]
    known = [
        merge.gather_statistics(layer, merge.Task(layer, functional.mse_loss, [(x, None)]))
        for layer, x in zip(layers, inputs, strict=True)
    ]
    merged = merge.regmean(layers, statistics=known, alpha=1.0, ridge=1e-9).state_dict()
    assert merged["weight"].shape == layers[0].weight.shape
    weight = merged["weight"].double().requires_grad_()

    def error(weight: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for layer, x in zip(layers, inputs, strict=True):
            own = copy.deepcopy(layer).double()
            outs = [
                torch.func.functional_call(own, {"weight": w, "bias": own.bias}, x.double())
                for w in (weight, own.weight.detach())
            ]
            total = total + (outs[0] - outs[1]).square().sum() / len(x)
        return total

    (slope,) = torch.autograd.grad(error(weight), weight)
    mean = (layers[0].weight + layers[1].weight).detach().double() / 2
    (usual,) = torch.autograd.grad(error(mean.requires_grad_()), mean)
    assert float(slope.norm()) < 1e-4 * float(usual.norm())


def test_padding_counts_for_nothing() -> None:
    """The same texts with more padding, and garbage in it, give the same Gram matrices."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(1, 50, (5, 9))
    mask = (torch.arange(9) < torch.tensor([9, 4, 7, 2, 9])[:, None]).long()
    wide = torch.cat([ids, torch.randint(1, 50, (5, 6))], 1)
    wide_mask = torch.cat([mask, torch.zeros(5, 6, dtype=torch.long)], 1)

    def gathered(ids: Tensor, mask: Tensor) -> State:
        batch = ({"input_ids": ids, "attention_mask": mask}, None)
        task = merge.Task(model, functional.mse_loss, [batch])
        return merge.gather_statistics(model, task).state_dict()

    short, long = gathered(ids, mask), gathered(wide, wide_mask)
    assert len(short) == 12
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)
    alone = [gathered(ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(mask.sum(1))]
    for name, found in short.items():
        expected = sum(n * a[name] for n, a in zip(mask.sum(1), alone, strict=True)) / mask.sum()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_torchs_own_attention_gives_query_key_and_value_their_inputs() -> None:
    torch.manual_seed(0)
    part = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    x = random(6, 5, 8).float()
    task = merge.Task(part, functional.mse_loss, [(x, None)])
    found = merge.gather_statistics(part, task).state_dict()
    assert set(found) == {"self_attn.in_proj_weight", "linear1.weight", "linear2.weight"}
    for group in found["self_attn.in_proj_weight"]:
        torch.testing.assert_close(group, gram(x.reshape(-1, 8)))
    merged = merge.regmean([part, part], statistics=[found, found]).state_dict()
    own = part.state_dict()
    assert all(torch.equal(merged[n], own[n]) for n in own)


class Shared(nn.Module):
    """One map used twice, one that is an embedding too, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.table.weight
        self.idle = nn.Linear(6, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(self.table(ids))))
        return out


def test_shared_weights_have_one_matrix_over_all_uses_and_idle_ones_zeros() -> None:
    torch.manual_seed(1)
    model = Shared()
    ids = torch.randint(0, 10, (4, 5))
    found = merge.gather_statistics(
        model, merge.Task(model, functional.cross_entropy, [(ids, None)])
    ).state_dict()
    assert set(found) == {"first.weight", "idle.weight"}
    inner = model.table(ids).reshape(-1, 6).detach()
    rows = torch.cat([inner, inner @ model.first.weight.detach().T])
    torch.testing.assert_close(found["first.weight"], gram(rows))
    assert not found["idle.weight"].any()


@pytest.mark.parametrize("memory", [1, 4000, "1GiB"])
def test_portions_change_nothing(memory: int | str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 2))
    batches = [(random(n, 5, seed=n).float(), None) for n in (10, 20, 30)]
    task = merge.Task(model, functional.mse_loss, batches)
    out = merge.gather_statistics(model, task, samples=45, memory=memory).state_dict()
    rows = torch.cat([x for x, _ in batches])[:45]
    torch.testing.assert_close(out["0.weight"], gram(rows))
    torch.testing.assert_close(out["4.weight"], gram(model[:4](rows).detach()))


class Headed(nn.Module):
    """An encoder with a head of its own around it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(x))
        return out


def test_a_network_may_have_a_head_around_the_model() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    x = random(20, 3).float()
    task = merge.Task(Headed(encoder), functional.mse_loss, [], adapt=[x[:12], (x[12:], None)])
    gathered = merge.gather_statistics(encoder, task)
    assert any("2 tensors of the network are its own" in n for n in gathered.notes)
    found = gathered.state_dict()
    assert set(found) == {"0.weight", "2.weight"}
    torch.testing.assert_close(found["0.weight"], gram(x))
    torch.testing.assert_close(found["2.weight"], gram(encoder[:2](x).detach()))
    constants = {**encoder.state_dict(), "embeddings.position_ids": torch.arange(9)[None]}
    again = merge.gather_statistics(constants, task).state_dict()
    assert torch.equal(again["2.weight"], found["2.weight"])
    with pytest.raises(merge.PlanError, match="none of the merged tensors"):
        merge.gather_statistics({"other": torch.ones(2)}, task)


# -- a user's way ----------------------------------------------------------------------------------
def test_a_recipe_with_statistics_from_the_command_line(
    llamas: Callable[[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, a, b, _ = llamas("float32")
    monkeypatch.chdir(tmp_path)
    rng: NDArray[Any] = np.random.default_rng(0).integers(0, 96, (12, 10))
    (tmp_path / "own.py").write_text(OWN.format(folder=str(base)))
    np.save(tmp_path / "ids.npy", rng)
    for name, folder in (("a", a), ("b", b)):
        (tmp_path / name).symlink_to(folder)
        done = CliRunner().invoke(
            cli, ["statistics", name, "--data", "own:task", "-o", f"{name}-gram", "-q"]
        )
        assert done.exit_code == 0, done.output
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        "merge_method: regmean\nmodels:\n- {model: a, statistics: a-gram}\n"
        "- {model: b, statistics: b-gram}\n"
    )
    merge.apply("r.yml", "out", memory="64MiB")
    out = merge.open("out").state_dict()
    known = [merge.open(f"{n}-gram").state_dict() for n in "ab"]
    models = [merge.open(n).state_dict() for n in "ab"]
    name = "model.layers.1.mlp.down_proj.weight"
    grams = [k[name].double() for k in known]
    shrunk = [0.9 * c + 0.1 * torch.diag(c.diagonal()) for c in grams]
    right = sum(m[name].double() @ c for m, c in zip(models, shrunk, strict=True))
    torch.testing.assert_close(
        out[name].double(), right @ torch.linalg.inv(sum(shrunk)), rtol=1e-3, atol=1e-5
    )
    norm = "model.norm.weight"
    torch.testing.assert_close(out[norm], (models[0][norm] + models[1][norm]) / 2)
    assert set(known[0]) <= set(models[0])
    assert not any("embed" in n for n in known[0])


OWN = """
import numpy as np, torch, merge
from transformers import AutoModelForCausalLM

def task():
    model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="float32")
    ids = torch.from_numpy(np.load("ids.npy"))
    return merge.Task(model, None, [({{"input_ids": ids}}, None)])
"""
