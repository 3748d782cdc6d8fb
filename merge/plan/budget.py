"""Cut the work to fit memory: tile size and number of workers from the budget."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import TypeGuard

from merge.errors import PlanError, RecipeError
from merge.ir.derived import (
    BlockScaled,
    Concat,
    Gather,
    LowRank,
    Reorder,
    Whole,
    Window,
    held_elements,
)
from merge.ir.expr import Apply, Expr, Linear
from merge.methods.core.shapes import row_length
from merge.plan.far import ahead_bytes
from merge.plan.model import Budget, Step

__all__ = [
    "BLOCK",
    "CHUNK",
    "budget",
    "extent",
    "held_bytes",
    "parse_bytes",
    "tile_bytes",
]

BLOCK = 1 << 16
"""Elements of one summand of a measuring pass; tiles are whole blocks (merge.methods.core)."""

CHUNK = 1 << 21
"""Elements of a chunk of element-wise work: 4 MiB of bfloat16."""

_TILES = {"cpu": 1 << 18, "cuda": 1 << 21}  # largest tile: fits a core's cache; feeds a GPU
_DEFAULT = {"cpu": 1 << 30, "cuda": 4 << 30}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """Bytes from a number or text: ``256MiB`` (binary), ``5GB`` or ``5G`` (decimal).

    >>> parse_bytes("256MiB"), parse_bytes("1.5GB")
    (268435456, 1500000000)
    """
    if isinstance(value, int):
        return value
    match = _BYTES.fullmatch(value)
    unit = match[2].lower() if match else ""
    if match is None or unit == "i":
        raise RecipeError(
            "not a size in bytes", found=repr(value), expected="such as 256MiB or 5GB"
        )
    return int(float(match[1]) * (_UNITS | _BINARY)[unit])


def extent(nodes: Sequence[Expr]) -> tuple[int, int]:
    """The grain of an expression, of which tiles are multiples, and elements of a chunk.

    nodes: all of the expression's, operands before what uses them (`merge.ir.expr.walk`).

    Rows and whole tensors are worked on a chunk at a time whatever the budget, so that vector tails
    fall on the same elements and the bytes do not depend on it.
    """
    found = _grain(nodes)
    if found == 1:
        return 1, CHUNK
    return found, found * max(1, _TILES["cpu"] // found)


def _grain(nodes: Sequence[Expr]) -> int:
    """Elements that must be computed together: 1, a row, one of several parts, or the tensor."""
    done: dict[int, int] = {}
    for node in nodes:
        grains = [done[id(e)] for e in node.operands]
        if isinstance(node, Apply) and not node.method.coefficients:
            if node.method.local == "row":
                grains.append(max(1, row_length(node.shape)))
            elif node.method.local == "tensor":
                grains.append(_numel(node))
        elif isinstance(node, Whole):
            grains.append(_numel(node))
        elif isinstance(node, Reorder) and node.picks:
            grains.append(node.width)
        if all(g == 1 for g in grains) or isinstance(node, LowRank):
            done[id(node)] = 1
        elif isinstance(node, Concat):
            done[id(node)] = _grain_of_parts(node, grains)
        elif isinstance(node, Gather | Reorder):
            whole = any(node.width % g for g in grains)
            done[id(node)] = _numel(node) if whole else node.width
        elif isinstance(node, Window):
            same = _numel(node) == _numel(node.operands[0])  # another shape of the whole
            done[id(node)] = grains[0] if same else _numel(node)
        else:
            done[id(node)] = _common(grains, _numel(node))
    return done[id(nodes[-1])]


def _numel(node: Expr) -> int:
    return max(1, math.prod(node.shape))


def _common(grains: Sequence[int], numel: int) -> int:
    """The least grain that suits all; the whole tensor where none does."""
    least = math.lcm(*grains)
    return least if numel % least == 0 else numel


def _grain_of_parts(node: Concat, grains: Sequence[int]) -> int:
    """Of tensors put together: that of the parts where all parts are whole grains of it."""
    numel = _numel(node)
    least = _common(grains, numel)
    return least if all(_numel(e) % least == 0 for e in node.operands) else numel


def tile_bytes(expr: Expr) -> int:
    """Upper bound of buffer bytes a worker holds per element of a tile of ``expr``.

    One raw buffer, one compute buffer for each node, and what the node itself holds. Of tensors
    put together from others, only one is computed at a time.
    """
    wide = 8 if expr.dtype.name == "float64" else 4
    return math.ceil(wide * (4 + _tiles(expr, set())))


def _tiles(node: Expr, seen: set[int]) -> float:
    """Buffers of a tile's size for ``node`` and for those under it that are not in ``seen``."""
    if id(node) in seen:
        return 0
    seen.add(id(node))
    if isinstance(node, Whole):
        return 1 + (node.scratch + sum(map(_whole_elements, node.operands))) / _numel(node)
    own = 1 + _temporaries(node)
    if isinstance(node, Concat | Gather):
        return own + max(_tiles(e, set(seen)) for e in node.operands)
    apart = node.operands[node.models :] if _has_apart(node) else ()
    alike = node.operands[: len(node.operands) - len(apart)]
    large = sum(map(_whole_elements, apart)) / _numel(node)
    return own + large + sum(_tiles(e, seen) for e in alike)


