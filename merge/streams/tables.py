"""Rows of .jsonl, .csv, .parquet and .txt files: a text, and a label and a part where asked for."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from merge.errors import RecipeError, SourceError, nearest
from merge.streams.examples import Example
from merge.streams.spec import PARTS, DataSpec

__all__ = ["SUFFIXES", "read_table"]

SUFFIXES = (".jsonl", ".csv", ".parquet", ".txt")
Row = Mapping[str, Any]


def read_table(file: Path, spec: DataSpec, part: str | None = None) -> list[Example]:
    """The examples of a file. part: the one that all of them are in.

    SourceError names file, line and field. A text that is empty is an error, as is an example
    without a label where a label is asked for, unless it is in the part ``adapt``.
    """
    if not file.is_file():
        raise SourceError("there is no such data", file=file)
    named = spec.text.split(",") + ([] if spec.positive is None else [spec.positive])
    found = []
    for number, row in _rows(file):
        where = {"file": file, "row" if file.suffix.lower() == ".parquet" else "line": number}
        texts = [_field(row, name.strip(), where) for name in named]
        for name, text in zip(named, texts, strict=True):
            if not isinstance(text, str):
                raise SourceError("a text is no text", found=repr(text)[:80]).at(
                    **where, field=name
                )
        own = part
        if own is None and spec.split is not None:
            own = _part(_field(row, spec.split, where), spec.split, where)
        label = None
        if spec.label is not None and not (own == "adapt" and row.get(spec.label) in (None, "")):
            label = _label(row, spec.label, where)
        key = "\0".join(texts).encode()
        found.append(Example(tuple(texts), label, key, own, where))
    if not found:
        raise SourceError("there is no data", file=file, found="no rows")
    return found


def _field(row: Row, name: str, where: Mapping[str, object]) -> Any:
    if name in row and row[name] is not None:
        return row[name]
    near = nearest(name, row)
    raise SourceError(
        f"a line has no key {name!r}" if name not in row else f"the value of {name!r} is empty",
        found=", ".join(map(str, row))[:200] or "nothing",
        do=f"did you mean {near!r}?" if near and near != name else None,
    ).at(**where, field=name)


def _label(row: Row, name: str, where: Mapping[str, object]) -> str | int:
    value = _field(row, name, where)
    if isinstance(value, bool) or not isinstance(value, int | str | float):
        raise SourceError("a label is no name and no number", found=repr(value)[:80]).at(
            **where, field=name
        )
    if isinstance(value, float):
        if not value.is_integer():
            raise SourceError("a label is no whole number", found=value).at(**where, field=name)
        return int(value)
    return value


def _part(value: object, name: str, where: Mapping[str, object]) -> str:
    found = {"valid": "validate", "validation": "validate", "val": "validate", "dev": "validate"}
    part = found.get(str(value).lower(), str(value).lower())
    if part not in PARTS:
        raise SourceError(
            "an example is in no part that is known",
            found=repr(value),
            expected=", ".join(PARTS),
        ).at(**where, field=name)
    return part


def _rows(file: Path) -> Iterator[tuple[int, Row]]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        yield from enumerate(_parquet(file), 1)
        return
    try:
        with file.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as lines:
            if suffix == ".csv":
                csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
                reader = csv.DictReader(lines, strict=True)
                for row in reader:
                    if None in row or None in row.values():
                        raise SourceError(
                            "a line has not as many values as the first has names",
                            file=file,
                            line=reader.line_num,
                        )
                    yield reader.line_num, row
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    text = suffix == ".txt"
                    yield number, {"text": line.rstrip("\n")} if text else _json(line, file, number)
    except UnicodeDecodeError as error:
        raise SourceError("the file is not UTF-8", file=file, found=error.reason) from None
    except csv.Error as error:
        raise SourceError("the file is no CSV", file=file, found=error) from None


def _json(line: str, file: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise SourceError("a line is no JSON object", file=file, line=number, found=line[:80])
    return row


def _parquet(file: Path) -> Iterator[Row]:
    try:
        pyarrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise RecipeError(
            "parquet files are read by pyarrow, which is not installed",
            file=file,
            do="pip install 'hf-merge[data]'",
        ) from None
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        raise SourceError("the file is no parquet file", file=file, found=first[:200]) from None
