"""Models published on the Hub: plans computed into a repo, one weight file at a time."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from merge import run
from merge.errors import RecipeError, SinkError
from merge.ir.checkpoint import Checkpoint, short
from merge.plan.model import Plan
from merge.provenance import card_statement, provenance
from merge.run import PlanOptions, WriteOptions
from merge.write.card import CARD
from merge.write.hub import Target
from merge.write.ledger import Ledger
from merge.write.lock import OutputLock
from merge.write.manifest import MANIFEST, manifest_text
from merge.write.publication import Entries, Made, Outcome, Publication
from merge.write.shard import Shard, held_in_memory
from merge.write.side import side_bytes
from merge.write.target import check_memory, check_space

if TYPE_CHECKING:
    from merge.applying import Planned
    from merge.engine.execute import Report
    from merge.write.admission import Admission

__all__ = [
    "Notice",
    "Progress",
    "Published",
    "Target",
    "admitted",
    "first_line",
    "maker",
    "open_ledger",
    "open_target",
    "published",
    "push_checkpoint",
    "push_plan",
    "push_planned",
    "room_for",
]

Progress = Callable[[int], None]
Notice = Callable[[str], None]
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LONGEST = 100  # characters of a commit's first line


@dataclass(frozen=True, slots=True)
class Published:
    """A model on the Hub. url: of its page, or of the pull request that proposes it.

    report: of the engine, None where nothing was computed. private: the repo was made so.
    """

    target: Target
    outcome: Outcome
    url: str
    report: Report | None = None
    private: bool = False


def open_target(target: Target) -> Admission:
    """The repo of ``target``, after a look whether it may be written to; nothing is changed."""
    if _ID.fullmatch(target.repo) is None or "--" in target.repo or ".." in target.repo:
        raise RecipeError(
            "a repo on the Hub is named with its owner",
            found=repr(target.repo),
            expected="owner/name, of letters, digits, dots, hyphens and underscores",
        )
    if target.create_pr and target.branch != "main":
        raise RecipeError(
            "a pull request is made against the main branch",
            found=f"--create-pr with --branch {target.branch}",
            do="leave one of them out",
        )
    from huggingface_hub import HfApi, constants, get_token

    from merge.hub import current
    from merge.write.admission import Admission

    if constants.HF_HUB_OFFLINE:
        raise SinkError(
            "publishing needs the network, and it is switched off",
            repo=target.repo,
            found="HF_HUB_OFFLINE=1 or TRANSFORMERS_OFFLINE=1",
            do="unset it",
        )
    token = target.token or get_token()
    if token is None:
        raise SinkError(
            "publishing needs a token, and there is none",
            repo=target.repo,
            do="log in with `hf auth login`, or set HF_TOKEN, or give --token",
        )
    known = replace(target, token=token)
    api = HfApi(
        endpoint=target.endpoint or current().endpoint, token=token, library_name="hf-merge"
    )
    admission = Admission(api, known)
    admission.check_right()
    return admission


def push_checkpoint(
    checkpoint: Checkpoint, target: Target, options: PlanOptions, *, fresh: bool = False
) -> str:
    """Plan ``checkpoint`` and compute it into a repo; the address of its page."""
    repo = open_target(target)
    plan = run.plan(checkpoint, replace(options, in_memory=True))
    return push_plan(plan, repo, WriteOptions(fresh=fresh)).url


def push_plan(
    plan: Plan,
    repo: Admission,
    how: WriteOptions = WriteOptions(),
    notice: Notice = lambda _: None,
) -> Published:
    """Compute ``plan`` into a repo, one weight file at a time, without a disk.

    A repo that is made is private where an input is not for everyone. how: progress is told of
    bytes that are sent, too. notice: is told what happens, in words.
    """
    room_for(plan)
    small = {s.name: s for s in plan.side}
    card = side_bytes(small[CARD]).decode() if CARD in small else None
    private = admitted(repo, card, plan.roots, notice)
    reports: list[Report] = []

    def content(entries: Entries) -> Mapping[str, bytes]:
        data = {name: side_bytes(s) for name, s in small.items()}
        digests = {name: blake3(d).hexdigest() for name, d in data.items()}
        weights = {n: e for n, e in entries.items() if e is not None}
        text = manifest_text(plan.hash, {f.name: weights[f.name] for f in plan.files}, digests)
        return {**data, MANIFEST: text.encode()}

    with open_ledger(repo, plan.hash, fresh=how.fresh) as ledger:
        outcome = Publication(
            repo,
            ledger,
            weights=[f.name for f in plan.files],
            side=[*small, MANIFEST],
            make=maker(plan, reports, how),
            content=content,
            message=repo.target.message or f"Merge: {first_line(plan.label)}",
            mark=plan.hash[:12],
            notice=notice,
            progress=how.progress or (lambda _: None),
        ).run()
    return published(repo, outcome, private, _sum(reports))


def room_for(plan: Plan) -> None:
    """An error unless there is room for the largest weight file of ``plan`` beside its buffers."""
    largest = max((f.size for f in plan.files), default=0)
    if held_in_memory():
        check_memory(plan.budget.buffers + largest)
    else:
        check_space(Path(tempfile.gettempdir()), largest)


def maker(
    plan: Plan, reports: list[Report], how: WriteOptions
) -> Callable[[str], AbstractContextManager[Made]]:
    """Makes one weight file of ``plan``, which is there as long as the context lasts."""

    @contextmanager
    def make(file: str) -> Iterator[Made]:
        from merge.engine.execute import execute
        from merge.engine.heap import give_back_freed_memory

        part = plan.part(file)
        with Shard(part) as shard:
            reports.append(execute(part, shard, progress=how.progress, non_finite=how.non_finite))
            give_back_freed_memory()  # the client has buffers of its own
            yield Made(shard.path, shard.entry())

    return make


def push_planned(
    planned: Planned,
    repo: Admission,
    how: WriteOptions = WriteOptions(),
    notice: Notice = lambda _: None,
) -> Published:
    """Compute a recipe: its result into a repo, the stages that it keeps into their folders, first.

    how, notice: as for `push_plan`; whether the folders may be replaced is of these stages.
    """
    for folder, stage in planned.stages:
        run.save_plan(stage, folder, how)
    plan = planned.plan if planned.extract is None else planned.extract(how.progress)
    return push_plan(plan, repo, how, notice)


def first_line(text: str) -> str:
    """Text for the first line of a commit's message."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def admitted(repo: Admission, card: str | None, roots: Sequence[str], notice: Notice) -> bool:
    """The checks before any work, then the repo is made. Whether it is made private.

    roots: where inputs lie; their own cards may say that they are gated.
    """
    for warning in repo.check_card(card):
        notice(f"the Hub on the model card: {warning}")
    inputs = [(short(root), provenance(root, ())) for root in roots]
    gated = [p.hub or name for name, p in inputs if p.card.licence.gated]
    named = [*card_statement(card or "").base_models, *(p.hub for _, p in inputs if p.hub)]
    restricted = tuple(dict.fromkeys([*gated, *repo.restricted(tuple(dict.fromkeys(named)))]))
    private = repo.check_privacy(restricted)
    if private and repo.target.private is None:
        notice(f"{repo.repo} is made private: not everyone may read {', '.join(restricted)}")
    elif restricted and repo.target.private is False:
        notice(f"published for all, though not everyone may read {', '.join(restricted)}")
    repo.make(private)
    repo.check_route()
    return bool(private)


