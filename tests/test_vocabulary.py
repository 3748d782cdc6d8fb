"""Vocabularies: read from files, united, and the rows of embeddings that follow from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from merge.errors import PlanError, SourceError
from merge.ir.rows import RowTable
from merge.vocabulary.combine import Member, combine
from merge.vocabulary.document import parse_document
from merge.vocabulary.ids import follow, resize
from merge.vocabulary.parse import parse_vocabulary
from merge.vocabulary.table import Choice, origins
from merge.vocabulary.tokens import Vocabulary
from tests.tokens import (
    Known,
    Matrix,
    byte_level,
    rows_by_hand,
    save_tokenizer,
    unigram,
    union_by_hand,
    word_piece,
)

FOX = "the quick brown fox jumps over the lazy dog and the dog sleeps on"
SEA = "the sea was quiet and the ships sailed over the waves in the dark"
CHAT = [AddedToken(f"<|{w}|>", special=True) for w in ("user", "end")]


def three() -> list[Tokenizer]:
    """Tokenizers that overlap: the second and the third define <|end|> in ways of their own."""
    return [
        byte_level(FOX, 290, [AddedToken("<pad>", special=True)]),
        byte_level(SEA, 290, [*CHAT, AddedToken("<pad>", special=False)]),
        byte_level(FOX + SEA, 310, [AddedToken("<|end|>", lstrip=True), AddedToken("Extra")]),
    ]


def vocabulary(made: Tokenizer, label: str = "model", **config: object) -> Vocabulary:
    texts = {"tokenizer.json": made.to_str(pretty=True), "tokenizer_config.json": "{}"}
    if config:
        texts["tokenizer_config.json"] = json.dumps(config, indent=2)
    return parse_vocabulary(texts, label)


def members(made: Sequence[Tokenizer], rows: Sequence[int]) -> list[Member]:
    return [Member(vocabulary(t, name), r) for t, r, name in zip(made, rows, "abc", strict=False)]


def evaluate(table: RowTable, matrices: Sequence[Matrix]) -> Matrix:
    """The rows of a table, one after another."""
    out = np.zeros((table.count, matrices[0].shape[1]))
    for i, (begin, end) in enumerate(zip(table.begin, table.end, strict=True)):
        taken = [matrices[table.operand[e]][table.row[e]] for e in range(begin, end)]
        if taken:
            out[i] = np.mean(taken, axis=0)
    return out


def random_matrices(rows: Sequence[int]) -> list[Matrix]:
    random = np.random.default_rng(0)
    return [random.normal(size=(r, 3)) for r in rows]


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (byte_level(FOX, 280, CHAT), "BPE"),
        (word_piece(["fox", "dog", "##s"], CHAT), "WordPiece"),
        (unigram(["▁fox", "▁dog", "s"], CHAT), "Unigram"),
    ],
)
def test_a_tokenizer_file_says_ids_kind_and_added_tokens(made: Tokenizer, kind: str) -> None:
    read = vocabulary(made, bos_token="<s>", eos_token={"content": "</s>", "special": True}, b=1)
    assert dict(read.ids) == made.get_vocab()
    assert read.kind == kind
    assert read.pieces == made.get_vocab_size(with_added_tokens=False)
    assert read.roles == {"bos_token": "<s>", "eos_token": "</s>"}
    assert read.in_order() == sorted(made.get_vocab(), key=made.token_to_id)
    assert not read.notes
    for number, theirs in made.get_added_tokens_decoder().items():
        ours = read.added[theirs.content]
        assert read.ids[theirs.content] == number
        for flag in ("special", "lstrip", "rstrip", "single_word", "normalized"):
            assert getattr(ours, flag) == getattr(theirs, flag)
    assert len(read.added) == len(made.get_added_tokens_decoder())


def test_older_files_say_the_same() -> None:
    bpe = byte_level(FOX, 280)
    whole = json.loads(bpe.to_str())["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(m) for m in whole["merges"]) + "\n"
    texts = {
        "vocab.json": json.dumps(whole["vocab"]),
        "merges.txt": merges,
        "added_tokens.json": '{"<b>": 281, "<a>": 280}',
        "special_tokens_map.json": '{"pad_token": {"content": "<a>"}, "bos_token": "<s>"}',
    }
    read = parse_vocabulary(texts, "old")
    assert dict(read.ids) == {**bpe.get_vocab(), "<a>": 280, "<b>": 281}
    assert read.kind == "BPE"
    assert read.added["<a>"].special and not read.added["<a>"].normalized
    assert not read.added["<b>"].special and read.added["<b>"].normalized
    assert read.roles == {"pad_token": "<a>", "bos_token": "<s>"}
    del texts["merges.txt"]
    assert parse_vocabulary(texts, "old").kind == "WordLevel"
    lines = parse_vocabulary({"vocab.txt": "[UNK]\nfox\r\n##es\n"}, "old")
    assert (lines.kind, dict(lines.ids)) == ("WordPiece", {"[UNK]": 0, "fox": 1, "##es": 2})


def test_tokens_that_only_the_config_knows_come_after_the_others() -> None:
    """As transformers loads them."""
    decoder = {"271": {"content": "<late>", "special": True}, "0": {"content": "<s>"}}
    made = byte_level(FOX, 270, CHAT[:1])
    read = vocabulary(made, added_tokens_decoder=decoder)
    assert (read.ids["<|user|>"], read.ids["<late>"]) == (270, 271)
    assert read.added["<late>"].special
    assert read.added["<s>"].special, "tokenizer.json goes before the config"


def test_ids_are_those_that_the_library_gives_whatever_the_file_says() -> None:
    text = byte_level(FOX, 270, CHAT).to_str().replace('"id":271', '"id":400')
    read = parse_vocabulary({"tokenizer.json": text}, "gap")
    assert read.ids["<|end|>"] == Tokenizer.from_str(text).token_to_id("<|end|>") == 271
    assert "'<|end|>' has id 400, but it is loaded as 271" in read.notes[0]


def test_models_of_older_libraries_that_do_not_name_their_kind() -> None:
    for made in (byte_level(FOX, 270), word_piece(["fox"])):
        whole = json.loads(made.to_str())
        kind = whole["model"].pop("type")
        assert parse_vocabulary({"tokenizer.json": json.dumps(whole)}, "old").kind == kind


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"tokenizer.json": "{"}, "not sound JSON"),
        ({"tokenizer.json": "[1]"}, "not sound JSON: expected '{'"),
        ({"tokenizer.json": '{"model": {}}'}, "no 'vocab'"),
        ({"tokenizer.json": '{"model": {"vocab": {"a": "1"}}}'}, "'1', which is no id"),
        ({"tokenizer.json": '{"model": {"vocab": {"a": -1}}}'}, "key: model.vocab"),
        ({"tokenizer.json": '{"model": {"vocab": [1]}}'}, "key: model.vocab"),
        ({"tokenizer.json": '{"model": null}'}, "a type and a vocab"),
        ({"tokenizer.json": '{"model": {"vocab": {"\\ud800": 0}}}'}, "half a surrogate"),
        ({"tokenizer.json": '{"model": ' + "[" * 100_000}, "nested too deeply"),
        ({"vocab.txt": "a", "added_tokens.json": '{"b": "x"}'}, "file: added_tokens.json"),
        ({"tokenizer_config.json": "{}"}, "no file says what the tokens of a model are"),
    ],
)
def test_unsound_files_are_refused_by_name(texts: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match="unsound-model") as caught:
        parse_vocabulary(texts, "unsound-model")
    assert message in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v, max_size=3)
)


@given(st.dictionaries(st.text(), JSON), st.dictionaries(st.text(), JSON), st.booleans())
def test_a_document_with_values_replaced_is_the_object_with_those_values(
    values: dict[str, object], changes: dict[str, object], pretty: bool
) -> None:
    text = json.dumps(values, indent=2 if pretty else None) + "\n"
    document = parse_document(text)
    assert document.values == values
    new = document.replaced({k: json.dumps(v) for k, v in changes.items()})
    assert json.loads(new) == {**values, **changes}
    assert list(json.loads(new)) == list({**values, **changes})
    assert document.replaced({}) == text


@pytest.mark.parametrize(
    "text", ["", "[]", "{1: 2}", '{"a" 1}', '{"a": 1,}', '{"a": 1', "{} x", "{,}"]
)
def test_what_is_no_object_is_no_document(text: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)expect|no text|more text"):
        parse_document(text)


# -- union ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [0, 1, 2])
def test_a_union_is_the_one_made_by_hand(base: int) -> None:
    made, rows = three(), [296, 293, 320]
    known = [Known.of(t, r) for t, r in zip(made, rows, strict=True)]
    found = combine(members(made, rows), base, union=True, extra=["Extra", "more"])
    wanted = union_by_hand(known, base, ["Extra", "more"])
    assert found.ids == wanted
    assert found.new == tuple(sorted(wanted.keys() - made[base].get_vocab(), key=wanted.get))
    assert found.rows == max(len(wanted), rows[base])


def test_the_first_definition_of_an_added_token_counts_and_clashes_are_told() -> None:
    found = combine(members(three(), [300, 300, 320]), 0, union=True)
    assert found.added["<pad>"].special
    assert found.added["<|end|>"] == vocabulary(three()[1]).added["<|end|>"]
    assert any("a and b define added tokens differently" in n for n in found.notes)
    clash = next(n for n in found.notes if "b and c define" in n)
    assert "'<|end|>' (special true against false" in clash
    assert "lstrip false against true" in clash


def test_an_ordinary_token_of_the_base_becomes_an_added_one_where_another_model_has_it_so() -> None:
    first = byte_level(FOX, 290)
    assert first.token_to_id("fo") is not None
    second = byte_level(SEA, 270, [AddedToken("fo", single_word=True)])
    found = combine(members([first, second], [290, 271]), 0, union=True)
    assert found.ids["fo"] == first.token_to_id("fo")
    assert found.added["fo"].single_word
    assert "fo" not in found.new


def test_a_token_without_a_row_in_its_model_brings_nothing() -> None:
    made = [byte_level(FOX, 290), byte_level(FOX, 290, CHAT)]
    found = combine(members(made, [290, 291]), 0, union=True)
    assert found.new == ("<|user|>",)
    assert any("b: its embeddings have 291 rows, and none for 1 of" in note for note in found.notes)


def test_a_token_of_the_base_without_a_row_keeps_its_id_and_gets_a_row_from_another_model() -> None:
    made = [byte_level(FOX, 290, CHAT), byte_level(FOX, 290, CHAT)]
    both = members(made, [290, 292])
    found = combine(both, 0, union=True)
    assert (found.new, found.rows, found.ids["<|end|>"]) == ((), 292, 291)
    matrices = random_matrices([290, 292])
    table = origins(both, found, 0, {}).table(0)
    np.testing.assert_array_equal(evaluate(table, matrices)[290:], matrices[1][290:])


def test_tokens_that_no_model_has_a_row_for_get_none() -> None:
    """As Gemma's tokens for images, which lie beyond the text model's matrix."""
    found = combine(members([byte_level(FOX, 290, CHAT)], [290]), 0, union=True)
    assert (found.new, found.rows) == ((), 290)
    assert "290 rows, and none for 2 of its tokens" in found.notes[0]
    with_new = combine(members([byte_level(FOX, 290, CHAT)], [290]), 0, union=True, extra=["xyzzy"])
    assert (with_new.ids["xyzzy"], with_new.rows) == (292, 293)


def test_without_union_the_vocabulary_is_the_ground_with_extra_tokens() -> None:
    made = three()
    found = combine(members(made, [291, 293, 312]), 1, union=False, extra=["xyzzy", "<|end|>"])
    assert found.ids == {**made[1].get_vocab(), "xyzzy": 293}
    assert found.new == ("xyzzy",)


def test_a_base_with_gaps_in_its_ids_takes_no_new_tokens() -> None:
    whole = json.loads(byte_level(FOX, 270).to_str())
    whole["model"]["vocab"]["far"] = 400
    gap = parse_vocabulary({"tokenizer.json": json.dumps(whole)}, "gap")
    assert combine([Member(gap, 401)], 0, union=True).rows == 401
    with pytest.raises(PlanError, match="gaps in its ids"):
        combine([Member(gap, 401)], 0, union=True, extra=["new"])


# -- rows ----------------------------------------------------------------------------------------

CHOICES: dict[str, tuple[Choice, tuple[object, ...]]] = {
    "dog": (Choice((2, 7)), (2, 7)),
    "Ġthe": (Choice((1, 290), force=True), (1, 290, "!")),
    "<|end|>": (Choice(None), ("zero",)),
    "<pad>": (Choice(None, force=True), ("zero", "!")),
    "brand new": (Choice((0, 3)), (0, 3)),
}


@pytest.mark.parametrize("rows", [(291, 293, 312), (320, 293, 330), (296, 320, 700), (291, 292, 9)])
@pytest.mark.parametrize("base", [0, 1, 2])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("ground", [None, 0, 1])
def test_rows_are_those_taken_by_hand(
    rows: tuple[int, ...], base: int, chosen: bool, ground: int | None
) -> None:
    """Padding in none, in the base, in others, and a model with fewer rows than tokens."""
    made = three()
    extra = ["dog", "Ġthe", "<|end|>", "<pad>", "brand new"] if chosen else []
    union, start = ground is None, base if ground is None else ground
    everyone = members(made, rows)
    found = combine(everyone, start, union=union, extra=extra)
    choices = {t: c for t, (c, _) in CHOICES.items()} if chosen else {}
    by_hand = {t: h for t, (_, h) in CHOICES.items()} if chosen else {}
    whence = origins(everyone, found, base, choices)
    known = [Known.of(t, r) for t, r in zip(made, rows, strict=True)]
    matrices = random_matrices(rows)
    wanted = rows_by_hand(known, matrices, found.ids, base, start, by_hand)
    for member in range(3):
        table = whence.table(member)
        got = evaluate(table, matrices)
        np.testing.assert_allclose(got, wanted[member][: found.rows], rtol=1e-12)
        assert not wanted[member][found.rows :].any()


def test_rows_are_rounded_up_by_the_mean_of_the_models_own_tokens() -> None:
    made, rows = three(), (300, 293, 312)
    everyone = members(made, rows)
    found = combine(everyone, 0, union=True)
    whence = origins(everyone, found, 0, {})
    matrices = random_matrices(rows)
    for member, tokens in enumerate((291, 293, 312)):
        table = whence.table(member, multiple=64)
        assert table.count % 64 == 0 and 0 < table.count - found.rows < 64
        got = evaluate(table, matrices)
        np.testing.assert_array_equal(got[: found.rows], evaluate(whence.table(member), matrices))
        mean = np.broadcast_to(matrices[member][:tokens].mean(0), got[found.rows :].shape)
        np.testing.assert_allclose(got[found.rows :], mean, rtol=1e-12)
        assert len(table.row) < found.rows + 3 * tokens, "the rows share one list"
    even = whence.table(0, multiple=found.rows)
    assert even == whence.table(0)


def test_rows_of_statistics_are_zero_where_a_model_lacks_a_token() -> None:
    made, rows = three(), (300, 293, 312)
    everyone = members(made, rows)
    found = combine(everyone, 0, union=True)
    table = origins(everyone, found, 0, {}).own_table(1, multiple=8)
    matrix = random_matrices(rows)[1]
    got = evaluate(table, [matrix])
    assert len(got) % 8 == 0
    for token, i in found.ids.items():
        old = made[1].token_to_id(token)
        np.testing.assert_array_equal(got[i], 0.0 if old is None else matrix[old])
    assert not got[found.rows :].any()


def test_rows_of_a_model_outside_the_merge_are_not_used() -> None:
    made, rows = three(), (291, 293, 320)
    everyone = members(made, rows)
    everyone[2] = Member(everyone[2].vocabulary, 320, present=False)
    found = combine(everyone, 2, union=False)
    assert (found.ids, found.rows) == (made[2].get_vocab(), 320)
    whence = origins(everyone, found, 0, {})
    assert {int(o) for m in (0, 1) for o in whence.table(m).operand} == {0, 1}
    matrices = random_matrices(rows)
    got = evaluate(whence.table(0), matrices)
    for token, i in found.ids.items():
        if (old := made[0].token_to_id(token)) is not None:
            np.testing.assert_array_equal(got[i], matrices[0][old])
        elif (old := made[1].token_to_id(token)) is not None:
            np.testing.assert_array_equal(got[i], matrices[1][old])
        else:
            assert not got[i].any()


def test_every_row_is_of_one_class() -> None:
    made, rows = three(), (340, 293, 330)
    everyone = members(made, rows)
    found = combine(everyone, 0, union=True, extra=["brand new"])
    counts = origins(everyone, found, 0, {}).counts(["a", "b", "c"])
    sets = [set(t.get_vocab()) for t in made]
    averaged = counts.pop("averaged for models that lack them")
    assert averaged == len((sets[1] & sets[2]) - sets[0])
    assert counts.pop("shared") == sum(sum(t in s for s in sets) > 1 for t in set().union(*sets))
    for i, label in enumerate("abc"):
        others = set().union(*(s for j, s in enumerate(sets) if j != i))
        assert counts.pop(f"only in {label}", 0) == len(sets[i] - others)
    assert counts == {"in no model": 1, "padding": found.rows - len(found.ids)} or (
        found.rows == len(found.ids) and counts == {"in no model": 1}
    )


TOKENS = st.lists(st.sampled_from([f"t{i}" for i in range(12)]), unique=True, max_size=9)


@settings(max_examples=60)
@given(st.lists(st.tuples(TOKENS, TOKENS, st.integers(-3, 4)), min_size=1, max_size=4), st.data())
def test_a_union_of_any_vocabularies_is_the_one_made_by_hand(
    drawn: list[tuple[list[str], list[str], int]], data: st.DataObject
) -> None:
    """Word-level vocabularies of drawn pieces and added tokens, with more or fewer rows."""
    everyone, known = [], []
    for i, (pieces, added, more) in enumerate(drawn):
        vocab = {"<unk>": 0, **{t: n + 1 for n, t in enumerate(pieces)}}
        entries = [{"id": 0, "content": t, "special": bool(i % 2)} for t in added]
        whole = {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": entries}
        read = parse_vocabulary({"tokenizer.json": json.dumps(whole)}, f"m{i}")
        rows = max(1, len(read.ids) + more)
        everyone.append(Member(read, rows))
        known.append(Known(dict(read.ids), list(read.added), rows))
    base = data.draw(st.integers(0, len(drawn) - 1))
    extra = data.draw(TOKENS)
    found = combine(everyone, base, union=True, extra=extra)
    assert found.ids == union_by_hand(known, base, extra)
    matrices = random_matrices([k.rows for k in known])
    wanted = rows_by_hand(known, matrices, found.ids, base, base)
    whence = origins(everyone, found, base, {})
    for member in range(len(drawn)):
        got = evaluate(whence.table(member), matrices)
        np.testing.assert_allclose(got, wanted[member][: found.rows], rtol=1e-12)
        assert not wanted[member][found.rows :].any()


# -- ids in configs ------------------------------------------------------------------------------


def test_the_size_of_the_vocabulary_is_set_where_it_was_said() -> None:
    assert resize({"vocab_size": 9, "other": 9}, 9, 12) == {"vocab_size": 12, "other": 9}
    nested = {"vocab_size": 5, "text_config": {"vocab_size": 9}, "audio_config": {"vocab_size": 4}}
    assert resize(nested, 9, 12) == {**nested, "text_config": {"vocab_size": 12}}
    stale = {"vocab_size": 8, "n": 1}  # the matrix has 9 rows
    assert resize(stale, 9, 12) == {"vocab_size": 12, "n": 1}
    assert resize({"text_config": {"n": 1}}, 9, 12) == {"text_config": {"n": 1, "vocab_size": 12}}
    assert resize({"n": 1}, 9, 12) == {"n": 1}
    assert resize(stale, 9, 9) == stale


def test_ids_of_tokens_follow_their_texts() -> None:
    old = Vocabulary("m", "BPE", {"<s>": 1, "</s>": 2, "<pad>": 3, "<x>": 4}, 5, {}, {}, {})
    ids = {"<s>": 11, "</s>": 12, "<pad>": 3}
    config = {
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": -1,
        "image_token_index": 900,
        "forced_decoder_ids": [[1, 2], [2, 3]],
        "suppress_tokens": [1, 2],
        "bad_words_ids": [[1, 2], [3]],
        "text_config": {"decoder_start_token_id": 2, "num_layers": 2},
        "unk_token_id": None,
        "layers": 2,
    }
    changed, left = follow(config, old, ids, {})
    assert changed == {
        "bos_token_id": 11,
        "eos_token_id": [12, 3],
        "pad_token_id": -1,
        "image_token_index": 900,
        "forced_decoder_ids": [[1, 12], [2, 3]],
        "suppress_tokens": [11, 12],
        "bad_words_ids": [[11, 12], [3]],
        "text_config": {"decoder_start_token_id": 12, "num_layers": 2},
        "unk_token_id": None,
        "layers": 2,
    }
    assert not left


def test_a_token_that_is_gone_gives_way_to_that_of_the_same_role() -> None:
    old = Vocabulary("m", "BPE", {"<s>": 1, "<x>": 4}, 5, {}, {}, {})
    config = {"eos_token_id": 4, "sep_token_id": 4}
    changed, left = follow(config, old, {"<end>": 7}, {"eos_token": "<end>"})
    assert changed == {"eos_token_id": 7, "sep_token_id": 4}
    assert left == ["sep_token_id 4 ('<x>')"]


# -- determinism ---------------------------------------------------------------------------------

SCRIPT = """
import hashlib, json, sys
from pathlib import Path
from merge.vocabulary.combine import Member, combine
from merge.vocabulary.output import tokenizer_files
from merge.vocabulary.parse import parse_vocabulary
from merge.vocabulary.table import origins
texts = [{"tokenizer.json": Path(p).read_text()} for p in sys.argv[1:]]
everyone = [Member(parse_vocabulary(t, str(i)), 320) for i, t in enumerate(texts)]
found = combine(everyone, 0, union=True, extra=["b", "a", "new"])
whence = origins(everyone, found, 0, {})
made = tokenizer_files(everyone, found, ["tokenizer.json", "vocab.json"])
tables = [whence.table(m).digest for m in range(len(everyone))]
print(json.dumps([found.ids, found.notes, tables, dict(made.texts), whence.counts("abc")]))
"""


def test_nothing_depends_on_the_seed_of_hashes(tmp_path: Path) -> None:
    paths = []
    for name, made in zip("abc", three(), strict=True):
        save_tokenizer(made, tmp_path / name)
        paths.append(str(tmp_path / name / "tokenizer.json"))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT, *paths],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "77")
    }
    assert len(outputs) == 1
    assert len(json.loads(outputs.pop())[0]) > 310
