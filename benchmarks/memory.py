"""Shows that peak memory depends on the budget and not on the number of models.

    python benchmarks/memory.py [--size tiny|b1-slice|b1]

Averages 1, 2, 4 and 8 models within the default budget, and 4 models within each of three
budgets. Prints a table and writes it to benchmarks/results/.
"""

import argparse
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from floor import warm, weight_files
from report import mib, save, table
from runs import MERGE, memory_disk, merge, models

from recipes import linear

HEAD = ("budget", "models", "input MiB", "peak RSS MiB", "wall s", "body s")
COUNTS = (1, 2, 4, 8)
BUDGETS = ("64MiB", "256MiB", "1GiB")
RUNS = [("default", count) for count in COUNTS] + [(budget, 4) for budget in BUDGETS]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the memory of merges.")
    add = parser.add_argument
    add("--size", choices=("tiny", "b1-slice", "b1"), default="b1-slice")
    add("--models", type=Path, default=Path(tempfile.gettempdir()) / "merge-benchmarks")
    add("--out", type=Path, default=memory_disk(), help="disk for outputs")
    add("--merge", type=shlex.split, default=MERGE, help="our command")
    add("--name", help="of the results, else memory-SIZE")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    folders = models(args.models, args.size, finetunes=max(COUNTS) - 1)
    rows, every = [], []
    with tempfile.TemporaryDirectory(prefix="merge-memory-", dir=args.out) as out:
        for budget, count in RUNS:
            inputs = folders[:count]
            size = sum(file.stat().st_size for f in inputs for file in weight_files(f))
            flags = [] if budget == "default" else ["--memory", budget]
            warm(inputs)
            cost = merge(args.merge, linear(inputs), Path(out), flags)
            times = [f"{cost.wall:.2f}", f"{cost.body:.2f}"]
            rows.append([budget, str(count), mib(size), mib(cost.peak_rss), *times])
            every.append({"budget": budget, "models": count, "bytes": size, **asdict(cost)})
            print(f"{budget}: {count} models", file=sys.stderr)
    text = f"{table(HEAD, rows)}\n\nMethod: linear. Models: {args.size}."
    print(text)
    save(args.name or f"memory-{args.size}", "Memory", text, {"size": args.size, "runs": every})


if __name__ == "__main__":
    main()
