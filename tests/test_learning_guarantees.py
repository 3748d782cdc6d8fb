"""What learning guarantees: resumption, oddities reported, statistics, ties, errors with names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import merge
from merge.learning.network import Network
from merge.learning.objectives import Contrastive, Negation
from merge.learning.prepare import preparation
from merge.learning.store import InMemory, Store
from merge.learning.threshold import thresholds

Names = dict[str, dict[str, Tensor]]


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh())
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def made(module: nn.Module, count: int = 2, scale: float = 1.0) -> tuple[dict[str, Tensor], Names]:
    torch.manual_seed(3)
    base = {
        n: t.detach().clone() for n, t in module.state_dict().items() if not n.startswith("head.")
    }
    experts = {
        f"task {i}": {
            n: t + scale * torch.randn_like(t) * (t.std() + 0.1) if t.is_floating_point() else t
            for n, t in base.items()
        }
        for i in range(count)
    }
    return base, experts


def task(
    seed: int, expert: dict[str, Tensor], net: nn.Module | None = None, **how: Any
) -> merge.Task:
    """A task whose labels are what the expert chooses on inputs of the task's own."""
    torch.manual_seed(50 + seed)
    net = Net() if net is None else net
    x = torch.randn(80, 6) + seed
    with torch.no_grad():
        y = torch.func.functional_call(net, expert, (x,)).argmax(1)
    given = {
        "train": [(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)],
        "validate": [(x[48:], y[48:])],
        **how,
    }
    return merge.Task(net, F.cross_entropy, **given)


def both(**how: Any) -> tuple[dict[str, Tensor], Names, dict[str, merge.Task]]:
    torch.manual_seed(4)
    base, experts = made(Net())
    tasks = {n: task(i, e, **how) for i, (n, e) in enumerate(experts.items())}
    return base, experts, tasks


QUICK: dict[str, Any] = {"steps": 20, "every": 5, "rebuild": 5, "granularity": "tensor"}


# -- states --------------------------------------------------------------------------------------
class Stops(Exception):
    pass


@pytest.mark.parametrize(
    "how",
    [
        {"batch": 8, "schedule": "cosine"},
        {"preset": "tinting++", "batch": 8},
        {"init": "tuned", "optimiser": "sgd", "clip": 0.1},
        {"objective": Negation(("task 0",)), "init": 0.0, "link": "identity"},
    ],
    ids=lambda h: "-".join(h),
)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    base, experts, tasks = both()
    whole = merge.learn(experts, base=base, tasks=tasks, **QUICK, **how)

    def stop(step: Any) -> None:
        if step.number == 13:
            raise Stops

    state = tmp_path / "learning.safetensors"
    settings = {"base": base, "tasks": tasks, "state": state, **QUICK, **how}
    with pytest.raises(Stops):
        merge.learn(experts, progress=stop, **settings)
    assert state.exists()
    resumed = merge.learn(experts, **settings)
    assert resumed.history == whole.history
    assert resumed.coefficients == whole.coefficients
    assert resumed.scores == whole.scores
    for name, own in whole.heads.items():
        for key, value in own.items():
            assert torch.equal(resumed.heads[name][key], value)
    finished = merge.learn(experts, **settings)  # nothing is left to do
    assert finished.coefficients == whole.coefficients


def test_a_state_of_other_settings_or_damaged_is_refused(tmp_path: Path) -> None:
    base, experts, tasks = both()
    state = tmp_path / "state"
    merge.learn(experts, base=base, tasks=tasks, state=state, **QUICK)
    with pytest.raises(merge.PlanError, match="other settings") as caught:
        merge.learn(experts, base=base, tasks=tasks, state=state, rate=0.5, **QUICK)
    assert caught.value.where["key"] == "rate"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(merge.SourceError, match="cannot be read"):
        merge.learn(experts, base=base, tasks=tasks, state=state, **QUICK)


class Breaks(Sequence[Any]):
    """Batches of which one cannot be loaded after it was asked for a few times."""

    def __init__(self, batches: Sequence[Any], good: int) -> None:
        self.batches, self.left = batches, good

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return self.batches[index]


