"""Functions of the user's own, named as ``module:function`` on the command line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge.errors import MergeError, SourceError, hint, told

__all__ = ["called", "function", "is_function"]


def is_function(text: str) -> bool:
    """Whether a text names a function.

    >>> is_function("my.data:batches"), is_function("data.npz"), is_function("C:/data.npz")
    (True, False, False)
    """
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(p.isidentifier() for p in module.split("."))


def function(text: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; modules of the current folder are found, too."""
    name, _, wanted = text.partition(":")
    with _here():
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a module of the user's may raise anything when it is run
            raise SourceError(
                "a module cannot be imported",
                module=name,
                found=told(error),
                do="run the command in the module's folder, or put that on PYTHONPATH",
            ) from error
    found = getattr(module, wanted, None)
    if not callable(found):
        raise SourceError(
            "a module has no such function",
            module=name,
            found=wanted,
            do=hint(wanted, [n for n in vars(module) if callable(getattr(module, n))]),
        )
    return found  # type: ignore[no-any-return]


def called(text: str) -> Any:
    """What the function returns, called without arguments; its errors come as SourceError."""
    made = function(text)
    with _here():
        try:
            return made()
        except MergeError as error:
            raise error.at(function=text) from None
        except Exception as error:  # as above
            raise SourceError(
                "a function of your own raised an error", function=text, found=told(error)
            ) from error


@contextmanager
def _here() -> Iterator[None]:
    """The current folder first among those in which modules are looked for."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
