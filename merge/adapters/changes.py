"""Which tensors of a model differ from its base's, and as what each fits into an adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from merge.adapters.products import difference_of, products_of
from merge.errors import PlanError
from merge.families.roles import role_of
from merge.ir.checkpoint import Checkpoint, same, some
from merge.ir.expr import Expr

__all__ = ["Changes", "Choice", "Embeddings", "Measure", "find_changes"]

Embeddings = Literal["full", "lora", "skip"]
"""How changed embeddings are kept: whole, as factors, or not at all."""

Measure = Callable[[Mapping[str, Expr]], Mapping[str, float]]
"""From expressions to the sum of squares of each."""

_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that peft stores whole under a task, whether they differ or not."""

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Choice:
    """What is wanted of the difference. include, exclude: regular expressions over modules.

    embeddings: None writes those whose difference is a product of thin matrices as such, and the
    others whole.
    """

    embeddings: Embeddings | None = None
    include: Sequence[re.Pattern[str]] = ()
    exclude: Sequence[re.Pattern[str]] = ()

    def takes(self, module: str) -> bool:
        """Whether a module is to be in the adapter."""
        if any(p.search(module) for p in self.exclude):
            return False
        return not self.include or any(p.search(module) for p in self.include)


@dataclass(slots=True)
class Changes:
    """The parts of the difference.

    matrices: differences to be written as B A, by the weight's name. whole: modules of which all
    tensors are stored. biases: that are stored beside factors. lost: tensors that differ and are
    not kept, and why. squares: sums of squares of differences, of those that were measured.
    """

    matrices: dict[str, Expr] = field(default_factory=dict)
    whole: dict[str, None] = field(default_factory=dict)
    biases: dict[str, None] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)


def find_changes(
    model: Checkpoint, base: Checkpoint, measure: Measure, choice: Choice, task: str | None
) -> Changes:
    """What is to be done with each tensor of ``model`` that is not the base's.

    measure: is asked for what is not told by the expressions: whether embeddings, norms and biases
    that are stored anew are really other ones. Raises PlanError for what fits into no adapter.
    """
    found = Changes()
    differences = _differences(model, base)
    asked: dict[str, Expr] = {}
    whole: dict[str, None] = {}
    parts = _parts_of_experts(model)
    for name, expr in differences.items():
        kind = _kind(name, model, choice, expr)
        if kind == "matrix" and name.split(".")[-2] in parts and not _EXPERT.search(name):
            kind = "whole"
        taken = choice.takes(name.rpartition(".")[0])
        if kind == "matrix" and expr is not None and taken:
            found.matrices[name] = expr
        elif expr is None:
            whole[name] = None
        else:
            asked[name] = expr
    found.squares = dict(measure(asked))
    differing = [n for n in differences if found.squares.get(n, 1.0) > 0.0]
    for name in differing:
        if not choice.takes(name.rpartition(".")[0]):
            found.lost[name] = "left out, as was asked"
        elif name in found.matrices:
            continue
        elif choice.embeddings == "skip" and _is_embedding(name, model):
            found.lost[name] = "embeddings are skipped, as was asked"
        elif name in asked and _kind(name, model, choice, asked[name]) == "bias":
            found.biases[name] = None
        else:
            whole[name] = None
    for name in model.tensors:
        if (module := name.rpartition(".")[0]).rpartition(".")[2] in _TASKS.get(task or "", ()):
            found.whole[module] = None
    _settle(found, whole)
    return found


def _differences(model: Checkpoint, base: Checkpoint) -> dict[str, Expr | None]:
    """The difference of each tensor that may differ; None where the base has none to compare."""
    missing = [n for n in base.tensors if n not in model.tensors and n not in base.tied]
    if missing:
        raise PlanError(
            "the model lacks tensors of its base",
            model=model.label,
            against=base.label,
            found=some(missing),
            do="name the model that this one was trained from: --base",
        )
    out: dict[str, Expr | None] = {}
    for name, expr in model.tensors.items():
        owner = model.tied.get(name)
        if owner is not None and (owner == base.tied.get(name) or name not in base.tensors):
            continue  # it follows the tensor that it is tied to
        other = base.tensors.get(name)
        if other is None or other.shape != expr.shape:
            out[name] = None
        elif expr.dtype.kind == other.dtype.kind == "float":
            if (difference := difference_of(expr, other)) is not None:
                out[name] = difference
        elif expr != other:
            out[name] = same(name, (expr, other))
    return out


def _kind(name: str, model: Checkpoint, choice: Choice, expr: Expr | None) -> str:
    """As what a tensor's difference is kept: ``matrix``, ``bias``, or ``whole`` with its module."""
    module, _, last = name.rpartition(".")
    shape = model.tensors[name].shape
    product = expr is not None and products_of(expr) is not None
    if last == "bias":
        weight = model.tensors.get(f"{module}.weight")
        return "bias" if weight is not None and len(weight.shape) > 1 else "whole"
    if last != "weight" or len(shape) < 2 or expr is None:
        return "whole"
    if len(shape) > 2:
        return "matrix" if product else "whole"
    if _is_embedding(name, model):
        wanted = choice.embeddings == "lora" or (choice.embeddings is None and product)
        return "matrix" if wanted else "whole"
    return "whole" if role_of(name, shape) == "router" and not product else "matrix"


def _parts_of_experts(model: Checkpoint) -> frozenset[str]:
    """What the matrices of single experts are called: peft takes all of these names for experts."""
    return frozenset(n.split(".")[-2] for n in model.tensors if _EXPERT.search(n))


def _is_embedding(name: str, model: Checkpoint) -> bool:
    return role_of(name, model.tensors[name].shape) in ("embedding", "position")


def _settle(found: Changes, whole: Iterable[str]) -> None:
    """Whole modules hold all that lies in them; a bias goes with its module where that is whole."""
    for name in whole:
        module = name.rpartition(".")[0]
        if not module:
            raise PlanError(
                "a tensor that differs belongs to no module, so no adapter can hold it",
                tensor=name,
                do="leave it out, and keep in mind that its difference is lost: --exclude",
            )
        found.whole[module] = None

    def inside(name: str) -> bool:
        path = name
        while path := path.rpartition(".")[0]:
            if path in found.whole:
                return True
        return False

    for module in list(found.whole):
        if inside(module):
            del found.whole[module]
    found.matrices = {n: e for n, e in found.matrices.items() if not inside(n)}
    found.biases = {n: None for n in found.biases if not inside(n)}
    found.lost = {n: why for n, why in found.lost.items() if not inside(n)}
