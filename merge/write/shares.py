"""The folders of several ranks, gathered into the output that they were dealt.

Each rank leaves ``OUT.share-<plan>-<rank>-of-<world>`` beside the output: its weight files, the
manifest with their digests, and a ledger of the whole plan. Gathering reads ledgers and renames
files; it needs neither the recipe nor the inputs. A run that dies in it can be repeated.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merge.errors import OutputRefused, SourceError
from merge.plan.share import LEDGER, Rank
from merge.write import ops
from merge.write.disk import disk_errors
from merge.write.folder import settle
from merge.write.lock import OutputLock
from merge.write.manifest import MANIFEST, Digest, Manifest, Name, manifest_text, read_manifest
from merge.write.publish import publish, recover
from merge.write.target import check_unused

__all__ = [
    "Gathered",
    "ShareLedger",
    "covered_ledger",
    "gather",
    "read_ledger",
    "share_folder",
    "siblings",
    "sweep_shares",
]


class ShareLedger(BaseModel):
    """What a rank says of the whole plan: sizes of its files, who computes which."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    plan: Digest
    rank: int = Field(ge=0)
    world: int = Field(ge=1)
    files: dict[Name, int]
    ranks: dict[Name, int]
    side: list[Name]


@dataclass(frozen=True, slots=True)
class Gathered:
    """A finished output. ``ranks``: how many shares it came from; 0 when it was there already."""

    path: Path
    plan: str
    ranks: int


@dataclass(frozen=True, slots=True)
class _Share:
    path: Path
    ledger: ShareLedger
    manifest: Manifest

    @property
    def names(self) -> list[str]:
        return [n for n in [*self.manifest.weights, *self.manifest.side] if n != LEDGER]


def share_folder(out: Path, plan: str, rank: Rank) -> Path:
    """Where a rank's part of the output ``out`` lies until it is gathered."""
    return _sibling(Path(os.path.abspath(out)), f"share-{plan[:16]}-{rank}")


def sweep_shares(out: Path, plan: str, rank: Rank) -> None:
    """Remove what this rank left for other plans of the same output, finished or not."""
    mine = share_folder(out, plan, rank).name
    for old in siblings(out, f"share-*-{rank}*"):
        if re.search(rf"-{rank}(\.|$)", old.name) and not old.name.startswith(mine):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def gather(out: Path, *, replace: bool = False) -> Gathered:
    """Publish ``out`` from the shares beside it.

    OutputRefused when something is at ``out`` already; SourceError when shares are missing: it
    names the files that are not there and the ranks that were to write them.
    """
    out = Path(os.path.abspath(out))
    lock = OutputLock(_sibling(out, "lock"))
    with disk_errors(out):
        lock.acquire()
        try:
            return _gather(out, replace)
        finally:
            lock.release()


def _gather(out: Path, replace: bool) -> Gathered:
    aside = _sibling(out, "replaced")
    recover(out, aside)
    there = read_manifest(out) if out.is_dir() else None
    if there is not None:  # a run that died after it had published leaves some of its shares
        _remove(siblings(out, f"share-{there.plan[:16]}-*"))
    shares = _find(out)
    if not shares and there is not None:
        return Gathered(out, there.plan, 0)
    ledger = covered_ledger(out, {s.path: (s.ledger, s.names) for s in shares})
    plan = ledger.plan
    check_unused(out, replace=replace)
    stage = _sibling(out, f"gather-{plan[:16]}")
    ops.mkdir(stage)
    places = _places(stage, shares, ledger)
    for name, share in places.items():
        _move(share.path / name, stage / name)
    weights = {name: places[name].manifest.weights[name] for name in ledger.files}
    side = {name: places[name].manifest.side[name] for name in ledger.side}
    _write(stage / MANIFEST, manifest_text(plan, weights, side))
    publish(stage, out, aside, [(stage / name).parent for name in places])
    _remove([s.path for s in shares])
    return Gathered(out, plan, len(shares))


