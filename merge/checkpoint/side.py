"""The small files beside the weights: which are copied into an output, which are not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

from merge.checkpoint.components import PIPELINE
from merge.checkpoint.place import Files
from merge.checkpoint.weights import PICKLES
from merge.ir.side import Side, SideFile

__all__ = ["find_side"]

_OTHER_WEIGHTS = (
    *PICKLES, ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".tflite", ".npz", ".pkl", ".pickle",
)  # fmt: skip
"""The same weights for other programs: not ours, and nothing to tell."""

_COPIED = (
    ".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab", ".yaml", ".yml",
)  # fmt: skip
_LEGAL = ("license", "licence", "notice", "copying", "use_policy")
_OURS = {
    "coefficients.json",
    "merge.lock.yml",
    "merge_manifest.json",
    "merge_recipe.yml",
    "merge_share.json",
    "mergekit_config.yml",
    "tune.json",
}
_CARD, _CODE = "README.md", ".py"


def find_side(
    place: Files,
    configs: Mapping[str, Mapping[str, object]],
    folders: Sequence[str],
    weights: Collection[str],
) -> Side:
    """The side files of a checkpoint, each kind sorted by name.

    configs: config.json of each component that has weights, by folder. folders: the components.
    weights: names of the weight files that are read; others are named as left.
    """
    files: list[SideFile] = []
    code: list[SideFile] = []
    left: list[str] = []
    card: SideFile | None = None
    for sub in dict.fromkeys(("", *folders, "additional_chat_templates")):
        if not place.is_folder(sub):
            continue
        for own in place.names(sub):
            name = str(PurePosixPath(sub) / own)
            if own.startswith(".") or not place.is_file(name):
                continue
            if name == _CARD:
                card = place.side(name)
            elif own.endswith(_CODE):
                code.append(place.side(name))
            elif _is_copied(own):
                files.append(place.side(name))
            elif name not in weights and not _is_other(own):
                left.append(name)
    if place.is_there(PIPELINE):
        left += [f"{name}/" for name in place.names() if _unlisted(name, place, folders)]
    parts = {f: c for f, c in configs.items() if f}
    files.sort(key=lambda f: f.name)
    code.sort(key=lambda f: f.name)
    return Side(
        tuple(files), configs.get("", {}), tuple(left), code=tuple(code), card=card, configs=parts
    )


def _unlisted(name: str, place: Files, folders: Sequence[str]) -> bool:
    """Whether a folder in a pipeline holds weights, and the pipeline's list does not have it."""
    if name in folders or name.startswith(".") or not place.is_folder(name):
        return False
    return any(f.endswith((".safetensors", *PICKLES)) for f in place.names(name))


def _is_copied(name: str) -> bool:
    if name.lower().startswith(_LEGAL):
        return True
    return not _is_index(name) and name not in _OURS and name.endswith(_COPIED)


def _is_other(name: str) -> bool:
    return name.endswith(_OTHER_WEIGHTS) or _is_index(name) or name in _OURS


def _is_index(name: str) -> bool:
    """Whether this is an index of shards, such as model.safetensors.index.fp16.json."""
    return name.endswith(".json") and ".index." in name
