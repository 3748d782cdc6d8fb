"""Tokenizer files of a union, by transformers: old texts encode as before, new tokens anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import AddedToken, Tokenizer

from merge.errors import SourceError
from merge.vocabulary.chat import common_template, is_template, templates_in, with_template
from merge.vocabulary.combine import Combined, Member, combine
from merge.vocabulary.output import Files, tokenizer_files
from merge.vocabulary.parse import parse_vocabulary
from merge.vocabulary.templates import MARKS, TEMPLATES
from tests.tokens import byte_level, save_tokenizer, unigram, word_piece

FOX = "the quick brown fox jumps over the lazy dog and the dog sleeps on"
SEA = "the sea was quiet and the ships sailed over the waves in the dark"
CHAT = [AddedToken(f"<|{w}|>", special=True) for w in ("user", "end")]
PAIRS = {
    "bytes": (byte_level(FOX, 280), byte_level(SEA, 290, [*CHAT, AddedToken("New", lstrip=True)])),
    "pieces": (
        word_piece(["fox", "dog", "##s", "the"], [AddedToken("<b>")]),
        word_piece(["fox", "sea", "##s"], CHAT),
    ),
    "unigram": (unigram(["▁fox", "▁dog", "s"]), unigram(["▁fox", "▁sea", "s"], CHAT)),
}
WORDS = {"bytes": "the quick fox", "pieces": "the foxs dog", "unigram": "foxs dog"}
SAMPLE = {"bytes": "a<|user|>b<|end|>New", "pieces": "fox <|end|>", "unigram": "fox<|end|>fox"}


def union(
    folders: Path, made: tuple[Tokenizer, ...], names: tuple[str, ...] = (), **config: Any
) -> tuple[Files, Combined, dict[str, str]]:
    """The union of tokenizers saved by the library, written over the first one's folder."""
    members = []
    for i, tokenizer in enumerate(made):
        texts = save_tokenizer(tokenizer, folders / str(i), **config)
        members.append(Member(parse_vocabulary(texts, f"model {i}"), 1000))
    found = combine(members, 0, union=True)
    files = tokenizer_files(members, found, [*members[0].vocabulary.texts, *names])
    return files, found, dict(members[0].vocabulary.texts)


def load(folder: Path, texts: Mapping[str, str]) -> Any:
    """The tokenizer that transformers makes of the files."""
    from transformers import AutoTokenizer

    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", list(PAIRS))
@pytest.mark.parametrize("listed", [False, True], ids=["plain", "with added_tokens_decoder"])
def test_transformers_loads_the_union_and_encodes_as_before_and_anew(
    tmp_path: Path, kind: str, listed: bool
) -> None:
    base, other = PAIRS[kind]
    decoder = {
        str(i): {f: getattr(t, f) for f in ("content", "special", "normalized")}
        for i, t in base.get_added_tokens_decoder().items()
    }
    config = {"added_tokens_decoder": decoder} if listed else {}
    files, found, texts = union(tmp_path, (base, other), **config)
    assert set(files.texts) == {"tokenizer.json", *(["tokenizer_config.json"] if listed else [])}
    loaded = load(tmp_path / "out", {**texts, **files.texts})
    assert loaded.get_vocab() == found.ids
    assert len(loaded) == len(found.ids)
    old = base.encode(WORDS[kind], add_special_tokens=False).ids
    assert loaded.encode(WORDS[kind], add_special_tokens=False) == old
    for token in found.new:
        if kind != "unigram" or not token.startswith("▁"):
            assert loaded.convert_tokens_to_ids(token) == found.ids[token]
            assert found.ids[token] in loaded.encode(token, add_special_tokens=False)
    backend = loaded.backend_tokenizer.get_added_tokens_decoder()
    for token in CHAT:
        assert backend[found.ids[token.content]].special
    encoded = loaded.encode(SAMPLE[kind], add_special_tokens=False)
    assert found.ids["<|end|>"] in encoded
    if kind == "bytes":
        assert backend[found.ids["New"]].lstrip
        assert loaded.decode(encoded, skip_special_tokens=True) == "abNew"


