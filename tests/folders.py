"""Small folders, and their content, for tests of the layouts of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import merge
from merge.errors import SourceError

OURS = {"README.md", "merge_manifest.json"}
"""What every output has besides the weights and the files that came with them."""


def state(seed: int = 0) -> dict[str, Tensor]:
    """Three tensors, other ones for another seed."""
    made = torch.Generator().manual_seed(seed)
    return {n: torch.randn(4, 3, generator=made) for n in ("a.weight", "b.weight", "c.weight")}


def mean(*states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of state dicts, computed in float64."""
    found = {}
    for name, first in states[0].items():
        every = torch.stack([s[name].double() for s in states])
        found[name] = first if not first.is_floating_point() else every.mean(0).to(first.dtype)
    return found


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names; values equal to the last bits of their type."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, n=name: f"{n}: {text}")


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def written(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def saved(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path)


def error_of(path: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        merge.open(path)
    return caught.value


def pipeline(root: Path, index: Mapping[str, object]) -> Path:
    """A pipeline of a UNet and a scheduler, with that model_index.json."""
    written(root / "model_index.json", {"_class_name": "Toy", **index})
    saved(root / "unet" / "diffusion_pytorch_model.safetensors", state())
    written(root / "unet" / "config.json", {"_class_name": "UNet"})
    written(root / "scheduler" / "scheduler_config.json", {"_class_name": "Scheduler"})
    return root


UNET = {"unet": ["diffusers", "UNet"], "scheduler": ["diffusers", "Scheduler"]}
