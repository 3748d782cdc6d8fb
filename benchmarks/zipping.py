"""What partial merging and zipping are good for, on scikit-learn's digits, 0 to 4 and 5 to 9 apart.

    python benchmarks/zipping.py [--seeds 5]

Networks that saw one half of the classes each are merged: by PLeaS at budgets from one network's
size to two, with least squares and without, and by ZipIt, as a whole and up to a layer. The last
table holds the error of each layer after the closed form and after 400 steps of Adam on the same
moments, from the same start, at the paper's rate (5e-4).
"""

import argparse
import copy
import statistics
from unittest import mock

import torch
from fusion import TRAIN, X, Y
from report import save, table
from torch import Tensor, nn

import merge
from merge import parting_data
from merge.partial.fit import error_of, fitted

BUDGETS = (1.0, 1.2, 1.55, 2.0)
DATA = list(X[:TRAIN].split(130))


def plain(width: int = 64) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip


def normed(width: int = 128) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip


class Convolutions(nn.Module):
    """Three convolutions with BatchNorm, the last two with a shortcut, on 8 x 8 pictures."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.inner_norm = nn.BatchNorm2d(width)
        self.outer = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.outer_norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x.reshape(-1, 1, 8, 8))))
        x = nn.functional.max_pool2d(x, 2)
        inner = torch.relu(self.inner_norm(self.inner(x)))
        x = torch.relu(x + self.outer_norm(self.outer(inner)))
        found: Tensor = self.head(nn.functional.max_pool2d(x, 2).flatten(1))
        return found


def trained(make: type | object, seed: int, half: int, epochs: int = 30) -> nn.Module:
    """A network of one half of the classes."""
    torch.manual_seed(seed)
    module: nn.Module = make()  # type: ignore[operator]
    mask = (Y[:TRAIN] < 5) == (half == 0)
    x, y = X[:TRAIN][mask], Y[:TRAIN][mask]
    draw = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(module.parameters(), 1e-3, weight_decay=1e-4)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=draw).split(64):
            adam.zero_grad()
            nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()
            adam.step()
    return module.eval()


def right(module: object) -> float:
    with torch.no_grad():
        out = module(X[TRAIN:])  # type: ignore[operator]
    return float((out.argmax(1) == Y[TRAIN:]).float().mean())


def told(values: list[float], digits: int = 3) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +- {spread:.{digits}f}"


def mean_of(nets: list[nn.Module]) -> object:
    return lambda x: sum(n(x) for n in nets) / len(nets)


def budgets(name: str, make: object, seeds: int) -> list[list[str]]:
    """Accuracy at each budget; the last column is how far 2.0 is from the mean of the logits."""
    manners: tuple[tuple[str, dict[str, object]], ...] = (
        ("matched only", {"least_squares": False}),
        ("least squares, together", {"sequential": False}),
        ("least squares, layer by layer", {}),
    )
    found: dict[str, list[list[float]]] = {m: [] for m, _ in manners}
    alone: dict[str, list[float]] = {"parents": [], "mean of both logits": []}
    for seed in range(seeds):
        nets = [trained(make, 2 * seed + k, k) for k in range(2)]
        alone["parents"] += [right(n) for n in nets]
        both = mean_of(nets)
        alone["mean of both logits"].append(right(both))
        for manner, options in manners:
            row = []
            for budget in BUDGETS:
                made = merge.pleas(*nets, budget, data=DATA, **options)  # type: ignore[arg-type]
                module = made.module(nets[0]).eval()
                row.append(right(module))
            with torch.no_grad():
                wanted = both(X)  # type: ignore[operator]
                row.append(float((module(X) - wanted).abs().max() / wanted.abs().max()))
            found[manner].append(row)
    rows = [
        [f"{name}: {manner}", *(told([r[k] for r in runs]) for k in range(len(BUDGETS))),
         f"{max(r[-1] for r in runs):.1e}"]
        for manner, runs in found.items()
    ]  # fmt: skip
    blank = [""] * (len(BUDGETS) - 1)
    return [[f"{name}: {n}", told(v), *blank, ""] for n, v in alone.items()] + rows


def zipped(name: str, make: object, cuts: tuple[str, ...], seeds: int) -> list[list[str]]:
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        nets = [trained(make, 2 * seed + k, k) for k in range(2)]
        average = copy.deepcopy(nets[0])
        average.load_state_dict(merge.average(nets).state_dict())
        networks: dict[str, object] = {"plain average": average}
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in average.modules()):
            merge.recalibrate(measured := copy.deepcopy(average), DATA)
            networks["average, BatchNorm measured anew"] = measured.eval()
        for by in ("weights", "activations"):
            made = merge.pleas(*nets, 1.0, by=by, data=DATA, least_squares=False)  # type: ignore[arg-type]
            networks[f"permuted, by {by}"] = made.module(nets[0]).eval()
        authors = merge.zip_models(nets, DATA, inside=0.125)
        networks["zipped, a = 0.3, b = 0.125"] = authors.network()
        networks["zipped"] = merge.zip_models(nets, DATA).network()
        for cut in reversed(cuts):
            networks[f"zipped up to {cut}"] = merge.zip_models(nets, DATA, until=cut).network(
                "mean"
            )
        networks["mean of both logits"] = mean_of(nets)
        for what, module in networks.items():
            found.setdefault(what, []).append(right(module))
    return [[f"{name}: {what}", told(values)] for what, values in found.items()]


def layers(seeds: int) -> list[list[str]]:
    """Error of each layer, as a share of its targets' energy."""
    found: dict[int, list[tuple[float, float, float]]] = {}

    calls = [0]

    def both(weight, bias, normal, rows, columns, ridge):  # type: ignore[no-untyped-def]
        new = fitted(weight, bias, normal, rows, columns, ridge)
        errors = error_of(weight, bias, normal), error_of(*new, normal)
        stepped = error_of(*adam(weight, bias, normal, rows, columns), normal)
        found.setdefault(calls[0], []).append((*errors, stepped))
        calls[0] += 1
        return new

    for seed in range(seeds):
        nets = [trained(plain, 2 * seed + k, k) for k in range(2)]
        calls[0] = 0
        with mock.patch.object(parting_data, "fitted", both):
            merge.pleas(*nets, 1.2, data=DATA)
    return [
        [f"layer {k}", *(told([r[i] for r in runs], 4) for i in range(3)),
         str(sum(r[1] <= r[2] for r in runs)) + f" of {len(runs)}"]
        for k, runs in sorted(found.items())
    ]  # fmt: skip


