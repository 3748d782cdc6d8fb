"""A task's data for learning: looked through once, drawn from by seed, errors that name it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.errors import MergeError, PlanError, SourceError, told

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Batch",
    "Batches",
    "Drawn",
    "joined",
    "key_of",
    "moved",
    "nbytes_of",
    "pair",
    "rows_of",
    "taken",
]

Batch = tuple[Any, Any]
"""Inputs and target; the target is None where there is none."""

Rows = tuple[int, tuple[int, ...] | None]
"""A batch's number and some of its rows, or all."""

Drawn = tuple[Rows, ...]
"""What a step takes of a task's data."""


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """Batches by number. sizes: rows of each, counted when the data was first read.

    classes: labels that were met then, two of them at most; None where there were none.
    """

    task: str
    items: Sequence[Any]
    sizes: tuple[int, ...]
    classes: frozenset[int] | None = None

    @classmethod
    def read(cls, task: str, data: Iterable[Any], keep: int, part: str = "learn on") -> Batches:
        """The data of a task, gone through once. part: what it is for.

        What has numbers (a list, or a sequence that loads on access) is asked again for each use;
        what can only be gone through is kept, ``keep`` bytes at most. SourceError where it raises,
        PlanError where there is none.
        """
        items: list[Any] = []
        sizes: list[int] = []
        classes: set[int] = set()
        held = 0
        lasting = isinstance(data, Sequence)
        for item in _gone_through(task, data):
            inputs, target = pair(task, item)
            size = rows_of(inputs)
            if size == 0:
                raise PlanError("a batch is empty", task=task, batch=len(sizes))
            if target is not None and (count := _rows_or_none(target)) not in (None, size):
                raise PlanError(
                    "a batch has not one target for each input",
                    task=task,
                    batch=len(sizes),
                    found=f"{size} inputs, {count} targets",
                )
            sizes.append(size)
            classes |= _classes(target) if len(classes) < 2 else set()
            if not lasting:
                items.append(item)
                held += nbytes_of((inputs, target))
                if held > keep:
                    raise PlanError(
                        "a task's data is more than is kept in memory",
                        task=task,
                        found=f"over {keep} bytes after {len(sizes)} batches",
                        do="give fewer batches, or a sequence that loads a batch when asked",
                    )
        if not sizes:
            raise PlanError(
                f"a task has no data to {part}",
                task=task,
                found="no batches",
                expected="at least one batch of inputs",
                do="give the task adapt= or train= batches"
                if part == "learn on"
                else "give batches, or leave validate= out: a share of the others is held out then",
            )
        kept = data if isinstance(data, Sequence) else items
        return cls(task, kept, tuple(sizes), frozenset(classes) if classes else None)

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, number: int) -> Batch:
        """One batch; SourceError where loading it raises."""
        try:
            item = self.items[number]
        except MergeError as error:
            raise error.at(task=self.task, batch=number) from None
        except Exception as error:  # the loader's own code may raise anything
            raise _raised(self.task, number, error) from error
        return pair(self.task, item)

    def part(self, numbers: Sequence[int]) -> Batches:
        """Some of the batches."""
        return Batches(
            self.task, _Part(self.items, tuple(numbers)), tuple(self.sizes[i] for i in numbers)
        )

    def drawn(self, seed: int, step: int, rows: int | None) -> Drawn:
        """What step number ``step`` takes: a whole batch, or ``rows`` rows of any batches.

        All data is gone through once, in an order that the seed gives, before any comes again.
        """
        import torch

        total = len(self.sizes) if rows is None else sum(self.sizes)
        each = 1 if rows is None else min(rows, total)
        epoch, at = divmod(step * each, total)
        wanted: list[int] = []
        while len(wanted) < each:
            draw = torch.Generator().manual_seed(key_of(seed, self.task, epoch))
            order = torch.randperm(total, generator=draw)
            wanted += order[at : at + each - len(wanted)].tolist()
            epoch, at = epoch + 1, 0
        if rows is None:
            return tuple((i, None) for i in wanted)
        found: dict[int, list[int]] = {}
        for row in wanted:
            number = 0
            while row >= self.sizes[number]:
                row -= self.sizes[number]
                number += 1
            found.setdefault(number, []).append(row)
        return tuple((i, tuple(chosen)) for i, chosen in found.items())

    def take(self, drawn: Drawn, more: Callable[[int], Any] | None = None) -> tuple[Any, Any, Any]:
        """Inputs and target of what was drawn, and what ``more`` has of it by batch number."""
        pieces = []
        for number, rows in drawn:
            inputs, target = self.batch(number)
            piece = (inputs, target, None if more is None else more(number))
            pieces.append(piece if rows is None else tuple(taken(p, rows) for p in piece))
        if len(pieces) == 1:
            return pieces[0][0], pieces[0][1], pieces[0][2]
        try:
            inputs, target, other = (joined(list(p)) for p in zip(*pieces, strict=True))
        except (RuntimeError, TypeError, ValueError) as error:
            raise PlanError(
                "rows of different batches do not fit into one",
                task=self.task,
                found=str(error).splitlines()[0],
                do="make batches of one shape, or learn on them as they are: batch: null",
            ) from None
        return inputs, target, other


