"""The manifest in an output: which plan made it, and the digests by which it can be verified.

A tensor's digest is the BLAKE3 over the concatenated BLAKE3 of its chunks of ``chunk_bytes``: they
are taken while the bytes are in the cache, from any thread, and a damaged tensor has a name.
BLAKE3 because it costs a fifth of SHA-256 with SHA instructions (10.6 against 2.1 GB/s a core), and
a twentieth without: SHA-256 was more than half of the CPU time of an average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated

from blake3 import blake3
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from merge.errors import SourceError
from merge.plan.model import Plan

__all__ = [
    "MANIFEST",
    "Digest",
    "FileEntry",
    "Manifest",
    "TensorEntry",
    "manifest_text",
    "read_manifest",
    "tensor_digest",
    "weight_entries",
]

MANIFEST = "merge_manifest.json"


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError("leads out of the folder")
    return name


Name = Annotated[str, AfterValidator(_inside)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TensorEntry(_Strict):
    """One tensor: how it was cut into chunks, and the digest over theirs."""

    chunk_bytes: int = Field(gt=0)
    blake3: Digest


class FileEntry(_Strict):
    """One weight file. Tensors are named as in the file."""

    size: int = Field(ge=0)
    header_blake3: Digest
    tensors: dict[str, TensorEntry]


class Manifest(_Strict):
    """What an output folder holds."""

    format: int = 1
    plan: Digest
    weights: dict[Name, FileEntry]
    side: dict[Name, Digest]


def tensor_digest(chunks: Iterable[str]) -> str:
    """The digest of a tensor from its chunks' digests in hex, in order."""
    return blake3(b"".join(bytes.fromhex(c) for c in chunks)).hexdigest()


def weight_entries(plan: Plan, digests: Mapping[tuple[int, int], str]) -> dict[str, FileEntry]:
    """The entry of every weight file of a plan. digests: of every chunk."""
    tensors: dict[str, dict[str, TensorEntry]] = {f.name: {} for f in plan.files}
    for number, step in enumerate(plan.steps):
        chunks = [digests[c.step, c.number] for c in step.chunks(number)]
        size = max(1, step.chunk * step.output.dtype.bits // 8)
        tensors[step.file][step.output.name_in_file] = TensorEntry(
            chunk_bytes=size, blake3=tensor_digest(chunks)
        )
    return {
        f.name: FileEntry(
            size=f.size,
            header_blake3=blake3(f.header).hexdigest(),
            tensors=dict(sorted(tensors[f.name].items())),
        )
        for f in plan.files
    }


def manifest_text(plan: str, weights: dict[str, FileEntry], side: dict[str, str]) -> str:
    """The manifest of what the plan with this hash has written. side: file name to digest."""
    manifest = Manifest(plan=plan, weights=weights, side=side)
    return manifest.model_dump_json(indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an output folder; None when it has none, SourceError when it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise SourceError(
            "the manifest is damaged",
            file=path,
            key=".".join(map(str, first["loc"])) or None,
            found=first["msg"],
        ) from None
    except OSError as error:
        raise SourceError(f"the manifest cannot be read: {error.strerror}", file=path) from None
