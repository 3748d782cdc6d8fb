"""What a repo has been given already: one line a weight file, so that a new process goes on.

A line is written when the server has said that it holds the file; without the file's bytes it is
enough to commit it. Whether the server still holds them is asked anew by each run. Lines are
appended and synced; a torn last line is dropped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merge.write import ops
from merge.write.manifest import Digest, FileEntry

__all__ = ["Ledger", "Sent"]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Sent(_Line):
    """A file whose bytes the server holds. sample: its first 512 bytes, in hex.

    weights: its entry in the manifest, where it was never on a disk that could tell it.
    """

    path: str
    size: int = Field(ge=0)
    sha256: Digest
    sample: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){0,512}$")]
    weights: FileEntry | None = None


class _Pull(_Line):
    pull_request: int = Field(gt=0)


class Ledger:
    """The ledger of one plan for one place on the Hub. ``sent``: by path in the repo."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._head = f"hf-merge ledger 1 {what}\n".encode()
        self.sent: dict[str, Sent] = {}
        self.pull_request: int | None = None
        self._fd: int | None = None

    def open(self, *, fresh: bool = False) -> None:
        """Read what an earlier run has left, unless ``fresh``, and be ready to append."""
        old = self.path.read_bytes() if self.path.exists() and not fresh else b""
        kept = self._head
        if old.startswith(self._head):
            for line in old[len(self._head) : old.rfind(b"\n") + 1].splitlines(keepends=True):
                if not self._take(line):  # a sector was lost: what follows is not to be trusted
                    break
                kept += line
        ops.mkdir(self.path.parent)
        self._fd = ops.open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.ftruncate(self._fd, 0)
        self._append(kept)

    def _take(self, line: bytes) -> bool:
        try:
            if line.startswith(b'{"pull_request"'):
                self.pull_request = _Pull.model_validate_json(line).pull_request
            else:
                found = Sent.model_validate_json(line)
                self.sent[found.path] = found
        except ValidationError:
            return False
        return True

    def add(self, sent: Sent) -> None:
        """Note a file that the server holds now."""
        self.sent[sent.path] = sent
        self._append(sent.model_dump_json().encode() + b"\n")

    def add_pull_request(self, number: int) -> None:
        """Note the pull request that the commits go to."""
        self.pull_request = number
        self._append(_Pull(pull_request=number).model_dump_json().encode() + b"\n")

    def forget(self, path: str) -> None:
        """A file that the server has lost; it is sent again."""
        del self.sent[path]

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _append(self, data: bytes) -> None:
        assert self._fd is not None
        ops.pwrite(self._fd, data, 0)  # O_APPEND: at the end
        ops.fsync(self._fd)