def _has_apart(node: Expr) -> TypeGuard[Apply]:
    """Whether a method's statistics have shapes of their own."""
    return isinstance(node, Apply) and node.method.statistic is not None


def _whole_elements(operand: Expr) -> float:
    """What an operand of a function of whole tensors takes, in elements of a tile.

    One that is not of floats is there as it is stored, and once more where it is put together.
    """
    if operand.dtype.kind == "float":
        return _numel(operand) * _tiles(operand, set())
    return 2 * _numel(operand) * operand.dtype.bits / 32


def _temporaries(node: Expr) -> int:
    """What a node holds besides its value, in buffers of a tile's size.

    Two fresh tensors for each operand of a method (one thinned, one weighted), one where it works
    on whole tensors, six more, and its scratch.
    """
    if isinstance(node, Apply) and not node.method.coefficients:
        fresh = 1 if node.method.local == "tensor" else 2
        scratch = node.method.scratch
        shape = node.operands[-1].shape if _has_apart(node) else node.shape
        held = 0 if scratch is None else scratch(shape, len(node.operands))
        return fresh * len(node.operands) + 6 + -(-held // _numel(node))
    return int(isinstance(node, Linear | Gather | Reorder | LowRank | BlockScaled))


def held_bytes(nodes: Sequence[Expr], wide: int) -> int:
    """Bytes of small operands that are kept whole while their tensor is worked on, twice: as they
    are read, and as they are kept."""
    return 2 * wide * sum(held_elements(n) for n in nodes if isinstance(n, LowRank | BlockScaled))


def budget(
    steps: list[Step], *, memory: int | None, threads: int | None, device: str, held: int = 0
) -> Budget:
    """Tile and workers such that all that they hold together stays under ``memory`` bytes.

    Three quarters are for tiles, one for what measuring passes hold between tiles. held: bytes of a
    weight file that is in memory beside the buffers; a ``memory`` that was given is for both.
    """
    kind = device.partition(":")[0]
    limit = _DEFAULT[kind] if memory is None else max(0, memory - held)
    workers = threads if threads is not None else default_threads(kind)
    if workers < 1:
        raise RecipeError("the number of threads must be at least 1", found=threads)
    per_element = max((s.tile_bytes for s in steps if s.grain == 1), default=8)
    whole = max((_least(s) * s.tile_bytes for s in steps if s.grain > 1), default=0)
    factors = max((s.held_bytes for s in steps), default=0)
    least = max(BLOCK * per_element, whole) + factors
    ahead = ahead_bytes(steps, limit, -(-least * 4 // 3))
    given, limit = limit, limit - ahead
    for_tiles = limit * 3 // 4
    if least > for_tiles:
        worst = max(
            steps,
            key=lambda s: _least(s) * s.tile_bytes + s.held_bytes,
        )
        needed = -(-least * 4 // 3) + held + ahead
        beside = f", {held} of them for a weight file that is held in memory" if held else ""
        smaller = ", or make smaller weight files: --shard-size" if held else ""
        raise PlanError(
            "the memory budget is too small for one worker",
            tensor=worst.output.name,
            found=f"{memory if memory is not None else given} bytes",
            expected=f"at least {needed} bytes{beside}",
            do=f"give --memory {-(-needed // 2**20)}MiB or more{smaller}",
        )
    workers = min(workers, for_tiles // least)
    tile = _TILES[kind]
    while tile > BLOCK and workers * (tile * per_element + factors) > for_tiles:
        tile //= 2
    # never more than the largest tensors take, so that a small merge is not said to hold much
    numel = max((s.output.numel for s in steps), default=0)
    largest = max((s.output.numel * s.tile_bytes for s in steps if s.passes > 1), default=0)
    aside = limit // 4 // workers
    nested = [s.kept_bytes for s in steps if s.kept_bytes]
    keep = max((b for b in nested if b <= aside // 2), default=0)
    measured = min(aside - (aside // 2 if nested else 0), largest)
    held = workers * (max(min(tile, numel) * per_element, whole) + factors + measured + keep)
    return Budget(tile, workers, given, held + ahead, measured, keep, device, ahead)


def _least(step: Step) -> int:
    """Elements that are worked on at once, at least: a block, or a chunk of rows and wholes."""
    return BLOCK if step.grain == 1 else min(step.chunk, step.output.numel)


def default_threads(kind: str) -> int:
    """The cores this process may use; on a GPU enough workers to keep copies and kernels going."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return cores if kind == "cpu" else min(cores, 12)
