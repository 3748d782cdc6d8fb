"""What aligning a Llama-shaped pair costs: time, bytes read and peak memory of one sweep.

    python benchmarks/alignment_speed.py [--size tiny|b1-narrow]

Three second models: a fine-tune of the first; the same in other coordinates (units, heads and the
residual stream all moved); and one whose tensors were moved each on its own, so that nothing is
alike. Peak memory is what the process holds above what it held before the match, against three
times n^2 numbers of eight bytes for the largest group of n, plus one layer of both models.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from models import make
from report import mib, save, table

HEAD = ("second model", "sweeps", "wall s a sweep", "CPU s a sweep", "passes read", "peak MiB",
        "bound MiB", "cosine before", "after", "recovered")  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the alignment of a Llama-shaped pair.")
    add = parser.add_argument
    add("--size", choices=("tiny", "b1-narrow", "b1"), default="b1-narrow")
    add("--models", type=Path, default=Path(tempfile.gettempdir()) / "merge-benchmarks")
    add("--sweeps", type=int, default=2, help="at most, for the pair that is not alike")
    add("--name", help="of the results, else alignment-SIZE")
    add("--one", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def moved_models(folder: Path, size: str) -> list[tuple[str, Path, Path]]:
    """The first model, and the three that are aligned with it."""
    from dataclasses import replace

    import numpy as np

    import merge
    from merge.aligning import symmetry_of
    from merge.alignment.moved import moved
    from merge.ir.derived import reorder
    from merge.ir.orders import Permutation
    from merge.symmetry.elements import random_element

    base, tuned = make(folder / size, size, 1)
    planted, apart = folder / size / "planted", folder / size / "apart"
    opened = merge.open(tuned)
    if not planted.exists():
        symmetry = symmetry_of(opened)
        moved(opened, symmetry, random_element(symmetry, 1)).save(planted)
    if not apart.exists():
        draw = np.random.default_rng(0)
        tensors = {
            n: reorder(e, [Permutation.of(draw.permutation(k)) for k in e.shape])
            for n, e in opened.tensors.items()
        }
        replace(opened, tensors=tensors).save(apart)
    return [("fine-tune", base, tuned), ("planted", base, planted), ("apart", base, apart)]


def measure(first: Path, second: Path, sweeps: int) -> dict[str, object]:
    """One match, in this process; peak memory above what there was before."""
    import torch

    import merge
    from merge.aligning import symmetry_of
    from merge.alignment.weight import match_weights
    from merge.engine.heap import give_back_freed_memory
    from merge.stream import TensorsOf

    give_back_freed_memory()  # as merge.align does
    a, b = merge.open(first), merge.open(second)
    symmetry = symmetry_of(b)
    torch.ones(512, 512) @ torch.ones(512, 512)
    from scipy.optimize import linear_sum_assignment  # noqa: F401

    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _status("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    found = match_weights(symmetry, TensorsOf(a), TensorsOf(b), sweeps=sweeps)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    report = found.report
    count = len(report.objective)
    return {
        "sweeps": count,
        "wall": wall / count,
        "cpu": cpu / count,
        "bytes_read": report.bytes_read,
        "bytes": sum(s.nbytes for c in (a, b) for s in c.values()),
        "peak": _status("VmHWM") - before,
        "before": report.before,
        "after": report.after,
        "moved": report.moved,
        "converged": report.converged,
        "exact": _recovered(symmetry_of(a), found.element) if second.name == "planted" else None,
    }


def _recovered(symmetry: object, element: object) -> float:
    """Share of indices that undo the planted element."""
    import numpy as np

    from merge.symmetry.elements import compose, random_element

    undone = compose(symmetry, random_element(symmetry, 1), element)
    right = sum(int((m == np.arange(m.shape[-1])).sum()) for m in undone.values())
    return right / sum(m.size for m in undone.values())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {key} in /proc/self/status")


def bound(config: dict[str, int]) -> int:
    """Three n^2 float64 of the largest group, and one layer of both models in bfloat16."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * head * hidden + 3 * inter * hidden
    return 3 * 8 * max(hidden, inter) ** 2 + 2 * 2 * layer


def main() -> None:
    args = arguments()
    if args.one:
        first, second, sweeps = args.one
        print(json.dumps(measure(Path(first), Path(second), int(sweeps))))
        return
    rows, every = [], []
    for called, first, second in moved_models(args.models, args.size):
        sweeps = args.sweeps if called == "apart" else 100
        for file in [*first.glob("*.safetensors"), *second.glob("*.safetensors")]:
            file.read_bytes()  # the page cache is warm
        command = [sys.executable, __file__, "--one", str(first), str(second), str(sweeps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        cost = json.loads(done.stdout)
        most = bound(json.loads((first / "config.json").read_text()))
        exact = cost["exact"]
        rows.append([
            called, f"{cost['sweeps']}{'' if cost['converged'] else ' of more'}",
            f"{cost['wall']:.1f}", f"{cost['cpu']:.1f}",
            f"{cost['bytes_read'] / cost['bytes'] / cost['sweeps']:.2f}", mib(cost["peak"]),
            mib(most), f"{cost['before']:.4f}", f"{cost['after']:.4f}",
            "" if exact is None or math.isnan(exact) else f"{exact:.2%}",
        ])  # fmt: skip
        every.append({"second": called, "bound": most, **cost})
        print(f"{called}: {cost['wall']:.1f} s a sweep", file=sys.stderr)
    text = table(HEAD, rows)
    print(text)
    name = args.name or f"alignment-{args.size}"
    save(name, "Alignment of a Llama-shaped pair", text, {"size": args.size, "runs": every})


if __name__ == "__main__":
    main()
