"""The outcome of a smoke check, and the figures that it is judged by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from merge.ir.checkpoint import some
from merge.methods.core.schema import Tensor

__all__ = ["Figures", "Smoke", "measured", "not_finite", "tensors_of"]

_MAIN = ("logits", "logits_per_image", "prediction_logits", "start_logits", "last_hidden_state")
"""Names of outputs by which a model is known, the first that there is counts."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One output tensor: its name and shape, and what its finite numbers are.

    std: the standard deviation, divided by n. largest: in magnitude.
    """

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float
    largest: float

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return (
            f"{self.name} {size}: mean {self.mean:.4g}, std {self.std:.4g},"
            f" largest {self.largest:.4g}"
        )


@dataclass(frozen=True, slots=True)
class Smoke:
    """The outcome. loader: what loaded it, None where nothing here does: then nothing was checked.

    missing: weights that the model has and the folder does not, which were set at random.
    unexpected: those of the folder that the model has no place for. problems: why it fails.
    """

    path: Path
    loader: str | None = None
    dtype: str | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    figures: Figures | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, object]:
        """The outcome as plain data."""
        return {**asdict(self), "path": str(self.path), "ok": self.ok}

    def __str__(self) -> str:
        head = "failed" if self.problems else "passed" if self.loader else "not made"
        by = f", {self.loader}" if self.loader else ""
        lines = [f"{self.path}: smoke check {head}{by}" + (f" in {self.dtype}" * bool(self.dtype))]
        lines += [f"  {self.figures}"] if self.figures else []
        lines += [f"  problem: {p}" for p in self.problems] + [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)


def measured(found: Smoke, outputs: Mapping[str, Tensor]) -> Smoke:
    """``found`` with figures of the main output, and how many numbers of all are not finite."""
    if not outputs:
        return replace(found, notes=(*found.notes, "its output holds no numbers"))
    found = replace(found, problems=(*found.problems, *not_finite(outputs)))
    main = next((name for name in _MAIN if name in outputs), next(iter(outputs)))
    shape, x = tuple(outputs[main].shape), outputs[main].double().flatten()
    if not (x := x[x.isfinite()]).numel():
        return found
    measured = (float(x.mean()), float(x.std(correction=0)), float(x.abs().max()))
    return replace(found, figures=Figures(main, shape, *measured))


def not_finite(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """A problem that counts the numbers which are NaN or infinite, if there are any."""
    counts = {name: int((~t.isfinite()).sum()) for name, t in tensors.items()}
    wrong = [f"{n} in {name}" for name, n in counts.items() if n]
    total = sum(counts.values())
    return (f"{total} numbers are NaN or infinite: {some(wrong)}",) if wrong else ()


def tensors_of(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The float tensors of an output that may nest, each with the keys that lead to it."""
    if hasattr(output, "is_floating_point"):
        if output.is_floating_point() and output.numel():
            yield name or "output", output
        return
    nested = enumerate(output) if isinstance(output, list | tuple) else ()
    for key, value in output.items() if isinstance(output, Mapping) else nested:
        yield from tensors_of(value, f"{name}.{key}" if name else str(key))
