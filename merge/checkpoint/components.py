"""The components of a checkpoint: which of its folders may hold weights of their own.

Most checkpoints have one component, the folder itself. Two libraries keep several models in one
checkpoint, each in a folder beneath, and list them in a file at the top:

- sentence-transformers, in modules.json (and router_config.json for modules that route);
- diffusers, in model_index.json, where the top itself holds no weights that its loader would read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from merge.checkpoint.inside import is_plain
from merge.checkpoint.place import Files, json_object, read_json
from merge.errors import SourceError

__all__ = ["PIPELINE", "component_folders"]

PIPELINE = "model_index.json"
MODULES, ROUTER = "modules.json", "router_config.json"


def component_folders(files: Files) -> tuple[str, ...]:
    """The folders of the components, '' for the top; those that are there, in the order listed.

    A component without weights (a scheduler, a tokenizer, a pooling) is one too: its files are
    small files of the checkpoint.
    """
    if files.is_there(PIPELINE):
        parts = _pipeline(json_object(files, PIPELINE), files)
        return tuple(_there(files, PIPELINE, "", parts))
    folders = ["", *_there(files, MODULES, "", _modules(read_json(files, MODULES), files))]
    for folder in list(folders):
        prefix = f"{folder}/" if folder else ""
        types = json_object(files, prefix + ROUTER).get("types")
        if isinstance(types, dict):
            folders += _there(files, prefix + ROUTER, prefix, types)
    return tuple(dict.fromkeys(folders))


def _modules(listed: object, files: Files) -> list[str]:
    """The folders of the modules; a module without one stands at the top."""
    modules = [] if listed is None else listed
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and isinstance(m.get("path", ""), str) for m in modules
    ):
        raise SourceError(
            "modules.json does not list modules",
            file=files.where(MODULES),
            key="path",
            found=repr(listed)[:200],
            expected="a list of mappings, each with a folder as its path",
            do="save the model anew with sentence-transformers, or fetch the file again",
        )
    return [m["path"] for m in modules if m.get("path")]


def _pipeline(index: dict[str, object], files: Files) -> Iterator[str]:
    """The names of a pipeline's parts: those with a library and a class."""
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2:
            if value[1] is not None:
                yield name
        elif is_plain(name) and files.is_folder(name):
            raise SourceError(
                "model_index.json does not say what a folder of the pipeline holds",
                file=files.where(PIPELINE),
                key=name,
                found=repr(value)[:100],
                expected='a library and a class, such as ["diffusers", "UNet2DConditionModel"]',
                do="mend the file, or fetch it again",
            )


def _there(files: Files, listed_in: str, prefix: str, names: Iterable[object]) -> Iterator[str]:
    for name in names:
        if not isinstance(name, str):
            continue
        if not is_plain(name):
            raise SourceError(
                f"{PurePosixPath(listed_in).name} points outside the folder",
                file=files.where(listed_in),
                found=repr(name),
                expected="the plain name of a folder beside it",
            )
        if files.is_folder(prefix + name):
            files.check(prefix + name)
            yield prefix + name