def test_a_loader_that_raises_costs_nothing_that_was_found(tmp_path: Path) -> None:
    base, experts, tasks = both()
    bad = task(1, experts["task 1"])
    tasks["task 1"] = merge.Task(
        bad.module, F.cross_entropy, Breaks(bad.train, 20), validate=bad.validate
    )
    state = tmp_path / "state"
    with pytest.raises(merge.SourceError, match="loader raised") as caught:
        merge.learn(experts, base=base, tasks=tasks, state=state, **QUICK)
    assert caught.value.where["task"] == "task 1"
    assert "the disk is gone" in str(caught.value.found)
    good = merge.learn(
        experts, base=base, tasks={**tasks, "task 1": bad}, state=state, **{**QUICK, "steps": 20}
    )
    assert good.history[-1].number == 20


# -- oddities ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dead", "value"), [("init", 0.3), ("zero", 0.0), ("average", 0.5)])
def test_a_tensor_without_gradient_is_told_and_gets_its_fallback(dead: str, value: float) -> None:
    base, experts, tasks = both()
    found = merge.learn(experts, base=base, tasks=tasks, dead=dead, **{**QUICK, "candidates": ()})
    assert set(found.dead) == {"unused.weight", "unused.bias"}
    assert "without gradient: 2 tensors" in found.report()
    merged = found.checkpoint.state_dict()["unused.weight"]
    own = "unused.weight"
    deltas = sum(e[own] - base[own] for e in experts.values())
    torch.testing.assert_close(merged, base[own] + value * deltas)


def test_a_loss_that_is_not_finite_is_left_out_and_counted() -> None:
    base, experts, tasks = both()
    calls = iter(range(1000))

    def sometimes(out: Tensor, batch: Any, task: merge.Task, expert: Any) -> Tensor:
        loss = F.cross_entropy(out, batch[1])
        return loss * math.nan if next(calls) % 7 == 3 else loss

    found = merge.learn(experts, base=base, tasks=tasks, objective=sometimes, **QUICK)
    assert sum(found.skipped.values()) == 6
    values = [v for row in found.coefficients.table().values() for v in row.values()]
    assert all(map(math.isfinite, values))

    def never(out: Tensor, *_: Any) -> Tensor:
        return out.sum() * math.nan

    with pytest.raises(merge.ScoreError, match="steps in a row") as caught:
        merge.learn(experts, base=base, tasks=tasks, objective=never, **{**QUICK, "steps": 30})
    assert caught.value.where["task"] == "task 0"


def test_a_gate_that_lets_nothing_through_costs_nothing() -> None:
    from merge.learning.objectives import PseudoLabels

    base, experts, tasks = both()
    gate = PseudoLabels(least=1.1)
    found = merge.learn(experts, base=base, tasks=tasks, objective=gate, **QUICK)
    assert all(v == 0.0 for s in found.history for v in s.losses.values())
    assert not found.skipped


def test_the_module_is_left_as_it_was_and_runs_in_evaluation_mode() -> None:
    class Drops(Net):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return super().forward(F.dropout(x, 0.9, self.training))

    base, experts = made(Net())
    net = Drops().train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    tasks = {n: task(i, e) for i, (n, e) in enumerate(experts.items())}
    tasks = {n: merge.Task(net, t.criterion, t.train) for n, t in tasks.items()}
    merge.learn(experts, base=base, tasks=tasks, **QUICK)
    assert net.training
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.one(x)).tanh())
        return out


@pytest.mark.parametrize("buffers", ["base", "mean", "recalibrate"])
def test_statistics_of_batchnorm(buffers: str) -> None:
    """The base's, the mean, or what data says of the merged model: outputs then are centred."""
    base, experts = made(Normed())
    for expert in experts.values():
        expert["norm.running_var"] = expert["norm.running_var"].abs() + 5.0
    tasks = {n: task(i, e, Normed()) for i, (n, e) in enumerate(experts.items())}
    found = merge.learn(
        experts, base=base, tasks=tasks, buffers=buffers, **{**QUICK, "candidates": ()}
    )
    state = found.checkpoint.state_dict()
    key = "norm.running_var"
    if buffers == "base":
        torch.testing.assert_close(state[key], base[key])
    elif buffers == "mean":
        mean = sum(e[key] for e in experts.values()) / len(experts)
        torch.testing.assert_close(state[key], mean)
    else:
        x = torch.cat([b[0] for t in tasks.values() for b in t.train])
        before = F.linear(x, state["one.weight"], state["one.bias"])
        centred = (before - state["norm.running_mean"]).mean(0)
        assert float(centred.abs().max()) < 1e-5
        rows = [b[0] for t in tasks.values() for b in t.train]
        each = [F.linear(r, state["one.weight"], state["one.bias"]).var(0) for r in rows]
        torch.testing.assert_close(state[key], torch.stack(each).mean(0))
    assert int(state["norm.num_batches_tracked"]) == int(base["norm.num_batches_tracked"])


