"""Chat templates: which a model has, which most models have, and where one is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from merge.vocabulary.document import parse_document, read_document

__all__ = ["FILES", "FURTHER", "common_template", "is_template", "templates_in", "with_template"]

JINJA = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
PROCESSOR = "chat_template.json"
FILES = (JINJA, CONFIG, PROCESSOR)
"""Files that may hold a chat template."""

_KEY = "chat_template"
FURTHER = "additional_chat_templates/"
"""The folder of further templates, one a file."""


def is_template(text: str) -> bool:
    """Whether a recipe's text can be a template itself: 20 characters or more, with a brace."""
    return len(text) >= 20 and "{" in text


def templates_in(texts: Mapping[str, str], label: str) -> dict[str, str]:
    """The templates in a model's files, by name; the main one is called default.

    A file of its own goes before tokenizer_config.json. label: the model's, for errors.
    """
    found: dict[str, str] = {}
    for name in (PROCESSOR, CONFIG):
        if name in texts:
            found.update(_named(read_document(texts[name], name, label).values.get(_KEY)))
    for name, text in texts.items():
        if name.startswith(FURTHER) and name.endswith(".jinja"):
            found[name.removeprefix(FURTHER).removesuffix(".jinja")] = text
    if JINJA in texts:
        found["default"] = texts[JINJA]
    return found


def _named(value: Any) -> dict[str, str]:
    """The value of chat_template: one text, or a list of names and texts."""
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        return {}
    entries = [e for e in value if isinstance(e, dict)]
    return {str(e.get("name")): str(e.get("template")) for e in entries}


def common_template(templates: Sequence[str | None]) -> str | None:
    """The template that most models have, of equally common ones the first; None without any."""
    there = [t for t in templates if t]
    return Counter(there).most_common(1)[0][0] if there else None


def with_template(texts: Mapping[str, str], template: str) -> dict[str, str]:
    """The files that change so that the main template is ``template``.

    It is replaced wherever there is one, and else goes to a file of its own. texts: those of
    `FILES` that a model has.
    """
    found = {n: _main(n, texts[n]) for n in FILES if n in texts}
    places = [n for n, main in found.items() if main is not None] or [JINJA]
    return {
        name: template if name == JINJA else _replaced(texts[name], template)
        for name in places
        if found.get(name) != template
    }


def _main(name: str, text: str) -> str | None:
    """The main template in a file; '' where it has others only, None where it has none."""
    if name == JINJA:
        return text
    value = parse_document(text).values.get(_KEY)
    return None if value is None else _named(value).get("default", "")


def _replaced(text: str, template: str) -> str:
    document = parse_document(text)
    return document.replaced({_KEY: _written(document.values[_KEY], template)})


def _written(value: Any, template: str) -> str:
    """The new value of chat_template as JSON; further named templates stay beside it."""
    if not isinstance(value, list):
        return json.dumps(template, ensure_ascii=False)
    default = {"name": "default", "template": template}
    others = [e for e in value if isinstance(e, dict) and e.get("name") != "default"]
    return json.dumps([default, *others], ensure_ascii=False)
