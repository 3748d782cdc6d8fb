"""What of a learned merge belongs to single tasks, in files beside it.

In an output each task has a folder ``tasks/NAME``: ``own.safetensors`` with its tensors, by their
names in the task's network; ``task.json``, which says what they are; and for a network of
transformers its ``config.json``. Nothing there is called as the weights of a whole model are, so
that no library takes it for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.checkpoint.place import Files, LocalFiles, json_object
from merge.checkpoint.reference import files_of
from merge.errors import PlanError, SourceError, nearest
from merge.ir.reference import parse_reference
from merge.learning.own import Own
from merge.learning.surgery import DOWN, UP
from merge.recipe.learned import TASKS

if TYPE_CHECKING:
    from torch import nn

__all__ = ["carried", "own_file", "read_own", "task_files", "tasks_in"]

_OWN, _TASK, _CONFIG = "own.safetensors", "task.json", "config.json"
_FORMAT = "merge-task"


def task_files(parts: Sequence[tuple[Own, nn.Module]]) -> dict[str, bytes]:
    """The files of tasks, by their paths in an output. parts: each with its network's code."""
    from safetensors.torch import save

    out: dict[str, bytes] = {}
    folders: set[str] = set()
    for own, module in parts:
        folder = _plain(own.task, folders)
        folders.add(folder)
        said = {
            "format": _FORMAT,
            "version": 1,
            "task": own.task,
            "learned": list(own.learned),
            "layer": own.layer,
            "places": {n: list(p) for n, p in (own.places or {}).items()},
        }
        tensors = {n: t.cpu().clone().contiguous() for n, t in own.tensors.items()}
        here = f"{TASKS}/{folder}"
        out[f"{here}/{_TASK}"] = (json.dumps(said, indent=1) + "\n").encode()
        out[f"{here}/{_OWN}"] = save(tensors, {"format": "pt"})
        config = _config_of(module)
        if config is not None:
            out[f"{here}/{_CONFIG}"] = config.encode()
    return dict(sorted(out.items()))


def carried(folder: Path, tasks: Sequence[str]) -> dict[str, bytes]:
    """The files of tasks in ``folder``, to be written again as they are.

    tasks: those that must be there. SourceError where one is not, or is damaged.
    """
    out: dict[str, bytes] = {}
    there: set[str] = set()
    files = LocalFiles.of(folder)
    for name in _folders(files, ""):
        there.add(_read(files, name).task)
        for file in (_TASK, _OWN, _CONFIG):
            if files.is_there(f"{name}/{file}"):
                out[f"{TASKS}/{name}/{file}"] = files.small(f"{name}/{file}").read_bytes()
    missing = [t for t in tasks if t not in there]
    if missing or not out:
        raise SourceError(
            "there are no tensors of a task's own",
            folder=folder,
            task=next(iter(missing), None),
            found=", ".join(sorted(there)) or "none",
            expected=f"NAME/{_TASK}, {_OWN} for {', '.join(tasks)}" if tasks else f"NAME/{_TASK}",
        )
    return dict(sorted(out.items()))


def tasks_in(out: str | Path) -> list[Own]:
    """What is said of the tasks that have tensors of their own in an output, here or on the Hub;
    the tensors themselves are not read."""
    return [own for own, _ in _all(_files(out))]


def read_own(out: str | Path, task: str) -> tuple[Own, dict[str, object]]:
    """What a task has for itself in an output, and the config of its network, {} without one.

    PlanError, with the nearest name, for one that is no task's.
    """
    files = _files(out)
    folder = _folder_of(files, task)
    return _read(files, folder), json_object(files, f"{folder}/{_CONFIG}")


def own_file(out: str | Path, task: str) -> Path:
    """The file of a task's own tensors, on this machine."""
    files = _files(out)
    return files.small(f"{_folder_of(files, task)}/{_OWN}")


def _all(files: Files) -> Iterator[tuple[Own, str]]:
    for name in _folders(files, TASKS):
        yield _said(files, f"{TASKS}/{name}"), f"{TASKS}/{name}"


def _folder_of(files: Files, task: str) -> str:
    every = list(_all(files))
    found = next((f for own, f in every if own.task == task), None)
    if found is None:
        names = [own.task for own, _ in every]
        near = nearest(task, names)
        raise PlanError(
            "there is no such task" if names else "no task has tensors of its own there",
            model=files.where(""),
            task=task,
            expected=f"one of {', '.join(names)}" if names else None,
            do=f"did you mean {near!r}?" if near else None,
        )
    return found


def _folders(files: Files, folder: str) -> list[str]:
    if not files.is_folder(folder):
        return []
    prefix = f"{folder}/" if folder else ""
    return [n for n in files.names(folder) if files.is_there(f"{prefix}{n}/{_TASK}")]


def _said(files: Files, folder: str) -> Own:
    """What a task's folder says, without its tensors."""
    data = json_object(files, f"{folder}/{_TASK}")
    where = files.where(f"{folder}/{_TASK}")
    if data.get("format") != _FORMAT or data.get("version") != 1:
        raise SourceError(
            "this does not say what tensors of a task are",
            file=where,
            found=f"format {data.get('format')!r}, version {data.get('version')!r}",
            expected=f"format {_FORMAT!r}, version 1",
        )
    task, learned = data.get("task"), data.get("learned")
    layer, places = data.get("layer"), data.get("places")
    sound = (
        isinstance(task, str)
        and _texts(learned)
        and (layer is None or isinstance(layer, str))
        and isinstance(places, dict)
        and all(_texts(p) for p in places.values())
    )
    if not sound:
        raise SourceError("what is said of a task's tensors is damaged", file=where)
    made: Any = data
    inside = {str(n): tuple(p) for n, p in made["places"].items()}
    return Own(made["task"], {}, tuple(made["learned"]), made["layer"], inside)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _read(files: Files, folder: str) -> Own:
    from safetensors import SafetensorError
    from safetensors.torch import load

    said, name = _said(files, folder), f"{folder}/{_OWN}"
    files.header(name)
    try:
        tensors = load(files.small(name).read_bytes())
    except (OSError, SafetensorError) as error:
        raise SourceError(
            "a task's tensors cannot be read", file=files.where(name), found=error
        ) from None
    own = replace(said, tensors=tensors)
    lacking = [n for n in own.learned if n not in tensors]
    lacking += [n for n in (DOWN, UP) if own.layer is not None and n not in tensors]
    if lacking:
        raise SourceError(
            "a task's tensors are not all there", file=files.where(name), tensor=lacking[0]
        )
    return own


def _plain(task: str, taken: set[str]) -> str:
    """A plain name of a folder for a task."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", task).strip(".-") or "task"
    found, number = plain, 1
    while found in taken:
        number += 1
        found = f"{plain}-{number}"
    return found


def _files(out: str | Path) -> Files:
    return files_of(parse_reference(str(out)))


def _config_of(module: nn.Module) -> str | None:
    """The config of a network whose class transformers has, naming that class; else None."""
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    config: Any = module.config
    said = json.loads(config.to_json_string(use_diff=True))
    for key in ("dtype", "torch_dtype", "_name_or_path"):
        said.pop(key, None)
    return json.dumps({**said, "architectures": [kind.__name__]}, indent=2, sort_keys=True) + "\n"
