"""The template of a model type: derived from twins of its classes, sizes and settings."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from merge.errors import SourceError
from merge.symmetry.axes import Axis, Factor
from merge.symmetry.sizes import parse_size
from merge.symmetry.spec import Spec
from merge.symmetry.templates import Template, Variant
from merge.tracing.derive import derive
from merge.tracing.disk import on_disk
from merge.tracing.express import Sizes, expressed, sizes_of
from merge.tracing.generalise import generalised
from merge.tracing.shrink import shrunk
from merge.tracing.twins import Twin, main_outputs, make_twin, model_class
from merge.tracing.unite import optional_prefix, united

__all__ = ["Family", "Switch", "build", "spec_of_class", "twin_config"]


_CLASS = "architectures[0]"


@dataclass(frozen=True, slots=True)
class Switch:
    """A setting that changes the structure: ``key``, an expression over the config.

    ``values`` are what it may be, each with the settings that make a twin so; None stands for any
    value that is not listed, and comes last.
    """

    key: str
    values: tuple[tuple[object, Mapping[str, Any]], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """A model type: its classes with heads and without, what its config is to be, its switches.

    ``twins`` are the configs of two twins where those that are shrunk from the default will not do.
    ``only`` and ``never``: values of further expressions under which alone, or not, the twins tell.
    ``extra`` are patterns of tensors that old files have, with the number of axes: they are fixed.
    ``old`` are pieces of names and what they once were.
    """

    model: str
    heads: tuple[str, ...]
    bodies: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    switches: tuple[Switch, ...] = ()
    twins: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    never: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    extra: Mapping[str, int] = field(default_factory=dict)
    old: tuple[tuple[str, str], ...] = ()


def build(family: Family) -> Template:
    """Derive the template of a family; every spec in it was verified on each twin."""
    variants: list[Variant] = []
    for setting in itertools.product(*(switch.values for switch in family.switches)):
        changes = {key: value for _, change in setting for key, value in change.items()}
        for number, (names, spec) in enumerate(_of_setting(family, changes)):
            keys = (switch.key for switch in family.switches)
            when = {k: (v,) for k, (v, _) in zip(keys, setting, strict=True)}
            _enter(variants, Variant({**when, **({_CLASS: names} if number else {})}, spec))
    needed = [
        _conditioned(replace(v, spec=_with_old(v.spec, family)), family.switches)
        for v in sorted(variants, key=lambda v: _CLASS not in v.when)
    ]
    needed = [
        replace(v, when={**v.when, **family.only}, unless={**v.unless, **family.never})
        for v in needed
    ]
    kind = model_class([*family.heads, *family.bodies][0])
    return Template(family.model, _defaults(kind, needed), family.bodies, tuple(needed))


def _with_old(spec: Spec, family: Family) -> Spec:
    """The spec with the names and the tensors that only old files have."""
    tensors = dict(spec.tensors)
    for now, once in family.old:
        tensors |= {p.replace(now, once): a for p, a in spec.tensors.items() if now in p}
    fixed = Axis(((Factor(None),),))
    return replace(spec, tensors={**tensors, **{p: (fixed,) * n for p, n in family.extra.items()}})


def _of_setting(family: Family, setting: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Spec]]:
    """Specs of classes that agree, for one setting of the switches; the bodies are in each."""
    found: list[tuple[tuple[str, ...], Spec]] = []
    prefix = ""
    for name in [*family.heads, *family.bodies]:
        kind, headed = model_class(name), name in family.heads
        configs = [twin_config(family, kind, setting, number) for number in (0, 1)]
        spec = spec_of_class(kind, configs, free_outputs=not headed)
        base = getattr(kind, "base_model_prefix", "")
        if headed and any(p.startswith(f"{base}.") for p in spec.tensors):
            prefix = base
        spec = replace(optional_prefix(spec, prefix, headed), model=family.model)
        joined = [(n, names, united(old, spec)) for n, (names, old) in enumerate(found)]
        own = (name,) if headed else ()
        fitting = [(n, (*names, *own), both) for n, names, both in joined if both is not None]
        if not fitting:
            found.append(((name,), spec))
        for n, names, both in fitting if not headed else fitting[:1]:
            found[n] = (names, both)
    return found


def twin_config(
    family: Family, kind: Any, setting: Mapping[str, Any], number: int
) -> dict[str, Any]:
    """The config of the first twin or the second, for one setting of the switches."""
    if family.twins is not None:
        return {**family.twins[number], **setting}
    default = kind.config_class(**{**family.config, **setting}).to_dict()
    return {**shrunk(default, number), **setting}


def spec_of_class(
    kind: Any, configs: Sequence[Mapping[str, Any]], *, free_outputs: bool = False
) -> Spec:
    """The spec of one class, sizes as expressions: in memory and on disk, from a twin per config.

    `SourceError` where twins of different sizes have different structures.
    """
    specs: list[Spec] = []
    settings: list[Mapping[str, Any]] = []
    sizes: list[Sizes] = []
    for number, config in enumerate(configs):
        twin: Twin = make_twin(kind, config, seed=number)
        derived = derive(twin.module, twin.inputs, free_outputs=free_outputs, pick=main_outputs)
        spec = generalised(derived.symmetry, derived.names)
        disk = generalised(on_disk(derived.symmetry, twin.module), derived.names)
        both = united(spec, disk, alike=True)
        specs.append(spec if both is None else both)
        sizes.append(sizes_of(derived.symmetry, derived.names))
        settings.append({**config, **_told(twin)})
    first = specs[0]
    for other in specs[1:]:
        if {p: list(map(str, a)) for p, a in first.tensors.items()} != {
            p: list(map(str, a)) for p, a in other.tensors.items()
        }:
            raise SourceError(
                "twins of different sizes have different symmetries",
                model=kind.__name__,
                found=_difference(other, first),
                expected=_difference(first, other),
                do="choose sizes for the twins that do not coincide",
            )
    return expressed(specs, settings, sizes)


def _told(twin: Twin) -> dict[str, Any]:
    """The config as it is saved."""
    settings: Any = twin.module.config
    return dict(settings.to_dict())


def _difference(one: Spec, other: Spec) -> str:
    def texts(spec: Spec) -> set[str]:
        return {f"{p}: {', '.join(map(str, a))}" for p, a in spec.tensors.items()}

    return "; ".join(sorted(texts(one) - texts(other))[:4])


def _enter(variants: list[Variant], new: Variant) -> None:
    """Add a variant, joined with one that it does not contradict."""
    for number, old in enumerate(variants):
        if old.when.get(_CLASS) != new.when.get(_CLASS):
            continue
        both = united(old.spec, new.spec)
        same = both is not None and all(
            both.groups[g].flags == old.spec.groups[g].flags for g in old.spec.groups
        )
        if both is not None and same and len(both.groups) == len(old.spec.groups):
            when = {k: tuple(dict.fromkeys([*old.when[k], *new.when[k]])) for k in old.when}
            variants[number] = Variant(when, both)
            return
    variants.append(new)


def _conditioned(variant: Variant, switches: Sequence[Switch]) -> Variant:
    """The variant with the conditions that tell it from others; 'any other value' is a negation."""
    when = {k: v for k, v in variant.when.items() if k == _CLASS}
    unless: dict[str, tuple[object, ...]] = {}
    for switch in switches:
        own, every = variant.when[switch.key], [value for value, _ in switch.values]
        if len(own) == len(every):
            continue
        if None in own:
            unless[switch.key] = tuple(v for v in every if v not in own)
        else:
            when[switch.key] = own
    return replace(variant, when=when, unless=unless)


def _defaults(kind: Any, variants: Sequence[Variant]) -> dict[str, object]:
    """What the config class gives the keys that sizes and conditions use, where files omit them."""
    texts = [g.size for v in variants for g in v.spec.groups.values() if g.size]
    texts += [key for v in variants for key in (*v.when, *v.unless)]
    nodes = [n for text in texts for n in ast.walk(parse_size(text))]
    out: dict[str, Any] = {}
    stated = _stated(kind.config_class)
    for name in sorted({n.id for n in nodes if isinstance(n, ast.Name)}):
        if _plain(stated.get(name)):
            out[name] = stated[name]
    inner = [n for n in nodes if isinstance(n, ast.Attribute)]
    pairs = {(n.value.id, n.attr) for n in inner if isinstance(n.value, ast.Name)}
    for part, name in sorted(pairs):
        own = _stated(getattr(kind.config_class, "sub_configs", {}).get(part))
        if _plain(own.get(name)):
            out.setdefault(part, {})[name] = own[name]
    return out


def _stated(config_class: Any) -> dict[str, object]:
    """The defaults that a config class states; {} of what is no class of its own."""
    return {f.name: f.default for f in fields(config_class)} if is_dataclass(config_class) else {}


def _plain(value: object) -> bool:
    return isinstance(value, int | float | str)
