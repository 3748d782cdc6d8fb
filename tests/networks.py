"""Small networks with their symmetry specs, for tests of alignment; nothing here is a test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from merge.symmetry.action import apply
from merge.symmetry.elements import random_element
from merge.symmetry.resolve import resolve
from merge.symmetry.spec import parse_spec
from merge.symmetry.symmetry import Symmetry

Tensors = Mapping[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads only get in one another's way on networks as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Recorder:
    """A network's tensors by name, and what was read of them."""

    tensors: Tensors
    bytes_read: int = 0

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        found = self.tensors[name] if last is None else self.tensors[name][first:last]
        self.bytes_read += found.numel() * found.element_size()
        return found.clone()


def symmetry_of(
    spec: Mapping[str, Any], tensors: Tensors, config: Mapping[str, Any] | None = None
) -> Symmetry:
    return resolve(parse_spec(spec), {n: t.shape for n, t in tensors.items()}, config)


def planted(symmetry: Symmetry, tensors: Tensors, seed: int = 1, kinds: str = "P") -> Any:
    """The network moved by a random element of its symmetry, and that element."""
    element = random_element(symmetry, seed, kinds)
    return apply(symmetry, dict(tensors), element), element


def inner(a: Tensors, b: Tensors, names: Sequence[str] | None = None) -> float:
    """The inner product of two networks."""
    return float(sum((a[n].double() * b[n].double()).sum() for n in names or a))


# -- MLPs ------------------------------------------------------------------------------------------
def mlp_spec(layers: int, flags: str = "P") -> dict[str, Any]:
    """A perceptron of ``layers`` linear maps, as `mlp` makes it."""
    tensors: dict[str, list[str]] = {}
    for i in range(layers):
        out = "_out" if i == layers - 1 else f"f{i}"
        tensors[f"{2 * i}.weight"] = [out, f"f{i - 1}*" if i else "_in"]
        tensors[f"{2 * i}.bias"] = [out]
    groups = {f"f{i}": {"flags": flags} for i in range(layers - 1)}
    frozen = {"in": "an input of the network", "out": "an output of the network"}
    return {"model": "mlp", "groups": groups, "frozen": frozen, "tensors": tensors}


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        layers += ([activation()] if i else []) + [nn.Linear(n, m)]
    return nn.Sequential(*layers)


# -- a residual network ----------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(short, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2016: three stages of three blocks; projections where the width doubles."""

    def __init__(self, width: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(
                    widths[s] if b == 0 else widths[s + 1], widths[s + 1], 2 if s and not b else 1
                )
                for b in range(3)
            )
            for s in range(3)
        )
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        found: Tensor = self.fc(x.mean((2, 3)))
        return found


NORM = ("weight", "bias", "running_mean", "running_var")


def resnet_spec() -> dict[str, Any]:
    tensors: dict[str, list[str]] = {"conv.weight": ["s0", "_in", "_", "_"]}
    groups: dict[str, Any] = {f"s{s}": {"flags": "P"} for s in range(3)}

    def norm(name: str, group: str) -> None:
        tensors.update({f"{name}.{part}": [group] for part in NORM})
        tensors[f"{name}.num_batches_tracked"] = []

    norm("bn", "s0")
    for s in range(3):
        for b in range(3):
            name, stream, inner = f"stages.{s}.{b}", f"s{s}", f"u{s}_{b}"
            before = f"s{s - 1}" if s and not b else stream
            groups[inner] = {"flags": "P"}
            tensors[f"{name}.conv1.weight"] = [inner, before, "_", "_"]
            norm(f"{name}.bn1", inner)
            tensors[f"{name}.conv2.weight"] = [stream, inner, "_", "_"]
            norm(f"{name}.bn2", stream)
            if s and not b:
                tensors[f"{name}.shortcut.0.weight"] = [stream, before, "_", "_"]
                norm(f"{name}.shortcut.1", stream)
    tensors["fc.weight"], tensors["fc.bias"] = ["_out", "s2"], ["_out"]
    return {"model": "resnet20", "groups": groups, "frozen": {"in": "", "out": ""},
            "tensors": tensors}  # fmt: skip