def _find(out: Path) -> list[_Share]:
    """The finished shares beside an output."""
    found = []
    for path in siblings(out, "share-*"):
        if not re.search(r"-\d+-of-\d+$", path.name) or not path.is_dir():
            continue  # a share in work, or its lock
        manifest = read_manifest(path)
        if manifest is None:
            raise SourceError("a rank's folder has no manifest", folder=path, expected=MANIFEST)
        found.append(_Share(path, read_ledger(path / LEDGER), manifest))
    return found


def read_ledger(path: Path) -> ShareLedger:
    """A rank's ledger; SourceError for a damaged one."""
    try:
        return ShareLedger.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise SourceError(
            "a rank's ledger is damaged",
            file=path,
            key=".".join(map(str, first["loc"])) or None,
            found=first["msg"],
        ) from None
    except OSError as error:
        raise SourceError(f"a rank's ledger cannot be read: {error.strerror}", file=path) from None


def covered_ledger(
    out: Path, shares: Mapping[Path, tuple[ShareLedger, Collection[str]]]
) -> ShareLedger:
    """The ledger of the plan that all shares are of; SourceError unless they cover it.

    shares: by folder, what the rank says of the plan, and the files that it has.
    """
    if not shares:
        raise _nothing(out)
    if len({ledger.plan for ledger, _ in shares.values()}) > 1:
        raise SourceError(
            "the ranks did not compute the same plan",
            output=out,
            found=", ".join(path.name for path in shares),
            expected="the same recipe, inputs and options on every machine",
            do="remove the folders beside the output that are of a plan that is not wanted",
        )
    ledger = next(iter(shares.values()))[0]
    there = {name for _, names in shares.values() for name in names}
    missing = [n for n in [*ledger.files, *ledger.side] if n not in there]
    if missing:
        lacking = sorted({ledger.ranks.get(n, 0) for n in missing})  # side files are the first's
        raise SourceError(
            "not all ranks have finished",
            output=out,
            found="shares " + ", ".join(f"{s.rank} of {s.world}" for s, _ in shares.values()),
            expected=f"also {_some(missing)}",
            do=f"run rank {', '.join(map(str, lacking))} of {ledger.world}, or run it again: it"
            " resumes; then finish",
        )
    return ledger


def _places(stage: Path, shares: Sequence[_Share], ledger: ShareLedger) -> dict[str, _Share]:
    """Which share has each file of the plan; SourceError for a weight file of another size."""
    places: dict[str, _Share] = {}
    for share in shares:
        for name in share.names:
            places.setdefault(name, share)
    for name, size in ledger.files.items():
        place = stage / name if (stage / name).exists() else places[name].path / name
        found = place.stat().st_size if place.exists() else None
        if found != size:
            raise SourceError(
                "a rank's weight file is not what its ledger says",
                file=place,
                found="nothing" if found is None else f"{found} bytes",
                expected=f"{size} bytes",
                do=f"remove {places[name].path} and run that rank again",
            )
    return {name: places[name] for name in [*ledger.files, *ledger.side]}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _move(source: Path, target: Path) -> None:
    """Rename, unless a run that died has done so already."""
    ops.mkdir(target.parent)
    with suppress(FileNotFoundError):
        ops.rename(source, target)


def _write(path: Path, text: str) -> None:
    fd = ops.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        ops.pwrite(fd, text.encode(), 0)
        ops.fsync(fd)
    finally:
        os.close(fd)


def _remove(folders: Sequence[Path]) -> None:
    for folder in folders:
        if folder.is_dir():
            shutil.rmtree(folder)
            settle(folder)


def _nothing(out: Path) -> OutputRefused:
    return OutputRefused(
        "there is nothing to finish",
        output=out,
        found="no folder of a rank beside it",
        expected=f"{out.name}.share-PLAN-RANK-of-WORLD, as merge apply --rank --world leaves them",
        do="give the OUT that the ranks were given",
    )


def _sibling(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.name}.{suffix}")


def siblings(out: Path, pattern: str) -> list[Path]:
    """What lies beside ``out`` under its name, a dot, and ``pattern``."""
    name = "".join(f"[{c}]" if c in "*?[" else c for c in out.name)
    return sorted(out.parent.glob(f"{name}.{pattern}"))
