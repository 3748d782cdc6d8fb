"""The spec of a transformers model that no template is shipped for: derived once, then remembered.

What is derived from a config is kept under the user's cache folder by a hash of all that may change
the structure: the whole config, and the versions of the tracer's rules and of transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge.errors import MergeError, SourceError
from merge.symmetry.spec import Spec, parse_spec
from merge.tracing.build import spec_of_class
from merge.tracing.shrink import shrunk
from merge.tracing.twins import model_class, quiet

__all__ = ["RULES", "cache_folder", "derived_spec", "goes_by_layer"]

RULES = 3
"""Raised when the rules of the tracer change what they derive, so that old entries are left."""

_ASIDE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "name_or_path")


def derived_spec(config: Mapping[str, Any], cache: Path | None = None) -> Spec:
    """The spec of the model that ``config`` describes, from twins of its class in transformers.

    ``cache`` is where it is kept, by default `cache_folder`. `SourceError` where the class is not
    known, or its twin does not run.
    """
    import transformers

    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name is None:
        raise SourceError(
            "the symmetry of this model cannot be derived: its config names no class",
            found=f"model_type {config.get('model_type')!r}, no architectures",
            do="give a symmetry spec, or the module itself with example inputs",
        )
    known = {k: v for k, v in config.items() if k not in _ASIDE}
    key = json.dumps([RULES, transformers.__version__, known], sort_keys=True, default=str)
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    file = (cache or cache_folder()) / f"{config.get('model_type', 'model')}-{digest}.json"
    if file.is_file():
        return parse_spec(json.loads(file.read_text(encoding="utf-8")), str(file))
    spec = _derived(str(name), known)
    _keep(file, spec)
    return spec


def _derived(name: str, config: Mapping[str, Any]) -> Spec:
    kind = model_class(name)
    try:
        with quiet():
            full = kind.config_class(**config).to_dict()
        spec = spec_of_class(kind, [shrunk(full, number) for number in (0, 1)])
        if goes_by_layer(spec):  # a twin of a few layers does not tell which they are
            whole = [shrunk(full, number, layers=False) for number in (0, 1)]
            spec = spec_of_class(kind, whole)
    except MergeError as error:
        raise error.at(model=name) from None
    except Exception as error:  # the model's own code, with a config that it was not made for
        raise SourceError(
            "a tiny twin of the model does not run, so its symmetry cannot be derived",
            model=name,
            found=f"{type(error).__name__}: {error}",
            do="give a symmetry spec, or the module itself with example inputs",
        ) from error
    return replace(spec, model=str(config.get("model_type", "")))


def goes_by_layer(spec: Spec) -> bool:
    """Whether tensors of the same name have other axes in some layers than in others."""
    return any(re.search(r"\{[a-z]>\d", pattern) for pattern in spec.tensors)


def cache_folder() -> Path:
    """Where derived specs are kept: ``hf-merge/symmetry`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "hf-merge" / "symmetry"


def _keep(file: Path, spec: Spec) -> None:
    """Write whole or not at all; a folder that cannot be written to only costs time."""
    text = json.dumps(spec.to_json(), indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        Path(name).replace(file)
    except OSError:
        return
