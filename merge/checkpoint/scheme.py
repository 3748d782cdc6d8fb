"""How quantised weights are stored, as config.json tells it, and which of the ways are read.

Read are eight-bit floats with a scale for each tensor, row or block, and MXFP4 (OCP Microscaling
Formats 1.0): each weight is a small float times a scale, so that reading it back is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from merge.ir.dtypes import BF16, BY_NAME, DType

__all__ = ["ENTRIES", "Scheme", "entries_of", "plain_dtype", "scheme_of"]

ENTRIES = ("quantization_config", "compression_config")
"""Keys under which config.json says that its model is quantised."""

BLOCK = (128, 128)
"""Rows and columns of a block where nothing says how large they are, as in DeepSeek-V3."""

_FLOATS = ("float-quantized", "naive-quantized", "dense")
"""Formats of compressed-tensors in which a code of eight bits is a float."""

Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way of storing weights that is read: its name, and sizes of the blocks that it may have."""

    method: str
    blocks: tuple[Block, ...] = (BLOCK,)


def entries_of(config: Mapping[str, object]) -> list[tuple[str, Mapping[str, object]]]:
    """What config.json, or that of a sub-model in it, says of quantisation, and under which key."""
    parts = {"": config, **{f"{k}.": v for k, v in config.items() if k not in ENTRIES}}
    return [
        (prefix + key, entry)
        for prefix, part in parts.items()
        for key in ENTRIES
        if isinstance(part, Mapping) and isinstance(entry := part.get(key), Mapping)
    ]


def scheme_of(config: Mapping[str, object]) -> Scheme | None:
    """The scheme that config.json names; None where it names none, or one that is not read."""
    schemes = {_scheme(entry) for _, entry in entries_of(config)}
    return schemes.pop() if len(schemes) == 1 else None


def _scheme(entry: Mapping[str, object]) -> Scheme | None:
    method = entry.get("quant_method")
    if method == "compressed-tensors" or (method is None and "config_groups" in entry):
        return _compressed(entry)
    if method == "fp8" and entry.get("expert_dtype", "fp8") == "fp8":
        size = entry.get("weight_block_size", BLOCK)
        blocks = _blocks([] if size is None else [size])
        return None if blocks is None else Scheme("fp8", blocks)
    return Scheme(str(method), ()) if method in ("fbgemm_fp8", "mxfp4") else None


def plain_dtype(config: Mapping[str, object]) -> DType:
    """The float type that config.json names for weights; bfloat16 where it names none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            found = BY_NAME.get(str(part.get(key)).removeprefix("torch."))
            if found is not None and found.kind == "float" and found.bits > 8:
                return found
    return BF16


def _compressed(entry: Mapping[str, object]) -> Scheme | None:
    """That of compressed-tensors: its groups of modules may have blocks of different sizes."""
    groups, sparse = entry.get("config_groups"), entry.get("sparsity_config")
    if not isinstance(groups, Mapping):
        return None
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        return None
    sizes: list[object] = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue  # this group is about activations
        kind = (weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True))
        if kind != ("float", 8, True) or group.get("format", "dense") not in (*_FLOATS, None):
            return None
        if weights.get("strategy") == "block":
            sizes.append(weights.get("block_structure"))
        elif weights.get("strategy") == "group":
            sizes.append((1, weights.get("group_size")))
    if entry.get("format", "dense") not in (*_FLOATS, "mixed-precision"):
        return None
    blocks = _blocks(sizes)
    return None if blocks is None else Scheme("compressed-tensors, float of 8 bits", blocks)


def _blocks(sizes: Iterable[object]) -> tuple[Block, ...] | None:
    """Each distinct pair of sizes; None where one is no pair of positive numbers."""
    found: dict[Block, None] = {}
    for size in sizes:
        if not isinstance(size, list | tuple) or len(size) != 2:
            return None
        rows, columns = size
        if type(rows) is not int or type(columns) is not int or min(rows, columns) < 1:
            return None
        found[rows, columns] = None
    return tuple(found)
