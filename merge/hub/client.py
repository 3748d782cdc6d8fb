"""A Hub as it is read: which commit a name stands for, which files it has, small files fetched.

All calls of the Hub's client are public ones. Files go to the user's own cache, which `hf cache`
manages, and only whole: what is read by ranges is never put there.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import HubError, SourceError, nearest
from merge.hub.patience import patiently
from merge.hub.told import Place, offline

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from merge.hub.ranges import RemoteFile

__all__ = ["SCHEME", "Entry", "Hub", "Pinned", "current", "is_hub_id", "use"]

SCHEME = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_READ = 1 << 20  # bytes


def is_hub_id(text: str) -> bool:
    """Whether ``text`` has the shape of ``org/name``, as models on the Hub are called.

    >>> is_hub_id("org/name"), is_hub_id("./folder"), is_hub_id("gpt2")
    (True, False, False)
    """
    odd = "--" in text or ".." in text or text.endswith((".git", ".safetensors"))
    return _ID.fullmatch(text) is not None and not odd


@dataclass(frozen=True, slots=True)
class Pinned:
    """A repo at a commit. asked: the revision by which it was asked for."""

    repo: str
    commit: str
    asked: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}@{self.commit}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a repo. digest: SHA-256 of a large file, git's own SHA-1 of a small one."""

    size: int
    digest: str
    large: bool


