"""What is written already, with proof: one line a chunk, with the BLAKE3 digest of its bytes.

Lines are appended without fsync: after a power loss a line may name bytes that never reached the
disk. That is why a chunk only counts when its bytes, read again, have the digest of its line.
"""

from __future__ import annotations

import os
from pathlib import Path

from merge.write import ops

__all__ = ["Journal"]

Key = tuple[int, int]


class Journal:
    """The journal of one plan. ``entries``: (step, chunk number) to digest in hex."""

    def __init__(self, path: Path, plan_hash: str) -> None:
        self.path = path
        self._head = f"hf-merge journal {plan_hash}\n".encode()
        self.entries: dict[Key, str] = {}
        self._fd: int | None = None

    def open(self) -> None:
        """Read what an earlier run left and be ready to append; a torn last line is dropped."""
        old = self.path.read_bytes() if self.path.exists() else b""
        whole = old[: old.rfind(b"\n") + 1]
        if whole.startswith(self._head):
            for line in whole[len(self._head) :].splitlines():
                step, number, digest = line.split()
                self.entries[int(step), int(number)] = digest.decode()
        else:
            whole = self._head
        self._fd = ops.open_file(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.ftruncate(self._fd, 0)
        ops.pwrite(self._fd, whole, 0)

    def forget(self, keys: list[Key]) -> None:
        """Entries whose bytes did not hold what they said."""
        for key in keys:
            del self.entries[key]

    def add(self, key: Key, digest: str) -> None:
        """Note a chunk; one append of one line, so that threads do not mix."""
        assert self._fd is not None
        ops.pwrite(self._fd, f"{key[0]} {key[1]} {digest}\n".encode(), 0)  # O_APPEND: at the end
        self.entries[key] = digest

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
