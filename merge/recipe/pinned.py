"""The lock file of an output: its recipe with every input pinned, so that it can be made again.

``merge.lock.yml`` lies in the output. `merge apply merge.lock.yml OUT` runs the recipe in it with
the options that decide the bytes, with models of the Hub at the commits of then; a local input that
is no longer what it was is refused.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merge.errors import RecipeError, SourceError
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Read, walk
from merge.ir.reference import Reference
from merge.recipe.document import read_documents, read_text

__all__ = ["LOCK", "Lock", "LockedInput", "check_learned", "lock_text", "pinned", "read_lock"]

LOCK = "merge.lock.yml"
_HEAD = 1 << 16  # bytes of a file that are compared, with its size
_COMMIT = re.compile(r"hf://(?P<repo>.+)@(?P<commit>[0-9a-f]{40})")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LockedFile(_Strict):
    """Size in bytes, and the BLAKE3 of the first 64 KiB: header and names, not every weight."""

    size: int = Field(ge=0)
    head: str = Field(pattern=r"^[0-9a-f]{64}$")


class LockedInput(_Strict):
    """A model by the name that the recipe gives it: commits on the Hub, or files."""

    model: str
    commits: dict[str, str] = Field(default_factory=dict)
    files: dict[str, LockedFile] = Field(default_factory=dict)


class Lock(_Strict):
    """A lock file. options: those of the command that decide the bytes, None where not given.

    learned: the BLAKE3 of each file that tells what was learned from data, which lie beside it.
    """

    merge_lock: int = Field(ge=1, le=1)
    hf_merge: str
    options: dict[str, str | int | bool | None] = Field(default_factory=dict)
    settings: list[str] = Field(default_factory=list)
    inputs: list[LockedInput] = Field(default_factory=list)
    learned: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(
        default_factory=dict
    )
    recipe: str

    def of(self, reference: Reference) -> LockedInput | None:
        """The input that a reference of the recipe names."""
        return next((i for i in self.inputs if i.model == str(reference)), None)


def pinned(reference: Reference, lock: Lock) -> Reference:
    """``reference`` at the commits that ``lock`` has for it."""
    found = lock.of(reference)
    if found is None or not found.commits:
        return reference
    adapter = reference.adapter
    return Reference(
        reference.path,
        found.commits.get(reference.path, reference.revision),
        adapter,
        None if adapter is None else found.commits.get(adapter, reference.adapter_revision),
        reference.architecture,
    )


def locked_input(called: str, checkpoint: Checkpoint) -> LockedInput:
    """What is remembered of an opened model."""
    commits = {m["repo"]: m["commit"] for r in checkpoint.roots if (m := _COMMIT.match(r))}
    reads = (n for e in checkpoint.tensors.values() for n in walk(e) if isinstance(n, Read))
    sources = dict.fromkeys(r.source for r in reads)
    paths = [f.path for s in sources for f in s.files]
    paths += [f.path for f in checkpoint.side.files]
    local = {_inside(p, checkpoint.roots): p for p in paths if not p.startswith("hf://")}
    files = {name: _file(Path(path)) for name, path in sorted(local.items()) if not commits}
    return LockedInput(model=called, commits=commits, files=files)


def check_same(called: str, checkpoint: Checkpoint, lock: Lock) -> None:
    """SourceError when a local input is not what it was when ``lock`` was written."""
    was = next((i for i in lock.inputs if i.model == called), None)
    if was is None or not was.files:
        return
    now = locked_input(called, checkpoint).files
    for name in sorted({*was.files, *now}):
        if was.files.get(name) != now.get(name):
            found, expected = now.get(name), was.files.get(name)
            raise SourceError(
                "an input is not what it was when the lock file was written",
                model=called,
                file=name,
                found=_told(found),
                expected=_told(expected),
                do="bring the old files back, or run the recipe itself (merge_recipe.yml)",
            )


def check_learned(files: Mapping[str, str | bytes], lock: Lock) -> None:
    """SourceError when a file of what was learned is not what it was when ``lock`` was written."""
    now = _digests(files)
    for name in sorted({*lock.learned, *now}) if lock.learned else ():
        if lock.learned.get(name) != now.get(name):
            raise SourceError(
                "what was learned is not what it was when the lock file was written",
                file=name,
                found=f"digest {now[name][:16]}" if name in now else "no such file",
                expected=f"digest {lock.learned[name][:16]}" if name in lock.learned else "no file",
                do="bring the old files back, or run the recipe itself (merge_recipe.yml)",
            )


def _digests(files: Mapping[str, str | bytes]) -> dict[str, str]:
    data = {n: f.encode() if isinstance(f, str) else f for n, f in files.items()}
    return {n: blake3(d).hexdigest() for n, d in sorted(data.items())}


def lock_text(
    recipe: str,
    settings: Iterable[str],
    options: Mapping[str, object],
    inputs: Mapping[str, Checkpoint],
    version: str,
    learned: Mapping[str, str | bytes],
) -> str:
    """The lock file's text. inputs: opened models by their names in the recipe.

    learned: the files that tell what was learned, by their paths in the output.
    """
    data: dict[str, Any] = {
        "merge_lock": 1,
        "hf_merge": version,
        "options": {k: v for k, v in options.items() if v not in (None, False)},
        "settings": list(settings),
        "inputs": [
            locked_input(name, checkpoint).model_dump(exclude_defaults=True)
            for name, checkpoint in inputs.items()
        ],
        "learned": _digests(learned),
    }
    head = "# Makes this output again, byte for byte: merge apply merge.lock.yml OUT\n"
    return head + _yaml({k: v for k, v in data.items() if v}, recipe)


def read_lock(path: Path) -> Lock | None:
    """The lock in a file; None where the file is a recipe. RecipeError for a damaged one."""
    text = read_text(path)
    if not re.search(r"^merge_lock:", text, re.MULTILINE):
        return None
    documents = read_documents(text, str(path))
    try:
        return Lock.model_validate(documents[0].data)
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(first["loc"])
        raise documents[0].error(
            "the lock file is damaged",
            place,
            key=".".join(map(str, place)) or None,
            found=first["msg"],
            do="run the recipe itself (merge_recipe.yml), or upgrade hf-merge if it is older",
        ) from None


def _yaml(data: dict[str, Any], recipe: str) -> str:
    """YAML with the recipe as a readable block, where a block can hold it exactly."""
    from ruamel.yaml import YAML
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

    for kind in (LiteralScalarString, DoubleQuotedScalarString):
        out = io.StringIO()
        yaml = YAML()
        yaml.width = 1 << 30
        yaml.dump({**data, "recipe": kind(recipe)}, out)
        text = out.getvalue()
        try:
            same = bool(read_documents(text, LOCK)[0].data["recipe"] == recipe)
        except RecipeError:
            same = False
        if same:
            return text
    raise RecipeError("the recipe holds characters that YAML cannot hold", recipe=LOCK)


def _inside(path: str, roots: Iterable[str]) -> str:
    """A file's path below the model that it is of."""
    for root in roots:
        if path.startswith(f"{root}/"):
            return path[len(root) + 1 :]
    return Path(path).name


def _file(path: Path) -> LockedFile:
    try:
        with path.open("rb") as file:
            return LockedFile(size=path.stat().st_size, head=blake3(file.read(_HEAD)).hexdigest())
    except OSError as error:
        raise SourceError(f"an input cannot be read: {error.strerror}", file=path) from None


def _told(file: LockedFile | None) -> str:
    return "no such file" if file is None else f"{file.size} bytes, head {file.head[:16]}"
