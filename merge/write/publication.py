"""A model brought into a repo: what was sent before is kept, the rest is sent, then all appears.

`merge.write.rounds` says in which commits. Each begins at the head that was looked at, so what
somebody else has committed meanwhile is an error and never lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from merge.errors import SinkError
from merge.plan.model import human_bytes
from merge.write.hub import HubRepo, RemoteFile
from merge.write.ledger import Ledger
from merge.write.manifest import FileEntry
from merge.write.rounds import Rounds, plan_rounds

__all__ = ["Made", "Outcome", "Publication"]

Entries = Mapping[str, FileEntry | None]


@dataclass(frozen=True, slots=True)
class Made:
    """A weight file, ready to be sent. weights: its entry in a manifest that is yet to be."""

    path: Path
    weights: FileEntry | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of a publication. commit: that holds the model; pull: its pull request.

    sent, kept: weight files sent now, and those that the server had from an earlier run. made:
    False when all was there already.
    """

    commit: str
    pull: int | None
    sent: tuple[str, ...]
    kept: tuple[str, ...]
    removed: tuple[str, ...]
    bytes_sent: int
    made: bool = True


@dataclass(slots=True)
class Publication:
    """One model on its way into one repo.

    weights: its weight files, in order. side: the names of all others. make: one weight file, as
    long as the context lasts. content: the other files' bytes, once all weights are sent. mark:
    names the staging branch. notice: is told what happens; progress: how many bytes were sent.
    """

    repo: HubRepo
    ledger: Ledger
    weights: Sequence[str]
    side: Sequence[str]
    make: Callable[[str], AbstractContextManager[Made]]
    content: Callable[[Entries], Mapping[str, bytes]]
    message: str
    mark: str
    notice: Callable[[str], None] = lambda _: None
    progress: Callable[[int], None] = lambda _: None
    _small: dict[str, bytes] = field(default_factory=dict)  # weights that go into a commit itself
    _entries: dict[str, FileEntry | None] = field(default_factory=dict)
    _sent: list[str] = field(default_factory=list)
    _bytes: int = 0

    def run(self) -> Outcome:
        """Send, commit and check; SinkError when it cannot be done, and then it can be resumed."""
        target, pull = self.repo.target, None
        if target.create_pr:
            pull = self.repo.open_pull(self.ledger.pull_request)
        ref = target.branch if pull is None else f"refs/pr/{pull}"
        head = self.repo.head(ref)
        there = self.repo.files(head)
        kept = self._keep(there)
        if (done := self._done(there)) is not None:
            if pull is not None:
                self.repo.show_pull(pull)
            return Outcome(head, pull, (), kept, done, 0, made=False)
        foreign = [f for f in there if not self._is_ours(f, there)]
        rounds = plan_rounds(self.weights, self.side, foreign, apart=target.create_pr)
        for name in () if rounds.rounds else self.weights:
            self._give(name)
        if target.create_pr and pull is None:
            pull = self.repo.make_pull(self.message, self._description())
            self.ledger.add_pull_request(pull)
            ref = f"refs/pr/{pull}"
            head = self.repo.head(ref)
        head = self._rounds(rounds, ref, head, there)
        side = self.content(self._entries)
        last = [s for s in rounds.last if not self._is_ours(s, there)]
        head = self.repo.commit(
            ref,
            head,
            self.message,
            [self.ledger.sent[n] for n in last if n not in self._small],
            {**self._small_of(last), **side},
            rounds.removed,
        )
        self._check(self.repo.files(head), side, rounds.removed)
        if rounds.staging:
            self.repo.remove_branch(self._staging)
        if pull is not None:
            self.repo.show_pull(pull)
        return Outcome(head, pull, tuple(self._sent), kept, rounds.removed, self._bytes)

    def send(self) -> tuple[str, ...]:
        """Have the server hold all weight files and commit nothing; those that were sent now."""
        self._keep({})
        for name in self.weights:
            self._give(name)
        return tuple(self._sent)

    @property
    def small(self) -> Mapping[str, bytes]:
        """Weight files that the server wants in the commit itself."""
        return self._small

    @property
    def entries(self) -> Entries:
        """Of the weight files so far, what the manifest is to say."""
        return self._entries

    # -- what was there before -------------------------------------------------------------------
    def _keep(self, there: Mapping[str, RemoteFile]) -> tuple[str, ...]:
        """The weight files that need not be made; those that the server has lost are forgotten."""
        mine = {n: s for n, s in self.ledger.sent.items() if n in set(self.weights)}
        asked = [s for n, s in mine.items() if not self._is_ours(n, there)]
        held = self.repo.held(asked) if asked else set()
        lost = [s.path for s in asked if s.path not in held]
        for name in lost:
            self.ledger.forget(name)
        kept = tuple(n for n in self.weights if n in self.ledger.sent)
        self._entries |= {n: self.ledger.sent[n].weights for n in kept}
        if kept or lost:
            again = f"; {len(lost)} the server has lost, they are made again" if lost else ""
            self.notice(f"{len(kept)} of {len(self.weights)} weight files were sent before{again}")
        return kept

    def _is_ours(self, name: str, there: Mapping[str, RemoteFile]) -> bool:
        """Whether the repo has our own file of that name."""
        sent, found = self.ledger.sent.get(name), there.get(name)
        return sent is not None and found is not None and found.is_sent(sent)

    def _done(self, there: Mapping[str, RemoteFile]) -> tuple[str, ...] | None:
        """An empty tuple when the repo holds all of the model, and nothing that should go."""
        if not all(self._is_ours(name, there) for name in self.weights):
            return None
        side = self.content(self._entries)
        same = all(name in there and there[name].holds(data) for name, data in side.items())
        stale = plan_rounds(self.weights, self.side, list(there)).removed
        return () if same and not stale else None

    # -- sending -----------------------------------------------------------------------------------
    def _give(self, name: str) -> None:
        """Have the server hold a weight file."""
        if name in self.ledger.sent or name in self._small:
            return
        with self.make(name) as made:
            size = made.path.stat().st_size
            self.notice(f"sending {name} ({human_bytes(size)})")
            sent = self.repo.send(name, made.path, made.weights)
            if sent is None:
                self._small[name] = made.path.read_bytes()
            else:
                self.ledger.add(sent)
            self._entries[name] = made.weights
            self._sent.append(name)
            self._bytes += size
            self.progress(size)

    def _small_of(self, names: Sequence[str]) -> dict[str, bytes]:
        return {n: self._small[n] for n in names if n in self._small}

    def _rounds(self, rounds: Rounds, ref: str, head: str, there: Mapping[str, RemoteFile]) -> str:
        """The commits before the last, on a branch of their own where the model is replaced.

        Returns what the last commit begins at.
        """
        at, where = head, ref
        if rounds.staging:
            where = self._staging
            self.repo.make_branch(where, head)
            at = self.repo.head(where)
            there = self.repo.files(at)
        for number, names in enumerate(rounds.rounds, 1):
            for name in names:
                self._give(name)
            new = [n for n in names if not self._is_ours(n, there)]
            if new:
                at = self.repo.commit(
                    where,
                    at,
                    f"{self.message} (weights, part {number} of {len(rounds.rounds)})",
                    [self.ledger.sent[n] for n in new if n not in self._small],
                    self._small_of(new),
                )
        return head if rounds.staging else at

    @property
    def _staging(self) -> str:
        return f"hf-merge-{self.mark}"

    def _description(self) -> str:
        return f"Published by hf-merge, from the plan `{self.mark}`."

    # -- what came of it ---------------------------------------------------------------------------
    def _check(
        self,
        there: Mapping[str, RemoteFile],
        side: Mapping[str, bytes],
        removed: Sequence[str],
    ) -> None:
        """SinkError unless the repo holds what was sent, by the server's own digests."""
        wrong = [n for n in self.weights if not self._arrived(n, there)]
        wrong += [n for n, data in side.items() if n not in there or not there[n].holds(data)]
        if wrong:
            first = there.get(wrong[0])
            raise SinkError(
                "the repo does not hold what was sent",
                repo=self.repo.repo,
                file=wrong[0],
                found="no such file" if first is None else f"another file of {first.size} bytes",
                expected="the file, with the size and digest that it was sent with"
                + (f"; {len(wrong) - 1} more files are wrong" if len(wrong) > 1 else ""),
                do="look whether a .gitignore in the repo leaves it out, then run with --fresh",
            )
        if left := [n for n in removed if n in there]:
            raise SinkError("an old weight file is still there", repo=self.repo.repo, file=left[0])

    def _arrived(self, name: str, there: Mapping[str, RemoteFile]) -> bool:
        if name in self._small:
            return name in there and there[name].holds(self._small[name])
        return self._is_ours(name, there)
