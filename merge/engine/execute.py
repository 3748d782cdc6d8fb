"""Run a plan from its sources into a sink, in parallel, with bounded memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from merge.engine.ahead import ReadAhead
from merge.engine.evaluate import Evaluator, Rules, Stopped, Task
from merge.engine.finite import Policy
from merge.engine.heap import keep_freed_memory
from merge.engine.sink import Sink
from merge.engine.stage import CpuStage, CudaStage, Stage, bytes_of
from merge.plan.model import Chunk, Plan

__all__ = ["Report", "execute"]

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did. Seconds of the engine alone; bytes as read and written."""

    seconds: float
    bytes_read: int
    bytes_written: int
    chunks: int
    resumed_chunks: int


def execute(
    plan: Plan, sink: Sink, *, progress: Progress | None = None, non_finite: Policy = "error"
) -> Report:
    """Compute every chunk of ``plan`` that ``sink`` does not have yet.

    progress: called with the bytes read and written since the last call, from any worker. The first
    error of any worker stops all and is raised; what is finished stays in the sink.
    """
    keep_freed_memory()
    started = time.perf_counter()
    work = _Work(plan, sink)
    with ReadAhead(plan, work.needed()) as ahead:
        work.ahead = ahead
        _run(plan, sink, work, progress, non_finite)
        if work.error is None:
            ahead.check()
    if work.error is not None:
        raise work.error
    return Report(
        time.perf_counter() - started, work.bytes_read, work.bytes_written, work.done, work.skipped
    )


def _run(
    plan: Plan, sink: Sink, work: _Work, progress: Progress | None, non_finite: Policy
) -> None:
    """All workers, from first to last."""
    workers = [
        threading.Thread(target=_worker, args=(plan, sink, work, progress, non_finite))
        for _ in range(plan.budget.workers)
    ]
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # a chunk is one thread's work; parallelism is over chunks
    try:
        for worker in workers:
            work.running += 1
            worker.start()
        work.wait()
    finally:
        work.stop()
        work.wait()
        for worker in workers:
            if worker.ident is not None:
                worker.join()  # they have returned, or are about to
        torch.set_num_threads(threads_before)


@dataclass(slots=True)
class _Tensor:
    """One output tensor in work; its chunks wait until it is measured."""

    task: Task
    chunks: list[Chunk]
    left: int  # chunks that are not done


class _Work:
    """The queue: chunks that are ready go first, then the next tensor in disk order.

    A tensor whose method measures is handed out once to be measured; its chunks follow at once,
    while its inputs are still in the page cache.
    """

    def __init__(self, plan: Plan, sink: Sink) -> None:
        self.condition = threading.Condition()
        self.plan = plan
        self.ahead: ReadAhead
        self.tensors = enumerate(plan.steps)
        self.sink = sink
        self.ready: deque[tuple[_Tensor, Chunk]] = deque()
        self.measuring = self.running = 0
        self.stopped = False
        self.error: BaseException | None = None
        self.bytes_read = self.bytes_written = self.done = self.skipped = 0

    def take(self) -> tuple[_Tensor, Chunk | None] | None:
        """The next chunk, or a tensor to measure (no chunk), or None when all is handed out."""
        with self.condition:
            while not self.stopped:
                if self.ready:
                    return self.ready.popleft()
                if (tensor := self._next()) is not None:
                    if tensor.task.step.passes > 1 and tensor.chunks:
                        self.measuring += 1
                        return tensor, None
                    self._enqueue(tensor)
                elif self.measuring:
                    self.condition.wait()
                else:
                    return None
            return None

    def _next(self) -> _Tensor | None:
        number, step = next(self.tensors, (0, None))
        if step is None:
            return None
        chunks = list(step.chunks(number))
        missing = [c for c in chunks if not self.sink.finished(c)]
        self.skipped += len(chunks) - len(missing)
        return _Tensor(Task(step), missing, len(missing))

    def needed(self) -> list[int]:
        """The steps of which something is not done yet."""
        return [
            n
            for n, step in enumerate(self.plan.steps)
            if not all(map(self.sink.finished, step.chunks(n)))
        ]

    def _enqueue(self, tensor: _Tensor) -> None:
        self.ready.extend((tensor, chunk) for chunk in tensor.chunks)

    def measured(self, tensor: _Tensor, read: int) -> None:
        """The tensor's chunks may be computed now; ``read`` bytes were read to measure it."""
        with self.condition:
            self.measuring -= 1
            self._enqueue(tensor)
            self.bytes_read += read
            self.condition.notify_all()

    def count(self, tensor: _Tensor, chunk: Chunk, read: int, written: int) -> None:
        """A chunk is done; with the last one its step is."""
        with self.condition:
            self.bytes_read += read
            self.bytes_written += written
            self.done += 1
            tensor.left -= 1
            last = not tensor.left
        if last:
            self.ahead.done(chunk.step)

    def fail(self, error: BaseException) -> None:
        """Keep the first error and stop everyone."""
        with self.condition:
            self.error = self.error or error
        self.stop()

    def wait(self) -> None:
        """Until no worker runs. Not `Thread.join`: before Python 3.13 an interrupt breaks it."""
        with self.condition:
            while self.running:
                self.condition.wait(0.5)  # a wait without end would not let an interrupt through

    def ended(self) -> None:
        """A worker is about to return."""
        with self.condition:
            self.running -= 1
            self.condition.notify_all()

    def stop(self) -> None:
        with self.condition:
            self.stopped = True
            self.condition.notify_all()


def _worker(plan: Plan, sink: Sink, work: _Work, progress: Progress | None, policy: Policy) -> None:
    stage: Stage | None = None
    try:
        device = plan.budget.device
        stage = CpuStage() if device == "cpu" else CudaStage(device)
        budget = plan.budget
        rules = Rules(
            budget.tile, budget.measure, budget.keep, policy, lambda: work.stopped, work.ahead.open
        )
        with torch.inference_mode():
            while (taken := work.take()) is not None:
                tensor, chunk = taken
                step = tensor.task.step
                with Evaluator(tensor.task, stage, rules) as evaluator:
                    if chunk is None:
                        evaluator.measure()
                        moved = step.read_bytes * (step.passes - 1)
                        work.measured(tensor, moved)
                    else:
                        moved = _compute(evaluator, sink, tensor, chunk, work)
                if progress is not None:
                    progress(moved)
    except Stopped:
        pass
    except BaseException as error:  # handed to the caller's thread, which raises it
        work.fail(error)
    finally:
        if stage is not None:
            stage.close()
        work.ended()


def _compute(evaluator: Evaluator, sink: Sink, tensor: _Tensor, chunk: Chunk, work: _Work) -> int:
    """One chunk into the sink; returns the bytes moved."""
    written, step = 0, tensor.task.step
    with sink.open(step, chunk) as out:
        for start, stop in evaluator.spans(chunk.start, chunk.stop):
            view = bytes_of(evaluator.finished(start, stop))
            out.write(view)
            written += len(view)
    share = (chunk.stop - chunk.start) / max(1, step.output.numel)
    read = round(step.read_bytes * share)
    work.count(tensor, chunk, read, written)
    return read + written