# -- encoders --------------------------------------------------------------------------------------
_HEAD = "hidden_size/num_attention_heads"


def encoder_groups() -> dict[str, Any]:
    return {
        "d": {"flags": "P", "size": "hidden_size", "output": True},
        "h{i}": {"flags": "P", "size": "num_attention_heads"},
        "qk{i}": {"flags": "PSDR", "size": _HEAD, "per": ["h{i}"]},
        "v{i}": {"flags": "PSDR", "size": _HEAD, "per": ["h{i}"]},
        "f{i}": {"flags": "P", "size": "intermediate_size"},
    }


def _both(name: str, out: str, inside: str) -> dict[str, list[str]]:
    return {f"{name}.weight": [out, inside], f"{name}.bias": [out]}


def _gains(name: str) -> dict[str, list[str]]:
    return {f"{name}.weight": ["d"], f"{name}.bias": ["d"]}


_VIT = "vit.layers.{i}"
VIT: dict[str, Any] = {
    "model": "vit",
    "groups": encoder_groups(),
    "tensors": {
        "vit.embeddings.cls_token": ["_", "_", "d"],
        "vit.embeddings.position_embeddings": ["_", "_", "d"],
        "vit.embeddings.patch_embeddings.projection.weight": ["d", "_", "_", "_"],
        "vit.embeddings.patch_embeddings.projection.bias": ["d"],
        **_gains(f"{_VIT}.layernorm_before"),
        **_both(f"{_VIT}.attention.q_proj", "h{i}.qk{i}", "d"),
        **_both(f"{_VIT}.attention.k_proj", "h{i}.qk{i}*", "d"),
        **_both(f"{_VIT}.attention.v_proj", "h{i}.v{i}", "d"),
        **_both(f"{_VIT}.attention.o_proj", "d", "h{i}.v{i}*"),
        **_gains(f"{_VIT}.layernorm_after"),
        **_both(f"{_VIT}.mlp.fc1", "f{i}", "d"),
        **_both(f"{_VIT}.mlp.fc2", "d", "f{i}"),
        **_gains("vit.layernorm"),
        "classifier.weight": ["_out", "d"],
        "classifier.bias": ["_out"],
    },
    "frozen": {"out": "an output of the network"},
}
"""A vision transformer with a classifier."""

# -- experts ---------------------------------------------------------------------------------------
_EXPERTS = {"ex": {"flags": "P"}, "f": {"flags": "P", "per": ["ex"]}, "d": {"flags": "P"}}
STACKED: dict[str, Any] = {
    "model": "experts",
    "groups": _EXPERTS,
    "tensors": {
        "embed": ["_token", "d"],
        "gate": ["ex", "d"],
        "up": ["ex", "f+f", "d"],
        "down": ["ex", "d", "f"],
    },
    "frozen": {"token": ""},
}
"""Experts in one tensor, gate and up projections joined."""

APART: dict[str, Any] = {
    "model": "experts",
    "groups": _EXPERTS,
    "tensors": {
        "embed": ["_token", "d"],
        "gate": ["ex", "d"],
        "experts.{ex}.up": ["f+f", "d"],
        "experts.{ex}.down": ["d", "f"],
    },
    "frozen": {"token": ""},
}
"""The same, a tensor for each expert."""


def stacked(experts: int = 4, units: int = 6, width: int = 8, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "embed": (20, width),
        "gate": (experts, width),
        "up": (experts, 2 * units, width),
        "down": (experts, width, units),
    }
    return {n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in shapes.items()}


def apart(tensors: Tensors) -> dict[str, Tensor]:
    """Stacked experts taken apart."""
    out = {n: tensors[n] for n in ("embed", "gate")}
    for name in ("up", "down"):
        out |= {f"experts.{i}.{name}": t for i, t in enumerate(tensors[name])}
    return out
