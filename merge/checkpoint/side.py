"""The small files beside the weights: which are copied into an output, which are not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from merge.checkpoint.components import PIPELINE
from merge.checkpoint.header import check_regular
from merge.checkpoint.inside import inside
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
_OURS = {"merge_manifest.json", "merge_recipe.yml", "mergekit_config.yml"}
_CARD, _CODE = "README.md", ".py"


def find_side(
    root: Path,
    configs: Mapping[str, Mapping[str, object]],
    folders: Sequence[str],
    weights: Collection[str],
) -> Side:
    """The side files of the checkpoint ``root``, each kind sorted by name.

    configs: config.json of each component that has weights, by folder. folders: the components.
    weights: weight files that are read, relative to ``root``; others are named as left.
    """
    files: list[SideFile] = []
    code: list[SideFile] = []
    left: list[str] = []
    card: SideFile | None = None
    for sub in dict.fromkeys(("", *folders, "additional_chat_templates")):
        here = root / sub
        if not here.is_dir():
            continue
        for path in sorted(here.iterdir()):
            name = str(PurePosixPath(sub) / path.name)
            if path.name.startswith(".") or not (path.is_file() or path.is_symlink()):
                continue
            if name == _CARD:
                card = _seen(root, name)
            elif path.suffix == _CODE:
                code.append(_seen(root, name))
            elif _is_copied(path.name):
                files.append(_seen(root, name))
            elif name not in weights and not _is_other(path.name):
                left.append(name)
    if (root / PIPELINE).exists():
        left += [f"{path.name}/" for path in sorted(root.iterdir()) if _unlisted(path, folders)]
    parts = {f: c for f, c in configs.items() if f}
    files.sort(key=lambda f: f.name)
    code.sort(key=lambda f: f.name)
    return Side(
        tuple(files), configs.get("", {}), tuple(left), code=tuple(code), card=card, configs=parts
    )


def _unlisted(path: Path, folders: Sequence[str]) -> bool:
    """Whether a folder in a pipeline holds weights, and the pipeline's list does not have it."""
    if path.name in folders or path.name.startswith(".") or not path.is_dir():
        return False
    return any(f.suffix in (".safetensors", *PICKLES) for f in path.iterdir())


def _seen(root: Path, name: str) -> SideFile:
    path = inside(root, name)
    info = check_regular(path, "side file")
    return SideFile(name, str(path), info.st_size, info.st_mtime_ns)


def _is_copied(name: str) -> bool:
    if name.lower().startswith(_LEGAL):
        return True
    return not _is_index(name) and name not in _OURS and name.endswith(_COPIED)


def _is_other(name: str) -> bool:
    return name.endswith(_OTHER_WEIGHTS) or _is_index(name) or name in _OURS


def _is_index(name: str) -> bool:
    """Whether this is an index of shards, such as model.safetensors.index.fp16.json."""
    return name.endswith(".json") and ".index." in name
