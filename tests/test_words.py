"""Misspelt words anywhere in a recipe, and text that is no YAML: the place, and what was meant."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from merge import methods
from merge.errors import RecipeError
from merge.ir.dtypes import BY_NAME
from merge.recipe import schema
from merge.recipe.read import parse_recipe, read_recipe

from .tiny import compiled, error_of, place, value_at, zoo

OPEN = zoo(a=2, b=2, base=2)
TOP = "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\n"


@dataclass(frozen=True)
class Site:
    """Where words stand: the text around one, and the words that may stand there."""

    text: str  # with {} for the word
    words: tuple[str, ...]
    known: tuple[str, ...] = ()  # all that may be meant, where that is more

    def place(self, word: str) -> tuple[int, int]:
        """Line and column of the word, or of the key whose value it is."""
        before = self.text.partition("{}")[0]
        line = before.rpartition("\n")[2]
        start = len(line) - len(re.split(r"[\[{,] ?", line)[-1].lstrip(" -"))
        return before.count("\n") + 1, start + 1


def fields(model: type[schema.BaseModel]) -> tuple[str, ...]:
    return tuple(model.model_fields)


def braces(text: str) -> str:
    """The text with <> for {}, as in str.format."""
    return text.replace("<>", "{}")


REFERENCE = ("model", "lora", "override_architecture")
HALF = ("path", "revision")
PARAMETERS = tuple(sorted({k for m in methods.registry().values() for k in m.parameters}))
DTYPES = (*(n for n, d in BY_NAME.items() if d.kind == "float"),)
SHORT_DTYPES = ("bf16", "fp16", "fp32", "fp64", "half", "float")
MODULE = "merge_method: passthrough\nmodules:\n  default:\n    "
SOURCES = "slices:\n- sources:\n  - {model: a, layer_range: [0, 1]}\n"
TOKENIZER = f"{TOP}tokenizer:\n  "

SITES = {
    "top": Site(f"{TOP}<>: 1\n", fields(schema.RecipeModel)),
    "model": Site(f"{TOP.partition('models')[0]}models:\n- <>: a\n", fields(schema.ModelEntry)),
    "slice": Site(f"merge_method: linear\n{SOURCES}  <>: 1\n", fields(schema.SliceEntry)),
    "source": Site(
        "merge_method: linear\nslices:\n- sources:\n  - model: a\n    <>: 1\n",
        fields(schema.SourceEntry),
    ),
    "module": Site(f"{MODULE}models: [{{model: a}}]\n    <>: 1\n", fields(schema.ModuleEntry)),
    "model of a module": Site(f"{MODULE}models:\n    - <>: a\n", fields(schema.ModelEntry)),
    "slice of a module": Site(f"{MODULE}slices:\n    - <>: []\n", fields(schema.SliceEntry)),
    "tokenizer": Site(f"{TOKENIZER}<>: 1\n", fields(schema.TokenizerEntry)),
    "token": Site(f"{TOKENIZER}tokens:\n    x:\n      <>: 1\n", fields(schema.TokenEntry)),
    "token's source": Site(
        f"{TOKENIZER}tokens:\n    x:\n      source: {{kind: model_token, <>: 1}}\n",
        fields(schema.TokenSource),
    ),
    "reference": Site(f"{TOP}base_model: {{model: a, <>: b}}\n", REFERENCE),
    "path": Site(f"{TOP}base_model: {{path: a, <>: b}}\n", HALF),
    "adapter": Site(f"{TOP}base_model: {{model: a, lora: {{path: a, <>: b}}}}\n", HALF),
    "filter": Site(
        "merge_method: linear\nmodels: [{model: a}]\nparameters:\n  weight:\n"
        "  - value: 1\n    <>: mlp\n",
        ("filter", "value"),
    ),
    "method": Site("models: [{model: a}]\nmerge_method: <>\n", tuple(methods.registry())),
    "dtype": Site(f"{TOP}dtype: <>\n", DTYPES, (*DTYPES, *SHORT_DTYPES)),
    "out_dtype": Site(f"{TOP}out_dtype: <>\n", DTYPES, (*DTYPES, *SHORT_DTYPES)),
}
for name, made in methods.registry().items():
    base = "base_model: base\n" * (made.base == "required")
    SITES[f"parameter of {name}"] = Site(
        f"merge_method: {name}\n{base}models: [{{model: a}}]\nparameters:\n  <>: 1\n",
        tuple(made.parameters),
        PARAMETERS,
    )


def slip(draw: random.Random, word: str) -> str:
    """The word with one letter left out, put in, replaced, or swapped with the next."""
    at, letter = draw.randrange(len(word)), draw.choice(string.ascii_lowercase + "_")
    return draw.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + letter + word[at:],
            word[:at] + letter + word[at + 1 :],
            word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
        ]
    )


def slips_between(a: str, b: str) -> bool:
    """Whether one slip makes b of a: by trying them all."""
    letters = string.ascii_lowercase + string.digits + "_"
    made = {a[:i] + a[i + 1 :] for i in range(len(a))}
    made |= {a[:i] + c + a[i:] for i in range(len(a) + 1) for c in letters}
    made |= {a[:i] + c + a[i + 1 :] for i in range(len(a)) for c in letters}
    made |= {a[:i] + a[i + 1 : i + 2] + a[i] + a[i + 2 :] for i in range(len(a))}
    return b in made


def mistakes(count: int) -> list[tuple[str, str, str]]:
    """Site, word and typo; every site in turn, words at random."""
    draw, found = random.Random(11), dict[tuple[str, str, str], None]()
    turns = [(name, word) for name, site in SITES.items() for word in site.words]
    while len(found) < count:
        for name, word in turns:
            typo, site = slip(draw, word), SITES[name]
            known = {*site.words, *site.known}
            if typo and typo not in known and not typo.isspace() and typo not in ("null", "no"):
                found[name, word, typo] = None
    return list(found)


def test_every_mistake_is_placed_and_the_right_word_suggested() -> None:
    """Another word may be suggested only where it is one slip away as well."""
    others = 0
    cases = mistakes(300)
    assert len(cases) >= 300
    for name, word, typo in cases:
        site = SITES[name]
        error = error_of(site.text.replace("<>", typo).replace("{}", typo), OPEN)
        at = Site(braces(site.text), ()).place(typo)
        said = f"{name}: {typo} for {word}: {error}"
        assert place(error) == at, said
        assert repr(typo) in error.what, said
        suggested = re.fullmatch(r"did you mean '(.*)'\?", str(error.do))
        assert suggested, said
        if suggested[1] != word:
            others += 1
            assert suggested[1] in {*site.words, *site.known}, said
            assert slips_between(typo, suggested[1]), said
    assert others <= len(cases) // 50  # such as densty... of words that are all alike


def test_a_word_of_the_method_goes_before_one_of_another() -> None:
    text = "merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {x: 1}\n"
    assert error_of(text, OPEN).do == "did you mean 't'?"


def test_a_word_of_another_method_is_suggested_where_the_own_has_none_near() -> None:
    text = "merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {densty: 1}\n"
    assert error_of(text, OPEN).do == "did you mean 'density'?"


# -- lenient ---------------------------------------------------------------------------------------

UNKNOWN = {
    "top": (f"{TOP}bogus: 1\n", 4),
    "model": ("merge_method: passthrough\nmodels:\n- model: a\n  bogus: 1\n", 4),
    "slice": (f"merge_method: passthrough\n{SOURCES}  bogus: 1\n", 5),
    "source": (
        "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n"
        "    layer_range: [0, 1]\n    bogus: {deep: [1]}\n",
        6,
    ),
    "module": (f"{MODULE}models: [{{model: a}}]\n    bogus: 1\n", 5),
    "model of a module": (f"{MODULE}models:\n    - model: a\n      bogus: 1\n", 6),
    "tokenizer": (f"{TOP}tokenizer: {{source: base, bogus: 1}}\n", 4),
    "reference": ("merge_method: passthrough\nmodels:\n- model: {path: a, bogus: 1}\n", 3),
    "reference within": (
        "merge_method: passthrough\nmodels:\n- model:\n    model:\n      path: a\n      bogus: 1\n",
        6,
    ),
    "parameter": (f"{TOP[:-2]}, bogus: 1}}\n", 3),
    "filter": (
        "merge_method: linear\nmodels: [{model: a}]\nparameters:\n  weight:\n"
        "  - value: 1\n    bogus: mlp\n",
        6,
    ),
}


@pytest.mark.parametrize(("text", "line"), UNKNOWN.values(), ids=UNKNOWN)
def test_lenient_lists_what_it_ignores_at_every_level(text: str, line: int) -> None:
    error = error_of(text, OPEN)
    assert "unknown" in error.what and place(error)[0] == line
    made = compiled(text, OPEN, lenient=True)
    assert f"line {line}: 'bogus' is not known and is ignored" in made.notes
    assert list(made.checkpoint)


def test_lenient_takes_the_last_of_duplicates_and_lists_them() -> None:
    text = (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters:\n"
        "  t: 0.25\n  t: 0.75\nmerge_method: slerp\n"
    )
    assert place(error_of(text, OPEN)) == (6, 3)
    made = compiled(text, OPEN, lenient=True)
    assert value_at(made, "lm_head.weight", "t") == 0.75
    assert made.notes == (
        "line 6: 't' is given again: the last counts",
        "line 7: 'merge_method' is given again: the last counts",
    )


def test_a_merge_key_is_no_duplicate() -> None:
    text = (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
        "parameters: &p {t: 0.25}\n---\nname: x\nmerge_method: slerp\nbase_model: a\n"
        "models: [{model: a}, {model: b}]\nsave: x\nparameters: {<<: {t: 1}, t: 0.5}\n"
    )
    assert not compiled(text, OPEN, lenient=True).notes


# -- no YAML ---------------------------------------------------------------------------------------

MALFORMED: dict[str, tuple[str, tuple[int, int]]] = {
    "bad indentation": ("merge_method: linear\nmodels:\n  - model: a\n - model: b\n", (4, 2)),
    "a key too deep": ("merge_method: linear\n  models: []\n", (2, 9)),
    "an open bracket": ("merge_method: linear\nmodels: [{model: a}\n", (3, 1)),
    "an open brace": ("merge_method: linear\nmodels: [{model: a]\n", (2, 19)),
    "an open quote": ("merge_method: 'linear\nmodels: []\n", (3, 1)),
    "a tab for indentation": ("merge_method: linear\nmodels:\n\t- model: a\n", (3, 1)),
    "a key twice": ("merge_method: linear\nmodels: []\nmodels: []\n", (3, 1)),
    "an unknown alias": ("merge_method: linear\nmodels: *m\n", (2, 9)),
    "a bad escape": ('merge_method: linear\nbase_model: "C:\\models"\n', (2, 17)),
    "two mappings on a line": ("merge_method: linear models: []\n", (1, 28)),
    "a block that is none": ("merge_method: |linear\nmodels: []\n", (1, 16)),
    "an unknown tag": ("merge_method: !foo linear\n", (1, 15)),
    "a Python object": ("merge_method: !!python/object:os.system [ls]\n", (1, 15)),
    "a reserved sign": ("merge_method: linear\nbase_model: @org/a\n", (2, 13)),
    "a sign that is none": ("merge_method: linear\nname: \x07\n", (2, 7)),
    "a number that is none": ("merge_method: linear\nseed: !!int abc\n", (2, 7)),
    "a document within": ("models: [\n---\nmodels: []\n", (2, 1)),
    "a mapping for a list": ("merge_method: linear\nmodels:\n  model: a\n", (2, 1)),
    "a list for a mapping": ("merge_method: linear\nmodels:\n- [model, a]\n", (3, 3)),
    "text for a list": ("merge_method: linear\nmodels: a\n", (2, 1)),
    "a list for text": ("merge_method: [linear]\nmodels: [{model: a}]\n", (1, 1)),
}


@pytest.mark.parametrize(("text", "where"), MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("lenient", [False, True])
def test_malformed_text_has_its_place(text: str, where: tuple[int, int], lenient: bool) -> None:
    if lenient and "\nmodels: []\nmodels: []" in text:
        pytest.skip("the last counts")
    error = error_of(text, OPEN, lenient=lenient)
    assert place(error) == where, error


def test_a_model_that_is_no_mapping_is_told_its_keys() -> None:
    error = error_of("merge_method: linear\nmodels:\n- org/a\n", OPEN)
    assert error.what == "the value of 'models' is wrong: it is no mapping of keys"
    assert error.expected == "keys: model, align, parameters, statistics, layer_range"
    assert place(error) == (3, 3)


def test_a_bad_escape_comes_with_advice() -> None:
    error = error_of(MALFORMED["a bad escape"][0], OPEN)
    assert error.do == "write a path with backslashes in single quotes"


BYTES: dict[str, tuple[bytes, tuple[int, int]]] = {
    "Latin-1": ("merge_method: linear\nname: ü\n".encode("latin-1"), (2, 7)),
    "UTF-16": ("merge_method: linear\n".encode("utf-16"), (1, 1)),
    "after other letters": ("a: ü\nb: äö".encode() + b"\xff", (2, 6)),
    "after a mark": (b"\xef\xbb\xbfab\xff", (1, 3)),
    "cut short": ("a: ü".encode()[:-1], (1, 4)),
}


@pytest.mark.parametrize(("content", "where"), BYTES.values(), ids=BYTES)
def test_text_that_is_not_utf8_has_its_place(
    content: bytes, where: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "r.yml").write_bytes(content)
    with pytest.raises(RecipeError, match="not UTF-8") as caught:
        read_recipe(tmp_path / "r.yml")
    assert place(caught.value) == where
    assert caught.value.do == "save it as UTF-8"


TABS: dict[str, Callable[[str], str]] = {
    "before a comment": lambda t: t.replace("\n", "\t# x\n"),
    "at the ends": lambda t: t.replace("\n", " \t \n"),
    "after colons": lambda t: t.replace(": ", ":\t"),
    "on empty lines": lambda t: t.replace("\n", "\n\t\n"),
}


@pytest.mark.parametrize("change", TABS.values(), ids=TABS)
def test_tabs_between_words_are_white_space(change: Callable[[str], str]) -> None:
    text = "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n      weight: 1\n"
    assert parse_recipe(change(text)).final.model == parse_recipe(text).final.model
    assert parse_recipe(change(text)).source == change(text)
