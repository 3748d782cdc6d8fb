"""Callbacks of a training run, in plain loops and in the Trainer of transformers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import merge

State = dict[str, Tensor]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def data(seed: int = 0, count: int = 32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=draw), torch.randint(0, 3, (count,), generator=draw)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 1) -> None:
    for step in range(steps):
        x, y = data(seed + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def copied(module: nn.Module) -> State:
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


# -- averages --------------------------------------------------------------------------------------
AVERAGES: dict[str, Callable[[list[np.ndarray]], np.ndarray]] = {
    "soup": lambda xs: np.mean(xs, axis=0),
    "lawa": lambda xs: np.mean(xs[-3:], axis=0),
    "ema": lambda xs: _ema(xs, 0.8),
}


def _ema(xs: list[np.ndarray], decay: float) -> np.ndarray:
    mean = xs[0]
    for x in xs[1:]:
        mean = decay * mean + (1 - decay) * x
    return mean


@pytest.mark.parametrize("count", [1, 2, 7, 80])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_is_its_formula(kind: str, count: int) -> None:
    model, seen = net(), []
    average = merge.WeightAverage(kind, on="step", decay=0.8, window=3)
    for step in range(1, count + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        seen.append(copied(model))
        average.step(model, step)
    for name, found in average.average().items():
        expected = AVERAGES[kind]([s[name].double().numpy() for s in seen])
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=2e-5, atol=1e-5)
    average.end(model)
    assert model.state_dict()["1.num_batches_tracked"].dtype == torch.int64
    np.testing.assert_allclose(
        model[0].weight.detach().numpy(), average.average()["0.weight"].float(), rtol=1e-6
    )


def test_it_acts_when_it_is_time_and_not_at_other_times() -> None:
    model = net()
    by_step = merge.WeightAverage(every=4, on="step", start=5)
    by_epoch = merge.WeightAverage(every=2)
    for step in range(1, 21):
        by_step.step(model, step)
        by_epoch.step(model, step)
    for epoch in range(1, 6):
        by_step.epoch(model, epoch)
        by_epoch.epoch(model, epoch)
    assert (by_step.count, by_epoch.count) == (4, 2)  # steps 8, 12, 16, 20; epochs 2, 4


def test_an_average_of_half_precision_is_kept_in_single() -> None:
    model = nn.Linear(3, 3).bfloat16()
    average = merge.WeightAverage("ema", on="step", decay=0.999)
    for step in range(1, 200):
        average.step(model, step)
        with torch.no_grad():
            model.weight.add_(2**-6)
    assert average.average()["weight"].dtype == torch.float32
    before = model.weight.dtype
    average.end(model)
    assert model.weight.dtype == before


def test_an_average_goes_on_after_a_restart() -> None:
    for kind in AVERAGES:
        model, first = net(), merge.WeightAverage(kind, on="step", window=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(1, 5):
            trained(model, optimizer, step)
            first.step(model, step)
        second = merge.WeightAverage(kind, on="step", window=3)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        trained(model, optimizer, 9)
        for average in (first, second):
            average.step(model, 5)
        torch.testing.assert_close(first.average(), second.average(), rtol=0, atol=0)


def test_batch_norm_is_measured_anew_on_data() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = [data(s)[0] for s in range(5)]
    average = merge.WeightAverage(on="step", batches=batches)
    for step in range(1, 9):
        trained(model, optimizer, step)
        average.step(model, step)
    average.end(model)
    norm = model[1]
    inputs = [model[0](x).detach() for x in batches]
    means = torch.stack([x.mean(0) for x in inputs]).mean(0)
    variances = torch.stack([x.var(0) for x in inputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.1
    assert model.training
    assert merge.recalibrate(nn.Linear(2, 2), batches) == 0
    with pytest.raises(merge.PlanError, match="no data to measure"):
        merge.recalibrate(model, [])


@pytest.mark.parametrize(
    "wrong", [{"kind": "mean"}, {"on": "batch"}, {"decay": 1.0}, {"window": 0}, {"every": 0}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(merge.RecipeError):
        merge.WeightAverage(**wrong)


def test_nothing_averaged_is_told_and_leaves_the_network() -> None:
    model, average = net(), merge.WeightAverage(start=9)
    before = copied(model)
    average.end(model)
    torch.testing.assert_close(copied(model), before)
    with pytest.raises(merge.PlanError, match="nothing to average"):
        average.average()


# -- the anchor ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_pull_is_the_formula_in_double_precision(kind: str, adaptive: bool) -> None:
    model = net().double()
    start = copied(model)
    twin = copy.deepcopy(model)
    wd, rate = 1e-3, 1e-2
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    other = torch.optim.AdamW(twin.parameters(), lr=rate, weight_decay=0.0)
    merge.AnchorDecay(start, weight_decay=wd, kind=kind, adaptive=adaptive).begin(model, optimizer)
    for step in range(1, 6):
        x, y = data(step)
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            nn.functional.cross_entropy(m(x.double()), y).backward()
            o.step()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                moment = (other.state[p]["exp_avg_sq"] / (1 - 0.999**step)).mean().sqrt()
                w = wd * rate / (float(moment) + 1e-8) if adaptive else wd * rate
                d = p - start[name]
                p -= min(w, 1.0) * d if kind == "l2" else d.clamp(-w, w)
    torch.testing.assert_close(copied(model), copied(twin), rtol=1e-9, atol=1e-12)
    assert any(not torch.equal(t, start[n]) for n, t in model.state_dict().items())


def test_the_anchor_is_held_and_not_copied_and_let_go_at_the_end() -> None:
    model = net()
    start = copied(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    decay = merge.AnchorDecay(start, weight_decay=1e9)
    decay.begin(model, optimizer)
    assert {t.data_ptr() for t in decay._goals.values()} <= {t.data_ptr() for t in start.values()}
    trained(model, optimizer, 1)
    torch.testing.assert_close(dict(model.named_parameters())["0.weight"], start["0.weight"])
    decay.end(model)
    trained(model, optimizer, 2)
    assert not torch.equal(model[0].weight, start["0.weight"])


def test_an_anchor_that_does_not_fit_is_refused() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(merge.PlanError, match="none of the network's weights"):
        merge.AnchorDecay({"x": torch.ones(1)}).begin(model, sgd)
    with pytest.raises(merge.PlanError, match="another shape"):
        merge.AnchorDecay({"0.weight": torch.ones(1)}).begin(model, sgd)
    merge.AnchorDecay(copied(model)).begin(model, sgd)
    with pytest.raises(merge.PlanError, match="no second moments"):
        trained(model, sgd, 1)


# -- replicas --------------------------------------------------------------------------------------
def stock(models: list[Tensor], base: Tensor) -> Tensor:
    """Model Stock's formula in float64, of two models."""
    a, b = (m.double() - base.double() for m in models)
    c = max(0.0, float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-6)))
    return base.double() + 2 * c / (1 + c) * (a + b) / 2


