"""What may be exchanged in a checkpoint or a module: the one way to its symmetry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from merge.checkpoint import open_checkpoint
from merge.errors import MergeError, PlanError, RecipeError
from merge.ir.checkpoint import Checkpoint
from merge.symmetry.axes import Axis, Factor
from merge.symmetry.patterns import Finder, Pattern
from merge.symmetry.resolve import resolve
from merge.symmetry.spec import Spec, parse_spec
from merge.symmetry.symmetry import Layout, Symmetry
from merge.symmetry.templates import template_of

__all__ = ["spec_of", "symmetry_of"]

Outputs = Literal["fixed", "free"]


def symmetry_of(
    model: object,
    inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    spec: object = None,
    outputs: Outputs = "fixed",
) -> Symmetry:
    """The groups of coordinates that may be exchanged in ``model``, and every tensor's axes.

    model: anything `merge.open` takes, or a ``torch.nn.Module`` with example ``inputs`` (a tuple of
    arguments, or a mapping of named ones). spec: a symmetry spec that is to be used: a file, what
    was read from one, or a `Spec`. outputs: ``fixed`` keeps what a model returns as it is; ``free``
    lets a model without a head return its features in another order.

    A spec that is given is fitted to the tensors. A module with inputs is run once under the
    tracer, as a twin in float64 with random weights. A checkpoint of a known model type takes its
    template, which needs neither torch nor transformers; of any other type a tiny twin is made
    with transformers, and what it shows is remembered. `PlanError` where spec and tensors do not
    fit, `SourceError` where there is no way to know.

    Example::

        symmetry = merge.symmetry_of("org/model")
        symmetry = merge.symmetry_of(net, (torch.zeros(2, 3, 32, 32),))
    """
    if spec is None and inputs is not None:
        from merge.tracing.derive import derive

        return derive(_module(model), inputs, free_outputs=outputs == "free").symmetry
    checkpoint = open_checkpoint(model)
    own = _config(model, checkpoint)
    found, config = _spec_of(checkpoint, own, spec)
    template = template_of(str(own.get("model_type"))) if spec is None else None
    body = template is not None and template.is_body(own)
    try:
        symmetry = _fitted(found, checkpoint, config)
    except PlanError as error:
        raise error.at(model=checkpoint.label) from None
    return _with_fixed_outputs(symmetry) if body and outputs == "fixed" else symmetry


def spec_of(checkpoint: Checkpoint) -> tuple[Spec, Mapping[str, Any]]:
    """The symmetry spec of a checkpoint, before it is fitted, and config.json with its defaults."""
    return _spec_of(checkpoint, checkpoint.side.config, None)


def _spec_of(
    checkpoint: Checkpoint, config: Mapping[str, Any], spec: object
) -> tuple[Spec, Mapping[str, Any]]:
    if spec is not None:
        return _given(spec), config
    template = template_of(str(config.get("model_type")))
    found = _known(checkpoint, config)
    return found, config if template is None else template.complete(config)


def _module(model: object) -> Any:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise RecipeError(
            "example inputs are for a module, which is run with them",
            found=type(model).__name__,
            expected="a torch.nn.Module",
            do="leave out the inputs",
        )
    return model


def _given(spec: object) -> Spec:
    """The spec that the user gave, read where it is a file."""
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, str | Path):
        try:
            return parse_spec(json.loads(Path(spec).read_text(encoding="utf-8")), str(spec))
        except (OSError, ValueError) as error:
            raise RecipeError(
                "the symmetry spec cannot be read",
                file=spec,
                found=str(error),
                expected="a JSON file with groups and tensors",
            ) from None
    return parse_spec(spec)


def _config(model: object, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """config.json; a module in memory is of its own class, which its config need not say."""
    config: Mapping[str, Any] = checkpoint.side.config
    if config and not config.get("architectures") and hasattr(model, "named_parameters"):
        return {**config, "architectures": [type(model).__name__]}
    return config


def _known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Spec:
    """The spec of a checkpoint's model type."""
    template = template_of(str(config.get("model_type")))
    if template is not None and (spec := template.find(config)) is not None:
        return spec
    if not config:
        raise PlanError(
            "it is not known which coordinates of this model may be exchanged",
            model=checkpoint.label,
            found="no config.json",
            do="give a symmetry spec, or the module itself with example inputs",
        )
    from merge.tracing.fallback import derived_spec

    try:
        return derived_spec(config)
    except MergeError as error:
        raise error.at(model=checkpoint.label) from None


def _fitted(spec: Spec, checkpoint: Checkpoint, config: Mapping[str, object]) -> Symmetry:
    """The spec resolved for a checkpoint; integers and flags that it does not know are fixed."""
    find = Finder(Pattern.of(p) for p in spec.tensors)
    shapes = {s.name: s.shape for s in checkpoint.values()}
    aside = [s.name for s in checkpoint.values() if s.dtype.kind != "float" and not find(s.name)]
    known = {n: shape for n, shape in shapes.items() if n not in set(aside)}
    symmetry = resolve(spec, known, config)
    fixed = {
        name: Layout(shapes[name], tuple(Axis(((Factor(None, n),),)) for n in shapes[name]))
        for name in aside
    }
    every = {**symmetry.tensors, **fixed}
    return replace(symmetry, tensors={name: every[name] for name in shapes})


def _with_fixed_outputs(symmetry: Symmetry) -> Symmetry:
    """The symmetry with the groups frozen that index what a model without a head returns."""
    reason = "the model has no head: these are the features that it returns"
    groups = {
        name: replace(group, flags="", per=(), reason=reason) if group.output else group
        for name, group in symmetry.groups.items()
    }
    return replace(symmetry, groups=groups)
