"""Specs shipped with the package, by model type; read in milliseconds, without torch.

A template is made by ``python -m merge.tracing.generate``. It has a spec for each structure that
models of its type may have, and under which settings of config.json each holds::

    {
      "model": "bert",
      "defaults": {"tie_word_embeddings": true},
      "bodies": ["BertModel"],
      "variants": [
        {"when": {"tie_word_embeddings": [true]}, "unless": {}, "spec": {...}},
        {"when": {"tie_word_embeddings": [false]}, "unless": {}, "spec": {...}}
      ]
    }

``defaults`` are settings that config.json leaves out; ``bodies`` are the classes without a head,
whose outputs are the groups marked ``output``. Conditions are tried in order; a spec holds where
each expression has one of its values, and none of those under ``unless``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

from merge.symmetry.sizes import look_up
from merge.symmetry.spec import Spec, parse_spec

__all__ = ["Template", "Variant", "shipped", "template_of"]


@dataclass(frozen=True, slots=True)
class Variant:
    """A spec, the values of settings under which it holds, and those under which it does not."""

    when: Mapping[str, tuple[object, ...]]
    spec: Spec
    unless: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def holds(self, config: Mapping[str, object]) -> bool:
        """Whether the config has one of the values for each expression, and none of the others."""
        wanted = all(look_up(key, config) in values for key, values in self.when.items())
        return wanted and not any(look_up(k, config) in v for k, v in self.unless.items())


@dataclass(frozen=True, slots=True)
class Template:
    """The specs of a model type."""

    model: str
    defaults: Mapping[str, object]
    bodies: tuple[str, ...]
    variants: tuple[Variant, ...]

    def find(self, config: Mapping[str, object]) -> Spec | None:
        """The spec for a config; None where none of the structures is the config's."""
        full = self.complete(config)
        return next((v.spec for v in self.variants if v.holds(full)), None)

    def complete(self, config: Mapping[str, object]) -> dict[str, object]:
        """The config with the settings that it leaves out."""
        out: dict[str, object] = {**self.defaults, **config}
        for key, stated in self.defaults.items():
            given = config.get(key)
            if isinstance(stated, Mapping) and isinstance(given, Mapping):
                out[key] = {**stated, **given}
        return out

    def is_body(self, config: Mapping[str, object]) -> bool:
        """Whether the config is that of a model without a head."""
        architectures = config.get("architectures")
        listed = architectures if isinstance(architectures, list) else []
        return any(a in self.bodies for a in listed)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it is shipped."""
        return {
            "model": self.model,
            "defaults": dict(self.defaults),
            "bodies": list(self.bodies),
            "variants": [
                {
                    "when": {k: list(v) for k, v in one.when.items()},
                    "unless": {k: list(v) for k, v in one.unless.items()},
                    "spec": one.spec.to_json(),
                }
                for one in self.variants
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "template") -> Template:
        """Read back what `to_json` gave; the specs are checked."""
        variants = (
            Variant(
                {k: tuple(v) for k, v in one["when"].items()},
                parse_spec(one["spec"], where),
                {k: tuple(v) for k, v in one["unless"].items()},
            )
            for one in data["variants"]
        )
        return cls(data["model"], data["defaults"], tuple(data["bodies"]), tuple(variants))


def shipped() -> list[str]:
    """The model types that have a template, in order."""
    folder = files("merge.symmetry") / "templates"
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir())


@lru_cache(maxsize=64)
def template_of(model_type: str) -> Template | None:
    """The template of a model type; None where there is none."""
    if model_type not in shipped():
        return None
    file = files("merge.symmetry") / "templates" / f"{model_type}.json"
    return Template.from_json(json.loads(file.read_text(encoding="utf-8")), file.name)
