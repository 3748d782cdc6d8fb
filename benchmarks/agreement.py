"""Compares what our merges and mergekit's yield, tensor by tensor, from the same recipes.

    MERGEKIT=/path/to/python python benchmarks/agreement.py [--methods linear,ties]

For each method: the size of the difference between the two results in parts of the size of the
change that the merge makes (root mean squares over all weights), and the largest difference of
one weight. Random methods differ by their random bits: there the sizes of the changes are compared.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from report import save, table
from runs import MERGE, OFFLINE, PEER_FLAGS, models, peer_version
from safetensors.torch import load_file

from recipes import CASES, recipe

RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
HEAD = ("method", "change (rms)", "theirs (rms)", "difference / change", "largest difference")


REMARKS = """\
- linear and nearswap: rounding of float32, in which mergekit adds up the weights themselves.
- slerp, nuslerp, multislerp, karcher, model_stock: mergekit rounds lengths and angles to float32.
- ties, breadcrumbs, sce: which of several equal magnitudes stay. Deltas of bfloat16 models take few
  values, and of equal ones mergekit's sort keeps any. The sizes of the changes agree.
- arcee_fusion: mergekit's divergence in float32 is off by a fiftieth, which moves the threshold.
"""


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, in float64."""
    files = sorted(folder.glob("*.safetensors"))
    return {n: t.double() for f in files for n, t in load_file(f).items()}


def rms(parts: list[torch.Tensor]) -> float:
    """The root mean square over all elements."""
    count = sum(p.numel() for p in parts)
    return float((sum(p.square().sum() for p in parts) / count).sqrt())


def compare(method: str, folders: list[Path], mergekit: Path, scratch: Path) -> list[str]:
    """The method's line of the table."""
    text = recipe(method, folders).replace("dtype: bfloat16", "dtype: float32")
    file = scratch / f"{method}.yml"
    file.write_text(text)
    ours, theirs = scratch / f"{method}-ours", scratch / f"{method}-theirs"
    quiet = {"check": True, "capture_output": True, "env": os.environ | OFFLINE}
    subprocess.run([*MERGE, "apply", file, ours, "-q"], **quiet)
    command = [mergekit.parent / "mergekit-yaml", file, theirs, *PEER_FLAGS, "--random-seed=0"]
    subprocess.run(command, **quiet)
    a, b, base = state(ours), state(theirs), state(folders[0])
    names = [n for n in a if n in b]
    change = rms([a[n] - base[n] for n in names])
    their_change = rms([b[n] - base[n] for n in names])
    apart = [a[n] - b[n] for n in names]
    ratio = "random" if method in RANDOM else f"{rms(apart) / change:.2e}"
    largest = max(float(x.abs().max()) for x in apart)
    return [method, f"{change:.6e}", f"{their_change:.6e}", ratio, f"{largest:.2e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare results with mergekit's.")
    known = [m for m, case in CASES.items() if case.times_faster is not None]
    parser.add_argument("--methods", type=lambda text: text.split(","), default=known)
    parser.add_argument("--size", choices=("tiny", "b1-slice"), default="tiny")
    parser.add_argument(
        "--models", type=Path, default=Path(tempfile.gettempdir()) / "merge-benchmarks"
    )
    args = parser.parse_args()
    mergekit = Path(os.environ["MERGEKIT"])
    folders = models(args.models, args.size, finetunes=3)
    with tempfile.TemporaryDirectory() as scratch:
        rows = [compare(m, folders, mergekit, Path(scratch)) for m in args.methods]
    text = table(HEAD, rows)
    print(text)
    lines = f"{text}\n\nModels: {args.size}, in float32. Peer: mergekit {peer_version(mergekit)}."
    lines += f"\n\nWhere the differences come from:\n\n{REMARKS.rstrip()}"
    data = {"rows": [dict(zip(HEAD, row, strict=True)) for row in rows]}
    save("agreement", "Agreement with mergekit", lines, data)


if __name__ == "__main__":
    main()
