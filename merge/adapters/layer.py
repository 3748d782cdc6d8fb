"""One layer of a tuner that peft has and we have not: built in peft, merged, and taken out again.

The layer stands alone in a tree of modules, at the path that it has in the whole model, so that all
that the config says of names holds. peft is imported when a tensor is computed.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["merged_part"]

_ONE = threading.Lock()
"""Warnings, and what is drawn at random before it is overwritten, are the whole process's."""

_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""What peft raises, NotImplementedError among them, for tensors that do not fit its layers."""


def merged_part(
    *tensors: Tensor, config: str, path: str, names: str, shape: str, part: str, largest: str
) -> Tensor:
    """The weight or the bias (``part``) of the layer at ``path`` with its adapter merged.

    tensors: the layer's own and the adapter's, under ``names``, a list in JSON; the layer's are
    called weight and bias. config: adapter_config.json. shape: what kind of layer. largest: path,
    out and in of the adapter's largest layers, in JSON, by which matrices that all share are made.
    Raises PlanError where peft is not there, or has another idea of the adapter's tensors.
    """
    import torch

    given = dict(zip(json.loads(names), tensors, strict=True))
    own = {n: given.pop(n) for n in ("weight", "bias") if n in given}
    others = {name: sizes for name, *sizes in json.loads(largest) if name != path}
    root = torch.nn.Module()
    with _ONE, warnings.catch_warnings(), torch.inference_mode(False), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        _place(root, path, _layer(shape, own))
        for name, (rows, columns) in others.items():
            blank = torch.nn.Linear(columns, rows, bias=False, device="meta")
            _place(root, name, blank.to_empty(device="cpu"))  # memory that is never touched
        try:
            merged = _merge(root, json.loads(config), given, path, list(others))
        except _FAILURES as error:
            raise PlanError(
                "peft cannot make a weight of an adapter's tensors",
                module=path,
                file="adapter_config.json",
                found=error,
                do="check adapter_config.json against the one that peft saved with the adapter",
            ) from error
        return merged.get_parameter(f"{path}.{part}").detach()


def _merge(
    root: torch.nn.Module,
    config: Mapping[str, Any],
    given: Mapping[str, Tensor],
    path: str,
    others: Sequence[str],
) -> torch.nn.Module:
    """The tree with the adapter merged. others: layers that are there for their sizes only."""
    kind = config["peft_type"]
    try:
        peft: Any = import_module("peft")
        kinds: Any = import_module("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise PlanError(
            f"adapters of kind {kind} are computed by peft, which is not installed",
            do="pip install 'hf-merge[peft]'",
        ) from None
    if kind not in kinds:
        raise PlanError(f"this version of peft has no adapters of kind {kind}", do="update peft")
    alone = {**config, "modules_to_save": None, "task_type": None, "auto_mapping": None}
    model = peft.PeftModel(root, kinds[kind].from_peft_type(**alone), autocast_adapter_dtype=False)
    loaded = peft.set_peft_model_state_dict(model, {n: t.clone() for n, t in given.items()})
    for name in others:
        above, _, last = name.rpartition(".")
        delattr(root.get_submodule(above), last)
    missing = _missing(model, loaded.missing_keys)
    if loaded.unexpected_keys or missing:
        raise PlanError(
            f"peft's layer of kind {kind} does not fit the adapter's tensors",
            module=path,
            found=f"beyond it: {', '.join(loaded.unexpected_keys) or 'none'}",
            expected=f"also: {', '.join(missing) or 'none'}",
            do="use the version of peft that the adapter was made with",
        )
    merged: torch.nn.Module = model.merge_and_unload()
    return merged


def _missing(model: torch.nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the tensors that were not loaded which belong to the adapter and were to be."""
    state = model.state_dict(keep_vars=True)
    absent = {n: state[n] for n in names if n in state and ".default" in n}
    loaded = {id(tensor) for name, tensor in state.items() if name not in absent}
    return [
        name
        for name, tensor in absent.items()
        if id(tensor) not in loaded and not name.endswith(".ranknum.default")
    ]


def _place(root: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    import torch

    *above, last = path.split(".")
    for name in above:
        if name not in dict(root.named_children()):
            root.add_module(name, torch.nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, layer)


def _layer(shape: str, own: Mapping[str, Tensor]) -> torch.nn.Module:
    """A layer of that kind with these weights."""
    import torch

    sizes: Any = tuple(own["weight"].shape)
    bias = "bias" in own
    layer: torch.nn.Module
    with torch.device("meta"):
        if shape == "turned":
            turned: Any = import_module("transformers.pytorch_utils").Conv1D
            layer = turned(sizes[1], sizes[0])
        elif shape == "embedding":
            layer = torch.nn.Embedding(*sizes)
        elif shape == "norm":
            layer = torch.nn.LayerNorm(sizes, bias=bias)
        elif shape == "kernel":
            kinds = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d}
            layer = kinds[len(sizes)](sizes[1], sizes[0], sizes[2:], bias=bias)
        else:
            layer = torch.nn.Linear(sizes[1], sizes[0], bias=bias)
    for name, tensor in own.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    return layer
