"""Tied weights: heads that are the embeddings, as config.json and the tensors that are there say.

A tied head is not stored; it is its model's embedding. Where every model ties a head, so does the
result. Where one has a head of its own, the others give their embedding in its place, and the
result's config says that nothing is tied.

A file may hold a head although its config ties it. transformers (5.24) then compares the two: equal
ones are tied, and others are not, whatever the config says. So it is here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from merge.errors import PlanError
from merge.families.roles import role_of
from merge.families.vocabulary import input_embedding, text_configs, vocabulary_tensors
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Expr, Read

__all__ = ["SCALED", "equal_bytes", "settle_ties", "ties_of"]

_KEY = "tie_word_embeddings"
_LANGUAGE = re.compile(
    r"LMHead|DoubleHeads|For(CausalLM|MaskedLM|PreTraining|ConditionalGen|Speech)"
)
"""Classes with a head that counts tokens, by what stands in their names."""
_HEADED = re.compile(r"(ForCausalLM|LMHeadModel)$")
"""Those of them that have no other use."""
SCALED = {"t5", "mt5", "umt5", "longt5", "pop2piano", "switch_transformers", "udop"}
"""Families that tie whatever the flag says: it tells whether the head sees scaled features."""

_PIECE = 1 << 20  # bytes that are compared at a time


@dataclass(frozen=True, slots=True)
class _Model:
    """A checkpoint with its vocabulary tensors, and what its config says of ties."""

    checkpoint: Checkpoint
    tensors: Mapping[str, int]
    says: bool | None
    part: Collection[str] | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, part: Collection[str] | None = None) -> _Model:
        found = vocabulary_tensors(checkpoint)
        own = found if part is None else {n: axis for n, axis in found.items() if n in part}
        return cls(checkpoint, own, _says(checkpoint.side.config), part)

    def partner(self, name: str, shape: tuple[int, ...], axis: int) -> str | None:
        """The tensor that ``name``, as another model has it, is tied to where it is not stored.

        It is the input embedding: the one that encoder and decoder share, if there is one, else the
        decoder's. Of two biases it is the one with the shorter name. None where it is not clear.
        """
        own = self.checkpoint.tensors

        def alike(other: str) -> bool:
            found, at = own[other].shape, self.tensors[other]
            same = len(found) == len(shape) and _but(found, at) == _but(shape, axis)
            nearer = _distance(other, found) < _distance(name, shape)
            return same and nearer and _folder(other) == _folder(name)

        stored = [n for n in self.tensors if n not in self.checkpoint.tied and alike(n)]
        nearest = min((_distance(n, own[n].shape) for n in stored), default=None)
        found = [n for n in stored if _distance(n, own[n].shape) == nearest]
        decoders = [n for n in found if "decoder" in n.split(".")]
        return next((f[0] for f in (found, decoders) if len(f) == 1), None)

    def state(self, name: str, partner: str | None, *, head: bool) -> State:
        """Whether ``name`` is a tensor of its own, its partner, or missing as others may be."""
        own = self.checkpoint
        if self.part is not None and name in own.tensors and name not in self.part:
            return "missing"
        if name in own.tied:
            return "tied"
        if name in own.tensors:
            known = partner is not None and self.says is True
            same = known and equal_bytes(own.tensors[name], own.tensors[str(partner)])
            return "tied" if same else "own"
        if partner is None or not head:  # an embedding's copy is tied whatever the config says
            return "missing" if partner is None else "tied"
        named = list(_architectures(own.side.config))
        if named and not any(_LANGUAGE.search(a) for a in named):
            return "missing"
        if self.says is False and own.side.config.get("model_type") not in SCALED:
            raise _missing_head(own, name)
        return "tied"


State = Literal["own", "tied", "missing"]


def settle_ties(
    checkpoints: Sequence[Checkpoint], parts: Sequence[Collection[str] | None] = ()
) -> list[Checkpoint]:
    """The checkpoints with every head that one of them has: tied in all of them, or in none.

    parts: the tensors of each that count, where not all do. A tied head stands in ``tied`` and is
    not written. Where none is, configs say so. PlanError for a head that is missing though the
    config says that it is not tied.
    """
    models = [_Model.of(c, parts[i] if parts else None) for i, c in enumerate(checkpoints)]
    for model in models:
        _check_head(model)
    wanted: dict[str, tuple[tuple[int, ...], int]] = {}
    for model in models:
        for name, axis in model.tensors.items():
            wanted.setdefault(name, (model.checkpoint.tensors[name].shape, axis))
    out = list(checkpoints)
    for name, (shape, axis) in wanted.items():
        if all(name in m.checkpoint.tensors and m.says is not True for m in models):
            continue  # everyone's own, or tied in memory
        head = role_of(name, shape) == "head"
        partners = [m.partner(name, shape, axis) for m in models]
        states = [m.state(name, p, head=head) for m, p in zip(models, partners, strict=True)]
        for i, (state, partner) in enumerate(zip(states, partners, strict=True)):
            if state == "tied" and partner is not None:
                out[i] = _with_tie(out[i], name, partner, stays="own" not in states)
        if head and "own" in states and any(p is not None for p in partners):
            out = [_untied(c, name, models, states) for c in out]
    return out


def ties_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What is tied to what in one model, by name; a head that is not stored is ``the head``."""
    model = _Model.of(checkpoint)
    shapes = {n: checkpoint.tensors[n].shape for n in model.tensors}
    inputs = [n for n, shape in shapes.items() if input_embedding(n, shape)]
    matrices = [n for n, shape in shapes.items() if len(shape) == 2 and n not in inputs]
    headed = any(_LANGUAGE.search(a) for a in _architectures(checkpoint.side.config))
    hidden = model.says is True or (model.says is None and headed)
    if inputs and not matrices and hidden:
        return {**checkpoint.tied, "the head": inputs[0]}
    return dict(checkpoint.tied)