class Images(nn.Module):
    """A convolution without a bias of its own before BatchNorm: its scale is of no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
        return out


def test_measuring_anew_restores_a_merged_cnn_and_the_bases_statistics_do_not() -> None:
    """Experts are the base with kernels 9 and 3 times as large, which BatchNorm undoes; their merge
    is one of 6 times, and computes what the base does as soon as its statistics are its own."""
    torch.manual_seed(1)
    net = Images().eval()
    x = torch.randn(96, 2, 6, 6)
    with torch.no_grad():
        net.norm.running_mean.copy_(net.conv(x).mean((0, 2, 3)))
        net.norm.running_var.copy_(net.conv(x).var((0, 2, 3)))
        wanted = net(x)
    base = {n: t.clone() for n, t in net.state_dict().items() if not n.startswith("head.")}
    scaled = {"conv.weight": 1, "norm.running_mean": 1, "norm.running_var": 2}
    experts = {
        k: {n: t * f ** scaled[n] if n in scaled else t for n, t in base.items()}
        for k, f in (("a", 9.0), ("b", 3.0))
    }
    y = wanted.argmax(1)
    tasks = {k: merge.Task(net, F.cross_entropy, [(x, y)], validate=[(x, y)]) for k in "ab"}
    how: dict[str, Any] = {"init": 0.5, "steps": 0, "candidates": ("start",)}
    found = {
        b: merge.learn(experts, base=base, tasks=tasks, buffers=b, **how)
        for b in ("base", "recalibrate")
    }
    with torch.no_grad():
        away = {b: float((f.module("a").eval()(x) - wanted).abs().max()) for b, f in found.items()}
    assert away["recalibrate"] < 1e-3 < 0.3 < away["base"]
    assert found["recalibrate"].scores[0].score == 1.0
    assert any("BatchNorm" in n and "recalibrate" in n for n in found["base"].notes)
    assert not any("BatchNorm" in n for n in found["recalibrate"].notes)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 6)
        self.out = nn.Linear(6, 10, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.emb(x).tanh())
        return out


def test_tied_tensors_are_merged_once() -> None:
    torch.manual_seed(0)
    net = Tied()
    base = net.state_dict()
    moved = base["emb.weight"] + 0.1 * torch.randn(10, 6)
    expert = {"emb.weight": moved, "out.weight": moved}
    x = torch.arange(10)
    data = [(x, (x * 3) % 10)]
    one = merge.Task(net, F.cross_entropy, data, validate=data)
    found = merge.learn(
        {"a": expert}, base=net, tasks={"a": one}, objective="cross_entropy", **QUICK
    )
    assert found.coefficients.tensors == ("emb.weight",)
    state = found.checkpoint.state_dict()
    assert state["emb.weight"].data_ptr() == state["out.weight"].data_ptr()


def test_half_precision_is_merged_in_float32() -> None:
    """The error of a bfloat16 merge is that of one rounding."""
    base, experts, tasks = both()
    short = {n: t.bfloat16() for n, t in base.items()}
    models = {k: {n: t.bfloat16() for n, t in e.items()} for k, e in experts.items()}
    found = merge.learn(models, base=short, tasks=tasks, **{**QUICK, "candidates": ()})
    for name, value in found.checkpoint.state_dict().items():
        rows = found.coefficients.block_of(name).values
        truth = short[name].double()
        for (c,), model in zip(rows, models.values(), strict=True):
            truth = truth + c * (model[name].double() - short[name].double())
        assert (
            torch.equal(value, truth.float().bfloat16())
            or float(((value.double() - truth) / truth).abs().max()) <= 2**-8
        )


def built(experts: Names, base: dict[str, Tensor], known: merge.Coefficients) -> dict[str, Tensor]:
    """The merged tensors as they are made while learning."""
    from dataclasses import replace

    source = InMemory(base, list(experts.values()))
    prepare = preparation(known.prepare, known.seed)
    if prepare.overall:
        prepare = replace(prepare, thresholds=thresholds(source, list(base), prepare.value))
    network = Network(Store(source, prepare), known.tensors)
    rows = {n: torch.tensor(known.block_of(n).values).double() for n in known.tensors}
    network.build(rows, {n: known.block_of(n).kind for n in known.tensors})
    return {n: t.detach() for n, t in network.theta.items()}


# -- presets -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "preset",
    ["adamerging", "adamerging:task", "adamerging++", "atlas", "atlas:partition", "atlas:few_shot",
     "tinting", "tinting++", "spectral_gates", "darex", "pseudo_labels"],
)  # fmt: skip
def test_presets_run_and_never_lose_to_their_candidates(preset: str) -> None:
    base, experts, tasks = both()
    found = merge.learn(experts, base=base, tasks=tasks, preset=preset, steps=6, every=3)
    chosen = next(c for c in found.scores if c.name == found.chosen)
    assert chosen.score == max(c.score for c in found.scores)
    assert len(found.history) == 6
    if preset.startswith("tinting"):
        assert {n for h in found.heads.values() for n in h} == {"head.weight", "head.bias"}


def test_surgery_brings_features_to_those_of_the_experts() -> None:
    """The merge stays as it is; the correction is exported as a part of a module that runs."""
    base, experts, tasks = both()
    found = merge.learn(
        experts, base=base, tasks=tasks, preset="surgery", surgery="body", steps=150, every=50,
        candidates=("start",), free_rate=1e-2, surgery_rank=4,
    )  # fmt: skip
    losses = [sum(s.losses.values()) for s in found.history]
    assert losses[-1] < 0.7 * losses[0]
    state = found.checkpoint.state_dict()
    for i, (name, task) in enumerate(tasks.items()):
        deltas = sum(e["body.0.weight"] - base["body.0.weight"] for e in experts.values())
        torch.testing.assert_close(state["body.0.weight"], base["body.0.weight"] + 0.3 * deltas)
        module = found.module(name)
        x = task.train[0][0]
        with torch.no_grad():
            z = module.body(x)
            expert = torch.func.functional_call(Net().body, _inside(experts[name]), (x,))
            plain = torch.func.functional_call(Net().body, _inside(state), (x,))
            assert float((z - expert).abs().mean()) < float((plain - expert).abs().mean())
            torch.testing.assert_close(module(x), task.module.head(z))
        assert {"surgery.down", "surgery.up"} <= module.state_dict().keys()
        assert i < 2
    with pytest.raises(merge.PlanError, match="no such layer"):
        merge.learn(experts, base=base, tasks=tasks, preset="surgery", surgery="boddy")
    with pytest.raises(merge.PlanError, match="no such task") as caught:
        found.module("task 9")
    assert "did you mean" in str(caught.value)


def _inside(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("body."): t for n, t in state.items() if n.startswith("body.")}


def test_teachers_may_be_others_than_the_experts() -> None:
    """A merge that is one operand, and what it learns from: the experts it was made of."""
    base, experts, tasks = both()
    merged = merge.ties(list(experts.values()), base=base, weight=1.0, density=0.5)
    found = merge.learn(
        {"ties": merged}, base=base, tasks=tasks, teachers=experts, **QUICK, init=1.0
    )
    assert found.coefficients.operands == ("ties",)
    assert len(found.history) == QUICK["steps"]
    again = merge.learn(
        {"ties": merged - merge.open(base)}, base=base, tasks=tasks, teachers=experts, **QUICK,
        init=1.0,
    )  # fmt: skip
    for (b, row), (_, other) in zip(
        found.coefficients.table().items(), again.coefficients.table().items(), strict=True
    ):
        assert abs(row["ties"] - other["ties"]) < 1e-3, b


def test_negation_forgets_and_keeps_the_control_floor() -> None:
    """The control is what the base does: whatever is forgotten may cost only so much of it."""
    base, experts, tasks = both()
    net = tasks["task 0"].module
    x = 4 * torch.randn(96, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        y = torch.func.functional_call(net, base, (x,)).argmax(1)
    control = merge.Task(net, F.cross_entropy, [(x[:48], y[:48])], validate=[(x[48:], y[48:])])
    pool = {"task 0": experts["task 0"]}
    forgotten = {}
    for floor in (0.0, 0.9, 1.0):
        found = merge.learn(
            pool,
            base=base,
            tasks={"task 0": tasks["task 0"], "control": control},
            preset="atlas:negation",
            objective=Negation(floor=floor),
            rate=0.05,
            steps=40,
            every=5,
            batch=None,
        )
        first = next(c for c in found.scores if c.name == "base")
        one = next(c for c in found.scores if c.name == found.chosen)
        assert first.tasks["control"] == 1.0
        assert one.tasks["control"] >= floor
        assert one.tasks["task 0"] <= first.tasks["task 0"]
        for c in found.scores:
            assert c.allowed == (c.tasks["control"] >= floor)
        assert any(not c.allowed for c in found.scores) or floor == 0.0
        assert one.score == max(c.score for c in found.scores if c.allowed)
        forgotten[floor] = one.tasks["task 0"]
    assert forgotten[0.0] <= forgotten[0.9] <= forgotten[1.0]
    assert forgotten[0.0] < forgotten[1.0]


def test_self_positioning_finds_simplex_weights_by_contrast() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8))
    base = {n: t.clone() for n, t in body.state_dict().items()}
    experts = {k: {n: t + 0.3 * torch.randn_like(t) for n, t in base.items()} for k in "ab"}
    x = torch.randn(64, 6)
    pairs = [(x[i : i + 32], x[i : i + 32] + 0.05 * torch.randn(32, 6)) for i in (0, 32)]
    tasks = {k: merge.Task(body, F.cross_entropy, pairs, validate=pairs) for k in "ab"}
    found = merge.learn(
        experts, base=base, tasks=tasks, preset="self_positioning", steps=20, candidates=("start",)
    )
    rows = [v for block in found.coefficients.blocks.values() for (v,) in block.values]
    assert all(v > 0 for v in rows)
    with pytest.raises(merge.PlanError, match="no other inputs"):
        lone = {k: merge.Task(body, F.cross_entropy, [(x[:1], x[:1])]) for k in "ab"}
        merge.learn(experts, base=base, tasks=lone, objective=Contrastive(), steps=1)


def test_a_learned_soup_weighs_models_of_one_task() -> None:
    base, experts, tasks = both()
    short: dict[str, Any] = {"steps": 40, "candidates": ()}
    found = merge.learn(experts, base=base, tasks=[tasks["task 0"]], preset="soup", **short)
    values = found.coefficients.table()["all"]
    assert values["task 0"] > values["task 1"]  # the labels are those of its expert


@pytest.mark.parametrize(
    "how",
    [
        {"granularity": "row"},
        {"granularity": "partition:4"},
        {"granularity": "tensor", "prepare": "dare:0.5", "link": "identity"},
        {"granularity": "tensor", "prepare": "ties:0.3:global"},
        {"granularity": "singular", "prepare": "tsv", "init": 1.5, "link": "identity"},
        {"granularity": "singular+row", "prepare": "tsv", "init": 1.5, "link": "identity"},
        {"granularity": "singular", "prepare": "cart:0.3", "init": 1.0, "link": "identity"},
    ],
    ids=str,
)
def test_a_vocabulary_is_merged_in_runs_of_bounded_memory(how: dict[str, Any]) -> None:
    """A tensor far larger than the others: what is saved is what was scored, and it fits."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.body = nn.Embedding(60_000, 48), nn.Linear(48, 40)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(self.emb(x)).tanh()
            return out

    torch.manual_seed(0)
    net = Words()
    base = {n: t.detach().clone() for n, t in net.state_dict().items()}
    experts = {k: {n: t + 0.1 * torch.randn_like(t) for n, t in base.items()} for k in "abcdef"}
    x = torch.arange(0, 60_000, 997)
    tasks = {k: merge.Task(net, F.cross_entropy, [(x, None)]) for k in experts}
    found = merge.learn(experts, base=base, tasks=tasks, steps=2, rate=0.05, **how)
    checkpoint = found.checkpoint
    assert checkpoint.plan(memory="256MiB")
    state = checkpoint.state_dict()
    truth = built(experts, base, found.coefficients)
    for name, value in truth.items():
        torch.testing.assert_close(state[name], value)
    assert not torch.equal(state["emb.weight"], base["emb.weight"])


