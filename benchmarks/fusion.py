"""What fusion by transport is good for: widths, depths and classes apart, on scikit-learn's digits.

    python benchmarks/fusion.py [--seeds 5]

Perceptrons with two hidden layers, of 64 and 32 units, are carried over into one another by both
maps of a plan and by one map for both sides; networks that saw other classes are fused; a network
with two hidden layers is fused with one of four. The last table holds time and peak memory against
the same fusion written with POT's primitives, layer by layer, and against the plain average.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from report import save, table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import merge
from merge.symmetry.axes import parse_axis
from merge.symmetry.spec import GroupSpec, Spec
from merge.transport import mapped
from merge.transport.coupling import Coupling
from merge.transport.plans import Plan

State = dict[str, Tensor]
TRAIN = 1300


def digits() -> tuple[Tensor, Tensor]:
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    scaled = (images - images.mean(0)) / images.std()
    return torch.tensor(scaled[order], dtype=torch.float32), torch.tensor(classes[order])


X, Y = digits()


def perceptron(sizes: list[int], seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        layers += ([nn.ReLU()] if i else []) + [nn.Linear(n, m)]
    return nn.Sequential(*layers)


def spec_of(layers: int) -> Spec:
    """A chain of linear maps with ReLU between them."""
    tensors = {}
    for i in range(layers):
        out = "_out" if i == layers - 1 else f"f{i}"
        axes = (parse_axis(out), parse_axis(f"f{i - 1}*" if i else "_in"))
        tensors[f"{2 * i}.weight"], tensors[f"{2 * i}.bias"] = axes, axes[:1]
    groups = {f"f{i}": GroupSpec(f"f{i}", "PD") for i in range(layers - 1)}
    return Spec("perceptron", groups, tensors)


def train(module: nn.Sequential, seed: int, epochs: int, mask: Tensor | None = None) -> None:
    """Adam on batches of 64, of all training samples or of those in the mask."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (X[:TRAIN], Y[:TRAIN]) if mask is None else (X[:TRAIN][mask], Y[:TRAIN][mask])
    adam = torch.optim.Adam(module.parameters(), 1e-3, weight_decay=1e-4)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=draw).split(64):
            adam.zero_grad()
            nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()
            adam.step()


