"""Open a PEFT adapter: adapter_config.json and its weights, on a base model or on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from merge.adapters.attach import attach
from merge.adapters.config import AdapterConfig, read_config
from merge.checkpoint.files import FileSource
from merge.checkpoint.header import check_regular
from merge.checkpoint.inside import inside, is_there, json_object
from merge.checkpoint.weights import find_weights
from merge.errors import MergeError, SourceError
from merge.ir.checkpoint import Checkpoint, short
from merge.ir.expr import Expr, Read
from merge.ir.side import Side, SideFile

__all__ = ["is_adapter", "open_adapter", "read_adapter", "with_adapter"]

CONFIG = "adapter_config.json"
_STEM = {"adapter_model": "adapter_model"}
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
)  # fmt: skip

OpenBase = Callable[[str, str | None], Checkpoint]
"""From the base's name and revision to its checkpoint."""


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    models = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return is_there(path / CONFIG) and not any(is_there(path / name) for name in models)


def open_adapter(path: Path, open_base: OpenBase, *, allow_pickle: bool = False) -> Checkpoint:
    """The adapter at ``path`` on the base that its config names; only headers are read.

    The base is looked for from the adapter's folder and from the working directory.
    """
    adapter, config = read_adapter(path, allow_pickle=allow_pickle)
    if config.base is None:
        raise SourceError(
            "an adapter does not say which model it was trained on",
            file=config.file,
            key="base_model_name_or_path",
            do="name the two together: base+adapter",
        )
    beside = path / Path(config.base).expanduser()
    name = str(beside) if beside.exists() else config.base
    try:
        base = open_base(name, config.revision if name == config.base else None)
    except MergeError as error:
        raise error.at(named_by=config.file, key="base_model_name_or_path") from None
    return _joined(base, adapter, config, path)


def with_adapter(base: Checkpoint, path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """``base`` with the adapter at ``path`` on it."""
    if not is_there(path / CONFIG):
        raise SourceError(
            "no such adapter",
            model=path,
            expected=f"a folder with {CONFIG} and adapter_model.safetensors",
            do="check the path; fetch one of the Hub with `hf download REPO --local-dir DIR`",
        )
    adapter, config = read_adapter(path, allow_pickle=allow_pickle)
    return _joined(base, adapter, config, path)


def read_adapter(path: Path, *, allow_pickle: bool = False) -> tuple[Checkpoint, AdapterConfig]:
    """An adapter's own tensors, under the names in its file, and its config."""
    root = path.resolve()
    config = read_config(json_object(root, CONFIG), str(path / CONFIG))
    found = find_weights(root, "", allow_pickle, _STEM)
    if not found.headers:
        raise SourceError(
            "the adapter's folder holds no weights",
            model=path,
            expected="adapter_model.safetensors",
        )
    source = FileSource.of(str(root), [("", header) for header in found.headers.values()])
    tensors: dict[str, Expr] = {
        name: Read(source, spec)
        for header in found.headers.values()
        for name, spec in header.tensors.items()
    }
    return Checkpoint(tensors, str(path), roots=(str(root),), notes=found.notes), config


def _joined(base: Checkpoint, adapter: Checkpoint, config: AdapterConfig, path: Path) -> Checkpoint:
    made = attach(base, adapter, config)
    made = replace(made, notes=(*made.notes, *adapter.notes))
    own = _tokenizer(path.resolve())
    if not own:
        return made
    if made.side.config.get("vocab_size") != base.side.config.get("vocab_size"):
        return replace(made, side=_with_tokenizer(made.side, own))
    note = (
        f"{short(str(path))}: its own tokenizer ({own[0].name}) is not used, but that of"
        f" {short(base.label)}, whose vocabulary the embeddings have"
    )
    return replace(made, notes=(*made.notes, note))


def _tokenizer(root: Path) -> list[SideFile]:
    found = []
    for name in _TOKENIZER:
        if is_there(root / name):
            path = inside(root, name)
            info = check_regular(path, "side file")
            found.append(SideFile(name, str(path), info.st_size, info.st_mtime_ns))
    return found


def _with_tokenizer(side: Side, own: list[SideFile]) -> Side:
    """The tokenizer that the new rows of the embeddings are of, in the place of the base's."""
    side = side.without(_TOKENIZER)
    return replace(side, files=tuple(sorted((*side.files, *own), key=lambda f: f.name)))
