"""Inputs that are far away, fetched ahead of the work: few ranges, large ones, each byte once.

The plan says which bytes are needed and in which order. Neighbouring steps make a batch; within it
the bytes of one file are joined to *segments*, in the order in which they lie there. Segments are
fetched in the order of the plan while there is room, and freed when the last step that reads of
them is done. What a step needs and is not there yet is fetched at once, in place of what was used
longest ago; so a tensor that is larger than all the room passes through it in pieces.

Where all of a file is read, its SHA-256 is computed on the way and held against the one that is
known.
"""

from __future__ import annotations

import hashlib
import math
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from merge.errors import DamagedInput
from merge.ir.expr import Distant, InputFile, Read, Span, TensorReader
from merge.plan.model import Plan, Step

__all__ = ["ReadAhead"]

_LARGEST = 64 << 20  # bytes of a segment
_SMALLEST = 1 << 16  # the same, where many inputs share little room
_BATCH = 8 << 20  # bytes of the steps whose inputs are joined, at least
_GAP = 1 << 16  # bytes between two tensors that are fetched along
_GAP_SHARE = 100  # gaps are at most one in so many bytes
_PATIENCE = 2.0  # seconds in which nobody reads, before a step makes room for itself
_LINES = 4  # segments that are fetched at the same time


@dataclass(slots=True, eq=False)
class _Segment:
    """A range of a file. users: steps that are still to read of it.

    left: bytes that they will still take, where a step is too large to wait for its end. again: of
    a step that is larger than the room and goes over its inputs several times.
    """

    source: Distant
    file: str
    begin: int
    end: int
    users: set[int] = field(default_factory=set)
    left: float = 0
    again: bool = False
    data: bytearray | None = None
    loading: bool = False
    error: BaseException | None = None
    used: int = 0  # when it was last read of
    hashed: bool = False

    @property
    def size(self) -> int:
        return self.end - self.begin


@dataclass(slots=True)
class _Proof:
    """The digest of a file as far as its segments have come, in order."""

    file: InputFile
    segments: list[_Segment]
    digest: hashlib._Hash
    next: int = 0
    given_up: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class _State:
    held: int = 0
    clock: int = 0
    next: int = 0  # of the segments: all before it were begun, or are not wanted
    stopped: bool = False
    served: int = 0  # reads, to see whether anyone goes on
    segments: list[_Segment] = field(default_factory=list)
    of_file: dict[tuple[str, str], tuple[list[int], list[_Segment]]] = field(default_factory=dict)
    of_step: dict[int, list[_Segment]] = field(default_factory=dict)
    proofs: dict[tuple[str, str], _Proof] = field(default_factory=dict)


