"""Experts of a layer: one matrix each, or all in one tensor, and one made of the other.

On disk an expert mostly has three matrices, gate and up (I, H) and down (H, I). transformers 5
holds all E of them in memory as ``gate_up_proj`` (E, 2I, H), each expert's gate before its up, and
``down_proj`` (E, H, I). Both are the same numbers in the same order, so that one is a window in, or
a join of, the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import concat, window
from merge.ir.expr import Expr

__all__ = ["count_experts", "experts_as_in", "experts_layout"]

_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(.+)$")
_FUSED = re.compile(r"^(.+\.experts)\.([a-z]\w*)$")
_WORDS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What gate, up and down are called, in this order: by most, and by Mixtral."""
_ALL_IN_ONE = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class _Block:
    """The experts of one layer. ``words``: how single matrices are called; () where fused."""

    words: tuple[str, ...]
    names: tuple[str, ...]  # of all its tensors
    count: int

    @property
    def fused(self) -> bool:
        return not self.words


def experts_layout(names: Mapping[str, object]) -> str | None:
    """How experts are stored: ``per expert``, ``fused``, or None where there are none.

    >>> experts_layout({"mlp.experts.0.up_proj.weight": 0}), experts_layout({"mlp.up_proj": 0})
    ('per expert', None)
    """
    kinds = {"per expert" for n in names if _EXPERT.match(n)}
    kinds |= {"fused" for n in names if (m := _FUSED.match(n)) and m[2] in _ALL_IN_ONE}
    return " and ".join(sorted(kinds)) or None


def count_experts(checkpoint: Checkpoint) -> int:
    """How many experts the layers have, at most; 0 for a model without."""
    single = [b.count for b in _blocks(checkpoint).values()]
    stacked = [e.shape[0] for n, e in checkpoint.tensors.items() if _FUSED.match(n) and e.shape]
    return max([*single, *stacked], default=0)


def experts_as_in(checkpoint: Checkpoint, donor: Checkpoint) -> Checkpoint:
    """``checkpoint`` with its experts stored and called as in ``donor``; as it is if they are.

    PlanError where the two differ and one of them is in a layout that is not understood.
    """
    if checkpoint.tensors.keys() <= donor.tensors.keys():
        return checkpoint
    if experts_layout(checkpoint.tensors) is None or experts_layout(donor.tensors) is None:
        return checkpoint
    ours, theirs = _blocks(checkpoint), _blocks(donor)
    by_layer = {_layer(path): path for path in theirs}
    tensors = dict(checkpoint.tensors)
    moved: dict[str, str] = {}
    changed = 0
    for path, block in ours.items():
        target = path if path in theirs else by_layer.get(_layer(path))
        if target is None or (target == path and _alike(block, theirs[target])):
            continue
        for name in block.names:
            del tensors[name]
        tensors.update(_rebuilt(checkpoint, path, block, donor, target, theirs[target]))
        changed += 1
        if (old := _parent(path)) != (new := _parent(target)):
            moved[old] = new
    if not changed:
        return checkpoint
    renamed = {_moved(n, moved): e for n, e in tensors.items()}
    kind = "one tensor" if next(iter(theirs.values())).fused else "a tensor an expert"
    note = f"the experts of {checkpoint.label} are taken as in {donor.label}: {kind}"
    return replace(
        checkpoint,
        tensors=renamed,
        tied={_moved(n, moved): _moved(o, moved) for n, o in checkpoint.tied.items()},
        folders={_moved(n, moved): f for n, f in checkpoint.folders.items()},
        notes=(*checkpoint.notes, note),
    )