class Hub:
    """One Hub with the token by which it is read.

    endpoint: None for HF_ENDPOINT, or the Hub itself. token: None for HF_TOKEN or the stored login,
    False for none. download: weights are fetched whole into the user's cache, and kept.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | bool | None = None,
        *,
        download: bool = False,
    ) -> None:
        self._endpoint, self._token, self.download = endpoint, token, download
        self._lock = threading.Lock()
        self._listings: dict[str, Mapping[str, Entry]] = {}
        self._files: dict[tuple[str, str], RemoteFile] = {}

    def changed(self, token: str | bool | None = None, download: bool | None = None) -> Hub:
        """The same Hub, read with this token, or whole files kept; None leaves a thing as it is."""
        return Hub(
            self._endpoint,
            self._token if token is None else token,
            download=self.download if download is None else download,
        )

    @property
    def endpoint(self) -> str:
        """The address, without a slash at its end."""
        from huggingface_hub import constants

        found = self._endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        return found.rstrip("/")

    @property
    def is_offline(self) -> bool:
        from huggingface_hub import constants

        return constants.is_offline_mode()

    def api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self._token, library_name="hf-merge")

    def headers(self) -> dict[str, str]:
        """Headers of a request to the Hub itself, with the token."""
        from huggingface_hub import utils

        build = utils.build_hf_headers  # type: ignore[attr-defined]
        found: dict[str, str] = build(token=self._token, library_name="hf-merge")
        return found

    def place(self, repo: str, revision: str | None = None, file: str | None = None) -> Place:
        """What errors call this, and what they must not show."""
        from huggingface_hub import get_token

        known = self._token if isinstance(self._token, str) else None
        return Place(repo, revision, file, tuple(t for t in (known, get_token()) if t))

    # -- what there is ----------------------------------------------------------------------------

    def pin(self, repo: str, revision: str | None = None) -> Pinned:
        """The commit that a revision stands for now; in offline mode as the cache remembers it."""
        place = self.place(repo, revision)
        if revision is not None and _COMMIT.fullmatch(revision):
            return Pinned(repo, revision, revision)
        if self.is_offline:
            found = patiently(
                lambda: self.api().resolve_revision(repo, revision=revision, local_files_only=True),
                place,
            )
            return Pinned(repo, found.resolved, revision)
        try:
            info = patiently(lambda: self.api().model_info(repo, revision=revision), place)
        except SourceError as error:
            raise self._with_hint(error, repo, revision) from None
        if info.sha is None:
            raise HubError("the Hub does not say which commit this is", **place.at())
        pinned = Pinned(repo, info.sha, revision)
        self._remember(pinned)
        return pinned

    def _remember(self, pinned: Pinned) -> None:
        """Leave word in the cache of what a revision was, as the client does, for offline mode."""
        path = self.snapshot(pinned).parent.parent / "refs" / (pinned.asked or "main")
        with suppress(OSError):  # a cache that may not be written serves as well
            if not path.is_file() or path.read_text() != pinned.commit:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(pinned.commit)

    def listing(self, pinned: Pinned) -> Mapping[str, Entry]:
        """The files of a commit, by name; in offline mode those that are in the cache."""
        key = str(pinned)
        if key not in self._listings:
            asked = self._cached_listing if self.is_offline else self._listed
            self._listings[key] = asked(pinned)
        return self._listings[key]

    def _listed(self, pinned: Pinned) -> Mapping[str, Entry]:
        def ask() -> dict[str, Entry]:
            from huggingface_hub.hf_api import RepoFile

            tree = self.api().list_repo_tree(pinned.repo, recursive=True, revision=pinned.commit)
            return {e.path: _entry(e) for e in tree if isinstance(e, RepoFile)}

        return patiently(ask, self.place(pinned.repo, pinned.asked or pinned.commit))

    def _cached_listing(self, pinned: Pinned) -> Mapping[str, Entry]:
        folder = self.snapshot(pinned)
        if not folder.is_dir():
            raise offline(self.place(pinned.repo, pinned.asked or pinned.commit))
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        return {
            name: Entry(p.stat().st_size, found, len(found) == 64)
            for name, p in sorted(files.items())
            for found in [p.resolve().name]
        }

    def _with_hint(self, error: SourceError, repo: str, revision: str | None) -> SourceError:
        """The same with the names that are near to the one that there is not."""
        what = error.what
        if what.startswith("no such model"):
            owner, _, name = repo.partition("/")
            api = self.api()
            known = self._guess(lambda: api.list_models(author=owner, limit=200))
            known += self._guess(lambda: api.list_models(search=name, limit=20))
            if (near := nearest(repo, known)) is not None:
                error.do = f"did you mean {near}? Else {error.do}"
        elif "no such revision" in what and revision is not None:
            refs = self._guess(lambda: self._refs(repo))
            if refs:
                near = nearest(revision, refs)
                error.expected = "one of " + ", ".join(refs[:8])
                error.do = f"did you mean {near}? " * (near is not None) + str(error.do)
        return error

    @staticmethod
    def _guess(ask: Any) -> list[str]:
        """Names for a hint; none where the Hub will not say, which is no further error."""
        try:
            return [getattr(found, "id", None) or found.name for found in ask()]
        except Exception:
            return []

    def _refs(self, repo: str) -> list[Any]:
        found = self.api().list_repo_refs(repo)
        return [*found.branches, *found.tags]

    # -- files ------------------------------------------------------------------------------------

    def snapshot(self, pinned: Pinned) -> Path:
        """The folder in which the user's cache shows the whole files of a commit."""
        from huggingface_hub import constants

        name = "models--" + pinned.repo.replace("/", "--")
        return Path(constants.HF_HUB_CACHE).expanduser() / name / "snapshots" / pinned.commit

    def cached(self, pinned: Pinned, name: str) -> Path | None:
        """The file in the user's cache, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(pinned.repo, name, revision=pinned.commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, pinned: Pinned, name: str) -> Path:
        """The file as a whole in the user's cache, its digest checked when it is fetched."""
        if (found := self.cached(pinned, name)) is not None:
            return found
        place = self.place(pinned.repo, pinned.asked or pinned.commit, name)
        if self.is_offline:
            raise offline(place)
        entry = self.listing(pinned)[name]
        for again in (False, True):
            path = patiently(partial(self._download, pinned, name, again), place)
            if _digest(path, entry) == entry.digest:
                return path
        raise HubError(
            "the bytes that came are not those of the file, twice",
            found=f"digest {_digest(path, entry)}",
            expected=entry.digest,
            do="run the same command again later; a proxy on the way may be at fault",
            **place.at(),
        )

    def _download(self, pinned: Pinned, name: str, again: bool) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                pinned.repo,
                name,
                revision=pinned.commit,
                endpoint=self.endpoint,
                token=self._token,
                library_name="hf-merge",
                force_download=again,
            )
        )

    def remote(self, pinned: Pinned, name: str) -> RemoteFile:
        """A file to be read by ranges; one and the same for all who read it."""
        from merge.hub.ranges import RemoteFile

        with self._lock:
            key = str(pinned), name
            if key not in self._files:
                self._files[key] = RemoteFile(self, pinned, name, self.listing(pinned)[name])
            return self._files[key]


def _entry(file: Any) -> Entry:
    if file.lfs is not None:
        return Entry(file.lfs.size, file.lfs.sha256, True)
    return Entry(file.size, file.blob_id, False)


def _digest(path: Path, entry: Entry) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256() if entry.large else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as f:
        while piece := f.read(_READ):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(slots=True)
class _Current:
    hub: Hub = field(default_factory=Hub)


_CURRENT = _Current()


def current() -> Hub:
    """The Hub that models are read from unless another is given: by the environment's word."""
    return _CURRENT.hub


def use(hub: Hub | None) -> None:
    """Read from ``hub`` from now on, in this process; None for the environment's again."""
    _CURRENT.hub = hub or Hub()
