"""Check a finished folder: headers, index, sizes, config, and every byte against its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from merge.checkpoint import open_checkpoint
from merge.checkpoint.adapter import is_adapter, read_adapter
from merge.checkpoint.header import read_header
from merge.checkpoint.place import LocalFiles
from merge.errors import MergeError
from merge.families.heads import FOLDER
from merge.ir.checkpoint import Checkpoint
from merge.write.card import CARD
from merge.write.manifest import FileEntry, Manifest, TensorEntry, read_manifest, tensor_digest

__all__ = ["Verification", "holds_files", "holds_plan", "verify"]

_READ = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome: what is wrong (nothing, if the folder is sound) and how much was checked."""

    path: Path
    problems: tuple[str, ...]
    tensors: int
    bytes_hashed: int
    plan: str | None

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: str | Path, *, threads: int = 2) -> Verification:
    """Check the folder ``path``. Without a manifest only structure is checked, no bytes.

    The model card may have changed: its author has more to say than we do.
    Each problem names the file, and the tensor where there is one. Raises SourceError when there is
    no checkpoint to check.
    """
    folder = Path(path)
    problems: list[str] = []
    tensors = 0
    try:
        files = LocalFiles.of(folder)
        adapter = is_adapter(files)
        checkpoint = read_adapter(files)[0] if adapter else open_checkpoint(folder)
        tensors = len(checkpoint)
        problems += _config_problems(folder, checkpoint)
    except MergeError as error:
        if not folder.is_dir():
            raise
        problems.append(str(error))
    manifest = read_manifest(folder)
    if manifest is None:
        return Verification(folder, tuple(problems), tensors, 0, None)
    found, hashed = _manifest_problems(folder, manifest, threads)
    problems += found
    listed = sum(
        len(entry.tensors)
        for name, entry in manifest.weights.items()
        if not name.startswith(f"{FOLDER}/")
    )
    if not problems and listed != tensors:
        problems.append(f"{folder}: {tensors} tensors, but the manifest lists {listed}")
    return Verification(folder, tuple(problems), tensors, hashed, manifest.plan)


def holds_plan(out: Path, plan: str) -> bool:
    """Whether ``out`` is the complete, undamaged output of the plan with this hash."""
    try:
        manifest = read_manifest(out)
        return manifest is not None and manifest.plan == plan and verify(out).ok
    except MergeError:
        return False


def holds_files(out: Path, plan: str) -> bool:
    """Likewise for a folder that holds some files of a model, and so is no checkpoint."""
    try:
        manifest = read_manifest(out)
        if manifest is None or manifest.plan != plan:
            return False
        return not any(_manifest_problems(out, manifest, 2)[0])
    except MergeError:
        return False


def _config_problems(folder: Path, checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.side.config
    named = config.get("dtype") or config.get("torch_dtype")
    stored = {s.dtype.name for s in checkpoint.values() if s.dtype.kind == "float"}
    if isinstance(named, str) and len(stored) == 1 and named not in stored:
        yield f"{folder / 'config.json'}: names dtype {named}, but the weights are {stored.pop()}"


def _manifest_problems(folder: Path, manifest: Manifest, threads: int) -> tuple[list[str], int]:
    """What differs from the manifest, and the bytes that were hashed."""
    problems, hashed = [*_side_problems(folder, manifest.side)], 0
    for name, entry in manifest.weights.items():
        found, size = _weight_problems(folder / name, entry, threads)
        problems += found
        hashed += size
    return problems, hashed


def _side_problems(folder: Path, side: dict[str, str]) -> Iterator[str]:
    for name, digest in side.items():
        path = folder / name
        if name == CARD:  # it is there to be written on
            continue
        if not path.is_file():
            yield f"{path}: missing"
        elif blake3(path.read_bytes()).hexdigest() != digest:
            yield f"{path}: changed since it was written"


def _weight_problems(path: Path, entry: FileEntry, threads: int) -> tuple[list[str], int]:
    """Problems of one weight file, and the bytes that were hashed."""
    try:
        header = read_header(path)
    except MergeError as error:
        return [str(error)], 0
    if header.file.size != entry.size:
        return [f"{path}: {header.file.size} bytes, not {entry.size}"], 0
    missing = sorted(set(entry.tensors) - set(header.tensors))
    if missing:
        return [f"{path}: tensor {n} is missing" for n in missing[:10]], 0

    def differs(item: tuple[str, TensorEntry]) -> bool:
        name, written = item
        size = header.tensors[name].nbytes
        return _digest(path, header.begin[name], size, written.chunk_bytes) != written.blake3

    with ThreadPoolExecutor(threads) as pool:
        wrong = pool.map(differs, entry.tensors.items())
        problems = [
            f"{path}: tensor {name} differs from what was written"
            for name, is_wrong in zip(entry.tensors, wrong, strict=True)
            if is_wrong
        ]
    with path.open("rb") as f:
        begin = min(header.begin.values(), default=header.file.size)
        if blake3(f.read(begin)).hexdigest() != entry.header_blake3:
            problems.append(f"{path}: the header differs from what was written")
    return problems, header.file.size


def _digest(path: Path, begin: int, size: int, chunk: int) -> str:
    """The digest of ``size`` bytes from ``begin``, as the manifest defines it."""
    chunks: list[str] = []
    with path.open("rb") as f:
        f.seek(begin)
        for start in range(0, size, chunk):
            digest, left = blake3(), min(chunk, size - start)
            while left:
                block = f.read(min(_READ, left))
                if not block:
                    return ""
                digest.update(block)
                left -= len(block)
            chunks.append(digest.hexdigest())
    return tensor_digest(chunks)


def to_json(result: Verification) -> dict[str, object]:
    """The outcome as plain data."""
    return {
        "path": str(result.path),
        "ok": result.ok,
        "problems": list(result.problems),
        "tensors": result.tensors,
        "bytes_hashed": result.bytes_hashed,
        "plan": result.plan,
    }
