"""What was tried, kept in a file while it goes on: an interrupted search is taken up again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge.errors import SinkError, SourceError
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import reads
from merge.learning.search import Values

__all__ = ["Study", "fingerprint"]

_FORMAT = "merge-study"


def fingerprint(text: str, names: Sequence[str], judged: str, models: Checkpoint) -> str:
    """What scores depend on: the recipe, the numbers, how they are judged, the models' files."""
    files: dict[str, tuple[int, int]] = {}
    for expr in models.tensors.values():
        for read in reads(expr):
            files.update((f.path, (f.size, f.mtime_ns)) for f in read.source.files)
    known = [text, list(names), judged, sorted(files.items())]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


class Study:
    """Scores by values. path: where they are kept; None keeps none.

    A line is written for each as it comes. Lines of another search are not taken: SourceError
    unless ``others`` says that they are passed over. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path | None, stamp: str, names: Sequence[str], *, fresh: bool = False):
        self.path = path
        self.known: dict[Values, float] = {}
        self._stamp = stamp
        self._names = tuple(names)
        if path is not None and fresh:
            path.unlink(missing_ok=True)
        if path is not None and path.exists():
            self._read(path)

    def add(self, values: Values, score: float) -> None:
        """Keep a score."""
        if values in self.known:
            return
        self.known[values] = score
        if self.path is None:
            return
        lines = [{"values": dict(zip(self._names, values, strict=True)), "score": score}]
        self._append(lines)

    def take(self, trials: Iterable[Mapping[str, Any]]) -> None:
        """Take the trials of a finished search of the same stamp."""
        for trial in trials:
            self.known[tuple(float(trial["values"][n]) for n in self._names)] = float(
                trial["score"]
            )

    def remove(self) -> None:
        """The search is over and told elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        assert self.path is not None
        try:
            new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                if new:
                    head = {"format": _FORMAT, "stamp": self._stamp}
                    file.write(json.dumps(head) + "\n")
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            raise SinkError(
                f"the study cannot be written: {error.strerror}", file=self.path
            ) from None

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().decode().split("\n")
            head = json.loads(lines[0])
            stamp = head["stamp"] if head["format"] == _FORMAT else None
        except OSError as error:
            raise SourceError(f"the study cannot be read: {error.strerror}", file=path) from None
        except (ValueError, LookupError, TypeError):
            raise SourceError(
                "this is no study", file=path, do="name a new file, or remove this one"
            ) from None
        if stamp != self._stamp:
            raise SourceError(
                "the study is of another search: recipe, numbers, score or models have changed",
                file=path,
                do="name a new file, or begin anew with --fresh",
            )
        whole = [json.loads(line) for line in lines[1:-1] if line]
        self.take(whole)
        if lines[-1]:  # cut off while it was written
            path.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
