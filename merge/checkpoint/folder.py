"""Open a checkpoint on disk: a folder of one component or several, or a lone weight file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from merge.checkpoint.components import component_folders
from merge.checkpoint.dequantise import dequantised
from merge.checkpoint.header import read_header
from merge.checkpoint.place import Files, LocalFiles, json_object
from merge.checkpoint.quantised import check_quantised, check_unpacked, refuse_gguf
from merge.checkpoint.scheme import scheme_of
from merge.checkpoint.side import find_side
from merge.checkpoint.weights import PICKLES, STEMS, Weights, find_weights, pickle_refused
from merge.errors import SourceError
from merge.ir.checkpoint import SPACE_KEY, Checkpoint
from merge.ir.expr import Expr, Read
from merge.ir.side import Side

__all__ = ["no_such_model", "open_files", "open_path"]


def open_path(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint at ``path``, a folder or a weight file; only headers are read.

    Understood: folders of transformers, sentence-transformers, diffusers (a pipeline, or one of its
    components), timm and open_clip, a lone ``.safetensors`` file, and, with ``allow_pickle``, the
    same with torch's pickles.
    """
    if path.is_file():
        return _open_file(path, allow_pickle)
    if not path.is_dir():
        raise no_such_model(path)
    return open_files(LocalFiles.of(path), str(path), allow_pickle=allow_pickle)


def open_files(files: Files, label: str, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint of these files; ``label`` is what people call it."""
    found: dict[str, Weights] = {}
    configs: dict[str, Mapping[str, object]] = {}
    folders = component_folders(files)
    for folder in folders:
        name = f"{folder}/config.json" if folder else "config.json"
        config = json_object(files, name)
        _check_kinds(config, files.where(name))
        if folder or scheme_of(config) is None:
            check_quantised(config, files, folder)
        weights = find_weights(files, folder, allow_pickle)
        if weights.headers or not folder:
            configs[folder] = config
        if weights.headers:
            found[folder] = weights
            names = [n for h in weights.headers.values() for n in h.tensors]
            check_unpacked(names, files, folder)
    if not found:
        raise _no_weights(files)
    used = {name for w in found.values() for name in w.headers}
    return _checkpoint(files, label, found, find_side(files, configs, folders, used))


def no_such_model(path: object, reason: object = None) -> SourceError:
    """The error for a reference that leads to nothing that can be opened."""
    return SourceError(
        "no such model",
        model=path,
        found=reason,
        expected="a folder with safetensors weights, a .safetensors file, or org/name on the Hub",
        do="check the path; a model on the Hub is called by its id, org/name",
    )


def _open_file(path: Path, allow_pickle: bool) -> Checkpoint:
    real = path.resolve()
    if path.suffix == ".safetensors":
        header = read_header(real)
    elif path.suffix == ".gguf":
        raise refuse_gguf(str(path))
    elif path.suffix not in PICKLES:
        raise SourceError(
            "only safetensors files are read, and pickles where they are allowed",
            file=path,
            found=path.suffix or "no suffix",
            do="save the weights as safetensors, as save_pretrained does",
        )
    elif not allow_pickle:
        raise pickle_refused(str(path))
    else:
        from merge.checkpoint.pickles import read_pickle

        header = read_pickle(real)
    check_unpacked(header.tensors, None, str(path))
    stem = path.name.partition(".")[0]
    weights = Weights({real.name: header}, stem if stem in STEMS else "model", header.notes)
    return _checkpoint(LocalFiles(real), str(path), {"": weights}, Side())


def _check_kinds(config: Mapping[str, object], file: str) -> None:
    """The kinds of a model and of its sub-models are names, by which much is looked up."""
    parts = [("", config), *((f"{k}.", v) for k, v in config.items() if isinstance(v, Mapping))]
    for prefix, part in parts:
        if not isinstance(kind := part.get("model_type"), str | None):
            raise SourceError(
                "a config does not say what kind of model it is of",
                file=file,
                key=f"{prefix}model_type",
                found=repr(kind)[:100],
                expected="a name, such as llama",
                do="fetch config.json again",
            )


def _checkpoint(files: Files, label: str, found: Mapping[str, Weights], side: Side) -> Checkpoint:
    """One checkpoint of all components; a tensor's name has its folder in front."""
    tables = [(folder, h) for folder, w in found.items() for h in w.headers.values()]
    source = files.source(tables)
    tensors: dict[str, Expr] = {}
    folders: dict[str, str] = {}
    tied: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for folder, header in tables:
        prefix = f"{folder}/" if folder else ""
        tied.update((prefix + n, prefix + first) for n, first in header.tied.items())
        dropped.update((prefix + n, why) for n, why in header.dropped.items())
        for name, spec in header.tensors.items():
            full = prefix + name
            if full in tensors:
                raise SourceError(
                    "two shards hold the same tensor",
                    tensor=full,
                    file=header.file.path,
                    found=f"also in {source.location(full).file}",
                    do="remove the shard that the index does not need",
                )
            owner = tied.get(full, full)
            tensors[full] = Read(source, spec if owner == name else spec.named(owner))
            if folder:
                folders[full] = folder
    delta = any(h.metadata.get(SPACE_KEY) == "delta" for _, h in tables)
    checkpoint = Checkpoint(
        tensors,
        label,
        0.0 if delta else 1.0,
        side=side,
        tied=tied,
        dropped=dropped,
        folders=folders,
        stems={folder: w.stem for folder, w in found.items()},
        notes=tuple(note for w in found.values() for note in w.notes),
        roots=(files.identity,),
    )
    return dequantised(checkpoint)


def _no_weights(files: Files) -> SourceError:
    if found := [n for n in files.names() if n.endswith(".gguf")]:
        return refuse_gguf(files.where(found[0]))
    return SourceError(
        "the folder holds no safetensors weights",
        model=files.where(""),
        expected="model.safetensors, or model.safetensors.index.json and its shards",
        do="check the path",
    )
