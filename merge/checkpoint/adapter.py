"""Open a PEFT adapter: adapter_config.json and its weights, on a base model or on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from merge.adapters.attach import attach
from merge.adapters.config import AdapterConfig, read_config
from merge.checkpoint.place import Files, json_object
from merge.checkpoint.weights import find_weights
from merge.errors import MergeError, SourceError
from merge.ir.checkpoint import Checkpoint, short
from merge.ir.expr import Expr, Read
from merge.ir.side import Side, SideFile

__all__ = ["is_adapter", "no_such_adapter", "open_adapter", "read_adapter", "with_adapter"]

CONFIG = "adapter_config.json"
_STEM = {"adapter_model": "adapter_model"}
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
)  # fmt: skip

OpenBase = Callable[[str, str | None], Checkpoint]
"""From the base's name and revision to its checkpoint."""


def is_adapter(files: Files) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    models = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return files.is_there(CONFIG) and not any(map(files.is_there, models))


def open_adapter(files: Files, open_base: OpenBase, *, allow_pickle: bool = False) -> Checkpoint:
    """The adapter in ``files`` on the base that its config names; only headers are read."""
    adapter, config = read_adapter(files, allow_pickle=allow_pickle)
    if config.base is None:
        raise SourceError(
            "an adapter does not say which model it was trained on",
            file=config.file,
            key="base_model_name_or_path",
            do="name the two together: base+adapter",
        )
    try:
        base = open_base(config.base, config.revision)
    except MergeError as error:
        raise error.at(named_by=config.file, key="base_model_name_or_path") from None
    return _joined(base, adapter, config, files)


def with_adapter(base: Checkpoint, files: Files, *, allow_pickle: bool = False) -> Checkpoint:
    """``base`` with the adapter in ``files`` on it."""
    if not files.is_there(CONFIG):
        raise no_such_adapter(files.where(""))
    adapter, config = read_adapter(files, allow_pickle=allow_pickle)
    return _joined(base, adapter, config, files)


def no_such_adapter(path: object) -> SourceError:
    """The error for a place that holds no adapter."""
    return SourceError(
        "no such adapter",
        model=path,
        expected=f"a folder with {CONFIG} and adapter_model.safetensors",
        do="check the path; an adapter on the Hub is called by its id, org/name",
    )


def read_adapter(files: Files, *, allow_pickle: bool = False) -> tuple[Checkpoint, AdapterConfig]:
    """An adapter's own tensors, under the names in its file, and its config."""
    config = read_config(json_object(files, CONFIG), files.where(CONFIG))
    found = find_weights(files, "", allow_pickle, _STEM)
    if not found.headers:
        raise SourceError(
            "the adapter's folder holds no weights",
            model=files.where(""),
            expected="adapter_model.safetensors",
        )
    source = files.source([("", header) for header in found.headers.values()])
    tensors: dict[str, Expr] = {
        name: Read(source, spec)
        for header in found.headers.values()
        for name, spec in header.tensors.items()
    }
    label = files.where("")
    return Checkpoint(tensors, label, roots=(files.identity,), notes=found.notes), config


def _joined(
    base: Checkpoint, adapter: Checkpoint, config: AdapterConfig, files: Files
) -> Checkpoint:
    made = attach(base, adapter, config)
    made = replace(made, notes=(*made.notes, *adapter.notes))
    own = [files.side(name) for name in _TOKENIZER if files.is_there(name)]
    if not own:
        return made
    if made.side.config.get("vocab_size") != base.side.config.get("vocab_size"):
        return replace(made, side=_with_tokenizer(made.side, own))
    note = (
        f"{short(adapter.label)}: its own tokenizer ({own[0].name}) is not used, but that of"
        f" {short(base.label)}, whose vocabulary the embeddings have"
    )
    return replace(made, notes=(*made.notes, note))


def _with_tokenizer(side: Side, own: list[SideFile]) -> Side:
    """The tokenizer that the new rows of the embeddings are of, in the place of the base's."""
    side = side.without(_TOKENIZER)
    return replace(side, files=tuple(sorted((*side.files, *own), key=lambda f: f.name)))