# -- bad input -----------------------------------------------------------------------------------
def refused(match: str, what: type[merge.MergeError] = merge.PlanError, **how: Any) -> Any:
    """The error of learning with a second task that is wrong."""
    base, experts, tasks = both()
    given = {"objective": "cross_entropy", **QUICK, **how.pop("settings", {})}
    good = tasks["task 1"]
    own = {"module": good.module, "criterion": good.criterion, "train": good.train, **how}
    tasks["task 1"] = merge.Task(**own)
    with pytest.raises(what, match=match) as caught:
        merge.learn(experts, base=base, tasks=tasks, **given)
    assert caught.value.where.get("task") == "task 1"
    return caught.value


def raising() -> Iterator[Any]:
    yield torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    raise ValueError("line 7 is no JSON")


def test_bad_data_is_refused_with_the_name_of_its_task() -> None:
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    refused("no data to learn on", train=[])
    refused("out of range", train=[(x, y + 1)])
    refused("out of range", train=[(x, y - 1)])
    refused("of one class", train=[(x, torch.zeros(8).long())])
    refused("not one target for each input", train=[(x, y[:3])])
    refused("no labels", train=[(x, y.float())])
    refused("no labels", train=[(x, None)])
    refused("not a pair", train=[(x, y, y)])
    refused("loader raised", merge.SourceError, train=raising())
    refused("cannot be run on its data", train=[(torch.randn(8, 5), y)])
    refused("a batch is empty", train=[(x[:0], y[:0])])


