"""What a checkpoint holds, as data, from headers and config.json alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from merge.checkpoint import open_checkpoint
from merge.checkpoint.components import PIPELINE
from merge.checkpoint.dequantise import stored_as
from merge.checkpoint.place import LocalFiles, json_object
from merge.families.experts import count_experts, experts_layout
from merge.families.layers import Layers
from merge.families.roles import parts_of, role_of
from merge.families.ties import ties_of
from merge.families.vocabulary import vocabulary_tensors
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import reads

__all__ = ["inspect", "tensor_rows"]

_FAMILY = ("model_type", "architecture", "_class_name")
"""Where the configs of transformers, timm and diffusers say what the model is."""


def inspect(source: object, *, allow_pickle: bool = False) -> dict[str, Any]:
    """What kind of model a checkpoint is, what it is made of, and which files hold it.

    roles and sub-models are counted in tensors. vocabulary: the tensors with a row a token. tied:
    name to name. adapters: by folder, how many tensors they change.
    """
    checkpoint = open_checkpoint(source, allow_pickle=allow_pickle)
    config = checkpoint.side.config or _index(checkpoint)
    tensors = checkpoint.tensors.values()
    sources = {r.source.identity: r.source for e in tensors for r in reads(e)}
    tokens = vocabulary_tensors(checkpoint)
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
        "quantised": dict(Counter(filter(None, map(stored_as, tensors)))),
        "stacks": dict(Layers.of(checkpoint).stacks),
        "sub_models": _sub_models(checkpoint),
        "roles": dict(Counter(role_of(s.name, s.shape) for s in checkpoint.values()).most_common()),
        "vocabulary": {
            "rows": sorted({checkpoint[n].shape[axis] for n, axis in tokens.items()}),
            "tensors": list(tokens),
        },
        "tied": ties_of(checkpoint),
        "experts": {"layout": experts_layout(checkpoint), "count": count_experts(checkpoint)},
        "adapters": {
            root: sum(any(r.source.identity == root for r in reads(e)) for e in tensors)
            for root in checkpoint.roots[1:]
        },
        "files": [{"file": f.path, "bytes": f.size} for s in sources.values() for f in s.files],
        "side_files": [f.name for f in checkpoint.side.files],
    }


def _index(checkpoint: Checkpoint) -> dict[str, object]:
    """model_index.json of a pipeline; {} where there is none."""
    named = (f.local() for f in checkpoint.side.files if f.name == PIPELINE)
    return next((json_object(LocalFiles(Path(p).parent), PIPELINE) for p in named), {})


def _sub_models(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The parts of a model with their layers, tensors and parameters."""
    names: dict[str, list[str]] = {}
    for name, part in parts_of(checkpoint).items():
        names.setdefault(part, []).append(name)
    return {
        part: {
            "tensors": len(own),
            "parameters": sum(checkpoint[n].numel for n in own),
            "stacks": dict(Layers.of(own).stacks),
        }
        for part, own in names.items()
    }


def tensor_rows(source: object, *, allow_pickle: bool = False) -> list[dict[str, Any]]:
    """Name, dtype, shape and role of every tensor, in order."""
    return [
        {
            "name": s.name,
            "dtype": s.dtype.name,
            "shape": list(s.shape),
            "bytes": s.nbytes,
            "role": role_of(s.name, s.shape),
        }
        for s in open_checkpoint(source, allow_pickle=allow_pickle).values()
    ]
