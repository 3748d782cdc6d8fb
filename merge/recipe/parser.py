"""ruamel.yaml with our settings: what of YAML a recipe may use, and what it may leave undone."""

from __future__ import annotations

import warnings
from typing import Any

__all__ = ["load"]

Repeated = list[tuple[str, int]]


def load(text: str, *, last_wins: bool) -> list[tuple[Any, Repeated]]:
    """ruamel's documents, each with the keys that are repeated in it.

    Tabs between words are white space in YAML, but not to this parser: it stops at the first, which
    is then made a space.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.scanner import ScannerError

    while True:
        yaml, repeated = YAML(typ="rt"), Repeated()
        yaml.Constructor = _constructor(repeated if last_wins else None)
        trees: list[tuple[Any, Repeated]] = []
        try:
            with warnings.catch_warnings():  # an anchor may be given anew, as YAML says
                warnings.simplefilter("ignore")
                for tree in yaml.load_all(text):
                    trees.append((tree, list(repeated)))
                    repeated.clear()
            return trees
        except ScannerError as error:
            mended = None if error.problem_mark is None else _untabbed(text, error.problem_mark)
            if mended is None:
                raise
            text = mended


def _untabbed(text: str, mark: Any) -> str | None:
    """The text with spaces for the tabs at ``mark``; None where they are no mere white space."""
    lines = text.split("\n")
    line = lines[mark.line]
    before, after = line[: mark.column], line[mark.column :]
    words = after.lstrip(" \t")
    blank = words.strip() == "" or words.startswith("#")
    if after[:1] != "\t" or not (blank or before.strip(" -?")) or text.count("\t") > 1000:
        return None
    lines[mark.line] = before + " " * (len(after) - len(words)) + words
    return "\n".join(lines)


def _constructor(repeated: Repeated | None) -> Any:
    """ruamel's, with dates as text, places for what is no value, and no tags but YAML's own.

    repeated: takes the keys that are given again, with their lines; the last of them counts. None
    refuses them.
    """
    from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor

    class Plain(RoundTripConstructor):
        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep=deep)
            except ValueError as error:
                raise ConstructorError(None, None, str(error), node.start_mark) from None

        def check_mapping_key(
            self, node: Any, key_node: Any, mapping: Any, key: Any, value: Any
        ) -> bool:
            if repeated is None:
                return bool(super().check_mapping_key(node, key_node, mapping, key, value))
            if key in mapping:
                repeated.append((str(key), key_node.start_mark.line + 1))
            return True

        def text(self, node: Any) -> str:
            return str(node.value)

        def unknown(self, node: Any) -> Any:
            raise ConstructorError(None, None, f"unknown tag {node.tag}", node.start_mark)

    for tag in ("str", "timestamp"):
        Plain.add_constructor(f"tag:yaml.org,2002:{tag}", Plain.text)
    Plain.add_constructor(None, Plain.unknown)
    return Plain
