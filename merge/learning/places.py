"""Where merged tensors lie in a task's module, and what of the module is the task's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from merge.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Place", "matches", "own_tensors", "places_of"]

Place = str | Mapping[str, str] | Callable[[str], str | None] | None


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of the patterns, or begins with one of them and a dot."""
    return any(name == p or name.startswith(f"{p}.") for p in patterns)


def places_of(
    task: str,
    shapes: Mapping[str, tuple[int, ...]],
    module: nn.Module,
    place: Place,
    stored: Mapping[str, str],
    head: Sequence[str],
) -> dict[str, tuple[str, ...]]:
    """For each merged tensor its names in the module; tensors that the module lacks are left out.

    stored: the module's own names by those it has in files. A name that shares its tensor with
    others in the module stands for all of them. PlanError where nothing fits.
    """
    state = module.state_dict(keep_vars=True)
    free = {n: t for n, t in state.items() if not matches(n, head)}
    rule = _rule(shapes, free, place, stored)
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        inside = rule(name)
        if inside is None or inside not in free:
            continue
        if tuple(state[inside].shape) != shape:
            raise PlanError(
                "a merged tensor has another shape in a task's module",
                task=task,
                tensor=name,
                found=f"{list(state[inside].shape)} at {inside}",
                expected=list(shape),
                do="name it as the task's head=, or check that the module is this architecture",
            )
        found[name] = inside
    if not found:
        raise PlanError(
            "none of the merged tensors lies in a task's module",
            task=task,
            found=f"{', '.join(list(state)[:3])}, ...",
            expected=f"{', '.join(list(shapes)[:3])}, ...",
            do="say with place= where they lie: a prefix, a mapping or a function of the name",
        )
    taken = set(found.values())
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in state.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    return {
        name: (inside, *(n for n in by_tensor[id(state[inside])] if n not in taken))
        for name, inside in found.items()
    }


def _rule(
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Tensor],
    place: Place,
    stored: Mapping[str, str],
) -> Callable[[str], str | None]:
    if isinstance(place, str):
        return lambda name: f"{place}{name}" if f"{place}{name}" in state else f"{place}.{name}"
    if isinstance(place, Mapping):
        return place.get
    if callable(place):
        return place
    rules: list[Callable[[str], str | None]] = [lambda n: n, lambda n: stored.get(n)]
    for prefix in _prefixes(shapes, state):
        rules.append(lambda n, p=prefix: f"{p}{n}")  # type: ignore[misc]
        rules.append(lambda n, p=prefix: stored.get(f"{p}{n}"))  # type: ignore[misc]
    for prefix in _prefixes(state, shapes):
        rules.append(lambda n, p=prefix: n[len(p) :] if n.startswith(p) else None)  # type: ignore[misc]
    return max(rules, key=lambda rule: sum(rule(n) in state for n in shapes))


def _prefixes(short: Iterable[str], long: Iterable[str]) -> list[str]:
    """What stands before a few of the short names in the long ones."""
    some = list(short)
    probe = {*some[:2], *some[len(some) // 2 :][:2], *some[-2:]}
    found = {n[: -len(p)]: None for n in long for p in probe if n.endswith(f".{p}")}
    return list(found)[:16]


def own_tensors(
    task: str,
    module: nn.Module,
    places: Mapping[str, tuple[str, ...]],
    given: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The module's tensors that are not merged: those of the task's expert, or as the module has.

    PlanError for one that has no values anywhere.
    """
    covered = {n for names in places.values() for n in names}
    out: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        if name in covered:
            continue
        value = given.get(name, tensor)
        if value.is_meta:
            raise PlanError(
                "a task has no head: a tensor of its module has no values",
                task=task,
                tensor=name,
                do="load it into the module, or give an expert that holds it",
            )
        if value.shape != tensor.shape:
            raise PlanError(
                "an expert's head does not fit into the task's module",
                task=task,
                tensor=name,
                found=list(value.shape),
                expected=list(tensor.shape),
            )
        out[name] = value.detach()
    return out