def test_a_task_without_a_head_or_of_one_class_is_refused() -> None:
    class Headless(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"features": self.body(x)}

    refused("no head", module=Headless(), settings={"objective": "entropy"})
    refused("does not choose between classes", module=Net(1), settings={"objective": "entropy"})
    with torch.device("meta"):
        empty = Net()
    refused("no head", module=empty)
    whole = nn.Module()
    whole.body = Net().body
    whole.forward = lambda x: whole.body(x)  # type: ignore[method-assign]
    refused(
        "no head to learn", module=whole, settings={"preset": "tinting", "objective": "entropy"}
    )


def test_wrong_words_are_refused_with_the_nearest() -> None:
    base, experts, tasks = both()
    for how, key in (
        ({"granularity": "leyer"}, "granularity"),
        ({"objective": "entropi"}, "objective"),
        ({"preset": "adamergin"}, "preset"),
        ({"stepz": 3}, "stepz"),
        ({"memory": "disk"}, "memory"),
        ({"prepare": "ties:2"}, "prepare"),
        ({"link": "clam"}, "link"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"init": {"task 0": 0.3, "task one": 0.2}}, "init"),
        ({"granularity": "partition"}, "granularity"),
        ({"granularity": "singular"}, "granularity"),
        ({"freeze": (".*",)}, "freeze"),
    ):
        with pytest.raises((merge.RecipeError, merge.PlanError)) as caught:
            merge.learn(experts, base=base, tasks=tasks, **how)
        assert caught.value.where["key"] == key, how


def test_coefficients_of_other_models_are_refused(tmp_path: Path) -> None:
    base, experts, tasks = both()
    found = merge.learn(experts, base=base, tasks=tasks, **QUICK)
    file = tmp_path / "c.json"
    file.write_text(found.coefficients.to_json())
    assert merge.apply_coefficients(file, list(experts.values()), base).state_dict()
    with pytest.raises(merge.PlanError, match="other experts"):
        merge.apply_coefficients(file, [base], base)
    fewer = {n: t for n, t in base.items() if n != "body.0.weight"}
    with pytest.raises(merge.PlanError, match="not every model has it") as caught:
        merge.apply_coefficients(file, [fewer, fewer], fewer)
    assert caught.value.where["tensor"] == "body.0.weight"
    file.write_text("{}")
    with pytest.raises(merge.SourceError, match="no file of coefficients"):
        merge.apply_coefficients(file, experts, base)