def adam(weight, bias, normal, rows, columns):  # type: ignore[no-untyped-def]
    """400 steps on the mean square error of all samples, zeros kept."""
    mask = ((rows[:, None] & columns) != 0).double()
    full = torch.cat([weight.double(), bias.double()[:, None]], 1).requires_grad_()
    mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.float64)], 1)
    steps = torch.optim.Adam([full], 5e-4)
    for _ in range(400):
        steps.zero_grad()
        held = full * mask
        loss = ((held @ normal.gram) * held).sum() - 2 * (held * normal.cross).sum()
        (loss / len(full)).backward()
        steps.step()
    held = (full * mask).detach()
    return held[:, :-1], held[:, -1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    text, data = [], {}
    counted = [f"{b:g}" for b in BUDGETS]
    for title, head, rows in (
        (
            "PLeaS: test accuracy by budget",
            ["network", *counted, "2 against the mean"],
            budgets("perceptron", plain, seeds) + budgets("convolutions", Convolutions, seeds),
        ),
        (
            "ZipIt: test accuracy",
            ["network", "test accuracy"],
            zipped("BatchNorm perceptron", normed, ("2", "5"), seeds)
            + zipped("perceptron", plain, ("1", "3", "5"), seeds)
            + zipped("convolutions", Convolutions, ("norm",), seeds),
        ),
        (
            "Least squares of a layer at budget 1.2: what remains of the targets",
            ["layer", "before", "closed form", "400 steps of Adam", "closed form at most Adam"],
            layers(seeds),
        ),
    ):
        text.append(f"## {title}\n\n{table(head, rows)}")
        data[title] = [dict(zip(head, row, strict=True)) for row in rows]
        print(text[-1], end="\n\n", flush=True)
    save("zipping", "Partial merging and zipping", "\n\n".join(text), {"seeds": seeds, **data})


if __name__ == "__main__":
    main()
