"""A folder of safetensors files as a sink: it appears whole or not at all.

The work lies in ``OUT.partial-<plan>`` beside the target: files preallocated, tensors written at
their offsets in any order, a journal line for each chunk. When all is there it is synced and
renamed to ``OUT``. A run that dies leaves only the partial folder and the lock file; the next run
of the same plan takes it up chunk by chunk, and a run of another plan clears it away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from merge.errors import DamagedInput
from merge.plan.model import Chunk, Plan, SideOutput, Step
from merge.write import ops
from merge.write.chunk import ChunkFile, byte_range
from merge.write.disk import disk_errors
from merge.write.journal import Journal
from merge.write.lock import OutputLock
from merge.write.manifest import MANIFEST, manifest_text, weight_entries
from merge.write.publish import publish, recover
from merge.write.side import side_bytes
from merge.write.target import check_overlap, check_space, check_unused

__all__ = ["FolderSink", "settle"]

_JOURNAL = "journal"
_READ = 1 << 20  # bytes at a time when a chunk is read again


class FolderSink:
    """Writes a plan to ``out``. A context: what is not published when it ends can be resumed."""

    def __init__(
        self, plan: Plan, out: Path, *, replace: bool = False, fresh: bool = False
    ) -> None:
        self.plan = plan
        self.out = Path(os.path.abspath(out))
        self.replace = replace
        self.fresh = fresh
        self.stage = self._sibling(f"partial-{plan.hash[:16]}")
        self._aside = self._sibling("replaced")
        self._lock = OutputLock(self._sibling("lock"))
        self._journal = Journal(self.stage / _JOURNAL, plan.hash)
        self._fds: dict[str, int] = {}
        self._done: frozenset[tuple[int, int]] = frozenset()

    def _sibling(self, suffix: str) -> Path:
        return self.out.with_name(f"{self.out.name}.{suffix}")

    # -- begin and end -------------------------------------------------------------------------
    def __enter__(self) -> FolderSink:
        check_overlap(self.out, self.plan.roots)
        try:
            with disk_errors(self.out):
                ops.mkdir(self.out.parent)
                self._lock.acquire()
            with disk_errors(self.stage):
                self._recover()
                check_unused(self.out, replace=self.replace)
                self._begin()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, DamagedInput):  # what is done rests on bytes that were wrong
            shutil.rmtree(self.stage, ignore_errors=True)
        self._close()

    def _close(self) -> None:
        self._journal.close()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._lock.release()

    def _recover(self) -> None:
        """Finish or undo what a run that died has left. The lock says that no one else is here."""
        recover(self.out, self._aside)
        for old in self.out.parent.glob(f"{_glob_escape(self.out.name)}.partial-*"):
            if self.fresh or old != self.stage:
                shutil.rmtree(old)

    def _begin(self) -> None:
        """The stage with its files at full size, and the chunks that an earlier run finished."""
        held = sum(_blocks(self.stage / f.name) for f in self.plan.files)
        check_space(self.out.parent, max(0, self.plan.write_bytes - held))
        ops.mkdir(self.stage)
        self._journal.open()
        for file in self.plan.files:
            path = self.stage / file.name
            ops.mkdir(path.parent)
            fd = ops.open_file(path, os.O_RDWR | os.O_CREAT)
            self._fds[file.name] = fd
            if os.fstat(fd).st_size != file.size:
                os.ftruncate(fd, 0)
            ops.allocate(fd, file.size)
            ops.pwrite(fd, file.header, 0)
        self._done = self._proved()

    def _proved(self) -> frozenset[tuple[int, int]]:
        """The journal's chunks whose bytes still have the digest that the journal says."""
        known = self._journal.entries
        if not known:
            return frozenset()
        chunks = [
            (s, c)
            for n, s in enumerate(self.plan.steps)
            for c in s.chunks(n)
            if (c.step, c.number) in known
        ]
        with ThreadPoolExecutor(self.plan.budget.workers) as pool:
            digests = pool.map(lambda sc: self._digest(*sc), chunks)
            right = {(c.step, c.number): d for (_, c), d in zip(chunks, digests, strict=True)}
        self._journal.forget([k for k, d in known.items() if right.get(k) != d])
        return frozenset(self._journal.entries)

    def _digest(self, step: Step, chunk: Chunk) -> str:
        begin, end = byte_range(step, chunk)
        digest, fd = blake3(), self._fds[step.file]
        for at in range(begin, end, _READ):
            digest.update(os.pread(fd, min(_READ, end - at), at))
        return digest.hexdigest()

    # -- the engine's side -----------------------------------------------------------------------
    def finished(self, chunk: Chunk) -> bool:
        return (chunk.step, chunk.number) in self._done

    @contextmanager
    def open(self, step: Step, chunk: Chunk) -> Iterator[ChunkFile]:
        with disk_errors(self.stage / step.file, step.output.name):
            writer = ChunkFile(self._fds[step.file], step, chunk)
            yield writer
            self._journal.add((chunk.step, chunk.number), writer.finish())

    def publish(self) -> None:
        """Side files, manifest, sync, rename: now the output is there."""
        with disk_errors(self.stage):
            side = {s.name: self._write_side(s) for s in self.plan.side}
            weights = weight_entries(self.plan, self._journal.entries)
            text = manifest_text(self.plan.hash, weights, side)
            self._write_side(SideOutput(MANIFEST, text=text))
            for fd in self._fds.values():
                ops.fsync(fd)
            self._journal.close()
            ops.unlink(self.stage / _JOURNAL)
            folders = ((self.stage / name).parent for name in [*side, *self._fds])
            publish(self.stage, self.out, self._aside, folders)

    def _write_side(self, side: SideOutput) -> str:
        """Write one small file durably; returns its digest."""
        data = side_bytes(side)
        target = self.stage / side.name
        ops.mkdir(target.parent)
        fd = ops.open_file(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            ops.pwrite(fd, data, 0)
            ops.fsync(fd)
        finally:
            os.close(fd)
        return blake3(data).hexdigest()


def settle(out: Path) -> None:
    """Remove the lock file of a run that died after it had published ``out``."""
    path = Path(os.path.abspath(out)).with_name(f"{out.name}.lock")
    if path.exists():
        lock = OutputLock(path)
        lock.acquire()
        lock.release()


def _blocks(path: Path) -> int:
    """Bytes of disk that a file holds."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _glob_escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
