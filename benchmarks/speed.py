"""Compares each method's merge with the floor and with mergekit, in one run on the same files.

    python benchmarks/speed.py [--size tiny|b1-slice|b1] [--methods linear,ties] [--repeats 5]
    MERGEKIT=/path/to/python python benchmarks/speed.py --peer-slice

Prints a table and writes it, with every single number, to benchmarks/results/.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from floor import floor, ready
from report import mib, save, table
from runs import MERGE, Merge, Run, memory_disk, merge, models, peer, peer_version

from recipes import CASES, recipe

SLOW_PEERS = {  # minutes for mergekit on the b1 models
    "ties", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce",
    "karcher", "multislerp", "arcee_fusion", "ram", "ramplus_tl",
}  # fmt: skip
HEAD = (
    "method",
    "models",
    "wall s",
    "body s",
    "CPU s",
    "GB/s",
    "peak RSS MiB",
    "body/floor",
    "peer wall s",
    "times faster",
    "target reached",
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every round uses: the models, the two commands and the disk for outputs."""

    folders: list[Path]
    slices: list[Path]  # empty, or the models on which slow peers run
    out: Path
    command: list[str]
    flags: list[str]
    mergekit: Path | None

    def sliced(self, method: str) -> bool:
        """Whether mergekit runs this method on the slices only."""
        return bool(self.slices) and method in SLOW_PEERS

    def measure(self, method: str, with_peer: bool) -> "Round":
        """One round: the floor, our command, and mergekit when it takes part."""
        inputs = CASES[method].inputs(self.folders)
        # Before each, for what left the page cache would slow the floor and flatter us.
        ready(inputs, self.out)
        cost = floor(inputs, self.out)
        text = recipe(method, self.folders)
        ready(inputs, self.out)
        ours = beside = merge(self.command, text, self.out, self.flags)
        if self.mergekit is None or not with_peer or CASES[method].times_faster is None:
            return Round(cost, ours)
        if self.sliced(method):
            text = recipe(method, self.slices)
            ready(self.slices, self.out)
            beside = merge(self.command, text, self.out, self.flags)
            inputs = self.slices
        ready(inputs, self.out)
        return Round(cost, ours, peer(self.mergekit, text, self.out), beside)


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of one method: what was measured within the same minute.

    peer and beside: mergekit, and our command on the models that mergekit was given.
    """

    floor: float
    ours: Merge
    peer: Run | None = None
    beside: Merge | None = None

    def over_floor(self) -> float:
        """How many times the floor our command's body took."""
        return self.ours.body / self.floor

    def times_faster(self) -> float | None:
        """How many of our command's runs fit into mergekit's one; None without mergekit."""
        return self.peer.wall / self.beside.wall if self.peer and self.beside else None


def row(method: str, rounds: Sequence[Round], size: str, sliced: bool) -> list[str]:
    """The method's line in the table: medians over the rounds, ratios taken within a round."""
    ours = [r.ours for r in rounds]
    walls = [r.peer.wall for r in rounds if r.peer]
    over_floor = median(r.over_floor() for r in rounds)
    faster = [ratio for r in rounds if (ratio := r.times_faster()) is not None]
    # The largest, not the median: memory that is needed once must be there.
    peak = max(m.peak_rss for m in ours)
    mark = "*" if sliced else ""
    return [
        method,
        str(CASES[method].models),
        f"{median(m.wall for m in ours):.2f}",
        f"{median(m.body for m in ours):.2f}",
        f"{median(m.cpu for m in ours):.2f}",
        f"{median(m.nbytes / m.body for m in ours) / 1e9:.2f}",
        mib(peak),
        f"{over_floor:.2f}",
        f"{median(walls):.1f}{mark}" if walls else "-",
        f"{median(faster):.1f}{mark}" if faster else "-",
        verdict(method, over_floor, peak, faster) if size == "b1" else "-",
    ]


def verdict(method: str, over_floor: float, peak: int, faster: Sequence[float]) -> str:
    """Yes, or the targets that were missed; without mergekit its target does not count."""
    case = CASES[method]
    missed = []
    if over_floor > case.over_floor:
        missed.append(f"floor {case.over_floor:g}")
    if peak > case.peak_rss * 2**20:
        missed.append(f"RSS {case.peak_rss:g}")
    if faster and case.times_faster and median(faster) < case.times_faster:
        missed.append(f"peer {case.times_faster:g}x")
    return f"no: {', '.join(missed)}" if missed else "yes"


def notes(size: str, repeats: int, peer: str | None, sliced: bool) -> str:
    """The lines below the table that say how to read it."""
    lines = [f"Models: {size}. Rounds: {repeats}; times and ratios are medians."]
    if size != "b1":
        lines.append("The targets are meant for the b1 models only.")
    if peer:
        lines.append(f"Peer: {peer}.")
    if peer and sliced:
        lines.append("\\* Both tools on b1-slice, two of the sixteen layers.")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the speed of merges.")
    add = parser.add_argument
    add("--size", choices=("tiny", "b1-slice", "b1"), default="b1")
    add("--models", type=Path, default=Path(tempfile.gettempdir()) / "merge-benchmarks")
    add("--out", type=Path, default=memory_disk(), help="disk for outputs")
    add("--methods", type=_methods, default=list(CASES), help="comma-separated")
    add("--repeats", type=int, default=5)
    add("--merge", type=shlex.split, default=MERGE, help="our command")
    add("--flags", type=shlex.split, default=[], help='more for our command: "--threads 1"')
    add("--peer-repeats", type=int, default=1, help="rounds in which mergekit takes part")
    add("--peer-skip", type=_methods, default=[], help="methods without mergekit")
    add("--peer-slice", action="store_true", help="slow methods: peer on b1-slice")
    add("--name", help="of the results, else speed-SIZE")
    return parser.parse_args()


def _methods(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(CASES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not measured here")
    return names


def main() -> None:
    args = arguments()
    mergekit = Path(os.environ["MERGEKIT"]) if os.environ.get("MERGEKIT") else None
    version = f"mergekit {peer_version(mergekit)}" if mergekit else None
    folders = models(args.models, args.size, finetunes=3)
    on_slices = bool(mergekit and args.peer_slice and args.size == "b1")
    slices = models(args.models, "b1-slice", finetunes=3) if on_slices else []
    rounds: dict[str, list[Round]] = {method: [] for method in args.methods}
    with tempfile.TemporaryDirectory(prefix="merge-speed-", dir=args.out) as out:
        bench = Bench(folders, slices, Path(out), args.merge, args.flags, mergekit)
        for turn in range(args.repeats):
            for method in args.methods:
                with_peer = turn < args.peer_repeats and method not in args.peer_skip
                rounds[method].append(bench.measure(method, with_peer))
                print(f"round {turn + 1}: {method}", file=sys.stderr)
    text = table(HEAD, [row(m, turns, args.size, bench.sliced(m)) for m, turns in rounds.items()])
    text = f"{text}\n\n{notes(args.size, args.repeats, version, on_slices)}"
    print(text)
    every = {method: [asdict(r) for r in turns] for method, turns in rounds.items()}
    data = {"size": args.size, "peer": version, "peer_on_slices": on_slices, "rounds": every}
    save(args.name or f"speed-{args.size}", "Speed", text, data)


if __name__ == "__main__":
    main()