@pytest.mark.parametrize("listed", [False, True], ids=["plain", "with added_tokens_decoder"])
@pytest.mark.parametrize(
    "named", ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "RobertaTokenizer"]
)
def test_classes_that_build_their_tokenizer_anew_come_to_the_same_ids(
    tmp_path: Path, named: str, listed: bool
) -> None:
    """They take pieces and added tokens from the files, and leave the rest."""
    base, other = PAIRS["bytes"]
    decoder = {str(i): {"content": t} for i, t in enumerate(("<s>", "</s>"))} if listed else {}
    roles = dict.fromkeys(("bos_token", "cls_token", "unk_token", "pad_token"), "<s>")
    roles |= dict.fromkeys(("eos_token", "sep_token", "mask_token"), "</s>")
    config = {"tokenizer_class": named, **roles}
    config |= {"added_tokens_decoder": decoder} if decoder else {}
    files, found, texts = union(tmp_path, (base, other), **config)
    loaded = load(tmp_path / "out", {**texts, **files.texts})
    assert type(loaded).__name__ == named
    assert loaded.get_vocab() == found.ids
    old = base.encode(WORDS["bytes"], add_special_tokens=False).ids
    assert loaded.encode(WORDS["bytes"], add_special_tokens=False) == old
    added = loaded.encode("<|user|>New", add_special_tokens=False)
    assert added == [found.ids["<|user|>"], found.ids["New"]]


def test_all_but_the_added_tokens_stays_as_it_was(tmp_path: Path) -> None:
    files, found, texts = union(tmp_path, PAIRS["bytes"])
    before, after = json.loads(texts["tokenizer.json"]), json.loads(files.texts["tokenizer.json"])
    added = after.pop("added_tokens")
    assert before.pop("added_tokens") == added[:2]
    assert before == after
    assert [t["id"] for t in added[2:]] == [found.ids[t] for t in found.new]
    text = files.texts["tokenizer.json"]
    rewritten = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    assert rewritten.startswith(text.partition('"normalizer"')[0]), "as the library lays it out"


def test_a_vocabulary_that_is_a_models_own_is_copied(tmp_path: Path) -> None:
    base, other = PAIRS["bytes"]
    same, _, _ = union(tmp_path / "a", (base, base))
    assert (same.copied, dict(same.texts), same.gone) == (0, {}, ())
    larger = byte_level(FOX, 280, CHAT)
    taken, found, _ = union(tmp_path / "b", (base, larger))
    assert found.new == ("<|user|>", "<|end|>")
    assert (taken.copied, dict(taken.texts)) == (1, {}), "the second one's files are the union's"
    lost, _, _ = union(tmp_path / "c", (base, other))
    assert lost.texts


def test_older_files_stay_with_a_list_of_what_they_lack(tmp_path: Path) -> None:
    names = ("vocab.json", "merges.txt", "tokenizer.model", "tekken.json", "qwen.tiktoken")
    files, found, _ = union(tmp_path, PAIRS["bytes"], names)
    assert json.loads(files.texts["added_tokens.json"]) == {t: found.ids[t] for t in found.new}
    assert files.gone == ("tekken.json", "qwen.tiktoken")
    kept, gone = files.notes
    assert "vocab.json, merges.txt, tokenizer.model of model 0 hold none of the new tokens" in kept
    assert "tekken.json, qwen.tiktoken of model 0 would not know" in gone


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_model_with_older_files_alone_takes_new_tokens(tmp_path: Path, kind: str) -> None:
    base, other = PAIRS[kind]
    model = json.loads(base.to_str())["model"]
    config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    if kind == "bytes":
        texts = {
            "vocab.json": json.dumps(model["vocab"]),
            "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]),
            "special_tokens_map.json": json.dumps(roles),
        }
    else:
        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        vocab = model["vocab"]
        texts = {"vocab.txt": "\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n"}
    texts["tokenizer_config.json"] = json.dumps(config)
    second = parse_vocabulary({"tokenizer.json": other.to_str()}, "other")
    members = [Member(parse_vocabulary(texts, "old"), 1000), Member(second, 1000)]
    found = combine(members, 0, union=True)
    files = tokenizer_files(members, found, list(texts))
    assert set(files.texts) == {"tokenizer_config.json", "added_tokens.json"}
    loaded = load(tmp_path / "out", {**texts, **files.texts})
    assert loaded.get_vocab() == found.ids
    old = base.encode(WORDS[kind], add_special_tokens=False).ids
    assert loaded.encode(WORDS[kind], add_special_tokens=False) == old
    assert found.ids["<|end|>"] in loaded.encode(SAMPLE[kind])
    if kind == "bytes":
        assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")


