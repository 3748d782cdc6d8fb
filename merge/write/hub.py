"""A repo on the Hub as a place to write to: who may, what is there, sending, committing, checking.

Only the client's public calls, but for one: a file that an earlier process has sent is committed
without its bytes, which takes three private fields of an operation (`_known`; a test holds them).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from merge.errors import SinkError
from merge.hub.patience import patiently, wait
from merge.hub.told import Place, status_of
from merge.write.ledger import Sent
from merge.write.manifest import FileEntry
from merge.write.refusal import passes, refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

__all__ = ["HubRepo", "RemoteFile", "Target"]

T = TypeVar("T")
_BATCH = 256  # objects of one question about large files
_TRIES = 5  # of a question or a commit


@dataclass(frozen=True, slots=True)
class Target:
    """Where a model is published. private: of a repo that is made; None where nothing was said.

    message: of the last commit. token: None for the one that is stored. endpoint: None for the
    Hub, or what HF_ENDPOINT says.
    """

    repo: str
    branch: str = "main"
    create_pr: bool = False
    private: bool | None = None
    message: str | None = None
    token: str | None = field(default=None, repr=False)
    endpoint: str | None = None

    def __str__(self) -> str:
        return self.repo if self.branch == "main" else f"{self.repo}@{self.branch}"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a repo. sha256: of a large file; oid: git's, of a small one."""

    size: int
    sha256: str | None
    oid: str

    def holds(self, data: bytes) -> bool:
        """Whether these are its bytes."""
        if self.sha256 is not None:
            return hashlib.sha256(data).hexdigest() == self.sha256
        blob = f"blob {len(data)}\0".encode() + data
        return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == self.oid

    def is_sent(self, sent: Sent) -> bool:
        return self.sha256 == sent.sha256 and self.size == sent.size


