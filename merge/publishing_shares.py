"""One plan sent to the Hub by many machines: each sends its weight files, one commits them all.

What a rank has sent stands in a folder beside the output, with no weights in it:
``OUT.sent-<plan>-<rank>-of-<world>``. The bytes lie with the Hub, which keeps them until they are
committed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from merge.errors import PlanError, SinkError
from merge.plan.share import LEDGER, Rank, deal_plan
from merge.publishing import Published, admitted, maker, open_ledger, published, room_for
from merge.run import WriteOptions
from merge.write.card import CARD
from merge.write.disk import disk_errors
from merge.write.ledger import Ledger
from merge.write.lock import OutputLock
from merge.write.manifest import MANIFEST, FileEntry, manifest_text
from merge.write.publication import Entries, Made, Publication
from merge.write.shares import covered_ledger, read_ledger, siblings
from merge.write.side import side_bytes

if TYPE_CHECKING:
    from merge.applying import Planned
    from merge.write.admission import Admission

__all__ = ["Sending", "publish_shares", "send_share"]

_SENT = "sent.ledger"
_SMALL = "small"  # weight files that the Hub wants in the commit itself
_SIDE = "side"


@dataclass(frozen=True, slots=True)
class Sending:
    """What a rank has sent. place: its folder; sent: files sent now, not in an earlier run."""

    place: Path
    plan: str
    sent: tuple[str, ...]


def send_share(
    planned: Planned,
    out: Path,
    rank: Rank,
    repo: Admission,
    how: WriteOptions = WriteOptions(),
    notice: Callable[[str], None] = lambda _: None,
) -> Sending:
    """Compute what ``rank`` is dealt of a recipe and send it to ``repo``, committing nothing.

    out: beside it lie the records by which `publish_shares` commits; all ranks give the same. The
    same command resumes, unless all is to be sent afresh. PlanError for what one machine has to do.
    """
    if planned.extract is not None or planned.stages:
        raise PlanError(
            "a recipe that keeps stages, or makes an adapter, is published by one machine",
            do="leave out --rank and --world",
        )
    plan = planned.plan
    share = deal_plan(plan, rank)
    card = next((s for s in plan.side if s.name == CARD), None)
    room_for(share)
    text = None if card is None else side_bytes(card).decode()
    admitted(repo, text, plan.roots, notice)
    place = _place(out, plan.hash, rank)
    lock = OutputLock(place.with_name(f"{place.name}.lock"))
    with disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        ledger = Ledger(place / _SENT, f"{plan.hash} {repo.target}")
        try:
            place.mkdir(exist_ok=True)
            (place / LEDGER).unlink(missing_ok=True)
            ledger.open(fresh=how.fresh)
            publication = Publication(
                repo,
                ledger,
                weights=[f.name for f in share.files],
                side=[],
                make=maker(share, [], how),
                content=lambda _: {},
                message="",
                mark=plan.hash[:12],
                notice=notice,
                progress=how.progress or (lambda _: None),
            )
            sent = publication.send()
            for name, data in publication.small.items():
                _write(place / _SMALL / name, data)
                entry = publication.entries[name]
                assert entry is not None
                _write(place / _SMALL / f"{name}.json", entry.model_dump_json().encode())
            for side in share.side:
                data = side_bytes(side)
                _write(place / (LEDGER if side.name == LEDGER else f"{_SIDE}/{side.name}"), data)
        finally:
            ledger.close()
            lock.release()
    return Sending(place, plan.hash, sent)


def publish_shares(
    out: str | Path,
    repo: Admission,
    *,
    notice: Callable[[str], None] = lambda _: None,
    progress: Callable[[int], None] | None = None,
) -> Published:
    """Commit what the ranks have sent for ``out``; the repo then holds the whole model.

    SourceError names files that no rank has sent, and whose they are; SinkError one that the Hub
    has lost since. Needs neither the recipe nor the inputs.
    """
    out = Path(os.path.abspath(out))
    found = [p for p in siblings(out, "sent-*") if p.is_dir() and (p / LEDGER).is_file()]
    ledgers = {path: read_ledger(path / LEDGER) for path in found}
    whole = covered_ledger(out, {p: (led, _names(p)) for p, led in ledgers.items()})
    side = {
        name: (path / _SIDE / name).read_bytes()
        for path in found
        for name in whole.side
        if (path / _SIDE / name).is_file()
    }
    small = {n: p / _SMALL / n for p in found for n in whole.files if (p / _SMALL / n).is_file()}
    text = side[CARD].decode() if CARD in side else None
    private = admitted(repo, text, (), notice)

    @contextmanager
    def make(name: str) -> Iterator[Made]:
        if name not in small:
            raise SinkError(
                "the Hub has lost a weight file that was sent before",
                repo=repo.repo,
                file=name,
                do=f"run rank {whole.ranks[name]} of {whole.world} again, then finish",
            )
        entry = small[name].with_name(f"{small[name].name}.json").read_bytes()
        yield Made(small[name], FileEntry.model_validate_json(entry))

    def content(entries: Entries) -> Mapping[str, bytes]:
        weights = {n: e for n in whole.files if (e := entries[n]) is not None}
        digests = {name: blake3(data).hexdigest() for name, data in side.items()}
        return {**side, MANIFEST: manifest_text(whole.plan, weights, digests).encode()}

    with open_ledger(repo, whole.plan, fresh=False) as ledger:
        for path in found:
            known = Ledger(path / _SENT, f"{whole.plan} {repo.target}")
            known.open()
            known.close()
            for name, sent in known.sent.items():
                if name not in ledger.sent:
                    ledger.add(sent)
        outcome = Publication(
            repo,
            ledger,
            weights=list(whole.files),
            side=[*side, MANIFEST],
            make=make,
            content=content,
            message=repo.target.message or "Merge",
            mark=whole.plan[:12],
            notice=notice,
            progress=progress or (lambda _: None),
        ).run()
    for path in found:
        shutil.rmtree(path)
    return published(repo, outcome, private, None)


def _place(out: Path, plan: str, rank: Rank) -> Path:
    here = Path(os.path.abspath(out))
    return here.with_name(f"{here.name}.sent-{plan[:16]}-{rank}")


def _names(place: Path) -> set[str]:
    """The files that a rank has for the commit."""
    lines = (place / _SENT).read_text().splitlines()[1:]
    sent = {json.loads(line).get("path") for line in lines}
    folders = (place / _SMALL, place / _SIDE)
    here = {p.relative_to(f).as_posix() for f in folders for p in f.rglob("*") if p.is_file()}
    return {name for name in sent | here if isinstance(name, str)}


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
