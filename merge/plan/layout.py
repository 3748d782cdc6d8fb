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

_NOT_TRANSFORMERS = ("_class_name", "pretrained_cfg")
"""Keys of the configs of diffusers and timm, which name no dtype."""

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
    specs: Sequence[TensorSpec],
    shard_size: int,
    metadata: Mapping[str, str] = PT,
    stems: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[OutputFile], dict[str, tuple[str, int]], list[SideOutput]]:
    """Files with their headers, (file, byte offset) of every tensor, and the index files.

    stems: by folder, what its weight files are called; ``model`` where nothing is said.
    """
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.folder, []).append(spec)
    files: list[OutputFile] = []
    places: dict[str, tuple[str, int]] = {}
    indices: list[SideOutput] = []
    for folder, members in groups.items():
        prefix = f"{folder}/" if folder else ""
        stem = stems.get(folder, "model")
        shards = _split(members, shard_size, stem)
        for name, shard in shards.items():
            text, begins = header([s.named(s.name_in_file) for s in shard], metadata)
            for spec in shard:
                places[spec.name] = (prefix + name, len(text) + begins[spec.name_in_file])
            total = sum(s.nbytes for s in shard)
            files.append(OutputFile(prefix + name, text, len(text) + total, len(shard)))
        if len(shards) > 1:
            indices.append(_index(f"{prefix}{stem}.safetensors.index.json", members, shards))
    return files, places, indices


def _split(specs: Sequence[TensorSpec], shard_size: int, stem: str) -> dict[str, list[TensorSpec]]:
    """Shards by file name, split by huggingface_hub's own rule."""
    if sum(s.nbytes for s in specs) <= shard_size:  # one file: spare the import
        return {f"{stem}.safetensors": list(specs)}
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {s.name: s for s in specs}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=stem + "{suffix}.safetensors",
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
    name: str, specs: Sequence[TensorSpec], shards: Mapping[str, Sequence[TensorSpec]]
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
    return SideOutput(name, text=text)


def lay_out_side(side: Side, dtype: DType | None, stored: Mapping[str, DType]) -> list[SideOutput]:
    """The donor's side files, and those written anew; config.json names a dtype that changed.

    ``dtype`` is what was asked for, ``stored`` what most of the weights of a folder are stored as.
    """
    outputs = {
        f.name: SideOutput(f.name, f.path, stamp=f"{f.size} {f.mtime_ns}", fetch=f.fetch)
        for f in side.files
    }
    outputs |= {name: SideOutput(name, text=text) for name, text in side.texts.items()}
    for folder, config in {"": side.config, **side.configs}.items():
        name = f"{folder}/config.json" if folder else "config.json"
        as_it_is = outputs.pop(name, None)
        changed = _config_of(config, dtype, stored.get(folder), at_top=not folder)
        if config and (as_it_is is None or changed != config):
            text = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
            outputs[name] = SideOutput(name, text=text)
        elif as_it_is is not None:
            outputs[name] = as_it_is
    return list(outputs.values())


def _config_of(
    config: Mapping[str, object], dtype: DType | None, stored: DType | None, *, at_top: bool
) -> dict[str, object]:
    """``config`` naming what its weights are stored as: where it named a type, or one is new.

    A part's config names none that it did not name: its keys may be arguments of a class.
    """
    actual = dtype or stored
    out = dict(config) if actual is None else _with_dtype(config, actual.name, deep=bool(dtype))
    named = any(isinstance(out.get(k), str) for k in ("dtype", "torch_dtype"))
    theirs = any(k in config for k in _NOT_TRANSFORMERS)
    if dtype is not None and at_top and not named and not theirs:
        out["torch_dtype"] = dtype.name
    return out


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