def _check_head(model: _Model) -> None:
    """A language model that ties nothing has a head."""
    config = model.checkpoint.side.config
    if model.says is not False or config.get("model_type") in SCALED:
        return
    headed = any(_HEADED.search(a) for a in _architectures(config))
    shapes = model.checkpoint.tensors
    if headed and model.tensors and all(input_embedding(n, shapes[n].shape) for n in model.tensors):
        raise _missing_head(model.checkpoint, "the head, such as lm_head.weight")


def _missing_head(checkpoint: Checkpoint, name: str) -> PlanError:
    return PlanError(
        "a model lacks its head, though its config says that it is not tied to the embeddings",
        model=checkpoint.label,
        tensor=name,
        found=f"{_KEY}: false, and no such tensor",
        do=f"fetch the model again; if its head is the embeddings, set {_KEY} to true",
    )


def _with_tie(checkpoint: Checkpoint, name: str, partner: str, *, stays: bool) -> Checkpoint:
    """The checkpoint in which ``name`` is ``partner``, by name if the tie stays, else by value."""
    tied = {n: o for n, o in checkpoint.tied.items() if n != name}
    dropped = dict(checkpoint.dropped)
    if stays and name in checkpoint.tensors and name not in checkpoint.tied:
        dropped[name] = f"it is equal to {partner}, to which it is tied"
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, name: checkpoint.tensors[partner]},
        tied={**tied, name: partner} if stays else tied,
        dropped=dropped,
    )


def _untied(
    checkpoint: Checkpoint, name: str, models: Sequence[_Model], states: Sequence[State]
) -> Checkpoint:
    """The checkpoint with a config that says that nothing is tied."""
    config = checkpoint.side.config
    whose = {m.checkpoint.label: state for m, state in zip(models, states, strict=True)}
    if config.get("model_type") in SCALED:
        if "tied" not in states:
            return checkpoint
        raise PlanError(
            "one model has a head of its own and another ties it to the embeddings, and in this"
            " family tied heads see features of another scale",
            tensor=name,
            found=", ".join(f"{label}: {state}" for label, state in whose.items()),
            do="merge models that all tie their heads, or none",
        )
    flagged = _flagged(config)
    if not config or flagged == config:
        return checkpoint
    owners = [label for label, state in whose.items() if state == "own"]
    note = f"{name} is not tied: {owners[0]} has one of its own. config.json says so: {_KEY}: false"
    return replace(
        checkpoint,
        side=checkpoint.side.with_config(flagged),
        notes=tuple(dict.fromkeys((*checkpoint.notes, note))),
    )


def _flagged(config: Mapping[str, object]) -> dict[str, object]:
    """``config`` saying that nothing is tied, at its top and for the part that writes text."""
    said = {id(c) for c in text_configs(config)}
    inner = {
        key: _flagged(value) if isinstance(value, Mapping) and id(value) in said else value
        for key, value in config.items()
    }
    return {**inner, _KEY: False}


def _says(config: Mapping[str, object]) -> bool | None:
    """What the config says of ties; None where it says nothing, or two things."""
    said = {bool(c[_KEY]) for c in text_configs(config) if c.get(_KEY) is not None}
    return said.pop() if len(said) == 1 else None


def _architectures(config: Mapping[str, object]) -> Iterator[str]:
    for inner in text_configs(config):
        value = inner.get("architectures")
        yield from (v for v in value if isinstance(v, str)) if isinstance(value, list) else ()


def _distance(name: str, shape: tuple[int, ...]) -> tuple[bool, bool, int]:
    """How far a tensor is from the input embedding, which all others are tied to."""
    words = name.split(".")
    return not input_embedding(name, shape), "shared" not in words, len(words)


def _folder(name: str) -> str:
    """The component of a checkpoint of several that the tensor is of."""
    return name.rpartition("/")[0]


def _but(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def equal_bytes(a: Expr, b: Expr) -> bool:
    """Whether two stored tensors hold the same bytes; they are read up to the first difference."""
    if a == b:
        return True
    if not isinstance(a, Read) or not isinstance(b, Read):
        return False
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    size = a.spec.nbytes
    with a.source.open(a.spec.name) as ours, b.source.open(b.spec.name) as theirs:
        for start in range(0, size, _PIECE):
            one, other = (bytearray(min(_PIECE, size - start)) for _ in range(2))
            ours.read_into(start, memoryview(one))
            theirs.read_into(start, memoryview(other))
            if one != other:
                return False
    return True
