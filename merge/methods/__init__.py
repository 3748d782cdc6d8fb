"""The merge methods: one file each. A file here that holds a `Method` is found by itself.

Packages outside register theirs under the entry-point group ``hf_merge.methods``.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from merge.errors import RecipeError, hint
from merge.methods.core.schema import Method

__all__ = ["Method", "get", "registry"]


@cache
def registry() -> dict[str, Method]:
    """Every method by name, in alphabetical order; importing them does not import torch."""
    found: dict[str, Method] = {}
    for info in pkgutil.iter_modules(__path__):
        if not info.ispkg:
            module = importlib.import_module(f"{__name__}.{info.name}")
            found.update((m.name, m) for m in vars(module).values() if isinstance(m, Method))
    for entry in entry_points(group="hf_merge.methods"):
        try:
            loaded = entry.load()
        except (ImportError, AttributeError) as error:
            raise RecipeError(
                f"entry point {entry.name!r} of group 'hf_merge.methods' cannot be loaded",
                found=f"{type(error).__name__}: {error}",
                do=f"mend or remove the package that offers {entry.value!r}",
            ) from None
        if not isinstance(loaded, Method):
            raise RecipeError(
                f"entry point {entry.name!r} of group 'hf_merge.methods' is not a method",
                found=repr(loaded),
                expected="a function decorated with merge.methods.core.schema.method",
            )
        if loaded.name in found:
            raise RecipeError(
                f"entry point {entry.name!r} offers a method by a name that is taken",
                found=repr(loaded.name),
                do=f"remove the package that offers {entry.value!r}, or rename its method",
            )
        found[loaded.name] = loaded
    return dict(sorted(found.items()))


def get(name: str) -> Method:
    """The method called ``name``; RecipeError with the nearest known name otherwise."""
    methods = registry()
    if name in methods:
        return methods[name]
    raise RecipeError(
        f"unknown merge method {name!r}",
        expected=f"one of {', '.join(methods)}",
        do=hint(name, methods, "see `merge methods`"),
    )
