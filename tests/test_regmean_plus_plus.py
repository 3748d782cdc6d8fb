"""RegMean++ against the same thing written out layer by layer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from merge_cli.app import cli
from torch import Tensor, nn
from torch.nn import functional

import merge
from merge.streams.open import open_task


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 5)
        self.outer = nn.Linear(5, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(torch.tanh(self.inner(x)))
        return out


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 6), Block(6), Block(6), nn.Linear(6, 3))


def inputs(seed: int) -> Tensor:
    return torch.randn(60, 9, generator=torch.Generator().manual_seed(seed))


def tasks() -> tuple[list[nn.Module], list[merge.Task]]:
    models = [network(k) for k in range(3)]
    data = [
        merge.Task(m, functional.mse_loss, [(inputs(10 + k), None), (inputs(20 + k), None)])
        for k, m in enumerate(models)
    ]
    return models, data


def solved(models: list[nn.Module], rows: list[Tensor], name: str) -> Tensor:
    """Least squares for one weight, alpha = 1, by the formula in float64."""
    grams = [(x.T @ x / len(x)).double() for x in rows]
    maps = [dict(m.named_parameters())[name].detach().double() for m in models]
    right = sum(w @ c for w, c in zip(maps, grams, strict=True))
    return right @ torch.linalg.inv(sum(grams))  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_each_layer_is_solved_on_inputs_of_those_merged_before(unit: str) -> None:
    models, data = tasks()
    rows = [torch.cat([inputs(10 + k), inputs(20 + k)]) for k in range(3)]
    merged = network(0)
    mean = {n: sum(m.state_dict()[n] for m in models) / 3 for n in merged.state_dict()}
    merged.load_state_dict(mean)
    with torch.no_grad():
        merged[0].weight.copy_(solved(models, rows, "0.weight"))
        for i in (1, 2):
            before = [merged[:i](x) for x in rows]
            merged[i].inner.weight.copy_(solved(models, before, f"{i}.inner.weight"))
            inside = [merged[i] if unit == "layer" else m[i] for m in models]
            within = [torch.tanh(p.inner(x)) for p, x in zip(inside, before, strict=True)]
            merged[i].outer.weight.copy_(solved(models, within, f"{i}.outer.weight"))
        last = [merged[:3](x) for x in rows]
        merged[3].weight.copy_(solved(models, last, "3.weight"))
    seen: list[str] = []
    out = merge.regmean_plus_plus(
        models, data, unit=unit, alpha=1.0, ridge=1e-10, progress=seen.append
    ).state_dict()
    assert seen[0] == "0.weight"
    assert len(seen) == 6
    torch.testing.assert_close(out, merged.state_dict(), rtol=2e-3, atol=2e-4)


def test_models_and_data_may_go_by_name() -> None:
    """Each model with the data of its name, in whatever order both are written."""
    models, data = tasks()
    names = ["math", "code", "law"]
    named = dict(zip(names, models, strict=True))
    sets = {n: data[names.index(n)] for n in reversed(names)}
    weights = {"law": 3.0, "math": 1.0, "code": 2.0}
    found = merge.regmean_plus_plus(named, sets, weight=weights).state_dict()
    wanted = merge.regmean_plus_plus(models, data, weight=[1.0, 2.0, 3.0]).state_dict()
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
    turned = merge.regmean_plus_plus(models, data[::-1], weight=[1.0, 2.0, 3.0]).state_dict()
    assert not torch.equal(turned["0.weight"], wanted["0.weight"])
    with pytest.raises(merge.RecipeError, match="other names than the models") as caught:
        merge.regmean_plus_plus(named, {**sets, "lwa": data[0]})
    assert "did you mean 'law'" in str(caught.value)


def test_copies_of_one_model_give_it_back() -> None:
    model = network(0)
    task = merge.Task(model, functional.mse_loss, [(inputs(1), None)])
    out = merge.regmean_plus_plus([model, model], [task, task]).state_dict()
    assert all(torch.equal(out[n], t) for n, t in model.state_dict().items())


def test_the_network_is_left_as_it_was_and_without_hooks() -> None:
    models, data = tasks()
    before = {n: t.clone() for n, t in models[0].state_dict().items()}
    merge.regmean_plus_plus(models, data)
    assert all(torch.equal(t, before[n]) for n, t in models[0].state_dict().items())
    assert not any(p._forward_hooks or p._forward_pre_hooks for p in models[0].modules())


def test_language_models_in_folders(llamas: Callable[[str], list[Path]]) -> None:
    """Stored in bfloat16: what is no linear layer is the plain average, to the bit."""
    from transformers import AutoModelForCausalLM

    _, *folders = llamas("bfloat16")
    ids = torch.randint(0, 96, (6, 12), generator=torch.Generator().manual_seed(0))
    data = [
        merge.Task(
            AutoModelForCausalLM.from_pretrained(f, dtype="float32"),
            functional.cross_entropy,
            [({"input_ids": ids}, None)],
        )
        for f in folders[:2]
    ]
    out = merge.regmean_plus_plus([str(f) for f in folders[:2]], data)
    mean = merge.average([str(f) for f in folders[:2]]).state_dict()
    state = out.state_dict()
    assert {n: t.dtype for n, t in state.items()} == {n: t.dtype for n, t in mean.items()}
    moved = [n for n in mean if not torch.equal(state[n], mean[n])]
    assert len(moved) >= 3 * 7
    assert all("proj" in n or "lm_head" in n for n in moved)


def test_wrong_words_and_counts_are_refused() -> None:
    models, data = tasks()
    with pytest.raises(merge.RecipeError, match="one set of data for each model"):
        merge.regmean_plus_plus(models, data[:2])
    with pytest.raises(merge.RecipeError, match="no such unit"):
        merge.regmean_plus_plus(models, data, unit="row")
    with pytest.raises(merge.RecipeError, match="out of range"):
        merge.regmean_plus_plus(models, data, alpha=2.0)
    with pytest.raises(merge.PlanError, match="no data to gather"):
        merge.regmean_plus_plus(models, [merge.Task(models[0], functional.mse_loss, [])] * 3)


OWN = """
import torch, merge
from transformers import AutoModelForCausalLM

def task():
    model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="float32")
    ids = torch.randint(0, 96, (6, 12), generator=torch.Generator().manual_seed(0))
    return merge.Task(model, None, [({{"input_ids": ids}}, None)])
"""


@pytest.mark.parametrize("sequential", [False, True])
def test_the_command_does_all_in_one(
    sequential: bool,
    llamas: Callable[[str], list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, *folders = llamas("float32")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_data.py").write_text(OWN.format(folder=str(folders[0])))
    a, b = (str(f) for f in folders[:2])
    arguments = ["regmean", a, b, "--data", "own_data:task", "--data", "own_data:task"]
    more = ["--sequential"] if sequential else []
    done = CliRunner().invoke(cli, [*arguments, "-o", "out", "--alpha", "0.8", *more])
    assert done.exit_code == 0, done.output
    sys.modules.pop("own_data")
    task = open_task("own_data:task")
    if sequential:
        expected = merge.regmean_plus_plus([a, b], [task, task], alpha=0.8)
    else:
        known = [merge.gather_statistics(m, task) for m in (a, b)]
        expected = merge.regmean([a, b], statistics=known, alpha=0.8)
    found, wanted = merge.open("out").state_dict(), expected.state_dict()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    wrong = CliRunner().invoke(cli, [*arguments[:5], "-o", "other"])
    assert wrong.exit_code == 2
    assert "as many --data" in wrong.output
