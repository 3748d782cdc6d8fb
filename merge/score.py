"""A score by any command: it is given a folder with the candidate, and prints a number."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from merge import run
from merge.errors import ScoreError
from merge.ir.checkpoint import Checkpoint

__all__ = ["score_by_command"]

_WORD = re.compile(r"[^\s:=,;|()\[\]{}%\"']+")
_NUMBER = re.compile(
    r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)\.?", re.IGNORECASE
)


def score_by_command(
    command: str,
    scratch: Path | None = None,
    *,
    minimize: bool = False,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Callable[[Checkpoint], float]:
    """A score that saves the candidate, runs ``command`` on it and removes it again.

    command: ``{}`` stands for the folder, which is added at the end where it does not. The last
    number that it prints on stdout is the score, or its negative with ``minimize``. scratch: where
    the folders are made, else in the system's place for temporary files.
    """
    words = shlex.split(command)
    if not words:
        raise ScoreError("the scoring command is empty", expected="such as 'python score.py {}'")
    if not any("{}" in w for w in words):
        words.append("{}")

    options = run.PlanOptions(memory, threads, device, card=False)

    def score(checkpoint: Checkpoint) -> float:
        place = Path(tempfile.mkdtemp(prefix="merge-candidate-", dir=scratch))
        try:
            folder = place / "model"
            run.save(checkpoint, folder, options)
            number = _printed([w.replace("{}", str(folder)) for w in words])
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return -number if minimize else number

    return score


def _printed(words: list[str]) -> float:
    """Run a command; the last number on its stdout, as a word of its own: none in a path's name."""
    text = shlex.join(words)
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise ScoreError("the scoring command cannot be run", found=error, command=text) from None
    if done.returncode != 0:
        raise ScoreError(
            "the scoring command failed", found=f"exit {done.returncode}", command=text
        )
    numbers = [w for w in _WORD.findall(done.stdout) if _NUMBER.fullmatch(w)]
    if not numbers:
        raise ScoreError(
            "the scoring command printed no number",
            command=text,
            found=repr(done.stdout[-200:]),
            expected="a number as the last thing on stdout, higher for a better model",
        )
    return float(numbers[-1].rstrip("."))
