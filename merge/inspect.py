"""What a checkpoint holds, as data, from headers and config.json alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from merge.checkpoint import open_checkpoint
from merge.families.layers import Layers
from merge.ir.expr import reads

__all__ = ["inspect", "tensor_rows"]


def inspect(source: object) -> dict[str, Any]:
    """Family, layers, element types, sizes and side files of a checkpoint."""
    checkpoint = open_checkpoint(source)
    config = checkpoint.side.config
    sources = {r.source.identity: r.source for e in checkpoint.tensors.values() for r in reads(e)}
    return {
        "model": checkpoint.label,
        "space": checkpoint.space,
        "family": config.get("model_type"),
        "architectures": config.get("architectures") or [],
        "tensors": len(checkpoint),
        "parameters": sum(s.numel for s in checkpoint.values()),
        "bytes": sum(s.nbytes for s in checkpoint.values()),
        "dtypes": dict(Counter(s.dtype.name for s in checkpoint.values()).most_common()),
        "stacks": dict(Layers.of(checkpoint).stacks),
        "files": [{"file": f.path, "bytes": f.size} for s in sources.values() for f in s.files],
        "side_files": [f.name for f in checkpoint.side.files],
    }


def tensor_rows(source: object) -> list[dict[str, Any]]:
    """Name, dtype and shape of every tensor, in order."""
    return [
        {"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape), "bytes": s.nbytes}
        for s in open_checkpoint(source).values()
    ]