class HubRepo:
    """The repo of a target, asked and changed through one client."""

    def __init__(self, api: HfApi, target: Target) -> None:
        self.api = api
        self.target = target
        self.repo = target.repo

    def do(
        self, what: str, call: Callable[[], T], file: str | None = None, tries: int = _TRIES
    ) -> T:
        """What ``call`` returns, with patience; SinkError says that ``what`` failed."""
        return patiently(
            call,
            self._place(file),
            may_pass=passes,
            tell=lambda error, place: refusal(error, what, place),
            tries=tries,
        )

    def _place(self, file: str | None = None) -> Place:
        secrets = (self.target.token,) if self.target.token else ()
        return Place(self.repo, file=file, secrets=secrets)

    # -- what is there -----------------------------------------------------------------------------
    def head(self, ref: str) -> str:
        """The commit that a branch or a pull request points to."""
        info = self.do("looking at the repo", lambda: self.api.repo_info(self.repo, revision=ref))
        assert info.sha is not None
        return info.sha

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """The files of a revision, by path."""

        def ask() -> dict[str, RemoteFile]:
            from huggingface_hub.hf_api import RepoFile

            tree = self.api.list_repo_tree(self.repo, recursive=True, revision=revision)
            return {
                e.path: RemoteFile(e.size, None if e.lfs is None else e.lfs.sha256, e.blob_id)
                for e in tree
                if isinstance(e, RepoFile)
            }

        return self.do("listing the repo", ask)

    def held(self, sent: Sequence[Sent]) -> set[str]:
        """The paths of those files whose bytes the server still holds, committed or not."""
        found: set[str] = set()
        for at in range(0, len(sent), _BATCH):
            batch = sent[at : at + _BATCH]
            found |= self.do("asking what was sent before", partial(self._held, batch))
        return found

    def _held(self, sent: Sequence[Sent]) -> set[str]:
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        objects, errors, _ = post_lfs_batch_info(
            [UploadInfo(s.size, b"", bytes.fromhex(s.sha256)) for s in sent],
            token=self.target.token,
            repo_type="model",
            repo_id=self.repo,
            revision=None if self.target.create_pr else self.target.branch,
            endpoint=self.api.endpoint,
        )
        wanted = {o["oid"] for o in objects if o.get("actions") is not None}
        lost = wanted | {e["oid"] for e in errors}
        return {s.path for s in sent if s.sha256 not in lost}

    # -- sending and committing --------------------------------------------------------------------
    def send(self, name: str, path: Path, weights: FileEntry | None) -> Sent | None:
        """Send the bytes of ``path`` ahead of the commit that will name them.

        None where the server wants the file in the commit itself, as it does small ones in repos
        that do not say that such files are large.
        """
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(name, str(path))

        def call() -> None:
            with _no_bars():
                self.api.preupload_lfs_files(
                    self.repo,
                    [operation],
                    revision=self.target.branch,
                    create_pr=self.target.create_pr,
                )

        self.do("sending a file", call, name, tries=3)  # each of the client's own tries
        if operation.path_or_fileobj != b"":
            return None
        info = operation.upload_info
        return Sent(
            path=name,
            size=info.size,
            sha256=info.sha256.hex(),
            sample=info.sample.hex(),
            weights=weights,
        )

    def commit(
        self,
        ref: str,
        parent: str,
        message: str,
        sent: Iterable[Sent] = (),
        small: Mapping[str, bytes] | None = None,
        removed: Iterable[str] = (),
    ) -> str:
        """One commit on ``ref``, which must still be at ``parent``; the new commit.

        An answer may be lost though the commit was made: before another try the head is looked at.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(_known(s) for s in sent),
            *(CommitOperationAdd(name, data) for name, data in (small or {}).items()),
            *(CommitOperationDelete(name, is_folder=False) for name in removed),
        ]
        for attempt in range(_TRIES):
            try:
                with _no_bars(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of the card: told before any work
                    return self.api.create_commit(
                        self.repo,
                        operations,
                        commit_message=message,
                        revision=ref,
                        parent_commit=parent,
                    ).oid
            except Exception as error:
                unclear = status_of(error) == 412 or passes(error)
                if unclear and (head := self.head(ref)) != parent:
                    self._check_ours(ref, parent, message)
                    return head
                if attempt + 1 == _TRIES or not passes(error):
                    raise refusal(error, "the commit", self._place()) from error
                wait(error, attempt)
        raise AssertionError("there is a last try")

    def _check_ours(self, ref: str, parent: str, message: str) -> None:
        """SinkError unless the head of ``ref`` is our commit, whose answer was lost."""
        found = self.do(
            "looking at the commits", lambda: self.api.list_repo_commits(self.repo, revision=ref)
        )
        head, before = found[0], found[1] if len(found) > 1 else None
        if head.title == message and before is not None and before.commit_id == parent:
            return
        who = ", ".join(str(a) for a in head.authors) or "somebody"
        raise SinkError(
            "the branch was moved by somebody else while the model was being sent",
            repo=self.repo,
            branch=ref,
            found=f"commit {head.commit_id[:12]} by {who}: {head.title!r}",
            expected=f"commit {parent[:12]} as its head",
            do="look at what has changed there, then run the same command again: what was sent is"
            " kept, and the new head is built upon",
        )

    # -- pull requests and branches ----------------------------------------------------------------
    def open_pull(self, number: int | None) -> int | None:
        """``number``, if that pull request still takes commits."""
        if number is None:
            return None
        details = self.do(
            "looking at the pull request",
            lambda: self.api.get_discussion_details(self.repo, number),
        )
        return number if details.status in ("draft", "open") else None

    def make_pull(self, title: str, description: str) -> int:
        """A new pull request against the main branch, still a draft; its number.

        Tried once: an answer that is lost would leave a second one behind.
        """
        made = self.do(
            "opening a pull request",
            lambda: self.api.create_pull_request(self.repo, title, description=description),
            tries=1,
        )
        return int(made.num)

    def show_pull(self, number: int) -> None:
        """Make a draft one that is open."""
        details = self.api.get_discussion_details(self.repo, number)
        if details.status == "draft":
            self.do(
                "opening the pull request",
                lambda: self.api.change_discussion_status(self.repo, number, "open"),
            )

    def make_branch(self, name: str, start: str | None = None) -> None:
        """A branch, if it is not there; it begins at ``start``, or at main."""
        self.do(
            "making a branch",
            lambda: self.api.create_branch(self.repo, branch=name, revision=start, exist_ok=True),
        )

    def remove_branch(self, name: str) -> None:
        self.do("removing a branch", lambda: self.api.delete_branch(self.repo, branch=name))


@contextmanager
def _no_bars() -> Iterator[None]:
    """The client shows no progress of its own, unless the environment has decided otherwise."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _known(sent: Sent) -> CommitOperationAdd:
    """An operation for a file that the server holds; its bytes are not at hand and not needed."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(sent.path, b"")
    operation.upload_info = UploadInfo(
        sent.size, bytes.fromhex(sent.sample), bytes.fromhex(sent.sha256)
    )
    operation._upload_mode = "lfs"
    operation._should_ignore = False
    operation._is_uploaded = True
    return operation