# -- chat templates ------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
SAID = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello.[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello.</s>[INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_built_in_template_says_a_talk_in_its_format(tmp_path: Path, name: str) -> None:
    texts = save_tokenizer(byte_level(FOX, 270), tmp_path / "m", bos_token="<s>", eos_token="</s>")
    texts |= with_template(texts, TEMPLATES[name])
    loaded = load(tmp_path / "out", texts)
    said = loaded.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert said == SAID[name]
    assert all(mark in SAID[name] for mark in MARKS[name])
    open_end = loaded.apply_chat_template(TALK, tokenize=False)
    assert said.startswith(open_end)
    alone = loaded.apply_chat_template(TALK[1:], tokenize=False)
    assert "Be brief." not in alone
    if name in ("alpaca", "mistral"):
        with pytest.raises(jinja2.TemplateError, match=f"{name} knows the roles"):
            loaded.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_a_template_is_found_in_each_form() -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    config = {"tokenizer_config.json": json.dumps({"chat_template": named})}
    assert templates_in(config, "m") == {"default": "D", "tool_use": "T"}
    old = {"tokenizer_config.json": '{"chat_template": "old"}'}
    assert templates_in(old, "m") == {"default": "old"}
    assert templates_in({**old, "chat_template.jinja": "new"}, "m") == {"default": "new"}
    further = {"additional_chat_templates/rag.jinja": "R"}
    assert templates_in({**old, **further}, "m") == {"default": "old", "rag": "R"}
    assert templates_in({"chat_template.json": '{"chat_template": "P"}'}, "m") == {"default": "P"}
    assert templates_in({"tokenizer_config.json": "{}"}, "m") == {}
    assert templates_in({"tokenizer_config.json": '{"chat_template": 3}'}, "m") == {}
    with pytest.raises(SourceError, match="not sound JSON"):
        templates_in({"tokenizer_config.json": "{"}, "m")


def test_the_commonest_template_is_chosen_and_of_equals_the_first() -> None:
    assert common_template(["a", "b", None, "b", ""]) == "b"
    assert common_template(["a", "b", "b", "a"]) == "a"
    assert common_template([None, ""]) is None


def test_a_text_is_a_template_when_it_is_long_and_has_a_brace() -> None:
    assert is_template("{% for m in messages %}{% endfor %}")
    assert not is_template("{{ messages }}")
    assert not is_template("no braces in a long text at all")


def test_a_template_is_written_where_the_model_keeps_it() -> None:
    config = {"tokenizer_config.json": '{"chat_template": "old", "a": 1}'}
    written = with_template(config, 'new "{{ x }}"')
    assert list(written) == ["tokenizer_config.json"]
    kept = json.loads(written["tokenizer_config.json"])
    assert kept == {"chat_template": 'new "{{ x }}"', "a": 1}
    both = with_template({**config, "chat_template.jinja": "old"}, "new")
    assert set(both) == {"tokenizer_config.json", "chat_template.jinja"}
    assert both["chat_template.jinja"] == "new"
    bare = {"tokenizer_config.json": '{"a": 1}'}
    assert with_template(bare, "new") == {"chat_template.jinja": "new"}
    processor = {"chat_template.json": '{"chat_template": "old"}'}
    assert with_template(processor, "new") == {"chat_template.json": '{"chat_template": "new"}'}
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    listed = {"tokenizer_config.json": json.dumps({"chat_template": named})}
    changed = json.loads(with_template(listed, "new")["tokenizer_config.json"])
    assert changed["chat_template"] == [{"name": "default", "template": "new"}, named[1]]


def test_a_template_that_is_there_already_changes_no_file() -> None:
    for texts in (
        {"tokenizer_config.json": '{"chat_template": "\\u0041 same"}'},
        {"chat_template.jinja": "A same", "tokenizer_config.json": "{}"},
    ):
        assert with_template(texts, "A same") == {}