def test_replicas_go_on_from_model_stock_over_the_first_anchor_with_moments_of_their_own() -> None:
    start = net()
    anchor = copied(start)
    replicas = [copy.deepcopy(start) for _ in range(2)]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in replicas]
    merging = merge.PeriodicMerge(anchor=anchor, replicas=replicas)
    for epoch in range(1, 4):
        for k, (model, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            trained(model, optimizer, 10 * k + epoch, steps=3)
        apart = [copied(m) for m in replicas]
        moments = [copy.deepcopy(o.state_dict()["state"]) for o in optimizers]
        pointers = [p.data_ptr() for p in replicas[0].parameters()]
        merging.epoch(replicas[0], epoch)
        for name, base in anchor.items():
            if base.is_floating_point():
                expected = stock([s[name] for s in apart], base)
                for model in replicas:
                    found = model.state_dict()[name].double()
                    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert [p.data_ptr() for p in replicas[0].parameters()] == pointers
        for before, optimizer in zip(moments, optimizers, strict=True):
            torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
    assert not torch.equal(
        optimizers[0].state_dict()["state"][0]["exp_avg"],
        optimizers[1].state_dict()["state"][0]["exp_avg"],
    )


def test_replicas_may_be_merged_by_any_method() -> None:
    replicas = [net(k) for k in range(3)]
    before = [copied(m) for m in replicas]
    merge.PeriodicMerge(replicas=replicas, method="linear", weight=1.0).epoch(replicas[0], 1)
    for name in before[0]:
        if "num_batches" not in name:
            mean = sum(s[name] for s in before) / 3
            torch.testing.assert_close(replicas[1].state_dict()[name], mean)
    with pytest.raises(merge.PlanError, match="needs the anchor"):
        merge.PeriodicMerge(replicas=replicas)
    with pytest.raises(merge.PlanError, match="no replicas"):
        merge.PeriodicMerge(anchor=before[0]).epoch(replicas[0], 1)
    with pytest.raises(merge.PlanError, match="the anchor lacks") as caught:
        merge.PeriodicMerge(anchor={"x": torch.ones(1)}, replicas=replicas).epoch(replicas[0], 1)
    assert caught.value.where["tensor"] == "0.weight"


RANK = """
import sys, torch, merge
from torch import distributed
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
anchor = {n: t.clone() for n, t in model.state_dict().items()}
torch.manual_seed(1 + rank)
with torch.no_grad():
    for p in model.parameters():
        p.add_(torch.rand_like(p))
own = {n: t.clone() for n, t in model.state_dict().items()}
merge.PeriodicMerge(anchor=anchor).epoch(model, 1)
torch.save({"anchor": anchor, "own": own, "merged": model.state_dict()}, sys.argv[3])
distributed.destroy_process_group()
"""


def test_processes_are_replicas_too(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(k), str(tmp_path / "meet"), str(tmp_path / f"{k}.pt")]
        )
        for k in range(2)
    ]
    assert [r.wait(timeout=120) for r in runs] == [0, 0]
    found = [torch.load(tmp_path / f"{k}.pt") for k in range(2)]
    for name, base in found[0]["anchor"].items():
        expected = stock([f["own"][name] for f in found], base)
        for f in found:
            torch.testing.assert_close(f["merged"][name].double(), expected, rtol=1e-5, atol=1e-6)


