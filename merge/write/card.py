"""The text of a model card, README.md: YAML front matter for the Hub, Markdown for people.

All that comes from elsewhere (names, licences, other people's cards) is shown as code, so that
nothing in it acts as Markdown or HTML. No dates, no machine: equal facts make equal bytes.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from merge.write.licence import Licence

__all__ = ["CARD", "Card", "CardInput", "MethodLine", "card_text", "code", "front_matter"]

CARD = "README.md"
_LONGEST = 200  # characters of anything that is shown in a line
_WORDS_OF_OLD_YAML = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


@dataclass(frozen=True, slots=True)
class CardInput:
    """One model that went in. hub: its id there; made_from: ids that it names as what it is from.

    weights: the digest of its files, in words; '' for weights that were in memory.
    """

    name: str
    roles: tuple[str, ...]
    parameters: str = ""
    hub: str | None = None
    revision: str | None = None
    made_from: tuple[str, ...] = ()
    licence: Licence = field(default_factory=Licence)
    weights: str = ""


@dataclass(frozen=True, slots=True)
class MethodLine:
    """A method as it was used. stage: of the recipe, where it has several. parameters: shared."""

    name: str
    summary: str
    paper: str = ""
    stage: str | None = None
    parameters: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """The facts of a card. merged: more than a copy. formula: where there is no recipe."""

    title: str
    version: str = ""
    inputs: tuple[CardInput, ...] = ()
    merged: bool = True
    methods: tuple[MethodLine, ...] = ()
    formula: str | None = None
    recipe: str | None = None
    stage: str | None = None  # which one of the recipe this is, if it is not the result
    command: str | None = None
    output: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    licence: Licence | None = None
    library: str | None = None
    pipeline: str | None = None
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def card_text(card: Card) -> str:
    """README.md of a merge."""
    parts = [
        f"# {card.title}",
        f"{_first_sentence(card)} Written by hf-merge {card.version}.",
        *_method(card),
        *_inputs(card.inputs),
        *_recipe(card),
        *(["## Output", *_list(card.output)] if card.output else []),
        *(["Not in it:", *_list(card.left_out)] if card.left_out else []),
        "## Verify",
        "`merge verify FOLDER` checks every byte of the weights, and of all files beside them but"
        " this one, against `merge_manifest.json`. That file also names the plan that made them.",
    ]
    return f"---\n{front_matter(_metadata(card))}---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(card: Card) -> dict[str, str | Sequence[str]]:
    licence = card.licence or Licence()
    relation = "adapter" if card.library == "peft" else "merge"
    found: dict[str, str | Sequence[str] | None] = {
        "base_model": list(
            dict.fromkeys(m for i in card.inputs for m in ([i.hub] if i.hub else i.made_from))
        ),
        "base_model_relation": relation if card.merged else None,
        "library_name": card.library,
        "pipeline_tag": card.pipeline,
        "license": licence.identifier,
        "license_name": licence.name,
        "license_link": licence.link,
        "language": card.languages,
        "datasets": card.datasets,
        "tags": [*(["merge"] if card.merged else []), *card.tags],
    }
    if not found["base_model"]:
        del found["base_model"], found["base_model_relation"]
    return {key: value for key, value in found.items() if value}


def front_matter(data: Mapping[str, str | Sequence[str]]) -> str:
    """YAML of words and lists of words, which readers of YAML 1.1 and 1.2 take for the same.

    The Hub's client reads 1.1, where ``no`` (Norwegian), ``1e3`` and ``12:30`` are no text.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    def text(value: str) -> str:
        plain = re.fullmatch(r"[A-Za-z][\w./+-]*", value, re.ASCII)
        odd = plain is None or value.lower() in _WORDS_OF_OLD_YAML
        return DoubleQuotedScalarString(value) if odd else value

    yaml, out = YAML(), io.StringIO()
    yaml.width = 10_000
    ready = {k: text(v) if isinstance(v, str) else [text(w) for w in v] for k, v in data.items()}
    if ready:
        yaml.dump(ready, out)
    return out.getvalue()


def code(text: str) -> str:
    """``text`` as a code span that no sign in it ends.

    >>> code("<b>"), code("`x`")
    ('`<b>`', '`` `x` ``')
    """
    kept = "".join(" " if c.isspace() else c for c in text if unicodedata.category(c)[0] != "C")
    line = " ".join(kept.split())
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
    fence = "`" * (1 + _longest_run(line))
    gap = " " if len(fence) > 1 or not line else ""
    return f"{fence}{gap}{line}{gap}{fence}"


def _first_sentence(card: Card) -> str:
    if not card.merged:
        return "A copy of one model's weights."
    if card.formula is not None:
        return f"Weights that were computed as {code(card.formula)}."
    number = sum(bool({"base", "model"} & set(i.roles)) for i in card.inputs)
    models = f"{number} models" if number != 1 else "one model"
    return f"The weights of {models}, merged."


def _method(card: Card) -> list[str]:
    lines = []
    for m in card.methods:
        stage = f" in stage {code(m.stage)}" if m.stage else ""
        paper = f" ({_linked(m.paper)})" if m.paper else ""
        shared = f" Shared by all models: {m.parameters}." if m.parameters else ""
        lines.append(f"{code(m.name)}{stage}: {m.summary.rstrip('.')}{paper}.{shared}")
    return ["## Method", *_list(lines)] if lines else []


def _linked(paper: str) -> str:
    """A citation with its arXiv numbers as links."""
    return re.sub(
        r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper.replace("|", "")
    )


def _inputs(inputs: Sequence[CardInput]) -> list[str]:
    """The table, and below it which files the models were."""
    if not inputs:
        return []
    rows = [["model", "role", "parameters", "revision", "licence"]]
    for i in inputs:
        licence = code(str(i.licence)) if i.licence.stated or i.licence.gated else "not stated"
        revision = code(i.revision) if i.revision else ""
        rows.append([_model(i), ", ".join(i.roles), i.parameters, revision, licence])
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    rows = [list(row) for row in zip(*columns, strict=True)]
    rows.insert(1, ["---"] * len(columns))
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    weights = list(dict.fromkeys(f"{code(i.name)}: {i.weights}" for i in inputs if i.weights))
    below = ["Their weight files:", *_list(weights)] if weights else []
    if any("headers" in i.weights for i in inputs):
        below.append(
            "`headers` is a SHA-256 over the headers and sizes of the files: it tells which tensors"
            " of which types they hold, not what the weights are."
        )
    return ["## Inputs", table, *below]


def _model(found: CardInput) -> str:
    name = code(found.name)
    if found.hub is not None:
        page = f"https://huggingface.co/{found.hub}"
        return f"[{name}]({page})" if found.hub == found.name else f"{name} ([Hub]({page}))"
    return f"{name}, from {', '.join(map(code, found.made_from))}" if found.made_from else name


def _recipe(card: Card) -> list[str]:
    """The recipe as it was written, and how to run it."""
    if card.recipe is None:
        return []
    parts = ["## Recipe", _fenced("yaml", card.recipe)]
    if card.stage is not None:
        parts.append(f"This is its stage {code(card.stage)}.")
    elif card.command is not None:
        parts += ["To make it again:", _fenced("sh", card.command)]
    return parts


def _fenced(language: str, text: str) -> str:
    """A block of code between fences that are longer than any in it."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{fence}"


def _longest_run(text: str) -> int:
    """Backticks in a row."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _list(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines)] if lines else []