def tune(module: nn.Sequential, seed: int) -> None:
    """Three epochs in batches of 32, the rate falling to nothing."""
    draw = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(module.parameters(), 2e-3, weight_decay=1e-4)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.02, 3 * -(-TRAIN // 32))
    for _ in range(3):
        for batch in torch.randperm(TRAIN, generator=draw).split(32):
            adam.zero_grad()
            nn.functional.cross_entropy(module(X[batch]), Y[batch]).backward()
            adam.step()
            falling.step()


def judge(state: State, sizes: list[int]) -> tuple[float, float]:
    """Loss and share right on the test set."""
    module = perceptron(sizes)
    module.load_state_dict(state)
    with torch.no_grad():
        out = module(X[TRAIN:])
    right = (out.argmax(1) == Y[TRAIN:]).float().mean()
    return float(nn.functional.cross_entropy(out, Y[TRAIN:])), float(right)


def task_of(module: nn.Module) -> merge.Task:
    return merge.Task(module, nn.functional.cross_entropy, [(X[:TRAIN], Y[:TRAIN])])


def one_map(coupling: Coupling) -> Coupling:
    """Both sides moved by the map of what is written: OTFusion's one normalised plan."""

    class Single(Plan):
        @property
        def into(self) -> np.ndarray:
            return self.out

    plan = coupling.plan
    return replace(coupling, plan=Single(plan.mass, plan.a, plan.b))


def single(models: list[nn.Module], into: nn.Module, **options: object) -> State:
    """The same fusion with the same plans, by the one map."""
    real = mapped.carried

    def carried(checkpoint, source, target, couplings, factors=None):  # type: ignore[no-untyped-def]
        return real(
            checkpoint, source, target, {g: one_map(c) for g, c in couplings.items()}, factors
        )

    with mock.patch("merge.fusing.carried", carried):
        return merge.fuse(models, into=into, **options).state_dict()  # type: ignore[arg-type]


def mean_and_spread(values: list[float], digits: int = 3) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +- {spread:.{digits}f}"


MANNERS: tuple[tuple[str, dict[str, object]], ...] = (
    ("weights, exact", {}),
    ("weights, soft (0.02)", {"regularisation": 0.02}),
    ("activations, exact", {"by": "activations"}),
    ("activations, soft (0.02)", {"by": "activations", "regularisation": 0.02}),
)


def widths(seeds: int) -> list[list[str]]:
    """Loss and accuracy of 64 units moved into 32, and 32 into 64."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def note(direction: str, what: str, state: State, sizes: list[int]) -> None:
        found.setdefault((direction, what), []).append(judge(state, sizes))

    wide, narrow = [64, 64, 64, 10], [64, 32, 32, 10]
    for seed in range(seeds):
        one, two = perceptron(wide, seed), perceptron(narrow, 100 + seed)
        train(one, seed, 25)
        train(two, 100 + seed, 25)
        for name, moving, into, old, sizes in (
            ("64 into 32", one, two, wide, narrow),
            ("32 into 64", two, one, narrow, wide),
        ):
            note(name, "the moving parent", moving.state_dict(), old)
            note(name, "the parent it goes into", into.state_dict(), sizes)
            both = [moving, into]
            for kind, options in MANNERS:
                data = [task_of(m) for m in both] if "by" in options else None
                for word, weights in (("map", [1, 0]), ("mid-point", [1, 1])):
                    every = {"weights": weights, "symmetry": spec_of(3), "data": data, **options}
                    fused = merge.fuse(both, into=into, **every)  # type: ignore[arg-type]
                    note(name, f"{word}, two maps, {kind}", fused.state_dict(), sizes)
                    note(name, f"{word}, one map, {kind}", single(both, into, **every), sizes)
    return [
        [name, what, *(mean_and_spread([v[k] for v in values]) for k in range(2))]
        for (name, what), values in found.items()
    ]


def classes(seeds: int) -> list[list[str]]:
    """Parents that saw digits 0 to 4 and 5 to 9, and a tenth of all."""
    found: dict[str, list[float]] = {}
    sizes, spec = [64, 64, 64, 10], spec_of(3)
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        shared = torch.rand(TRAIN, generator=draw) < 0.1
        parents = []
        for half in range(2):
            module = perceptron(sizes, seed + 50 * half)
            train(module, seed + half, 25, shared | (Y[:TRAIN] // 5 == half))
            parents.append(module)
            found.setdefault(f"parent of {5 * half} to {5 * half + 4}", []).append(
                judge(module.state_dict(), sizes)[1]
            )
        found.setdefault("plain average", []).append(
            judge(merge.average(parents).state_dict(), sizes)[1]
        )
        for name, options in MANNERS:
            data = [task_of(m) for m in parents] if "by" in options else None
            fused = merge.fuse(parents, symmetry=spec, data=data, **options)  # type: ignore[arg-type]
            found.setdefault(f"transport by {name}", []).append(judge(fused.state_dict(), sizes)[1])
        with torch.no_grad():
            logits = sum(p(X[TRAIN:]) for p in parents)
        right = (logits.argmax(1) == Y[TRAIN:]).float().mean()  # type: ignore[union-attr]
        found.setdefault("ensemble of both", []).append(float(right))
    return [[name, mean_and_spread(values)] for name, values in found.items()]


def depths(seeds: int) -> list[list[str]]:
    """Two hidden layers against four, fused into either, then three epochs of fine-tuning."""
    found: dict[str, list[float]] = {}

    def note(what: str, value: float) -> None:
        found.setdefault(what, []).append(value)

    short, long = [64, 64, 64, 10], [64, 64, 64, 64, 64, 10]
    for seed in range(seeds):
        two, four = perceptron(short, seed), perceptron(long, seed + 100)
        train(two, seed, 25)
        train(four, seed + 100, 25)
        better = max(judge(two.state_dict(), short)[1], judge(four.state_dict(), long)[1])
        note("the better parent", better)
        for into, moving, sizes, name in ((four, two, long, "four"), (two, four, short, "two")):
            data, spec = [task_of(moving), task_of(into)], spec_of(len(sizes) - 1)
            module = perceptron(sizes)
            if into is four:
                moved = merge.fuse([two, four], into=four, weights=[1, 0], symmetry=spec, data=data)
                module.load_state_dict(moved.state_dict())
                with torch.no_grad():
                    off = (module(X) - two(X)).abs().max() / two(X).abs().max()
                note("two put into four, largest relative deviation", float(off))
            fused = merge.fuse([moving, into], into=into, symmetry=spec, data=data)
            module.load_state_dict(fused.state_dict())
            note(f"fused into {name}", judge(fused.state_dict(), sizes)[1])
            tune(module, seed)
            tuned = judge(module.state_dict(), sizes)[1]
            note(f"fused into {name}, 3 epochs", tuned)
            note(f"fused into {name}, 3 epochs, above the better parent", tuned - better)
            fresh = perceptron(sizes, seed + 7)
            tune(fresh, seed)
            note(f"{name} from scratch, 3 epochs", judge(fresh.state_dict(), sizes)[1])
    return [
        [name, f"{max(values):.1e}" if "deviation" in name else mean_and_spread(values)]
        for name, values in found.items()
    ]


# -- time and memory -------------------------------------------------------------------------------
SPEED = [784, 2048, 2048, 10]


def fused_with_pot(a: State, b: State) -> State:
    """OTFusion by POT's primitives: squared distances of incoming weights, exact plans."""
    import ot

    out: State = {}
    before: np.ndarray | None = None
    last = len(SPEED) - 2
    for k in range(last + 1):
        ours, theirs = (s[f"{2 * k}.weight"].numpy().astype(np.float64) for s in (a, b))
        bias, other = (s[f"{2 * k}.bias"].numpy().astype(np.float64) for s in (a, b))
        if before is not None:
            ours = ours @ before * len(before)
        if k < last:
            full = [np.hstack([w, v[:, None]]) for w, v in ((ours, bias), (theirs, other))]
            cost = ot.dist(full[0], full[1])
            weights = [np.full(len(f), 1 / len(f)) for f in full]
            before = ot.emd(*weights, cost, numItermax=10_000_000)
            ours, bias = before.T @ ours * len(before), before.T @ bias * len(before)
        out[f"{2 * k}.weight"] = torch.from_numpy((ours + theirs) / 2).float()
        out[f"{2 * k}.bias"] = torch.from_numpy((bias + other) / 2).float()
    return out


def measured(how: str) -> None:
    """Fuse two perceptrons in this process, and print seconds and peak memory in MiB."""
    a, b = (perceptron(SPEED, s).state_dict() for s in (0, 1))
    begin = time.perf_counter()
    base = peak()
    if how == "pot":
        fused_with_pot(a, b)
    elif how == "average":
        merge.average([a, b]).state_dict()
    else:
        options = {"features": "incoming", "sweeps": 1} if how == "transport" else {"sweeps": 4}
        merge.fuse([a, b], symmetry=spec_of(3), **options).state_dict()  # type: ignore[arg-type]
    print(time.perf_counter() - begin, peak(), base)


def peak() -> float:
    text = Path("/proc/self/status").read_text()
    line = next(x for x in text.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def speed() -> list[list[str]]:
    rows = []
    for how, name in (
        ("average", "plain average"),
        ("pot", "POT: ot.dist and ot.emd, layer by layer"),
        ("transport", "merge.fuse, incoming weights, one sweep"),
        ("full", "merge.fuse, as it comes: all weights, up to four sweeps"),
    ):
        done = subprocess.run(
            [sys.executable, __file__, "--measure", how], capture_output=True, text=True, check=True
        )
        seconds, most, base = map(float, done.stdout.split())
        rows.append([name, f"{seconds:.2f}", f"{most:.0f}", f"{max(0.0, most - base):.0f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        measured(args.measure)
        return
    text, data = [], {}
    both, right = ["test loss", "test accuracy"], ["test accuracy"]
    for title, head, rows in (
        ("Other widths", ["direction", "network", *both], widths(args.seeds)),
        ("Other classes", ["network", *right], classes(args.seeds)),
        ("Other depths", ["network", *right], depths(args.seeds)),
        ("Two perceptrons 784-2048-2048-10", ["fusion", "seconds", "peak MiB", "grown"], speed()),
    ):
        text.append(f"## {title}\n\n{table(head, rows)}")
        data[title] = [dict(zip(head, row, strict=True)) for row in rows]
        print(text[-1], end="\n\n")
    save("fusion", "Fusion by transport", "\n\n".join(text), {"seeds": args.seeds, **data})


if __name__ == "__main__":
    main()
