"""What a model's folder says about the model: its place on the Hub, its card, digests of its files.

A card is somebody's text. Of its front matter a few keys are read, within bounds, and of those only
values of the expected shape; what cannot be read is told, and is no error. Nothing is fetched.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge.checkpoint.header import check_regular
from merge.checkpoint.inside import inside
from merge.errors import MergeError, SourceError
from merge.hub import SCHEME, Pinned, current, is_hub_id
from merge.ir.expr import InputFile
from merge.ir.json_text import strict_json
from merge.recipe.document import read_documents
from merge.write.licence import Licence

__all__ = [
    "Provenance",
    "Statement",
    "card_file",
    "card_statement",
    "is_hub_id",
    "provenance",
    "read_card",
]

_MAX_CARD = 4_000_000  # bytes; cards with thousands of benchmark figures are about this long
_MAX_KEPT = 50_000  # characters of the keys that are read
_MAX_BRACKETS = 200  # the parser's work grows with the square of how deep they nest
_MAX_CONFIG = 1_000_000  # bytes
_MOST = 200  # values of a list
_WORD = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_CACHED = re.compile(
    r"models--([\w.-]+)/(?:snapshots/([0-9a-f]{40})(?:/|$)|blobs/[0-9a-f]{64}$)", re.ASCII
)
_REPO = re.compile(rf"{SCHEME}([^/@]+/[^/@]+)@([0-9a-f]{{40}})(?:/|$)")
_CARD = "README.md"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# fmt: off
_KEYS = {
    "license", "license_name", "license_link", "language", "datasets", "tags", "pipeline_tag",
    "library_name", "base_model",
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Statement:
    """What a card's front matter states. problem: why nothing of it was read, if so."""

    licence: Licence = field(default_factory=Licence)
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pipeline: str | None = None
    library: str | None = None
    base_models: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a model comes from. made_from: Hub ids of what it was made from, as it says itself.

    weights: the digest of its files, in words.
    """

    hub: str | None = None
    revision: str | None = None
    made_from: tuple[str, ...] = ()
    card: Statement = field(default_factory=Statement)
    weights: str = ""


def provenance(root: str, files: Sequence[InputFile], called: str | None = None) -> Provenance:
    """What is known of the model at ``root``, a folder or a weight file.

    files: those that hold its weights. called: its name in a recipe. A folder that the Hub's client
    has downloaded and that is called like a model on the Hub is taken for that model.
    """
    if (repo := _REPO.match(root)) is not None:
        return _on_the_hub(Pinned(repo[1], repo[2]), files)
    path = Path(root)
    found = _CACHED.search(path.as_posix())
    card = read_card(card_file(root))
    downloads = _downloads(path, files) if path.is_dir() else {}
    commits = {commit for commit, _ in downloads.values()}
    if found is not None:
        hub, revision = found[1].replace("--", "/"), found[2]
    else:
        revision = commits.pop() if len(commits) == 1 else None
        hub = called if revision and called and is_hub_id(called) else None
    made_from = card.base_models or _named_in_config(path / "config.json")
    sums = [_sha256(f, downloads) for f in files]
    return Provenance(hub, revision, made_from, card, _weights(files, sums))


def _on_the_hub(pinned: Pinned, files: Sequence[InputFile]) -> Provenance:
    """The same of a repo at a commit; its card and its config are small files of it."""
    card = read_card(card_file(str(pinned)))
    config = current().cached(pinned, "config.json")
    made_from = card.base_models or (() if config is None else _named_in_config(config))
    sums = [f.sha256 for f in files]
    weights = "" if None in sums else _weights(files, sums)
    return Provenance(pinned.repo, pinned.commit, made_from, card, weights)


# -- the card --------------------------------------------------------------------------------------


def card_file(root: str) -> Path | None:
    """The card of the model at ``root``: README.md in its folder or its repo, if there is one."""
    if (repo := _REPO.match(root)) is not None:
        hub, pinned = current(), Pinned(repo[1], repo[2])
        return hub.fetch(pinned, _CARD) if _CARD in hub.listing(pinned) else None
    path = Path(root) / _CARD
    return inside(Path(root), path.name) if path.is_file() else None


def read_card(path: Path | None) -> Statement:
    """What the front matter of a card states; an empty statement without a card."""
    if path is None:
        return Statement()
    try:
        check_regular(path, "card")
        with path.open("rb") as file:
            text = file.read(_MAX_CARD).decode("utf-8-sig", errors="replace")
    except MergeError as error:
        return Statement(problem=error.what)
    except OSError as error:
        return Statement(problem=f"it cannot be read: {error.strerror}")
    return card_statement(text)


def card_statement(text: str) -> Statement:
    """What the front matter of a card's text states."""
    try:
        kept, gated = _kept(_front_matter(text))
        documents = read_documents(kept, "README.md", last_wins=True) if kept else []
    except MergeError as error:
        return Statement(problem=error.what)
    data = documents[0].data if documents else {}
    return _statement(data if isinstance(data, dict) else {}, gated)


def _front_matter(text: str) -> list[str]:
    """The lines between the two lines of dashes at a card's beginning; none without."""
    lines = text.lstrip().replace("\r\n", "\n").split("\n")
    if lines[0].rstrip() != "---":
        return []
    end = next((i for i, line in enumerate(lines) if i and line.rstrip() == "---"), None)
    if end is None:
        raise SourceError("its front matter has no end")
    return lines[1:end]