@dataclass(frozen=True, slots=True, eq=False)
class _Part(Sequence[Any]):
    """Some items of a sequence."""

    items: Sequence[Any]
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return self.items[self.numbers[index]]


def key_of(*parts: object) -> int:
    """A seed made of anything that has a text: the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def pair(task: str, item: Any) -> Batch:
    """A batch as inputs and target: tuples of two are that, what is no tuple is inputs alone."""
    if isinstance(item, tuple | list):
        if len(item) != 2:
            raise PlanError(
                "a batch is not a pair of inputs and target",
                task=task,
                found=f"{type(item).__name__} of {len(item)}",
                expected="(inputs, target), or (inputs, None); several inputs as a tuple in it",
            )
        return item[0], item[1]
    return item, None


def _gone_through(task: str, data: Iterable[Any]) -> Iterator[Any]:
    number = 0
    try:
        for item in data:
            yield item
            number += 1
    except MergeError as error:
        raise error.at(task=task, batch=number) from None
    except Exception as error:  # the loader's own code may raise anything
        raise _raised(task, number, error) from error


def _raised(task: str, number: int, error: Exception) -> SourceError:
    return SourceError(
        "a task's data loader raised an error", task=task, batch=number, found=told(error)
    )


# -- trees of tensors ------------------------------------------------------------------------------
def _leaves(tree: Any) -> Iterator[Tensor]:
    import torch

    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _leaves(value)


def nbytes_of(tree: Any) -> int:
    """Bytes of all tensors in a tree."""
    return sum(int(t.nbytes) for t in _leaves(tree))


def _classes(target: Any) -> set[int]:
    """Two of the labels in a target, or one, or none where it is no label for each row."""
    import torch

    if not isinstance(target, torch.Tensor) or target.is_floating_point() or not target.numel():
        return set()
    return {int(target.min()), int(target.max())}


def _rows_or_none(tree: Any) -> int | None:
    found = next((t for t in _leaves(tree) if t.dim()), None)
    return None if found is None else len(found)


def rows_of(tree: Any) -> int:
    """The rows of a batch: the length of its first tensor, or of the list that it is."""
    found = _rows_or_none(tree)
    if found is None:
        return len(tree) if isinstance(tree, list | tuple) else 1
    return found


def taken(tree: Any, rows: Sequence[int]) -> Any:
    """The same tree with some rows of its tensors and lists."""
    import torch

    if isinstance(tree, torch.Tensor):
        return tree[torch.tensor(rows, device=tree.device)] if tree.dim() else tree
    if isinstance(tree, Mapping):
        return {k: taken(v, rows) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(taken(v, rows) for v in tree)
    return [tree[i] for i in rows] if isinstance(tree, list) else tree


def moved(tree: Any, device: str) -> Any:
    """The same tree with its tensors on a device."""
    import torch

    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {k: moved(v, device) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(moved(v, device) for v in tree)
    return [moved(v, device) for v in tree] if isinstance(tree, list) else tree


def joined(trees: Sequence[Any]) -> Any:
    """Trees of one shape put together along their rows.

    Mappings with an attention mask are padded at the end to one length; what is added is masked.
    """
    import torch

    first = trees[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(trees)) if first.dim() else first
    if isinstance(first, Mapping):
        if "attention_mask" in first:
            trees = _padded(trees)
        return {k: joined([t[k] for t in trees]) for k in first}
    if isinstance(first, tuple):
        return tuple(joined(list(values)) for values in zip(*trees, strict=True))
    if isinstance(first, list):
        return [row for tree in trees for row in tree]
    return first


def _padded(trees: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    import torch

    length = max(t["attention_mask"].shape[1] for t in trees)

    def longer(name: str, value: Any, own: int) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[1] != own:
            return value
        fill = -100 if name == "labels" else 0
        pads = [0, 0] * (value.dim() - 2) + [0, length - own]
        return torch.nn.functional.pad(value, pads, value=fill)

    return [
        {k: longer(k, v, int(t["attention_mask"].shape[1])) for k, v in t.items()} for t in trees
    ]
