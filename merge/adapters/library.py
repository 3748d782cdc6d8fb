"""How transformers calls the tensors of a file in the model that it makes of them.

Since version 5 it holds many models under other names than their files have, and some tensors in
other layouts. It is asked, where it is installed and knows the model's class: the class is built
from config.json without memory, and the library's own conversion gives each name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

__all__ = ["LibraryNames", "architecture", "library_names"]

_UNKNOWN = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
"""What the library raises for a class or a config that it does not know."""


@dataclass(frozen=True, slots=True)
class LibraryNames:
    """names: from the file to the model, of tensors that are the same in both. tied: names that the
    model has and the file has not, and the model's names that they stand for."""

    names: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)


def library_names(names: Iterable[str], config: Mapping[str, Any]) -> LibraryNames:
    """The names in memory of a file's tensors; empty where transformers does not know the class."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _asked(list(names), config)
    except _UNKNOWN:
        return LibraryNames()  # code of its own, or another version: names are as in the file


def _asked(names: list[str], config: Mapping[str, Any]) -> LibraryNames:
    import torch

    kind: Any = getattr(import_module("transformers"), architecture(config))
    mapping: Any = import_module("transformers.conversion_mapping")
    loading: Any = import_module("transformers.core_model_loading")
    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(dict(config)))
    state = model.state_dict()
    transforms = mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    found = {}
    for name in names:
        new, other = loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if other is None and new in state:
            found[name] = new
    ties: Any = getattr(model, "all_tied_weights_keys", None) or {}
    there = set(found.values())
    return LibraryNames(found, {a: o for a, o in dict(ties).items() if a not in there})


def architecture(config: Mapping[str, Any]) -> str:
    """The class that config.json names first; '' where it names none."""
    kinds = config.get("architectures")
    return str(kinds[0]) if isinstance(kinds, list) and kinds else ""
