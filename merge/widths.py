"""Widths of a model by name: keys of config.json, groups of its symmetry, and how they follow."""

from __future__ import annotations

from collections.abc import Mapping

from merge import symmetries
from merge.errors import PlanError, RecipeError, hint
from merge.ir.checkpoint import Checkpoint
from merge.symmetry.patterns import Finder, Pattern
from merge.symmetry.sizes import assigned, key_of, look_up
from merge.symmetry.spec import Spec
from merge.symmetry.symmetry import Symmetry

__all__ = ["keys_of", "sizes_of"]


def sizes_of(
    checkpoint: Checkpoint, own: Symmetry, widths: Mapping[str, int]
) -> tuple[dict[str, object], dict[str, int]]:
    """config.json with new widths, and the new sizes of groups.

    widths: by keys of config.json or groups. RecipeError for a name of neither, PlanError where
    groups of one key would come to differ.
    """
    spec, _ = symmetries.spec_of(checkpoint)
    stated = _stated(spec, own)
    keys = {g: key_of(spec.groups[p].size or "") for g, p in stated.items()}
    config: dict[str, object] = dict(checkpoint.side.config)
    sizes: dict[str, int] = {}
    for word, size in widths.items():
        groups = [g for g in own.groups if word in (g, stated.get(g), keys.get(g))]
        value = look_up(word, config) if _is_key(word) else None
        if not groups and (value is not None or word in config):
            silent = {p: own.groups[g].size for g, p in stated.items() if not spec.groups[p].size}
            silent = {p: n for p, n in silent.items() if value in (None, n)}
            groups = [g for g in own.groups if stated.get(g) in silent] if len(silent) == 1 else []
            config = assigned(word, config, size)
            if not groups and isinstance(value, int):
                continue  # of no group by itself, such as query heads
        if not groups:
            every = dict.fromkeys([*(k for k in keys.values() if k), *own.groups])
            raise RecipeError(
                "no part of this model has a width of that name",
                key=word,
                model=checkpoint.label,
                expected=f"one of {', '.join(list(every)[:12])}",
                do=hint(word, every),
            )
        sizes.update(dict.fromkeys(groups, size))
        key = word if word in keys.values() else keys.get(groups[0])
        alike = [g for g in own.groups if key is not None and keys.get(g) == key]
        if key is not None and config:
            if set(alike) - set(groups):
                raise PlanError(
                    "config.json has one size for all of these groups",
                    model=checkpoint.label,
                    key=key,
                    found=f"a new size for {', '.join(groups[:4])} alone",
                    expected=f"{key}={size}",
                )
            config = assigned(key, config, size)
    return config, sizes


def _is_key(word: str) -> bool:
    return all(part.isidentifier() for part in word.split("."))


def keys_of(checkpoint: Checkpoint, own: Symmetry) -> dict[str, str | None]:
    """Of each group the key of config.json that states its size, or None where none does."""
    spec, _ = symmetries.spec_of(checkpoint)
    return {g: key_of(spec.groups[p].size or "") for g, p in _stated(spec, own).items()}


def _stated(spec: Spec, own: Symmetry) -> dict[str, str]:
    """Of each group what the spec calls it, such as ``f{i}``."""
    find = Finder(Pattern.of(name) for name in spec.groups)
    return {g: find(g)[0][0].text for g in own.groups if find(g)}
