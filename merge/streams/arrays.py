"""Arrays of a .npz: x and y, and x_PART and y_PART for parts of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge.errors import SourceError, told
from merge.streams.batches import Collate
from merge.streams.examples import Example
from merge.streams.labels import Classes
from merge.streams.spec import PARTS

__all__ = ["collated", "read_arrays"]


def read_arrays(file: Path, part: str | None = None) -> list[Example]:
    """The examples of a file: ``x`` with ``y`` by hash, ``x_test`` with ``y_test`` as they are.

    y holds whole numbers; ``x_adapt`` needs none, nor does any x where the file has no y at all.
    """
    import numpy as np

    if not file.is_file():
        raise SourceError("there is no such data", file=file)
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise SourceError("the arrays cannot be read", file=file, found=told(error)) from None
    known = {f"{a}{p}" for a in "xy" for p in ("", *(f"_{p}" for p in PARTS))}
    bare = arrays.keys() <= {n for n in known if n.startswith("x")}
    found: list[Example] = []
    for own in (None, *PARTS):
        ending = "" if own is None else f"_{own}"
        if own is not None and f"x{ending}" not in arrays:
            continue
        labelled = f"y{ending}" in arrays or (own != "adapt" and not bare)
        missing = [n for n in ("x", "y")[: 1 + labelled] if f"{n}{ending}" not in arrays]
        if own is None and len(missing) == 2 and any(f"x_{p}" in arrays for p in PARTS):
            continue
        if missing:
            raise SourceError(
                "the file lacks an array",
                file=file,
                found=", ".join(arrays) or "none",
                expected=f"x{ending} and y{ending}",
            )
        y = arrays[f"y{ending}"] if labelled else None
        found += _examples(file, arrays[f"x{ending}"], y, own or part or _rest(arrays))
    if not found:
        raise SourceError("there is no data", file=file, found="no rows")
    return found


def _rest(arrays: Any) -> str | None:
    """What x is where other parts have arrays of their own: what is learnt from."""
    return "train" if any(f"x_{part}" in arrays for part in PARTS) else None


def _examples(file: Path, x: Any, y: Any, part: str | None) -> list[Example]:
    if y is not None and (not x.ndim or len(x) != len(y)):
        raise SourceError(
            "there is not one y for each x", file=file, found=f"{len(x)} x, {len(y)} y"
        )
    if y is not None and (y.dtype.kind not in "iu" or y.ndim != 1):
        raise SourceError(
            "the labels are not whole numbers, one for each sample",
            file=file,
            found=f"{y.dtype} {list(y.shape)}",
        )
    if x.dtype.kind not in "iufb":
        raise SourceError("the array holds no numbers", file=file, found=x.dtype)
    return [
        Example(
            x[i],
            None if y is None else int(y[i]),
            x[i].tobytes(),
            part,
            {"file": file, "row": i},
        )
        for i in range(len(x))
    ]


def collated(classes: Classes, plain: bool) -> Collate:
    """Makes a batch of arrays: pictures, or tokens. plain: a tensor, not arguments by name."""

    def collate(examples: Sequence[Example]) -> tuple[Any, Any]:
        import numpy as np
        import torch

        x = torch.from_numpy(np.stack([e.value for e in examples]))
        x = x.float() if x.is_floating_point() else x.long()
        target = torch.tensor([classes[e.label] for e in examples if e.label is not None])
        key = "pixel_values" if x.ndim == 4 else "input_ids"
        inputs = x if plain else {key: x}
        return inputs, target if len(target) == len(examples) else None

    return collate
