"""States of learning in files."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from merge.errors import PlanError, SinkError, SourceError
from merge.learning.state import State

__all__ = ["read_state", "write_state"]


def write_state(file: Path, state: State) -> None:
    """Write a state, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = file.with_name(file.name + ".partial")
    tensors = {n: t.contiguous() for n, t in state.tensors.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, {"state": state.header()})
        part.replace(file)
    except (OSError, SafetensorError) as error:  # the latter for a disk that is full
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise SinkError(
            "the state of learning cannot be written",
            file=file,
            found=error,
            do="make room, or keep the state elsewhere; the state of before is as it was",
        ) from None


def read_state(file: Path, fingerprint: str) -> State | None:
    """The state in a file; None where there is no file."""
    if not file.exists():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            header = (opened.metadata() or {}).get("state", "")
            tensors = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SourceError("a state of learning cannot be read", file=file, found=error) from None
    try:
        return State.parse(header, tensors, fingerprint)
    except (PlanError, SourceError) as error:
        raise error.at(file=file) from None
