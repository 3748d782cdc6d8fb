"""A model with an adapter on it: one expression a tensor, nothing computed.

Every tensor of the adapter is consumed, or an error names it. Results keep the type of the model's
tensors. What comes out is what the adapter's model computes: where it changes embeddings that the
head shares, and not the head, the two are shared no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from merge.adapters.change import change_module, change_stack, stacked
from merge.adapters.config import AdapterConfig
from merge.adapters.follow import follow, shared_head
from merge.adapters.foreign import foreign_changes
from merge.adapters.kinds import Tuner, tuner_of
from merge.adapters.library import library_names
from merge.adapters.lora import factors_of, is_turned
from merge.adapters.names import Module, read_names
from merge.adapters.places import locate
from merge.adapters.replicate import replicated
from merge.adapters.work import Work
from merge.errors import PlanError
from merge.families.experts import experts_as_in, experts_fused
from merge.families.roles import role_of
from merge.families.ties import equal_bytes
from merge.families.vocabulary import input_embedding
from merge.ir.checkpoint import Checkpoint, short, some
from merge.ir.derived import cast, gather
from merge.ir.rows import RowTable

__all__ = ["attach"]

_TASK_HEADS = ("classifier", "score", "qa_outputs")
"""Modules that are replaced whole under some tasks, whether or not the config lists them."""


def attach(base: Checkpoint, adapter: Checkpoint, config: AdapterConfig) -> Checkpoint:
    """``base`` with the adapter's changes; PlanError names what does not fit.

    adapter: its tensors under the names in its file.
    """
    tuner = tuner_of(config)
    parts = read_names(adapter.tensors, None if tuner is None else tuner.prefix)
    stacks = stacked(parts, config) if tuner is None else {}
    given = replicated(base, config)
    base = experts_fused(given) if stacks else given
    work = Work(base, adapter, config, parts, dict(base.tensors))
    _refuse_attention(work)
    _find(work, stacks, plain=tuner is None)
    for wanted, name in parts.full.items():
        _replace(work, wanted, name)
    if tuner is not None:
        _change_by_peft(work, tuner)
    for module in parts.modules if tuner is None else ():
        if module.path not in stacks:
            change_module(work, module)
    for path, names in stacks.items():
        change_stack(work, [m for m in parts.modules if m.path == path], names)
    for path, name in parts.tokens.items():
        _put_rows(work, path, name)
    idle = dict.fromkeys(parts.idle, "it served the adapter's training")
    made = replace(
        base,
        tensors=work.tensors,
        label=f"{base.label}+{short(adapter.label)}",
        dropped={**base.dropped, **idle},
        roots=tuple(dict.fromkeys((*base.roots, *adapter.roots))),
    )
    made = follow(base, made, config, work.heads, work.alone - work.paired)
    return replace(experts_as_in(made, given), notes=made.notes) if stacks else made


def _refuse_attention(work: Work) -> None:
    """PlanError for torch's own attention, to the output of which peft adds LoRA twice."""
    for module in work.parts.modules:
        path = module.path.removesuffix(".base_layer.out_proj")
        if f"{path}.in_proj_weight" in work.base.tensors:
            raise PlanError(
                "LoRA on torch's MultiheadAttention is not computed: what it does depends on the"
                " version of peft, which adds that of the output projection twice",
                tensor=next(iter(module.tensors.values())),
                adapter=work.adapter.label,
                do="merge the adapter with the version of peft that it was trained with",
            )


def _find(work: Work, stacks: dict[str, list[str]], *, plain: bool) -> None:
    """The model's tensor for everything that the adapter speaks of. plain: it is a LoRA."""
    whose: dict[str, Module | str | None] = {
        f"{m.path}.weight": m for m in work.parts.modules if m.path not in stacks
    }
    whose |= {f"{path}.weight": name for path, name in work.parts.tokens.items()}
    whose |= {f"{path}.{name}": None for path, names in stacks.items() for name in names}
    whose |= work.parts.full

    def fit(wanted: str, there: str) -> bool:
        part, shape = whose[wanted], work.base.tensors[there].shape
        if part is None:
            return len(shape) == 3
        if isinstance(part, str):
            return _may_be_replaced(work, wanted, part, shape)
        factors = factors_of(work.exprs(part)) if plain else None
        return factors is None or is_turned(shape, factors, False) is not None

    work.places = locate(list(whose), work.base.tensors, fit)
    for wanted in whose:
        head = wanted.endswith(".weight") and role_of(wanted, ()) == "head"
        if wanted not in work.places and head and (source := shared_head(work.base)) is not None:
            work.places[wanted] = wanted
            work.tensors[wanted] = work.tensors[source]
            work.heads.add(wanted)
    left = [w for w in whose if w not in work.places and not _brought(work, w)]
    if left:
        known = library_names(work.base.tensors, work.base.side.config).names
        there = {new: old for old, new in known.items()}
        work.places |= {w: there[w] for w in left if w in there and fit(w, there[w])}
    work.second = frozenset((*work.heads, *work.base.tied))