@contextmanager
def open_ledger(repo: Admission, key: str, *, fresh: bool) -> Iterator[Ledger]:
    """The ledger of what goes into a repo, which no other process writes meanwhile."""
    from huggingface_hub import cached_assets_path, constants

    target = repo.target
    place = f"{repo.api.endpoint} {target} {'pull request' if target.create_pr else 'branch'}"
    name = hashlib.sha256(f"{key} {place}".encode()).hexdigest()[:24]
    folder = cached_assets_path(
        "hf-merge", "pushes", target.repo, assets_dir=constants.HF_ASSETS_CACHE
    )
    path = folder / f"{name}.ledger"
    lock, ledger = OutputLock(path.with_suffix(".lock")), Ledger(path, f"{key} {place}")
    try:
        lock.acquire()
        ledger.open(fresh=fresh)
    except OSError as error:
        lock.release()
        raise SinkError(
            f"the record of what was sent cannot be kept: {error.strerror}",
            file=error.filename or path,
            do="make the cache of the Hub's client writable, or set HF_ASSETS_CACHE",
        ) from error
    try:
        yield ledger
    finally:
        ledger.close()
        lock.release()


def published(repo: Admission, outcome: Outcome, private: bool, report: Report | None) -> Published:
    """What is told of a publication."""
    target, page = repo.target, f"{repo.api.endpoint}/{repo.repo}"
    if outcome.pull is not None:
        page = f"{page}/discussions/{outcome.pull}"
    elif target.branch != "main":
        page = f"{page}/tree/{target.branch}"
    return Published(target, outcome, page, report, private)


def _sum(reports: Sequence[Report]) -> Report | None:
    """The reports of the parts of a plan as one."""
    if not reports:
        return None
    return replace(
        reports[0],
        seconds=sum(r.seconds for r in reports),
        bytes_read=sum(r.bytes_read for r in reports),
        bytes_written=sum(r.bytes_written for r in reports),
        chunks=sum(r.chunks for r in reports),
        resumed_chunks=sum(r.resumed_chunks for r in reports),
    )