# -- the end of a run ------------------------------------------------------------------------------
def test_the_difference_is_saved_and_handed_on(tmp_path: Path) -> None:
    model = net()
    base = copied(model)
    trained(model, torch.optim.SGD(model.parameters(), lr=0.5), 3)
    pushed: list[Path] = []
    done = merge.PushDelta(base, tmp_path / "delta", push=pushed.append)
    floats = {n: t for n, t in base.items() if t.is_floating_point()}
    done.base = {**floats, "1.num_batches_tracked": model.state_dict()["1.num_batches_tracked"]}
    done.end(model)
    assert pushed == [tmp_path / "delta"]
    delta = merge.open(tmp_path / "delta")
    assert delta.space == "delta"
    again = (merge.open(done.base) + delta).state_dict()
    torch.testing.assert_close(dict(again), copied(model), rtol=1e-6, atol=1e-7)


def test_the_best_point_of_the_way_back_is_taken_and_reported() -> None:
    model = net()
    start = copied(model)
    trained(model, torch.optim.SGD(model.parameters(), lr=2.0), 1, steps=5)
    end = copied(model)
    x, y = data(99, 200)
    sweep = merge.WiseSweep(start, lambda m: m(x), y, alphas=[0.25, 0.5, 0.75], max_flips=0.05)
    sweep.end(model)
    report = sweep.report
    assert report is not None
    assert model.training
    answers = {}
    for a in (0.0, 0.25, 0.5, 0.75, 1.0):
        probe = net().eval()
        probe.load_state_dict(
            {
                n: start[n] + a * (t - start[n]) if t.is_floating_point() else t
                for n, t in end.items()
            }
        )
        answers[a] = probe(x).argmax(-1) == y
    for point in report.points:
        right = answers[point.alpha]
        assert point.accuracy == pytest.approx(float(right.float().mean()))
        assert point.negative == pytest.approx(float((answers[0.0] & ~right).float().mean()))
    allowed = [p for p in report.points if p.negative <= 0.05]
    assert report.chosen.accuracy == max(p.accuracy for p in allowed)
    a = report.chosen.alpha
    torch.testing.assert_close(
        model[0].weight.detach(), torch.lerp(start["0.weight"], end["0.weight"], a)
    )


# -- the Trainer -----------------------------------------------------------------------------------
def test_the_trainer_of_transformers_runs_them_all(tmp_path: Path) -> None:
    """The average is of the weights after each step, the pull is there, the push comes last."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    start = copied(model)
    rows = [
        {"input_ids": torch.randint(1, 40, (6,)), "labels": torch.tensor(i % 2)} for i in range(24)
    ]
    seen: list[State] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            seen.append(copied(known["model"]))

    pushed: list[Path] = []
    average = merge.WeightAverage("soup", on="step", start=2)
    epochs = merge.WeightAverage("soup", apply=False)
    parts = (
        merge.AnchorDecay(start, weight_decay=1e9),
        average,
        epochs,
        merge.PushDelta(tmp_path / "base", tmp_path / "delta", push=pushed.append),
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), num_train_epochs=2, per_device_train_batch_size=6,
        learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, callbacks=[Watch(), merge.trainer_callback(*parts)]
    )
    trainer.train()
    assert (len(seen), average.count, epochs.count) == (8, 7, 2)
    pulled = [n for n, t in seen[-1].items() if torch.allclose(t, start[n], atol=1e-6)]
    assert len(pulled) == len(start)  # so strong a pull leaves nothing
    mean = {n: torch.stack([s[n] for s in seen[1:]]).mean(0) for n in start}
    torch.testing.assert_close(copied(model), mean, rtol=1e-5, atol=1e-6)
    assert pushed == [tmp_path / "delta"]
    whole = (merge.open(tmp_path / "base") + merge.open(tmp_path / "delta")).state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(value, copied(model)[name], rtol=1e-5, atol=1e-6)
