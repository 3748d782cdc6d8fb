"""What merges are worth: fine-tunes of a real encoder on eight tasks, merged in every way.

    python -m benchmarks.quality [--seeds 0 1] [--rows tsv_tuned spectral_gates]

Makes a fixture for each seed (a few minutes, kept in --cache), then a line for each merge. Lines
are kept too: what is there already is not made again unless --again is given. The table is written
of all lines that are there.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging

from benchmarks.quality.fixture import Fixture, default_cache, fixture
from benchmarks.quality.learned import LEARNED
from benchmarks.quality.measure import Judge, Right, one_thread
from benchmarks.quality.rows import Bench, Made, Row, timed
from benchmarks.quality.static import STATIC
from benchmarks.quality.table import write

ROWS = (*STATIC, *LEARNED)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="+", choices=[r.key for r in ROWS], metavar="ROW",
                        default=[r.key for r in ROWS])  # fmt: skip
    parser.add_argument("--again", action="store_true", help="make lines anew")
    parser.add_argument("--cache", type=Path, default=default_cache())
    args = parser.parse_args()
    one_thread()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    every = []
    for seed in args.seeds:
        say(f"Fixture {seed}")
        made = fixture(seed, args.cache, say=say)
        wanted = [r for key in args.rows for r in ROWS if r.key == key]
        make_lines(made, wanted, args.again)
        every.append((made, {r.key: m for r in ROWS if (m := read(made, r)) is not None}))
    print(write(ROWS, every))


def make_lines(made: Fixture, rows: list[Row], again: bool) -> None:
    """Make the lines that are not there yet."""
    missing = [r for r in rows if again or read(made, r) is None]
    if not missing:
        return
    judge = Judge(made)
    for row in missing:
        with tempfile.TemporaryDirectory(dir=made.base.parent) as scratch:
            found = timed(row, Bench(made, judge, Path(scratch)))
        file = line_file(made, row)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(asdict(found)))
        say(f"  {row.title}: {found.summary()}")


def line_file(made: Fixture, row: Row) -> Path:
    """Where a line is kept."""
    return made.base.parent / "rows" / f"{row.key}.json"


def read(made: Fixture, row: Row) -> Made | None:
    """A line that was made before."""
    file = line_file(made, row)
    if not file.exists():
        return None
    data = json.loads(file.read_text())
    runs: tuple[Right, ...] = tuple(data["runs"])
    return Made(runs, data["settings"], data["seconds"])


def say(line: str) -> None:
    """Tell what is going on."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
