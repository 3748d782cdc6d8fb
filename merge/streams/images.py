"""Pictures in folders by class, brought to what a model takes by its preprocessor_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import RecipeError, SourceError, told
from merge.streams.batches import Collate
from merge.streams.examples import Example
from merge.streams.labels import Classes
from merge.streams.models import Runner
from merge.streams.spec import PARTS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SUFFIXES", "Preprocess", "list_pictures", "pictured", "preprocess_of"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def list_pictures(folder: Path, part: str | None = None) -> list[Example]:
    """The pictures in ``folder/CLASS/``, or in ``folder/PART/CLASS/`` where that is how it is.

    Where there are no folders in it, its own pictures, without classes.
    """
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if part is None and inside and all(_part(p.name) is not None for p in inside):
        return [e for p in inside for e in list_pictures(p, _part(p.name))]
    found = []
    for place in inside or [folder]:
        name = place.name if inside else None
        for file in sorted(place.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                key = "/".join(file.relative_to(folder).parts).encode()
                found.append(Example(file, name, key, part, {"file": file}))
    if not found:
        loose = sum(1 for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        raise SourceError(
            "there are no pictures in the folder",
            folder=folder,
            found=f"{len(inside)} folders without any, {loose} pictures beside them",
            expected="a folder for each class, with its pictures; or pictures alone",
        )
    return found


def _part(name: str) -> str | None:
    found = {"valid": "validate", "validation": "validate", "val": "validate"}
    part = found.get(name.lower(), name.lower())
    return part if part in PARTS else None


@dataclass(frozen=True, slots=True)
class Preprocess:
    """What is done to a picture, in this order: mode, resize, crop, scale, normalise.

    size: height and width, or the shortest edge alone. crop: height and width of the middle.
    """

    mode: str = "RGB"
    size: tuple[int, int] | int | None = None
    resample: int = 3
    crop: tuple[int, int] | None = None
    factor: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __call__(self, file: Path) -> Tensor:
        """The picture as channels x height x width in float32."""
        import numpy as np
        import torch
        from PIL import Image

        try:
            with Image.open(file) as opened:
                image = opened.convert(self.mode)
        except Exception as error:  # pillow's decoders raise many kinds
            raise SourceError("a picture cannot be read", file=file, found=told(error)) from None
        if self.size is not None:
            image = image.resize(self._target(*image.size), Image.Resampling(self.resample))
        values = np.asarray(image, dtype=np.float32)
        values = values[..., None] if values.ndim == 2 else values
        if self.crop is not None:
            values = _middle(values, *self.crop)
        values = values * np.float32(self.factor)
        if self.mean:
            mean, std = (np.asarray(v, dtype=np.float32) for v in (self.mean, self.std))
            values = (values - mean) / std
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32))

    def _target(self, width: int, height: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size[1], self.size[0]
        assert self.size is not None
        short, long = sorted((width, height))
        edges = {short: self.size, long: int(self.size * long / short)}
        return edges[width], edges[height]


def _middle(values: Any, height: int, width: int) -> Any:
    """The middle of a picture, zeros where it is too small."""
    import numpy as np

    out = np.zeros((height, width, values.shape[2]), values.dtype)
    rows, columns = values.shape[:2]
    top, left = (rows - height) // 2, (columns - width) // 2
    inside = values[max(0, top) : top + height, max(0, left) : left + width]
    at = (max(0, -top), max(0, -left))
    out[at[0] : at[0] + inside.shape[0], at[1] : at[1] + inside.shape[1]] = inside
    return out


def preprocess_of(runner: Runner) -> Preprocess:
    """What the model's preprocessor_config.json says; else its size, with values from 0 to 1."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise RecipeError(
            "pictures are read by pillow, which is not installed",
            do="pip install 'hf-merge[data]'",
        ) from None
    config = runner.config
    mode = "L" if config.get("num_channels", 3) == 1 else "RGB"
    file = None if runner.folder is None else runner.folder / "preprocessor_config.json"
    if file is None or not file.is_file():
        size = _pair(config.get("image_size"))
        return Preprocess(mode, size=size)
    try:
        said = json.loads(file.read_text())
        assert isinstance(said, dict)
        return _read(said, mode)
    except (ValueError, TypeError, AssertionError, LookupError) as error:
        raise SourceError(
            "what is to be done to pictures cannot be understood", file=file, found=told(error)
        ) from None


def _read(said: Mapping[str, Any], mode: str) -> Preprocess:
    size = said.get("size") if said.get("do_resize", True) else None
    wanted: tuple[int, int] | int | None = None
    if isinstance(size, Mapping) and "shortest_edge" in size:
        wanted = int(size["shortest_edge"])
    elif size is not None:
        wanted = _pair(size)
    crop = said.get("crop_size", size) if said.get("do_center_crop") else None
    normalise = said.get("do_normalize", "image_mean" in said)
    return Preprocess(
        mode,
        size=wanted,
        resample=int(said.get("resample", 3)),
        crop=None if crop is None else _pair(crop),
        factor=float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 1.0,
        mean=tuple(map(float, said["image_mean"])) if normalise else (),
        std=tuple(map(float, said["image_std"])) if normalise else (),
    )


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return int(size), int(size)


def pictured(preprocess: Preprocess, classes: Classes, plain: bool) -> Collate:
    """Makes a batch of pictures, decoded now. plain: a tensor, not arguments by name."""

    def collate(examples: Sequence[Example]) -> tuple[Any, Any]:
        import torch

        pictures = [preprocess(e.value) for e in examples]
        odd = next((i for i, p in enumerate(pictures) if p.shape != pictures[0].shape), None)
        if odd is not None:
            raise SourceError(
                "pictures differ in size, and the model says of none",
                file=examples[odd].value,
                found=list(pictures[odd].shape),
                expected=list(pictures[0].shape),
                do="resize them, or put a preprocessor_config.json beside the model",
            )
        stacked = torch.stack(pictures)
        target = torch.tensor([classes[e.label] for e in examples if e.label is not None])
        inputs = stacked if plain else {"pixel_values": stacked}
        return inputs, target if len(target) == len(examples) else None

    return collate
