"""Which files of a folder hold its weights: one file, shards with an index, a variant, a pickle.

Looked for in the order in which the libraries look: safetensors before pickles, a file before an
index, a plain name before a variant (``model.fp16.safetensors``), and any other name only where it
is the only weight file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from merge.checkpoint.header import Header
from merge.checkpoint.inside import is_plain
from merge.checkpoint.place import Files, json_object
from merge.errors import SourceError

__all__ = ["PICKLES", "STEMS", "Weights", "find_weights", "pickle_refused"]

STEMS = {
    "model": "pytorch_model",
    "diffusion_pytorch_model": "diffusion_pytorch_model",
    "open_clip_model": "open_clip_pytorch_model",
}
"""Names of weight files without ending, as safetensors, and what each is called as a pickle."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = re.compile(r"(adapter|optimizer|scheduler|scaler|rng_state|training_args)")
"""Beginnings of pickles and others that lie beside weights and are none of a model."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What was found in a folder: its files by name, and how the output's are to be called."""

    headers: Mapping[str, Header]
    stem: str = "model"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Choice:
    """A weight file or an index, by name."""

    file: str
    stem: str
    variant: str | None = None


def find_weights(
    files: Files, folder: str, allow_pickle: bool, stems: Mapping[str, str] = STEMS
) -> Weights:
    """The weights in a folder, headers checked; without any where the folder has none.

    folder: of a component of the checkpoint, '' for the top. stems: as `STEMS`.
    """
    prefix = f"{folder}/" if folder else ""
    names, here = files.names(folder), files.where(folder)
    if chosen := _choose(names, ".safetensors", {s: s for s in stems}, here):
        return _read(files, prefix, chosen, files.header)
    pickles = {pickled: stem for stem, pickled in stems.items()}
    chosen = _choose(names, ".bin", pickles, here)
    if chosen is None:
        return Weights({})
    if not allow_pickle:
        raise pickle_refused(files.where(prefix + chosen.file))
    return _read(files, prefix, chosen, files.pickle)


def pickle_refused(file: str) -> SourceError:
    """The error for weights that are a pickle, when nobody has allowed one."""
    name = PurePath(file).name
    return SourceError(
        f"the weights are a pickle ({name}), a program that may do anything when it runs",
        file=file,
        expected="safetensors weights",
        do="load the model in transformers and save_pretrained it, which writes safetensors; or,"
        " if you trust who made the file, allow it: --allow-pickle, or merge.open(...,"
        " allow_pickle=True). It is then read by torch's weights-only reader, which runs no code"
        " but has had holes before",
    )


def _choose(
    names: Sequence[str], ending: str, stems: Mapping[str, str], folder: str
) -> _Choice | None:
    """The file, or the index of files, that a loader would take. stems: in file, to ours."""
    for stem, ours in stems.items():
        for file in (f"{stem}{ending}", f"{stem}{ending}.index.json"):
            if file in names:
                return _Choice(file, ours)
    for stem, ours in stems.items():
        pattern = re.compile(
            rf"{stem}(\.(?P<of>\w+){re.escape(ending)}|{re.escape(ending)}\.index\.(?P<at>\w+)\.json)"
        )
        found = [(m["of"] or m["at"], n) for n in names if (m := pattern.fullmatch(n))]
        if found:
            variant, file = _only(found, f"{stem}{ending}", folder)
            return _Choice(file, ours, variant)
    endings = PICKLES if ending == ".bin" else (ending,)
    others = [n for n in names if n.endswith(endings) and not _NO_WEIGHTS.match(n)]
    if len(others) > 1:
        raise SourceError(
            "several weight files and no index that says which belong together",
            folder=folder,
            found=", ".join(others[:5]),
            expected=f"{next(iter(stems))}{ending}, or {next(iter(stems))}{ending}.index.json",
            do="name one file, or fetch the index",
        )
    return _Choice(others[0], "model") if others else None


def _only(found: Sequence[tuple[str, str]], plain: str, folder: str) -> tuple[str, str]:
    """The one variant that there is; a file goes before the index of the same variant."""
    if len({variant for variant, _ in found}) > 1:
        raise SourceError(
            "several variants of the weights and no plain file",
            folder=folder,
            found=", ".join(name for _, name in found[:5]),
            expected=plain,
            do=f"give the one that is meant the name {plain} (or its index, likewise)",
        )
    return min(found, key=lambda f: ".index." in f[1])


def _read(files: Files, prefix: str, chosen: _Choice, read: Callable[[str], Header]) -> Weights:
    if chosen.file.endswith(".json"):
        headers = _sharded(files, prefix, chosen.file, read)
    else:
        name = prefix + chosen.file
        headers = {name: read(name)}
    notes = [note for h in headers.values() for note in h.notes]
    if chosen.variant is not None:
        notes.append(
            f"{prefix}{chosen.file}: the {chosen.variant} variant is read, as there is no other"
        )
    return Weights(headers, chosen.stem, tuple(notes))


def _sharded(
    files: Files, prefix: str, file: str, read: Callable[[str], Header]
) -> dict[str, Header]:
    """The shards that the index names; each tensor must be where the index says, and listed."""
    index = files.where(prefix + file)
    where = json_object(files, prefix + file).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise SourceError("the index has no weight_map", file=index)
    sound: set[str] = set()
    for tensor, name in where.items():
        if isinstance(name, str) and (name in sound or is_plain(name)):
            sound.add(name)
        else:
            raise SourceError(
                "the index points outside the folder",
                file=index,
                tensor=tensor,
                found=repr(name),
                expected="the plain name of a file beside the index",
                do="do not use this checkpoint before you know why it says so",
            )
    headers: dict[str, Header] = {}
    for name in dict.fromkeys(where.values()):
        try:
            headers[name] = read(prefix + name)
        except SourceError as error:
            raise error.at(named_by=index) from None
    _check_index(where, headers, index)
    return {prefix + name: header for name, header in headers.items()}


def _check_index(where: Mapping[str, str], headers: Mapping[str, Header], index: str) -> None:
    owner = {t: f for f, h in headers.items() for t in h.tensors}
    for tensor, name in where.items():
        if tensor not in headers[name].tensors:
            raise SourceError(
                "the index names a tensor that its shard does not hold",
                file=index,
                tensor=tensor,
                found=f"it is in {owner[tensor]}" if tensor in owner else "no shard holds it",
                expected=f"in {name}",
            )
    for name, header in headers.items():
        for tensor in header.tensors:
            if tensor not in where:
                raise SourceError(
                    "a shard holds a tensor that the index does not name",
                    file=header.file.path,
                    tensor=tensor,
                    expected=f"listed in {index}",
                )
            if where[tensor] != name:
                raise SourceError(
                    "two shards hold the same tensor",
                    tensor=tensor,
                    found=f"{name} and {where[tensor]}",
                    file=index,
                )
