"""Examples as batches that are made when they are asked for: nothing is decoded before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from merge.errors import MergeError, SourceError, told
from merge.streams.examples import Example

__all__ = ["Batches"]

Batch = tuple[Any, Any]
Collate = Callable[[Sequence[Example]], Batch]


class Batches(Sequence[Batch]):
    """Batches of ``size`` examples in their order, the last of what is left.

    collate: makes a batch of examples. A batch is made anew each time: memory holds one. task: the
    name under which errors speak of it.
    """

    def __init__(
        self, examples: Sequence[Example], size: int, collate: Collate, task: str = ""
    ) -> None:
        self.examples = tuple(examples)
        self.size = size
        self._collate = collate
        self._task = task or None

    def __len__(self) -> int:
        return -(-len(self.examples) // self.size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index] * self.size
        chosen = self.examples[at : at + self.size]
        try:
            return self._collate(chosen)
        except MergeError as error:
            raise error.at(task=self._task) from None
        except Exception as error:  # a tokenizer's or a decoder's own
            raise SourceError("a batch cannot be made of these examples", found=told(error)).at(
                **chosen[0].where, task=self._task
            ) from error
