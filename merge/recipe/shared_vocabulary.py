"""Models put into one vocabulary: their embeddings, heads and biases get its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from merge.errors import PlanError
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import gather
from merge.ir.expr import Expr
from merge.ir.rows import RowTable
from merge.vocabulary.combine import Combined, Member
from merge.vocabulary.table import Choice, Origins, origins
from merge.vocabulary.tokens import Vocabulary

__all__ = ["SharedVocabulary", "Tokenized", "rows_of"]


def rows_of(checkpoint: Checkpoint, axes: Mapping[str, int]) -> int:
    """Rows of a model's embeddings; 0 for one that reads no tokens."""
    return next((checkpoint.tensors[n].shape[a] for n, a in axes.items()), 0)


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A model with its vocabulary, one of those that are merged or only named for its tokens.

    axes: for each tensor that has one, the axis that counts tokens.
    """

    label: str
    checkpoint: Checkpoint
    axes: Mapping[str, int]
    vocabulary: Vocabulary
    merged: bool = True

    @property
    def present(self) -> bool:
        """Whether its rows may be used: those of a merged model that has weights for tokens."""
        return self.merged and bool(self.axes) and self.checkpoint.space == "weight"

    @property
    def rows(self) -> int:
        """Rows of its embeddings; 0 for a model that reads no tokens."""
        return rows_of(self.checkpoint, self.axes)

    def member(self) -> Member:
        """The model as the union of vocabularies sees it."""
        return Member(self.vocabulary, self.rows, self.present)


@dataclass(slots=True)
class SharedVocabulary:
    """The vocabulary of a merge, and its models in it.

    base: the model whose rows are the first default, and whose config is written. multiple: what
    the number of rows is rounded up to.
    """

    models: tuple[Tokenized, ...]
    combined: Combined
    base: int
    choices: Mapping[str, Choice]
    multiple: int
    _origins: dict[frozenset[int], Origins] = field(default_factory=dict)
    _made: dict[int, Checkpoint] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the result's embeddings."""
        return self.combined.rows + -self.combined.rows % self.multiple

    def number_of(self, checkpoint: Checkpoint) -> int | None:
        """Which of the models a checkpoint is."""
        found = (i for i, m in enumerate(self.models) if m.checkpoint.same_as(checkpoint))
        return next(found, None)

    def model(self, number: int) -> Checkpoint:
        """A model with the result's rows in embeddings, heads and their biases."""
        if number not in self._made:
            model = self.models[number]
            if not model.present:
                self._check_unchanged(model)
            new = {n: self._rows_of(number, n) for n in model.axes} if model.present else {}
            self._made[number] = _with(model.checkpoint, new)
        return self._made[number]

    def statistics(self, number: int, known: Checkpoint) -> Checkpoint:
        """A statistic of each weight of a model: zero for tokens that the model lacks."""
        if not self.models[number].present:
            return known
        table = self._whence(self._present()).own_table(number, multiple=self.multiple)
        axes = {n: a for n, a in self.models[number].axes.items() if n in known.tensors}
        new = {n: _gathered(n, [known], table, a) for n, a in axes.items()}
        return _with(known, new)

    def summary(self) -> str:
        """What the rows of the result are, in words."""
        counts = self._whence(self._present()).counts([m.label for m in self.models])
        if more := self.rows - self.combined.rows:
            counts[f"added to make them a multiple of {self.multiple}"] = more
        inside = ", ".join(f"{count} {what}" for what, count in counts.items())
        return f"the vocabulary has {self.rows} rows: {inside}"

    def _present(self) -> frozenset[int]:
        return frozenset(i for i, m in enumerate(self.models) if m.present)

    def _whence(self, having: frozenset[int]) -> Origins:
        """Where the rows of a tensor come from that these models have."""
        if having not in self._origins:
            members = [replace(m.member(), present=i in having) for i, m in enumerate(self.models)]
            self._origins[having] = origins(members, self.combined, self.base, self.choices)
        return self._origins[having]

    def _rows_of(self, number: int, name: str) -> Expr:
        """One tensor of a model in the new rows."""
        model = self.models[number]
        axis = model.axes[name]
        if (rows := model.checkpoint.tensors[name].shape[axis]) != model.rows:
            raise PlanError(
                "a model has several vocabularies, and one tokenizer cannot be that of all",
                model=model.label,
                tensor=name,
                found=f"{rows} rows",
                expected=f"{model.rows}, as {next(iter(model.axes))} has",
            )
        having = frozenset(i for i in self._present() if self.models[i].axes.get(name) == axis)
        table = self._whence(having).table(number, multiple=self.multiple)
        used = sorted({*table.used(), number})
        if lacking := [self.models[i].label for i in used if i not in having]:
            raise PlanError(
                "a token's row is to come from a model that has no such tensor",
                tensor=name,
                found=", ".join(lacking),
            )
        sources = [self.models[i].checkpoint for i in used]
        return _gathered(name, sources, table.over(used), axis)

    def _check_unchanged(self, model: Tokenized) -> None:
        """A difference of weights has no rows for tokens that are new to it."""
        ids = self.combined.ids
        same = all(ids.get(t) == i for t, i in model.vocabulary.ids.items())
        if model.axes and not (same and model.rows == self.rows):
            raise PlanError(
                "a difference of weights cannot be put into another vocabulary",
                model=model.label,
                found=f"{model.rows} rows",
                expected=f"the vocabulary of the result, of {self.rows} rows",
                do="merge the weights that it is a difference of, with method task_arithmetic",
            )


def _gathered(name: str, sources: Sequence[Checkpoint], table: RowTable, axis: int) -> Expr:
    """The rows of ``table`` from the tensors ``name`` of ``sources``."""
    operands = [s.tensors[name] for s in sources]
    shape = [*operands[0].shape[:axis], table.count, *operands[0].shape[axis + 1 :]]
    if axis and shape[0] != 1:
        raise PlanError("the columns of a tensor are its tokens, not its rows", tensor=name)
    if any([*e.shape[:axis], table.count, *e.shape[axis + 1 :]] != shape for e in operands):
        raise PlanError(
            "the models' embeddings are of different widths",
            tensor=name,
            found=", ".join(f"{list(s.tensors[name].shape)} in {s.label}" for s in sources),
            expected="models of one architecture and size",
        )
    return gather(operands, table, tuple(shape))


def _with(checkpoint: Checkpoint, new: Mapping[str, Expr]) -> Checkpoint:
    """The checkpoint with other tensors under some names; what is tied stays tied."""
    tensors = {**checkpoint.tensors, **new}
    tensors.update({n: tensors[first] for n, first in checkpoint.tied.items()})
    return replace(checkpoint, tensors=tensors)