def _may_be_replaced(work: Work, wanted: str, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the adapter may take the place of one of this shape, or of its rows."""
    own = work.adapter.tensors[name].shape
    if name in work.parts.tokens.values():
        return len(shape) == 2 and shape[1:] == own[1:]
    grown = role_of(wanted, own) in ("head", "embedding")
    return shape == own or (grown and len(shape) == len(own) and shape[1:] == own[1:])


def _brought(work: Work, wanted: str) -> bool:
    """Whether a whole tensor may be one that the model does not have: of a head for a task."""
    module = wanted.rpartition(".")[0]
    head = work.config.saves(module) or module.rpartition(".")[2] in _TASK_HEADS
    return head and wanted in work.parts.full and wanted not in work.tensors


def _replace(work: Work, wanted: str, name: str) -> None:
    """Put a whole tensor in the place of the model's, or beside them where it is a new head."""
    own = work.adapter.tensors[name]
    if wanted not in work.places and _brought(work, wanted):
        if not _is_another(work, wanted, _tied(work).get(wanted)):
            work.tensors[wanted] = own
        return
    place = work.at(wanted, name)
    changed = any(wanted == f"{m.path}.weight" for m in work.parts.modules)
    head = place in work.heads and not changed
    source = shared_head(work.base) if head else None
    if source is not None and _is_another(work, wanted, source):
        work.forget(place)
        work.paired.add(source)
    elif not work.is_the_embeddings(place):
        own = cast(own, work.tensors[place].dtype)
        work.put(place, own, together=work.config.stays_tied)


def _is_another(work: Work, wanted: str, source: str | None) -> bool:
    """Whether a whole tensor is the one that also takes the place of ``source``, written twice."""
    given = work.adapter.tensors
    known = [n for w, n in work.parts.full.items() if source is not None
             and source in (w, work.places.get(w))]  # fmt: skip
    return any(equal_bytes(given[n], given[work.parts.full[wanted]]) for n in known)


def _tied(work: Work) -> Mapping[str, str]:
    """Tensors that the model has no file of, as they are tied to others."""
    return library_names(work.base.tensors, work.base.side.config).tied


def _change_by_peft(work: Work, tuner: Tuner) -> None:
    """Let peft's layers make the weights of all modules."""
    modules = work.parts.modules
    places = {work.at(f"{m.path}.weight", next(iter(m.tensors.values()))): m for m in modules}
    turned = {place: work.is_turned(place) for place in places}
    given, shared = work.adapter.tensors, work.parts.shared
    made = foreign_changes(places, work.tensors, given, shared, work.config, tuner, turned)
    for place, expr in made.items():
        work.put(place, expr, together=False)


def _put_rows(work: Work, path: str, name: str) -> None:
    """Put rows of tokens in the place of those of an embedding."""
    place = work.at(f"{path}.weight", name)
    rows = work.adapter.tensors[name]
    indices = _indices(work, path, place, name)
    if place in work.second and indices == next(iter(work.config.tokens.values())):
        work.forget(place)  # its rows are the embedding's, written down twice
        return
    weight = work.tensors[place]
    if len(indices) != rows.shape[0] or max(indices, default=0) >= weight.shape[0]:
        raise PlanError(
            "the rows of an adapter's tokens do not fit",
            tensor=name,
            file=work.config.file,
            found=f"{rows.shape[0]} rows, for tokens up to {max(indices, default=0)}",
            expected=f"{len(indices)} rows, of a vocabulary of {weight.shape[0]}",
        )
    new = dict(zip(indices, range(len(indices)), strict=True))
    every = range(weight.shape[0])
    table = RowTable.single([int(i in new) for i in every], [new.get(i, i) for i in every])
    made = gather([weight, cast(rows, weight.dtype)], table, weight.shape)
    work.put(place, made, together=True)


def _indices(work: Work, path: str, place: str, name: str) -> tuple[int, ...]:
    """The tokens that the rows ``name`` of the embedding at ``path`` are of."""
    for end, indices in work.config.tokens.items():
        if f".{path}".endswith(f".{end}") if end else input_embedding(place, (1, 1)):
            return indices
    if place in work.second:
        return next(iter(work.config.tokens.values()), ())
    raise PlanError(
        "an adapter's config does not say which tokens its rows are of",
        tensor=name,
        file=work.config.file,
        key="trainable_token_indices",
        found=some(list(work.config.tokens)) or "none",
    )
