"""Measures what moving the bytes of a merge costs when nothing is computed.

    python benchmarks/floor.py OUT MODEL [MODEL ...]

One thread reads every weight file of the models into one reused buffer and then writes as many
bytes as one model holds to a new file in OUT. A merge on one thread cannot do with less; one
that keeps several processor cores busy can go below it.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BUFFER = 16 * 1024 * 1024  # bytes


def floor(models: Sequence[Path], out: Path) -> float:
    """Seconds to read all weights of the models and to write the first one's amount into `out`."""
    buffer = bytearray(BUFFER)
    start = time.perf_counter()
    for model in models:
        for file in weight_files(model):
            read(file, buffer)
    seconds = time.perf_counter() - start
    amount = sum(file.stat().st_size for file in weight_files(models[0]))
    # The file is made anew, as a merge's output is: fresh pages are a large part of the cost.
    with tempfile.TemporaryFile(dir=out, buffering=0) as stream:
        start = time.perf_counter()
        write(stream.fileno(), buffer, amount)
        return seconds + time.perf_counter() - start


def weight_files(model: Path) -> list[Path]:
    """The safetensors files of a model folder, by name."""
    return sorted(model.glob("*.safetensors"))


def read(file: Path, buffer: bytearray) -> int:
    """Bytes read: the whole file, piece by piece into the same buffer."""
    done = 0
    with file.open("rb", buffering=0) as stream:
        while count := os.preadv(stream.fileno(), [buffer], done):
            done += count
    return done


def write(descriptor: int, buffer: bytearray, amount: int) -> None:
    """Write `amount` bytes, all of them from the same buffer."""
    view = memoryview(buffer)
    while amount > 0:
        amount -= os.write(descriptor, view[: min(amount, len(buffer))])


def warm(models: Sequence[Path]) -> None:
    """Read all weights once, so that what is measured next finds them in the page cache."""
    buffer = bytearray(BUFFER)
    for model in models:
        for file in weight_files(model):
            read(file, buffer)


def ready(models: Sequence[Path], out: Path) -> None:
    """Inputs in the page cache, and memory for one output freed a moment ago.

    On a virtual machine, memory that was free for some seconds belongs to the host, and to touch
    it again costs up to a second a gigabyte; without this, who comes first would pay for all.
    """
    warm(models)
    amount = sum(file.stat().st_size for file in weight_files(models[0]))
    with tempfile.TemporaryFile(dir=out, buffering=0) as stream:
        write(stream.fileno(), bytearray(BUFFER), amount)


if __name__ == "__main__":
    print(f"{floor([Path(name) for name in sys.argv[2:]], Path(sys.argv[1])):.3f} seconds")
