"""What a checkpoint holds, as data, from headers and config.json alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from merge.checkpoint import open_checkpoint
from merge.checkpoint.dequantise import stored_as
from merge.families.layers import Layers
from merge.ir.expr import reads

__all__ = ["inspect", "tensor_rows"]

_FAMILY = ("model_type", "architecture", "_class_name")
"""Where the configs of transformers, timm and diffusers say what the model is."""


def inspect(source: object, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Family, layers, element types, sizes and side files of a checkpoint."""
    checkpoint = open_checkpoint(source, allow_pickle=allow_pickle)
    config = checkpoint.side.config
    sources = {r.source.identity: r.source for e in checkpoint.tensors.values() for r in reads(e)}
    return {
        "model": checkpoint.label,
        "space": checkpoint.space,
        "family": next((config[k] for k in _FAMILY if k in config), None),
        "architectures": config.get("architectures") or [],
        "components": dict(Counter(s.folder for s in checkpoint.values())),
        "tensors": len(checkpoint),
        "parameters": sum(s.numel for s in checkpoint.values()),
        "bytes": sum(s.nbytes for s in checkpoint.values()),
        "dtypes": dict(Counter(s.dtype.name for s in checkpoint.values()).most_common()),
        "quantised": dict(Counter(filter(None, map(stored_as, checkpoint.tensors.values())))),
        "stacks": dict(Layers.of(checkpoint).stacks),
        "files": [{"file": f.path, "bytes": f.size} for s in sources.values() for f in s.files],
        "side_files": [f.name for f in checkpoint.side.files],
    }


def tensor_rows(source: object, *, allow_pickle: bool = False) -> list[dict[str, Any]]:
    """Name, dtype and shape of every tensor, in order."""
    return [
        {"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape), "bytes": s.nbytes}
        for s in open_checkpoint(source, allow_pickle=allow_pickle).values()
    ]