def _kept(lines: Sequence[str]) -> tuple[str, bool]:
    """The lines of the keys that are read, and whether others say that the model is gated.

    The rest, such as a thousand benchmark figures, would cost a second to parse.
    """
    kept: list[str] = []
    gated = taken = False
    for line in lines:
        if line[:1].strip() and line[0] not in "-#]}":  # it begins a key of its own
            key = line.partition(":")[0].strip().strip("\"'")
            taken = key in _KEYS
            gated = gated or key.startswith("extra_gated")
        if taken:
            kept.append(line)
    text = "\n".join(kept)
    if len(text) > _MAX_KEPT:
        raise SourceError(f"its front matter is longer than {_MAX_KEPT} characters")
    if text.count("[") + text.count("{") > _MAX_BRACKETS:
        raise SourceError(f"its front matter has more than {_MAX_BRACKETS} brackets")
    return text, gated


def _statement(data: Mapping[str, Any], gated: bool) -> Statement:
    licences = [word.lower() for word in _list(data.get("license"), _WORD)]
    odd = None if licences else data.get("license")
    return Statement(
        Licence(
            " + ".join(licences) or None,
            _line(data.get("license_name") or odd, r"[\w .,:+()-]{1,100}"),
            _line(data.get("license_link"), r"(https?://)?[\w.~/%#?=&+-]{1,300}"),
            gated,
        ),
        _list(data.get("language"), _WORD),
        _list(data.get("datasets"), _WORD, _ID),
        _list(data.get("tags"), _WORD),
        _line(data.get("pipeline_tag"), _WORD.pattern),
        _line(data.get("library_name"), _WORD.pattern),
        _list(data.get("base_model"), _WORD, _ID),
    )


def _list(value: object, *shapes: re.Pattern[str]) -> tuple[str, ...]:
    """The words of one of the ``shapes`` in a value that is one text or a list of them."""
    values = value if isinstance(value, list) else [value]
    found = (v for v in values if isinstance(v, str) and any(s.fullmatch(v) for s in shapes))
    return tuple(dict.fromkeys(found))[:_MOST]


def _line(value: object, shape: str) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(shape, value, re.ASCII) else None


def _named_in_config(path: Path) -> tuple[str, ...]:
    """The Hub id that config.json remembers: that of the model that training began with."""
    if not path.is_file() or path.stat().st_size > _MAX_CONFIG:
        return ()
    try:
        config = strict_json(path.read_bytes(), infinite=True)
    except (OSError, ValueError):  # opening the model says what is wrong with it
        return ()
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return (name,) if isinstance(name, str) and is_hub_id(name) else ()


# -- digests ---------------------------------------------------------------------------------------


def _downloads(folder: Path, files: Sequence[InputFile]) -> dict[str, tuple[str, str]]:
    """Commit and etag of files that the Hub's client has downloaded into ``folder``, by path.

    It keeps them beside the files, with the time; a file that changed since is not what it was.
    """
    found = {}
    for file in files:
        path = Path(file.path)
        if folder not in path.parents:
            continue
        name = f"{path.relative_to(folder).as_posix()}.metadata"
        note = folder / ".cache" / "huggingface" / "download" / name
        try:
            commit, etag, time = note.read_text().split()[:3]
            unchanged = file.mtime_ns / 1e9 <= float(time) + 1.0
        except (OSError, ValueError):  # it was not downloaded, or we do not know these notes
            continue
        if unchanged and _COMMIT.fullmatch(commit):
            found[file.path] = commit, etag
    return found


def _sha256(file: InputFile, downloads: Mapping[str, tuple[str, str]]) -> str | None:
    """The SHA-256 of a weight file where the Hub's client has left it: as a name, or as a note."""
    names = Path(file.path).resolve().name, downloads.get(file.path, ("", ""))[1]
    return next((n for n in names if _SHA256.fullmatch(n)), None)


def _weights(files: Sequence[InputFile], sums: Sequence[str | None]) -> str:
    """The digest of weight files, in words; '' for no files."""
    if not files:
        return ""
    known = [s for s in sums if s is not None]
    if len(known) < len(files):
        digest = hashlib.sha256()
        for file in sorted(files, key=lambda f: f.path):
            digest.update(_header(file) + file.size.to_bytes(8, "little"))
        return f"headers `{digest.hexdigest()}`"
    if len(files) == 1:
        return f"sha256 `{known[0]}`"
    names = (Path(f.path).name for f in files)
    lines = sorted(f"{s}  {n}\n" for s, n in zip(known, names, strict=True))
    digest = hashlib.sha256("".join(lines).encode())
    return f"sha256 `{digest.hexdigest()}` of the sorted output of `sha256sum` for its files"


def _header(file: InputFile) -> bytes:
    """The header of a safetensors file; nothing of any other."""
    if not file.path.endswith(".safetensors"):
        return b""
    try:
        with Path(file.path).open("rb") as opened:
            length = opened.read(8)
            return length + opened.read(int.from_bytes(length, "little"))
    except OSError as error:
        raise SourceError(
            f"a weight file cannot be read: {error.strerror}", file=file.path
        ) from None
