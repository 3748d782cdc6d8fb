"""What a recipe says about the chat template: auto, a known name, a file, or the template."""

from __future__ import annotations

from pathlib import Path

from merge.errors import MergeError, SourceError, hint
from merge.ir.checkpoint import Checkpoint
from merge.ir.side import Side
from merge.recipe.inputs import OpenAt, named_models
from merge.recipe.read import Stage
from merge.recipe.tokenizer_files import names_of, texts_of
from merge.vocabulary.chat import (
    FILES,
    FURTHER,
    common_template,
    is_template,
    templates_in,
    with_template,
)
from merge.vocabulary.parse import TEXTS
from merge.vocabulary.templates import MARKS, TEMPLATES

__all__ = ["with_chat_template"]

_KEY: tuple[str, ...] = ("chat_template",)


def with_chat_template(stage: Stage, side: Side, open_at: OpenAt, notes: list[str]) -> Side:
    """The side files with the template that the stage asks for, where they keep theirs.

    RecipeError for a text that is no name, no file and no template.
    """
    wanted = stage.model.chat_template
    if wanted is None:
        return side
    document = stage.document
    try:
        template = _common(stage, open_at) if wanted == "auto" else _named(stage, wanted)
    except MergeError as error:
        raise error.at(**document.where(_KEY)) from None
    if template is None:
        notes.append(f"line {document.where(_KEY)['line']}: no model has a chat template to take")
        return side
    texts = texts_of(side, lambda name: name in FILES)
    further = [n for n in names_of(side) if n.startswith(FURTHER)]
    if further:
        notes.append(f"further chat templates stay as they are: {', '.join(further)}")
    if marks := _marks(wanted, side):
        notes.append(
            f"the chat template {wanted} writes {', '.join(marks)}, which the tokenizer splits:"
            " add them as tokens of the recipe's tokenizer"
        )
    return side.with_texts(with_template(texts, template))


def _marks(wanted: str, side: Side) -> list[str]:
    """The marks of a known template that the tokenizer does not have, and so would split."""
    if not MARKS.get(wanted):
        return []
    tokenizer = "".join(texts_of(side, lambda name: name in TEXTS).values())
    return [mark for mark in MARKS[wanted] if mark not in tokenizer]


def _common(stage: Stage, open_at: OpenAt) -> str | None:
    """The template that most models have; the models each count once."""
    models: list[Checkpoint] = []
    for named in named_models(stage.model):
        model = open_at(named.reference, named.place)
        if not any(model.same_as(m) for m in models):
            models.append(model)
    found = [
        templates_in(texts_of(m.side, lambda n: n in FILES), m.label).get("default") for m in models
    ]
    return common_template(found)


def _named(stage: Stage, wanted: str) -> str:
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if is_template(wanted):
        return wanted
    try:
        return Path(wanted).expanduser().read_text("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"the chat template is not UTF-8 at byte {error.start}", file=wanted
        ) from None
    except (OSError, RuntimeError, ValueError):
        raise stage.document.error(
            "the value of 'chat_template' is no template, no known name and no file",
            _KEY,
            key="chat_template",
            found=repr(wanted)[:200],
            expected=f"auto, {', '.join(TEMPLATES)}, a file, or Jinja of 20 characters or more",
            do=hint(wanted, ["auto", *TEMPLATES]),
        ) from None
