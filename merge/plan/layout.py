"""Lay out the output: which tensor in which file at which byte, headers, index and side files.

Shards are split and named as huggingface_hub does; inside a file tensors are ordered as the
safetensors library orders them, so a file is byte for byte what that library would have written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from merge.ir.dtypes import DType
from merge.ir.side import Side
from merge.ir.spec import TensorSpec
from merge.plan.model import OutputFile, SideOutput

__all__ = ["header", "lay_out", "lay_out_side"]

PT = MappingProxyType({"format": "pt"})
"""Metadata that transformers wrote and older readers look for."""

# Larger elements first, as in the safetensors library (checked against it by a test).
# fmt: off
_DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ",
    "F8_E4M3FNUZ", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)
# fmt: on


def lay_out(
    specs: Sequence[TensorSpec], shard_size: int, metadata: Mapping[str, str] = PT
) -> tuple[list[OutputFile], dict[str, tuple[str, int]], list[SideOutput]]:
    """Files with their headers, (file, byte offset) of every tensor, and the index files."""
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.folder, []).append(spec)
    files: list[OutputFile] = []
    places: dict[str, tuple[str, int]] = {}
    indices: list[SideOutput] = []
    for folder, members in groups.items():
        prefix = f"{folder}/" if folder else ""
        shards = _split(members, shard_size)
        for name, shard in shards.items():
            text, begins = header([s.named(s.name_in_file) for s in shard], metadata)
            for spec in shard:
                places[spec.name] = (prefix + name, len(text) + begins[spec.name_in_file])
            total = sum(s.nbytes for s in shard)
            files.append(OutputFile(prefix + name, text, len(text) + total, len(shard)))
        if len(shards) > 1:
            indices.append(_index(prefix, members, shards))
    return files, places, indices


def _split(specs: Sequence[TensorSpec], shard_size: int) -> dict[str, list[TensorSpec]]:
    """Shards by file name, split by huggingface_hub's own rule."""
    if sum(s.nbytes for s in specs) <= shard_size:  # one file: spare the import
        return {"model.safetensors": list(specs)}
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {s.name: s for s in specs}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    return {f: [by_name[n] for n in names] for f, names in split.filename_to_tensors.items()}


def header(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str] = PT
) -> tuple[bytes, dict[str, int]]:
    """A safetensors header (length field included), and each tensor's begin after it, in bytes."""
    ordered = sorted(specs, key=lambda s: (_DTYPE_ORDER.index(s.dtype.code), s.name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    at = 0
    for spec in ordered:
        begins[spec.name] = at
        end = at + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype.code,
            "shape": list(spec.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins


def _index(
    prefix: str, specs: Sequence[TensorSpec], shards: Mapping[str, Sequence[TensorSpec]]
) -> SideOutput:
    where = {s.name_in_file: f for f, members in shards.items() for s in members}
    data = {
        "metadata": {
            "total_parameters": sum(s.numel for s in specs),
            "total_size": sum(s.nbytes for s in specs),
        },
        "weight_map": dict(sorted(where.items())),
    }
    text = json.dumps(data, indent=2) + "\n"
    return SideOutput(f"{prefix}model.safetensors.index.json", text=text)


def lay_out_side(side: Side, dtype: DType | None, main: DType | None) -> list[SideOutput]:
    """The donor's side files, and those written anew; config.json names a dtype that changed.

    ``dtype`` is what was asked for, ``main`` what most of the weights are stored as.
    """
    copies = [
        SideOutput(f.name, f.path, stamp=f"{f.size} {f.mtime_ns}")
        for f in side.files
        if f.name not in side.texts
    ]
    out = [c for c in copies if c.name != "config.json"]
    out += [SideOutput(name, text=text) for name, text in side.texts.items()]
    as_it_is = [c for c in copies if c.name == "config.json"]
    if not side.config:
        return [*out, *as_it_is]
    stored = dtype or main
    config = dict(side.config)
    if stored is not None:
        config = _with_dtype(side.config, stored.name, deep=dtype is not None)
    named = any(isinstance(config.get(k), str) for k in ("dtype", "torch_dtype"))
    if dtype is not None and not named:
        config["torch_dtype"] = dtype.name
    changed = config != side.config
    if as_it_is and not changed:
        return [*out, *as_it_is]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return [*out, SideOutput("config.json", text=text)]


def _with_dtype(config: Mapping[str, object], name: str, *, deep: bool) -> dict[str, object]:
    """``config`` naming ``name`` where it names a dtype; ``deep``: in its sub-models too."""
    out: dict[str, object] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            out[key] = name
        elif deep and isinstance(value, dict) and key.endswith("_config"):
            out[key] = _with_dtype(value, name, deep=True)
        else:
            out[key] = value
    return out