class ReadAhead:
    """Readers for the steps of a plan. A context: fetching goes on while it is entered."""

    def __init__(self, plan: Plan, needed: Iterable[int]) -> None:
        self.room = plan.budget.ahead
        self._is = _State()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._lay_out(plan, list(needed))

    # -- which bytes --------------------------------------------------------------------------
    def _lay_out(self, plan: Plan, needed: Sequence[int]) -> None:
        far = [list(_spans(plan.steps[n])) for n in needed]
        total = sum(span.end - span.begin for spans in far for _, span in spans)
        shares = 2 * (1 + max(map(len, far), default=0))  # what is used and what comes next
        largest = _LARGEST if total <= self.room else min(_LARGEST, self.room // shares)
        largest = max(_SMALLEST, largest)
        known: dict[tuple[str, str], Distant] = {}
        taken: dict[tuple[str, str], list[tuple[int, int]]] = {}
        batch: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        size = 0
        for number in needed:
            for source, span in _spans(plan.steps[number]):
                key = source.identity, span.file
                known[key] = source
                batch.setdefault(key, []).append((span.begin, span.end, number))
                size += span.end - span.begin
            if size > max(self.room // 2, _BATCH):
                self._join(batch, known, taken, largest)
                batch, size = {}, 0
        self._join(batch, known, taken, largest)
        for segment in self._is.segments:
            key = segment.source.identity, segment.file
            self._is.of_file.setdefault(key, ([], []))[1].append(segment)
        for key, (begins, segments) in self._is.of_file.items():
            segments.sort(key=lambda s: s.begin)
            begins += [s.begin for s in segments]
            if (proof := _proof(known[key], key[1], segments)) is not None:
                self._is.proofs[key] = proof
        self._count_users(plan, needed)

    def _join(
        self,
        batch: dict[tuple[str, str], list[tuple[int, int, int]]],
        known: dict[tuple[str, str], Distant],
        taken: dict[tuple[str, str], list[tuple[int, int]]],
        largest: int,
    ) -> None:
        """The segments of a batch, in the order in which its steps need them."""
        found: list[tuple[int, _Segment]] = []
        for key, spans in batch.items():
            before = taken.setdefault(key, [])
            for begin, end, first in _joined(spans, before):
                before.append((begin, end))
                for at in range(begin, end, largest):
                    stop = min(at + largest, end)
                    found.append((first, _Segment(known[key], key[1], at, stop)))
        found.sort(key=lambda f: f[0])  # stable: pieces of one range stay in order
        self._is.segments += [segment for _, segment in found]

    def _count_users(self, plan: Plan, needed: Sequence[int]) -> None:
        for number in needed:
            step = plan.steps[number]
            passing = step.passes == 1 and step.read_bytes > self.room // 2
            for source, span in _spans(step):
                for segment in self._covering(source, span.file, span.begin, span.end):
                    common = min(span.end, segment.end) - max(span.begin, segment.begin)
                    segment.left += common if passing else math.inf
                    segment.again |= step.passes > 1 and step.read_bytes > self.room
                    segment.users.add(number)
                    self._is.of_step.setdefault(number, []).append(segment)

    def _covering(self, source: Distant, file: str, begin: int, end: int) -> Iterator[_Segment]:
        begins, segments = self._is.of_file[source.identity, file]
        at = bisect_right(begins, begin) - 1
        while at < len(segments) and segments[at].begin < end:
            yield segments[at]
            at += 1

    # -- fetching -----------------------------------------------------------------------------
    def __enter__(self) -> ReadAhead:
        if self._is.segments:
            self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(_LINES)]
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is.stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(0.5)  # one that waits for the network ends by itself

    def _run(self) -> None:
        while (segment := self._next()) is not None:
            self._load(segment)

    def _next(self) -> _Segment | None:
        """The next segment that nobody fetches, once there is room for it; none overtakes it."""
        with self._changed:
            while self._is.next < len(self._is.segments):
                segment = self._is.segments[self._is.next]
                if not self._is_wanted(segment):
                    self._is.next += 1
                elif self._is.held + segment.size <= self.room:
                    self._begin(segment)
                    return segment
                elif not self._give_up_a_proof():
                    self._changed.wait(0.5)
            return None

    def _is_wanted(self, segment: _Segment) -> bool:
        """Whether some step is still to read of it, and nobody fetches it or has."""
        here = segment.loading or segment.data is not None or segment.error is not None
        needed = bool(segment.users) and segment.left > 0
        return needed and not here and not self._is.stopped

    def _begin(self, segment: _Segment) -> None:
        segment.loading = True
        self._is.held += segment.size

    def _load(self, segment: _Segment) -> None:
        """Fetch a segment that this thread has begun; an error is for those who need it."""
        data = bytearray(segment.size)
        try:
            segment.source.fetch(segment.file, segment.begin, memoryview(data))
        except BaseException as error:
            with self._changed:
                segment.error, segment.loading = error, False
                self._is.held -= segment.size
                self._changed.notify_all()
            return
        with self._changed:
            segment.data, segment.loading = data, False
            segment.used = self._is.clock
            self._changed.notify_all()
        self._prove(segment)

    # -- reading ------------------------------------------------------------------------------
    @contextmanager
    def open(self, read: Read) -> Iterator[TensorReader]:
        """One tensor, from what was fetched; one that is near from where it is."""
        source = read.source
        span = source.span(read.spec.name) if isinstance(source, Distant) else None
        if span is not None and (source.identity, span.file) in self._is.of_file:
            assert isinstance(source, Distant)
            yield _Reader(self, source, span)
            return
        with source.open(read.spec.name) as reader:
            yield reader

    def copy(self, source: Distant, file: str, begin: int, view: memoryview) -> None:
        """Fill ``view`` from the segments that hold these bytes."""
        end = begin + len(view)
        done = begin
        for segment in self._covering(source, file, begin, end):
            data = self._wanted(segment)
            stop = min(end, segment.end)
            part = memoryview(data)[done - segment.begin : stop - segment.begin]
            view[done - begin : stop - begin] = part
            with self._changed:
                self._is.served += 1
                segment.left -= stop - done
                self._free_if_spent(segment)
            done = stop

    def _wanted(self, segment: _Segment) -> bytearray:
        """The bytes of a segment, which is fetched here and now if nobody has begun to."""
        idle = False
        with self._changed:
            while True:
                self._is.clock += 1
                segment.used = self._is.clock
                if segment.data is not None:
                    return segment.data
                if segment.error is not None:
                    raise segment.error
                if not segment.loading and self._has_room(segment.size, idle or segment.again):
                    self._begin(segment)
                    break
                served = self._is.served
                woken = self._changed.wait(_PATIENCE)
                idle = not woken and served == self._is.served
        self._load(segment)
        return self._wanted(segment)

    def _has_room(self, size: int, idle: bool) -> bool:
        """Whether ``size`` bytes may be held more; where nobody gets on without, it is made.

        What is needed last goes first, and of that what was read of longest ago.
        """
        while self._is.held + size > self.room:
            if not idle or any(s.loading for s in self._is.segments):
                return False
            held = [s for s in self._is.segments if s.data is not None]
            if not held:
                return True
            self._free(max(held, key=lambda s: (min(s.users, default=math.inf), -s.used)))
        return True

    def _free(self, segment: _Segment) -> None:
        if not segment.hashed and (proof := self._proof_of(segment)) is not None:
            proof.given_up = True
        segment.data = None
        self._is.held -= segment.size
        self._changed.notify_all()

    def done(self, number: int) -> None:
        """A step is done: what no other step reads of is freed."""
        with self._changed:
            for segment in self._is.of_step.get(number, ()):
                segment.users.discard(number)
                self._free_if_spent(segment)

    def _free_if_spent(self, segment: _Segment) -> None:
        proof = self._proof_of(segment)
        proved = segment.hashed or proof is None or proof.given_up
        spent = not segment.users or segment.left <= 0
        if spent and segment.data is not None and proved:
            self._free(segment)

    # -- digests ------------------------------------------------------------------------------
    def _proof_of(self, segment: _Segment) -> _Proof | None:
        return self._is.proofs.get((segment.source.identity, segment.file))

    def _give_up_a_proof(self) -> bool:
        """Free segments that are kept for a digest alone, where what it waits for is not coming."""
        given_up = False
        for segment in self._is.segments[: self._is.next]:
            proof = self._proof_of(segment)
            if proof is None or proof.given_up or segment.hashed or segment.data is None:
                continue
            if not segment.users or segment.left <= 0:
                following = proof.segments[proof.next]
                if following.data is None and not following.loading:
                    proof.given_up = given_up = True
                    self._free_if_spent(segment)
        return given_up

    def _prove(self, segment: _Segment) -> None:
        """Carry the digest of the segment's file on, as far as its bytes are there."""
        if (proof := self._proof_of(segment)) is None:
            return
        with proof.lock:
            while not proof.given_up and proof.next < len(proof.segments):
                following = proof.segments[proof.next]
                if (data := following.data) is None:
                    return
                proof.digest.update(data)
                with self._changed:
                    following.hashed = True
                    proof.next += 1
                    self._free_if_spent(following)

    def check(self) -> None:
        """DamagedInput for a file that was read to its end and is not what it is said to be.

        To be called when all steps are done.
        """
        for thread in self._threads:
            thread.join()
        for proof in self._is.proofs.values():
            if proof.given_up or proof.next < len(proof.segments):
                continue
            if (found := proof.digest.hexdigest()) != proof.file.sha256:
                raise DamagedInput(
                    "an input came with other bytes than it has",
                    file=proof.file.path,
                    found=f"SHA-256 {found}",
                    expected=proof.file.sha256,
                    do="run the same command again: nothing of this run is kept; if it stays so,"
                    " a proxy or a cache on the way damages what passes",
                )


class _Reader:
    """One tensor, out of segments."""

    def __init__(self, ahead: ReadAhead, source: Distant, span: Span) -> None:
        self.ahead, self.source, self.span = ahead, source, span

    def read_into(self, start: int, view: memoryview) -> None:
        self.ahead.copy(self.source, self.span.file, self.span.begin + start, view)


def _spans(step: Step) -> Iterator[tuple[Distant, Span]]:
    """The bytes that a step reads from far away."""
    for read in step.reads:
        if isinstance(read.source, Distant):
            span = read.source.span(read.spec.name)
            if span is not None and span.end > span.begin:
                yield read.source, span


def _joined(
    spans: Iterable[tuple[int, int, int]], taken: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Ranges that cover the spans and not what is taken, each with the first step that needs it.

    Small gaps are covered too, as long as they are a small share.
    """
    fresh = sorted({s for span in spans for s in _without(span, taken)})
    begin, end, first, gaps = -1, -1, 0, 0
    for b, e, number in fresh:
        gap = b - end
        if begin >= 0 and gap <= _GAP and (gaps + max(gap, 0)) * _GAP_SHARE <= e - begin:
            if gap > 0 and any(x < b and y > end for x, y in taken):
                gap = _GAP + 1  # the gap was fetched before
            else:
                gaps += max(gap, 0)
                end, first = max(end, e), min(first, number)
                continue
        if begin >= 0:
            yield begin, end, first
        begin, end, first, gaps = b, e, number, 0
    if begin >= 0:
        yield begin, end, first


def _without(
    span: tuple[int, int, int], taken: Iterable[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """What of a span is not taken yet."""
    left = [span]
    for x, y in taken:
        pieces = ((p, q, n) for b, e, n in left for p, q in ((b, min(e, x)), (max(b, y), e)))
        if any(b < y and e > x for b, e, _ in left):
            left = [piece for piece in pieces if piece[0] < piece[1]]
    return left


def _proof(source: Distant, file: str, segments: Sequence[_Segment]) -> _Proof | None:
    """Where the segments are all of a file whose digest is known: what computes it."""
    known = next((f for f in source.files if f.path == file), None)
    head = source.head(file)
    if known is None or known.sha256 is None or head is None:
        return None
    at = len(head)
    for segment in segments:
        if segment.begin != at:
            return None
        at = segment.end
    if at != known.size:
        return None
    return _Proof(known, list(segments), hashlib.sha256(head))
