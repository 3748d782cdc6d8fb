"""In which commits a model is published, so that its repo never looks complete while it is not.

Readers look at a branch whenever they like, and what they find must be the old model or the new
one. A commit is the only thing that is atomic, and the Hub wants few files in each. So:

- up to 50 weight files: **one commit** of all, the removal of old weight files included;
- more, and the branch holds no model: rounds of 50 weight files on the branch itself, which
  without index and config load nowhere; the last commit adds these and all other files;
- more, and the branch holds a model: the same rounds on a branch of their own, which is removed
  after one last commit on the target. It names all files; their bytes are in the repo by then.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = ["MOST_FILES", "Rounds", "plan_rounds", "stale_files"]

MOST_FILES = 50
"""Weight files of a commit: the least of what the Hub's documentation advises."""

# Files that a library would load as a model's weights if it found them, and the lists of them.
_WEIGHTS = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|diffusion_flax_model|adapter_model|tf_model|"
    r"flax_model|open_clip_model|open_clip_pytorch_model)([.-][\w.-]+)?\."
    r"(safetensors|bin|h5|msgpack)(\.index(\.[\w-]+)?\.json)?"
)
_INDEX = re.compile(r".*\.(safetensors|bin|h5|msgpack)\.index(\.[\w-]+)?\.json")
_CONFIGS = {
    "adapter_config.json",
    "config.json",
    "model_index.json",
    "modules.json",
    "open_clip_config.json",
}
_OF_A_TASK = re.compile(r"tasks/[^/]+/task\.json")
"""Beside it lies what a task of a learned merge has for itself, with that merge alone."""
_ADAPTER = "adapter_config.json"
"""Beside a whole model it makes transformers look for an adapter."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """The commits of a publication. staging: whether rounds go to a branch of their own.

    rounds: the weight files of each commit before the last. last: those that the last commit names.
    removed: files that the last commit takes away.
    """

    staging: bool
    rounds: tuple[tuple[str, ...], ...]
    last: tuple[str, ...]
    removed: tuple[str, ...]


def plan_rounds(
    weights: Sequence[str],
    side: Collection[str],
    there: Collection[str],
    *,
    apart: bool = False,
    most: int = MOST_FILES,
) -> Rounds:
    """How ``weights`` and ``side`` files are committed to a branch that holds the files ``there``.

    there: without those that are ours already. apart: the commits go to a pull request, which
    nobody loads by chance. most: weight files of a commit.
    """
    removed = stale_files(weights, side, there)
    if len(weights) <= most:
        return Rounds(False, (), tuple(weights), removed)
    rounds = tuple(tuple(weights[i : i + most]) for i in range(0, len(weights), most))
    if apart or not _holds_model(there):
        return Rounds(False, rounds, (), removed)
    return Rounds(True, rounds, tuple(weights), removed)


def _holds_model(there: Collection[str]) -> bool:
    """Whether a library could take the files for a model, or for a part of one."""
    return any(PurePosixPath(f).name in _CONFIGS or _is_weights(f) for f in there)


def _is_weights(file: str) -> bool:
    name = PurePosixPath(file).name
    return _WEIGHTS.fullmatch(name) is not None or _INDEX.fullmatch(name) is not None


def stale_files(
    weights: Sequence[str], side: Collection[str], there: Collection[str]
) -> tuple[str, ...]:
    """Weight files and indices of an earlier model, which beside the new one would mislead.

    Only in folders that get weights, at the top, and in those of single tasks. What other programs
    read (GGUF, ONNX, images) is not ours to judge and stays.

    >>> stale_files(["model.safetensors"], ["config.json"], ["pytorch_model.bin", "x.gguf"])
    ('pytorch_model.bin',)
    """
    ours = {*weights, *side}
    folders = {"", *(_folder(w) for w in weights)}
    old = [f for f in there if f not in ours and _folder(f) in folders]
    found = [f for f in old if _is_weights(f) or PurePosixPath(f).name == _ADAPTER]
    gone = {_folder(f) for f in there if f not in ours and _OF_A_TASK.fullmatch(f)}
    return (*found, *(f for f in there if _folder(f) in gone and f not in ours))


def _folder(file: str) -> str:
    parent = str(PurePosixPath(file).parent)
    return "" if parent == "." else parent
