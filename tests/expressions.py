"""Expressions over tensors in memory, and what the engine makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from merge.checkpoint.memory import open_state_dict
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Expr

__all__ = ["saved", "stored", "value"]


def stored(value: Tensor) -> Expr:
    """A tensor in memory as an expression."""
    return open_state_dict({"t": value}).tensors["t"]


def value(expr: Expr, **work: Any) -> Tensor:
    """What the engine makes of an expression."""
    return Checkpoint({"out": expr}, "test").state_dict(**work)["out"]


def saved(expr: Expr, folder: Path, **work: Any) -> bytes:
    """The bytes that the engine writes."""
    out = Checkpoint({"out": expr}, "test").save(folder, replace=True, **work)
    return (out / "model.safetensors").read_bytes()