def experts_fused(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with a layer's experts in two tensors, as transformers 5 holds them."""
    tensors = dict(checkpoint.tensors)
    for path, block in _blocks(checkpoint).items():
        if not block.fused:
            for name in block.names:
                del tensors[name]
            tensors.update(_fused(path, _parts(checkpoint, path, block)))
    return replace(checkpoint, tensors=tensors)


def _blocks(checkpoint: Checkpoint) -> dict[str, _Block]:
    """The experts of each layer, by what their names begin with."""
    names: dict[str, list[str]] = {}
    words: dict[str, dict[str, None]] = {}
    counts: dict[str, int] = {}
    for name in checkpoint.tensors:
        if match := _EXPERT.match(name):
            words.setdefault(match[1], {})[match[3].removesuffix(".weight")] = None
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
        elif not (match := _FUSED.match(name)):
            continue
        names.setdefault(match[1], []).append(name)
    return {
        path: _Block(tuple(sorted(words.get(path, ()))), tuple(own), counts.get(path, 0))
        for path, own in names.items()
    }


def _alike(a: _Block, b: _Block) -> bool:
    """Whether both are stored in one way; what names alone tell apart is not for here."""
    known = {frozenset(w) for w in _WORDS}
    return a.fused == b.fused and (
        a.words == b.words or not {*map(frozenset, (a.words, b.words))} <= known
    )


def _layer(path: str) -> str:
    """``model.layers.3.mlp.experts`` is of ``model.layers.3``."""
    above, _, last = _parent(path).rpartition(".")
    return f"{above}.{last}" if last.isdigit() else above


def _parent(path: str) -> str:
    return path.removesuffix(".experts")


def _moved(name: str, moved: Mapping[str, str]) -> str:
    """A name under another block's, such as the router's beside the experts."""
    path = name
    while path := path.rpartition(".")[0]:
        if path in moved:
            return moved[path] + name.removeprefix(path)
    return name


def _rebuilt(
    checkpoint: Checkpoint, path: str, block: _Block, donor: Checkpoint, target: str, like: _Block
) -> dict[str, Expr]:
    """The experts of one layer under the names, and in the layout, of another model's.

    They still stand under the block's own path: what is beside them moves with them.
    """
    single = _parts(checkpoint, path, block)
    if like.fused:
        _sizes(donor, target, like)
        return _fused(path, single)
    words = next((w for w in _WORDS if set(w) == set(like.words)), None)
    if words is None:
        raise _unknown(like.names, f"{target}.*", donor.label)
    return {
        f"{path}.{i}.{word}.weight": expr
        for i, one in enumerate(single)
        for word, expr in zip(words, one, strict=True)
    }


def _fused(path: str, single: Sequence[tuple[Expr, Expr, Expr]]) -> dict[str, Expr]:
    """The matrices of single experts as two tensors."""
    gate, _, down = single[0]
    (inner, width), count = gate.shape, len(single)
    pairs = [e for one in single for e in one[:2]]
    return {
        f"{path}.gate_up_proj": concat(pairs, (count, 2 * inner, width)),
        f"{path}.down_proj": concat([one[2] for one in single], (count, *down.shape)),
    }


def _parts(checkpoint: Checkpoint, path: str, block: _Block) -> list[tuple[Expr, Expr, Expr]]:
    """Gate, up and down of every expert."""
    tensors = checkpoint.tensors
    if block.fused:
        return _taken_apart(checkpoint, path, block)
    words = next((w for w in _WORDS if set(w) == set(block.words)), None)
    wanted = [[f"{path}.{i}.{w}.weight" for w in words or ()] for i in range(block.count)]
    if words is None or {n for one in wanted for n in one} != set(block.names):
        raise _unknown(block.names, f"{path}.*", checkpoint.label)
    gates, ups, downs = ([tensors[one[k]] for one in wanted] for k in range(3))
    shapes = {g.shape for g in gates} | {u.shape for u in ups} | {d.shape[::-1] for d in downs}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise _unknown(block.names, f"{path}.*", checkpoint.label)
    return list(zip(gates, ups, downs, strict=True))


def _taken_apart(checkpoint: Checkpoint, path: str, block: _Block) -> list[tuple[Expr, Expr, Expr]]:
    count, inner, width = _sizes(checkpoint, path, block)
    both, down = (checkpoint.tensors[f"{path}.{word}"] for word in _ALL_IN_ONE)
    size = inner * width
    return [
        (
            window(both, 2 * i * size, (inner, width)),
            window(both, (2 * i + 1) * size, (inner, width)),
            window(down, i * size, (width, inner)),
        )
        for i in range(count)
    ]


def _sizes(checkpoint: Checkpoint, path: str, block: _Block) -> tuple[int, int, int]:
    """E, I and H of experts that are all in one tensor, which is checked to be laid out as here."""
    names = [f"{path}.{word}" for word in _ALL_IN_ONE]
    how = ""
    if set(block.names) == set(names):
        both, down = (checkpoint.tensors[n].shape for n in names)
        if len(both) == len(down) == 3 and both[0] == down[0]:
            (count, rows, columns), (_, width, inner) = both, down
            if (rows, columns) == (2 * inner, width):
                return count, inner, width
            if (rows, columns) == (inner, 2 * width):
                how = "transposed: "
    raise _unknown(block.names, f"{path}.*", checkpoint.label, how)


def _unknown(names: tuple[str, ...], tensor: str, label: str, how: str = "") -> PlanError:
    ends = list(dict.fromkeys(re.sub(r"^.*\.experts\.", "", n) for n in names))
    return PlanError(
        "experts are stored in two ways, and one of them is not understood",
        model=label,
        tensor=tensor,
        found=how + ", ".join(ends[:5]),
        expected="experts.N.{gate,up,down}_proj.weight, experts.N.{w1,w3,w2}.weight, or"
        " experts.gate_up_proj (E, 2I, H) with experts.down_proj (E, H, I)",
        do="save both models in the same layout, as save_pretrained(save_original_format=...) can",
    )
