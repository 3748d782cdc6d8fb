"""A checkpoint in the module of a task: its tensors under the module's names, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge.analysis.task import Task
from merge.checkpoint import open_checkpoint
from merge.ir.align import is_rebuilt, some
from merge.ir.checkpoint import Checkpoint
from merge.learning.places import own_tensors, places_of
from merge.tasks import names_in_files, state_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Placed", "placed"]


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Where a checkpoint's tensors lie in a module.

    files: from the module's names to the checkpoint's, of those it holds. whole: whether the module
    needs the library's own loader. notes: what is not the checkpoint's, or not the module's.
    """

    task: Task
    checkpoint: Checkpoint
    files: Mapping[str, str]
    whole: bool
    notes: tuple[str, ...]

    def state(self) -> dict[str, Tensor]:
        """All of the module's tensors, where its own are; floats in float32."""
        if self.whole:
            return self._there(state_of(self.task, self.checkpoint))
        places: dict[str, tuple[str, ...]] = {}
        for name, file in self.files.items():
            places[file] = (*places.get(file, ()), name)
        own = own_tensors(self.checkpoint.label, self.task.module, places, {})
        return self._there({**own, **self._read(list(self.files))})

    def some(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of the module by name, without the rest where that can be."""
        if self.whole and not all(n in self.files for n in names):
            state = self.state()
            return {n: state[n] for n in names}
        held = [n for n in names if n in self.files]
        own = self.task.module.state_dict()
        rest = {n: own[n].detach() for n in names if n not in self.files}
        return self._there({**rest, **self._read(held)})

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        files = dict.fromkeys(self.files[n] for n in names)
        part = Checkpoint({f: self.checkpoint.tensors[f] for f in files}, self.checkpoint.label)
        found = part.state_dict() if files else {}
        return {n: found[self.files[n]] for n in names}

    def _there(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first = next(iter(self.task.module.parameters()), None)
        wide = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
        return wide if first is None else {n: t.to(first.device) for n, t in wide.items()}


def placed(task: Task, checkpoint: Checkpoint) -> Placed:
    """Find a checkpoint's tensors in a task's module: by name, behind a prefix, or as the task's
    ``place`` says; by transformers' own names, where it has others in memory.

    What the module has besides, such as a head around an encoder, stays as it is there. PlanError
    where nothing fits, or a tensor has another shape.
    """
    stored = open_checkpoint(task.module).stored
    known = {} if stored is None else stored()
    shapes = {
        n: e.shape
        for n, e in checkpoint.tensors.items()
        if n not in checkpoint.tied and not is_rebuilt(n, e.shape)
    }
    places = places_of(checkpoint.label, shapes, task.module, task.place, known, task.head)
    lost = [n for n in shapes if n not in places]
    if lost and task.load is not None:
        names = names_in_files(task, checkpoint)
        own = {n: tuple(t.shape) for n, t in task.module.state_dict().items()}
        tensors = checkpoint.tensors
        same = {
            n: f for n in own if (f := names.get(n, n)) in tensors and tensors[f].shape == own[n]
        }
        return Placed(task, checkpoint, same, True, ())
    files = {name: n for n, inside in places.items() for name in inside}
    alone = [
        n
        for n, t in task.module.state_dict().items()
        if n not in files and not is_rebuilt(n, t.shape) and not n.endswith("num_batches_tracked")
    ]
    notes = []
    if lost:
        notes.append(f"{len(lost)} tensors are not in the network: {some(lost)}")
    if alone:
        notes.append(f"{len(alone)} tensors of the network are its own: {some(alone)}")
    return Placed(task, checkpoint, files, False, tuple(notes))
