"""LoRA put on one module: on its weight and its bias, or on the parameters of a stack."""

from __future__ import annotations

import math
from collections.abc import Sequence

from merge.adapters.config import AdapterConfig
from merge.adapters.lora import Factors, factors_of, is_turned, with_bias, with_factors
from merge.adapters.names import Module, Parts
from merge.adapters.stacks import assign, with_experts
from merge.adapters.work import Work
from merge.errors import PlanError
from merge.families.turned import experts_turned

__all__ = ["change_module", "change_stack", "stacked"]


def stacked(parts: Parts, config: AdapterConfig) -> dict[str, list[str]]:
    """Modules of which parameters are changed that are no weights, and the names of these."""
    found: dict[str, list[str]] = {}
    for module in parts.modules:
        for parameter in config.parameters:
            path, _, last = parameter.rpartition(".")
            if last != "weight" and f".{module.path}".endswith(f".{path}" if path else ""):
                found.setdefault(module.path, []).append(last)
    return {path: list(dict.fromkeys(names)) for path, names in found.items()}


def change_module(work: Work, module: Module) -> None:
    """Put LoRA on a module's weight, and on its bias."""
    first = next(iter(module.tensors.values()))
    factors = _factors(work, module)
    place = work.at(f"{module.path}.weight", first)
    if work.is_the_embeddings(place):
        return
    work.check_rank(module.path, factors[1].shape[0], first)
    scale = work.config.scale_of(module.path)
    weight = work.tensors[place]
    turned = is_turned(weight.shape, factors, work.is_turned(place))
    if turned is None or module.depth:
        raise PlanError(
            "a change does not fit the weight that it is of",
            tensor=first,
            adapter=work.adapter.label,
            found=f"B {list(factors[0].shape)} and A {list(factors[1].shape)}",
            expected=f"a product of shape {list(weight.shape)}",
        )
    exprs = work.exprs(module)
    magnitude = exprs.get("lora_magnitude_vector")
    if (magnitude is not None) != work.config.dora:
        raise PlanError(
            "an adapter's tensors and its config disagree on DoRA",
            tensor=first,
            file=work.config.file,
            key="use_dora",
            found=f"use_dora {work.config.dora}, magnitudes {magnitude is not None}",
            do="take both of the adapter's files from one save",
        )
    units = weight.shape[-1 if turned else 0]
    if magnitude is not None and math.prod(magnitude.shape) != units:
        raise PlanError(
            "an adapter's magnitudes are not one for each output",
            tensor=module.tensors["lora_magnitude_vector"],
            adapter=work.adapter.label,
            found=list(magnitude.shape),
            expected=f"{units} numbers",
            do="name the model that the adapter was trained on",
        )
    made = with_factors(weight, factors, scale, turned, magnitude)
    work.put(place, made, together=work.config.stays_tied)
    if (change := exprs.get("lora_B.bias")) is not None:
        bias = f"{place.removesuffix('weight')}bias"
        if bias not in work.tensors:
            raise PlanError(
                "an adapter changes a bias that the model does not have",
                tensor=module.tensors["lora_B.bias"],
                adapter=work.adapter.label,
                expected=bias,
            )
        work.tensors[bias] = with_bias(work.tensors[bias], change, scale)


def change_stack(work: Work, modules: Sequence[Module], names: Sequence[str]) -> None:
    """Put LoRA on parameters ``names`` of one module, on a stack of experts each."""
    path = modules[0].path
    changes = {next(iter(m.tensors.values())): _factors(work, m) for m in modules}
    first = next(iter(changes))
    places = {f"{path}.{name}": work.at(f"{path}.{name}", first) for name in names}
    shapes = {wanted: work.tensors[place].shape for wanted, place in places.items()}
    for change, wanted in assign(list(changes.items()), shapes).items():
        place = places[wanted]
        scale = work.config.scale_of(wanted)
        square = experts_turned(work.base.side.config)
        made, rank = with_experts(work.tensors[place], changes[change], scale, square)
        work.check_rank(wanted, rank, change)
        work.put(place, made, together=False)


def _factors(work: Work, module: Module) -> Factors:
    found = factors_of(work.exprs(module))
    if found is None:
        raise PlanError(
            "half of an adapter's change of a module is missing",
            tensor=next(iter(module.tensors.values())),
            adapter=work.adapter.label,
            found=", ".join(module.tensors),
            expected="lora_A and lora_B",
        )
    return found
