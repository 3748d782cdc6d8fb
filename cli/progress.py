"""Progress on stderr: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from merge.learning.search import Trial
from merge.learning.state import Step
from merge.plan.model import human_bytes

__all__ = ["count_bar", "progress_bar", "step_lines", "trial_lines"]

_EVERY = 30.0  # seconds between lines when stderr is not a terminal


@contextmanager
def progress_bar(total: int, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A function to call with bytes moved: bytes, rate and time left are shown."""
    if quiet or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1":
        yield None
        return
    lock = threading.Lock()
    if sys.stderr.isatty():
        from tqdm import tqdm

        size = shutil.get_terminal_size()  # never 0, of which tqdm shows nothing
        with tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            ncols=size.columns,
            nrows=size.lines,
        ) as bar:

            def advance(moved: int) -> None:
                with lock:
                    bar.update(moved)

            yield advance
        return
    started = last = time.monotonic()
    done = 0

    def line(moved: int) -> None:
        nonlocal done, last
        with lock:
            done += moved
            now = time.monotonic()
            if now - last >= _EVERY:
                last = now
                rate = done / (now - started)
                left = (total - done) / rate if rate else 0.0
                click.echo(
                    f"{human_bytes(done)} of {human_bytes(total)}, {human_bytes(rate)}/s,"
                    f" {left:.0f} s left",
                    err=True,
                )

    yield line


@contextmanager
def count_bar(unit: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A function to call with how many more are done, and of how many in all."""
    if quiet or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") == "1":
        yield None
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(unit=unit, ncols=shutil.get_terminal_size().columns) as bar:

            def advance(more: int, total: int) -> None:
                bar.total = total
                bar.update(more)

            yield advance
        return
    started = last = time.monotonic()
    done = 0

    def line(more: int, total: int) -> None:
        nonlocal done, last
        done += more
        now = time.monotonic()
        if now - last >= _EVERY:
            last = now
            left = (total - done) * (now - started) / done
            click.echo(f"{done:,} of {total:,}, {left:.0f} s left", err=True)

    yield line


def trial_lines() -> Callable[[Trial], None]:
    """A function that prints each trial of a search, the best so far marked, and the time left."""
    started = time.monotonic()
    new = 0

    def line(trial: Trial) -> None:
        nonlocal new
        new += not trial.known
        count = f"{trial.number + 1}/{trial.of}" if trial.of else f"{trial.number + 1}"
        values = "  ".join(f"{v:<8.5g}" for v in trial.values[:8])
        words = ["best"] if trial.best else []
        words += ["kept"] if trial.known else []
        words += [f"generation {trial.generation + 1}"] if trial.generation else []
        left = trial.of - trial.number - 1
        if new and left > 0:
            words.append(f"{left * (time.monotonic() - started) / new:.0f} s left")
        more = "..." if len(trial.values) > 8 else ""
        click.echo(
            f"{count:>8}  {values}{more}  {trial.score:10.6g}  {', '.join(words)}".rstrip(),
            err=True,
        )

    return line


def step_lines() -> Callable[[Step, int], None]:
    """A function that shows each step of learning: loss, score, time left.

    A bar on a terminal; elsewhere a line for each score on validation data, and every half minute.
    """
    started = last = time.monotonic()
    first: int | None = None
    bar: Any = None

    def line(step: Step, of: int) -> None:
        nonlocal first, last, bar
        first = step.number - 1 if first is None else first
        loss = sum(step.losses.values()) / max(1, len(step.losses))
        score = "" if step.score is None else f", score {step.score:.4f}"
        if sys.stderr.isatty():
            if bar is None:
                from tqdm import tqdm

                bar = tqdm(total=of, initial=first, unit="step", desc="learning")
            bar.set_postfix_str(f"loss {loss:.4f}{score}", refresh=False)
            bar.update(step.number - bar.n)
            if step.number >= of:
                bar.close()
            return
        now = time.monotonic()
        if step.score is not None or now - last >= _EVERY or step.number == of:
            last = now
            left = (of - step.number) * (now - started) / max(1, step.number - first)
            click.echo(
                f"step {step.number} of {of}, loss {loss:.4f}{score}, {left:.0f} s left", err=True
            )

    return line
