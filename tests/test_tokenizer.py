"""Recipes that change the vocabulary: rows of embeddings and heads, tokenizers, ids, templates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

import merge
from merge.errors import MergeError, PlanError, RecipeError
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import Gather
from merge.ir.expr import Read, walk
from merge.recipe.compile import Compiled, compile_recipe
from merge.recipe.read import parse_recipe
from tests.adapters import lora, train
from tests.conftest import write_model
from tests.tokens import Known, byte_level, rows_by_hand, save_tokenizer, union_by_hand

FOX = "the quick brown fox jumps over the lazy dog and the dog sleeps on"
SEA = "the sea was quiet and the ships sailed over the waves in the dark"
CHAT = [AddedToken(f"<|{w}|>", special=True) for w in ("user", "end")]
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LAYER = "model.layers.{}.mlp.up_proj.weight"
WIDTH = 3
ZOO: dict[str, tuple[Tokenizer, int]] = {
    "a": (byte_level(FOX, 290, [AddedToken("<pad>", special=True)]), 300),  # 9 rows of padding
    "b": (byte_level(SEA, 290, [*CHAT, AddedToken("<pad>")]), 293),
    "c": (byte_level(FOX + SEA, 310, [AddedToken("<|end|>", lstrip=True)]), 320),
}
NUMBERS = {"a": 0, "b": 1, "c": 2}


def tensors(name: str, rows: int, *, head: bool = True) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(ord(name[0]))
    shapes = {EMBED: (rows, WIDTH), LAYER.format(0): (4, WIDTH), LAYER.format(1): (4, WIDTH)}
    shapes |= {NORM: (WIDTH,)} | ({HEAD: (rows, WIDTH)} if head else {})
    return {n: torch.randn(s, generator=random) for n, s in shapes.items()}


def make(
    here: Path, name: str, *, head: bool = True, config: Mapping[str, Any] | None = None, **tok: Any
) -> dict[str, Tensor]:
    """A small decoder with the tokenizer of that letter."""
    made, rows = ZOO[name[0]]
    weights = tensors(name, rows, head=head)
    said = {"vocab_size": rows, "num_hidden_layers": 2, "eos_token_id": made.token_to_id("</s>")}
    write_model(here / name, weights, config={**said, **(config or {})})
    save_tokenizer(made, here / name, bos_token="<s>", eos_token="</s>", **tok)
    return weights


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def three(here: Path) -> dict[str, dict[str, Tensor]]:
    return {name: make(here, name) for name in "abc"}


def recipe(
    extra: str, *, method: str = "linear", models: Sequence[str] = "abc", own: str = ""
) -> str:
    listed = "".join(
        f"- model: {m}\n  parameters: {{weight: {w}}}\n"
        for m, w in zip(models, (0.5, 0.3, 0.2), strict=False)
    )
    return f"merge_method: {method}\nmodels:\n{listed}{own}{extra}\n"


def compiled(text: str) -> Compiled:
    return compile_recipe(parse_recipe(text, "r.yml"), merge.open)


def state(text: str) -> dict[str, Tensor]:
    return compiled(text).checkpoint.state_dict()


def written(here: Path, text: str) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """The config and the weights that the recipe writes, and their folder."""
    from safetensors.torch import load_file

    (here / "r.yml").write_text(text)
    merge.apply("r.yml", "out")
    config = json.loads((here / "out" / "config.json").read_text())
    return config, load_file(here / "out" / "model.safetensors"), here / "out"


def error_of(text: str) -> MergeError:
    with pytest.raises(MergeError) as caught:
        compiled(text)
    return caught.value


def place(error: MergeError) -> tuple[int, int]:
    return int(error.where["line"]), int(error.where["column"])


def by_hand(
    three: Mapping[str, Mapping[str, Tensor]],
    name: str,
    ids: Mapping[str, int],
    base: str,
    ground: str,
    chosen: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Every model's tensor in the rows of the result, by the slow loop."""
    known = [Known.of(*ZOO[m]) for m in three]
    matrices = [w[name].double().numpy() for w in three.values()]
    rows = rows_by_hand(known, matrices, ids, NUMBERS[base], NUMBERS[ground], chosen)
    return [torch.from_numpy(r) for r in rows]


def mean(parts: list[Tensor]) -> Tensor:
    return torch.stack([w * p for w, p in zip((0.5, 0.3, 0.2), parts, strict=True)]).sum(0)


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)


# -- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, "b", "c"])
def test_a_union_merges_the_rows_that_are_found_by_hand(
    here: Path, three: dict[str, dict[str, Tensor]], base: str | None
) -> None:
    own = "" if base is None else f"base_model: {base}\n"
    config, out, _ = written(here, recipe("tokenizer_source: union", own=own))
    start = base or "a"
    ids = union_by_hand([Known.of(*z) for z in ZOO.values()], NUMBERS[start])
    rows = max(len(ids), ZOO[start][1])
    assert config["vocab_size"] == rows == len(out[EMBED]) == len(out[HEAD])
    for name in (EMBED, HEAD):
        near(out[name], mean(by_hand(three, name, ids, start, start)))
    near(out[NORM], mean([w[NORM].double() for w in three.values()]))


@pytest.mark.parametrize(
    ("source", "ground"), [("base", "b"), ("a", "a"), ("model:c", "c"), ("{model: c}", "c")]
)
def test_the_vocabulary_of_one_model_is_taken_whole(
    here: Path, three: dict[str, dict[str, Tensor]], source: str, ground: str
) -> None:
    """Rows are those of the source, padding too; its tokenizer's bytes are copied."""
    text = recipe(f"tokenizer_source: {source}", own="base_model: b\n")
    config, out, folder = written(here, text)
    made, rows = ZOO[ground]
    assert config["vocab_size"] == len(out[EMBED]) == rows
    near(out[EMBED], mean(by_hand(three, EMBED, made.get_vocab(), "b", ground)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (here / ground / name).read_bytes()


CHOSEN = """\
tokenizer:
  source: union
  tokens:
    <|end|>: {source: c}
    dog: {source: {kind: model_token, model: b, token: Ġthe}, force: true}
    Ġthe: {source: {kind: model_token, model: a, token_id: 296}, force: true}
    <pad>: {source: {kind: zero}, force: true}
    Ġsea: {source: {kind: zero}}
    brand new: {source: {kind: model_token, model: c, token_id: 7}}
    without a word: {}
"""


def test_rows_of_chosen_tokens(here: Path, three: dict[str, dict[str, Tensor]]) -> None:
    out = state(recipe(CHOSEN))
    at = {m: z[0].token_to_id for m, z in ZOO.items()}
    chosen = {
        "<|end|>": (2, at["c"]("<|end|>")),
        "dog": (1, at["b"]("Ġthe"), "!"),
        "Ġthe": (0, 296, "!"),
        "<pad>": ("zero", "!"),
        "Ġsea": ("zero",),
        "brand new": (2, 7),
    }
    known = [Known.of(*z) for z in ZOO.values()]
    extra = ["<|end|>", "dog", "Ġthe", "<pad>", "Ġsea", "brand new", "without a word"]
    ids = union_by_hand(known, 0, extra)
    for name in (EMBED, HEAD):
        near(out[name], mean(by_hand(three, name, ids, "a", "a", chosen)))
    assert not out[EMBED][ids["without a word"]].any()
    assert torch.equal(out[EMBED][ids["<pad>"]], torch.zeros(WIDTH))


def test_rows_are_rounded_up(here: Path, three: dict[str, dict[str, Tensor]]) -> None:
    plain = state(recipe("tokenizer: {source: union}"))
    config, out, _ = written(here, recipe("tokenizer: {source: union, pad_to_multiple_of: 64}"))
    rows = len(plain[EMBED])
    assert config["vocab_size"] == len(out[EMBED]) == rows + -rows % 64
    assert torch.equal(out[EMBED][:rows], plain[EMBED])
    tokens = [z[0].get_vocab_size() for z in ZOO.values()]
    parts = [w[EMBED][:n].double().mean(0) for w, n in zip(three.values(), tokens, strict=True)]
    near(out[EMBED][rows:], mean(parts).expand(len(out[EMBED]) - rows, WIDTH))


def test_a_task_vector_to_a_base_that_lacks_a_token_adds_nothing_to_the_others_row(
    here: Path, three: dict[str, dict[str, Tensor]]
) -> None:
    """The base gets the row of the only model that has the token, so that model's delta is zero."""
    text = recipe("tokenizer_source: union", method="task_arithmetic", own="base_model: a\n")
    out = state(text)
    ids = union_by_hand([Known.of(*z) for z in ZOO.values()], 0)
    user = ids["<|user|>"]
    assert torch.equal(out[EMBED][user], three["b"][EMBED][ZOO["b"][0].token_to_id("<|user|>")])


def test_what_needs_no_new_rows_stays_a_plain_read(here: Path) -> None:
    for name in ("a", "a2"):
        make(here, name, x=name)  # the same tokens, in files that differ
    made = compiled(recipe("tokenizer_source: union", models=["a", "a2"]))
    nodes = list(walk(made.checkpoint.tensors[EMBED]))
    assert not any(isinstance(n, Gather) for n in nodes)
    assert sum(isinstance(n, Read) for n in nodes) == 2
    assert made.checkpoint.side.texts == {}


def test_rows_of_padding_are_kept_where_tokenizers_are_the_same(here: Path) -> None:
    """A model with padding beside one without: the base says how many rows there are."""
    make(here, "a")
    made, _ = ZOO["a"]
    small = {n: t[:291] if n in (EMBED, HEAD) else t for n, t in tensors("z", 300).items()}
    write_model(here / "z", small, config={"vocab_size": 291})
    save_tokenizer(made, here / "z", bos_token="<s>", eos_token="</s>")
    text = "merge_method: linear\nmodels: [{model: a}, {model: z}]\nparameters: {weight: 1}\n"
    large = tensors("a", 300)
    out = state(f"{text}tokenizer_source: union\n")
    near(out[EMBED][:291], (large[EMBED][:291] + small[EMBED]) / 2)
    near(out[EMBED][291:], large[EMBED][291:])
    assert len(state(f"{text}base_model: z\ntokenizer_source: base\n")[EMBED]) == 291


# -- heads, biases, slices, modules, stages ------------------------------------------------------


def llama(here: Path, name: str, *, tied: bool = False) -> Any:
    """A tiny Llama of transformers with the tokenizer of that letter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made, rows = ZOO[name]
    torch.manual_seed(ord(name))
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=rows,
        bos_token_id=made.token_to_id("<s>"),
        eos_token_id=made.token_to_id("</s>"),
        pad_token_id=made.token_to_id("<pad>"),
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(here / name)
    save_tokenizer(made, here / name, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_union_of_llamas_loads_in_transformers_and_computes_the_same(
    here: Path, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = {name: llama(here, name, tied=tied) for name in "ab"}
    config, out, folder = written(here, recipe("tokenizer_source: union", models="ab"))
    assert (HEAD in out) is not tied
    assert config["tie_word_embeddings"] is tied
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = [Known.of(*ZOO[m]) for m in "ab"]
    ids = union_by_hand(known, 0)
    assert tokenizer.get_vocab() == ids
    by_hand = {}
    for name, tensor in models["a"].state_dict().items():
        pair = [m.state_dict()[name].double().numpy() for m in models.values()]
        if name in (EMBED, HEAD):
            pair = rows_by_hand(known, pair, ids, 0, 0)
        merged = (0.5 * pair[0] + 0.3 * pair[1]) / 0.8
        by_hand[name] = torch.from_numpy(merged).to(tensor.dtype)
    encoded = tokenizer("the quick<|user|> fox<|end|>", return_tensors="pt")
    assert {ids["<|user|>"], ids["<|end|>"]} < set(encoded["input_ids"][0].tolist())
    got = loaded(**encoded).logits
    loaded.load_state_dict(by_hand)
    near(got, loaded(**encoded).logits)


@pytest.mark.parametrize("tied", ["a", "b"])
def test_a_tied_head_gives_its_embeddings_to_a_head_of_its_own(here: Path, tied: str) -> None:
    """The model that ties is one whose head has the same rows, also for tokens of the other."""
    models = {name: llama(here, name, tied=name == tied) for name in "ab"}
    config, out, _ = written(here, recipe("tokenizer_source: union", models="ab"))
    assert config["tie_word_embeddings"] is False
    known = [Known.of(*ZOO[m]) for m in "ab"]
    ids = union_by_hand(known, 0)
    for name in (EMBED, HEAD):
        pair = [m.state_dict()[name].double().numpy() for m in models.values()]
        rows = rows_by_hand(known, pair, ids, 0, 0)
        near(out[name], torch.from_numpy((0.5 * rows[0] + 0.3 * rows[1]) / 0.8))


def test_names_are_brought_into_one_tree_before_the_vocabulary(here: Path) -> None:
    """A token that one model lacks gets the other's row, whatever that calls its embeddings."""
    make(here, "a")
    prefixed = {f"language_model.{n}": t for n, t in tensors("b", 293).items()}
    write_model(here / "b", prefixed, config={"vocab_size": 293})
    save_tokenizer(ZOO["b"][0], here / "b")
    out = state(recipe("tokenizer_source: union", models="ab"))
    known = [Known.of(*ZOO[m]) for m in "ab"]
    ids = union_by_hand(known, 0)
    pair = [tensors("a", 300)[EMBED].double().numpy(), tensors("b", 293)[EMBED].double().numpy()]
    rows = rows_by_hand(known, pair, ids, 0, 0)
    near(out[EMBED], torch.from_numpy((0.5 * rows[0] + 0.3 * rows[1]) / 0.8))


@pytest.mark.parametrize("changed", ["embeddings", "tokens"])
def test_an_adapters_model_has_the_bases_tokens(here: Path, changed: str) -> None:
    """Its changes of embeddings go along: a thin product, or rows of some tokens."""
    a, b = (llama(here, name) for name in "ab")
    wish: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"]}
    if changed == "tokens":
        wish = {"trainable_token_indices": {"embed_tokens": [5, 290]}}
    tuned = train(here, b, lora(**wish), base=here / "b").merged()
    out = state(recipe("tokenizer_source: union", models=["a", "b+adapter"]))
    known = [Known.of(*ZOO[m]) for m in "ab"]
    ids = union_by_hand(known, 0)
    for name, tensor in a.state_dict().items():
        pair = [tensor.double().numpy(), tuned[name].double().numpy()]
        if name in (EMBED, HEAD):
            pair = rows_by_hand(known, pair, ids, 0, 0)
        near(out[name], torch.from_numpy((0.5 * pair[0] + 0.3 * pair[1]) / 0.8))
    assert not torch.equal(tuned[EMBED], merge.open("b").state_dict()[EMBED])


def test_heads_that_are_tied_in_memory_stay_so(here: Path) -> None:
    for name in "ab":
        make(here, name, head=False)

    def opened(reference: object) -> Checkpoint:
        found = merge.open(str(reference))
        return replace(
            found, tensors={**found.tensors, HEAD: found.tensors[EMBED]}, tied={HEAD: EMBED}
        )

    text = recipe("tokenizer_source: union", models="ab")
    made = compile_recipe(parse_recipe(text, "r.yml"), opened).checkpoint
    assert made.tied == {HEAD: EMBED}
    out = made.state_dict()
    assert torch.equal(out[HEAD], out[EMBED])
    assert len(out[HEAD]) == len(union_by_hand([Known.of(*ZOO[m]) for m in "ab"], 0))
    made.save("out")
    assert HEAD not in merge.open("out")


def resized(model: Any, rows: int) -> None:
    """The model with so many rows of embeddings, all of them random."""
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for parameter in (*model.parameters(), *model.buffers()):
            if parameter.is_floating_point():
                parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("family", ["t5", "bert", "bart"])
def test_every_tensor_that_counts_tokens_gets_the_new_rows(here: Path, family: str) -> None:
    """Shared embeddings, a masked language model's bias, and a bias that is a row of one."""
    import transformers as hf

    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4}
    t5 = {**sizes, "vocab_size": 290}
    bart = {"d_model": 8, "vocab_size": 290, "max_position_embeddings": 16} | {
        f"{part}_{key}": 1 if "layers" in key else 2 if "heads" in key else 8
        for part in ("encoder", "decoder")
        for key in ("layers", "attention_heads", "ffn_dim")
    }
    bert = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 290,
        "intermediate_size": 8,
        "max_position_embeddings": 16,
    }
    made = {
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**bert)),
        "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**bart)),
    }[family]
    models = {}
    for name in "ab":
        torch.manual_seed(ord(name))
        models[name] = made()
        resized(models[name], ZOO[name][1])
        models[name].save_pretrained(here / name)
        save_tokenizer(ZOO[name][0], here / name)
    config, _, folder = written(here, recipe("tokenizer_source: union", models="ab"))
    loaded = type(models["a"]).from_pretrained(folder)
    known = [Known.of(*ZOO[m]) for m in "ab"]
    ids = union_by_hand(known, 0)
    assert config["vocab_size"] == len(ids)
    changed = 0
    for name, tensor in loaded.state_dict().items():
        pair = [m.state_dict()[name].double().numpy() for m in models.values()]
        if ZOO["a"][1] in pair[0].shape:
            changed += 1
            shape = tensor.shape
            flat = [p.reshape(z[1], -1) for p, z in zip(pair, ZOO.values(), strict=False)]
            pair = [r.reshape(shape) for r in rows_by_hand(known, flat, ids, 0, 0)]
        near(tensor, torch.from_numpy((0.5 * pair[0] + 0.3 * pair[1]) / 0.8))
    assert changed > 2


def test_the_real_minilm_and_a_copy_with_two_more_tokens(here: Path, minilm: Path) -> None:
    """Old sentences keep their embeddings, and the new tokens get those of the copy."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.add_tokens(["<gene>", "<cell>"])
    model = AutoModel.from_pretrained(minilm)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(here / "more")
    tokenizer.save_pretrained(here / "more")
    text = "merge_method: linear\nmodels: [{model: %s}, {model: more}]\nparameters: {weight: 1}\n"
    config, _, folder = written(here, text % minilm + "tokenizer_source: union\n")
    assert config["vocab_size"] == 30522 + 2
    after, old = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(minilm)
    loaded = AutoTokenizer.from_pretrained(folder)
    sentence = loaded("Merging is not training.", return_tensors="pt")
    with torch.no_grad():
        near(after(**sentence).last_hidden_state, old(**sentence).last_hidden_state)
    ids = loaded.convert_tokens_to_ids(["<gene>", "<cell>"])
    assert ids == [30522, 30523] == loaded("<gene> <cell>")["input_ids"][1:-1]
    rows = after.embeddings.word_embeddings.weight[ids]
    assert torch.equal(rows, model.embeddings.word_embeddings.weight[ids])


def test_slices_take_layers_after_the_vocabulary_is_one(
    here: Path, three: dict[str, dict[str, Tensor]]
) -> None:
    text = """\
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: b, layer_range: [1, 2]}]
tokenizer_source: union
"""
    config, out, _ = written(here, text)
    known = [Known.of(*ZOO[m]) for m in "ab"]
    ids = union_by_hand(known, 0)
    assert (config["vocab_size"], config["num_hidden_layers"]) == (len(ids), 3)
    pairs = {n: [three[m][n].double().numpy() for m in "ab"] for n in (EMBED, HEAD)}
    near(out[EMBED], torch.from_numpy(rows_by_hand(known, pairs[EMBED], ids, 0, 0)[0]))
    near(out[HEAD], torch.from_numpy(rows_by_hand(known, pairs[HEAD], ids, 0, 0)[1]))
    assert torch.equal(out[LAYER.format(2)], three["b"][LAYER.format(1)])


def test_modules_are_put_into_the_vocabulary(
    here: Path, three: dict[str, dict[str, Tensor]]
) -> None:
    text = """\
merge_method: linear
modules:
  mlp: {models: [{model: a}, {model: b}]}
  default: {models: [{model: a}, {model: b}]}
parameters: {weight: 1}
tokenizer_source: union
"""
    plain = state(
        recipe("tokenizer_source: union", models="ab").replace("0.5", "1").replace("0.3", "1")
    )
    out = state(text)
    assert out.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(out[name], tensor)


def test_a_stage_with_a_new_vocabulary_is_a_model_like_any_other(
    here: Path, three: dict[str, dict[str, Tensor]]
) -> None:
    text = f"""\
{recipe("tokenizer_source: union", models="ab")}
name: first
---
merge_method: linear
models: [{{model: first, parameters: {{weight: 1}}}}, {{model: c, parameters: {{weight: 3}}}}]
tokenizer_source: union
"""
    config, out, folder = written(here, text)
    known = [Known.of(*ZOO[m]) for m in "ab"]
    ids = union_by_hand(known, 0)
    pair = [three[m][EMBED].double().numpy() for m in "ab"]
    first = rows_by_hand(known, pair, ids, 0, 0)
    joined = [Known(ids, [], len(ids)), Known.of(*ZOO["c"])]
    whole = union_by_hand(joined, 0)
    matrices = [(0.5 * first[0] + 0.3 * first[1]) / 0.8, three["c"][EMBED].double().numpy()]
    rows = rows_by_hand(joined, matrices, whole, 0, 0)
    near(out[EMBED], torch.from_numpy((rows[0] + 3 * rows[1]) / 4))
    assert config["vocab_size"] == len(whole)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() == whole


def test_statistics_know_nothing_of_tokens_that_their_model_lacks(
    here: Path, three: dict[str, dict[str, Tensor]]
) -> None:
    """So a row that only one model has is that model's, whatever the default was."""
    for name in "ab":
        fisher = {n: torch.rand(t.shape) + 0.5 for n, t in three[name].items()}
        write_model(here / f"f{name}", fisher)
    text = """\
merge_method: fisher
models: [{model: a, statistics: fa}, {model: b, statistics: fb}]
tokenizer: {source: union, tokens: {<|end|>: {source: {kind: zero}}}}
"""
    out = state(text)
    ids = union_by_hand([Known.of(*ZOO[m]) for m in "ab"], 0)
    row = three["b"][EMBED][ZOO["b"][0].token_to_id("<|end|>")]
    near(out[EMBED][ids["<|end|>"]], row)


def test_a_difference_of_weights_keeps_its_vocabulary(here: Path) -> None:
    make(here, "a")
    make(here, "a2")
    make(here, "b")
    delta = merge.open("a2") - merge.open("a")
    delta.save("d", replace=True)
    text = "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: d}{}]\n"
    text += "parameters: {weight: 1}\ntokenizer_source: union\n"
    near(state(text.replace("{}", ""))[EMBED], tensors("a2", 300)[EMBED])
    error = error_of(text.replace("{}", ", {model: b}"))
    assert "a difference of weights cannot be put into another vocabulary" in error.what
    assert place(error) == (3, 11)


# -- ids and files -------------------------------------------------------------------------------


def shuffled(here: Path) -> dict[str, int]:
    """Model m: the tokens of a with other ids, and an end of its own in the role of </s>."""
    whole = json.loads(ZOO["a"][0].to_str())
    vocab = whole["model"]["vocab"]
    new = {t: (i + 5) % len(vocab) for t, i in vocab.items()}
    new["<END>"] = new.pop("</s>")
    whole["model"]["vocab"] = new
    whole["added_tokens"] = [
        {**t, "id": new[c]}
        for t in whole["added_tokens"]
        if (c := t["content"].replace("</s>", "<END>")) in new and not t.update(content=c)
    ]
    text = json.dumps(whole)
    write_model(here / "m", tensors("m", 290), config={"vocab_size": 290})
    (here / "m" / "tokenizer.json").write_text(text)
    config = {
        "eos_token": "<END>",
        "bos_token": "<s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (here / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    return dict(Tokenizer.from_str(text).get_vocab())


def test_ids_in_configs_follow_their_tokens(here: Path) -> None:
    """By text, else by role: </s> is not in the vocabulary of m, whose end is <END>."""
    config = {
        "bos_token_id": 0,
        "eos_token_id": [1, 8],
        "pad_token_id": 290,
        "text_config": {"vocab_size": 300, "decoder_start_token_id": 7},
    }
    make(here, "a", config=config)
    generation = {"eos_token_id": 1, "suppress_tokens": [9, 11], "max_length": 20}
    (here / "a" / "generation_config.json").write_text(json.dumps(generation))
    ids = shuffled(here)
    old = {i: t for t, i in ZOO["a"][0].get_vocab().items()}
    text = "merge_method: linear\nmodels: [{model: a}, {model: m}]\nparameters: {weight: 1}\n"
    made = compiled(f"{text}tokenizer_source: m\n")
    config, _, folder = written(here, f"{text}tokenizer_source: m\n")
    assert (config["bos_token_id"], config["vocab_size"]) == (ids["<s>"], 290)
    assert config["eos_token_id"] == [ids["<END>"], ids[old[8]]]
    assert config["text_config"] == {"vocab_size": 290, "decoder_start_token_id": ids[old[7]]}
    assert config["pad_token_id"] == 290
    assert any("pad_token_id 290 ('<pad>')" in note for note in made.notes)
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == {
        **generation,
        "eos_token_id": ids["<END>"],
        "suppress_tokens": [ids[old[9]], ids[old[11]]],
    }


def test_a_union_leaves_configs_alone_but_for_the_size(here: Path) -> None:
    config = {"bos_token_id": 0, "eos_token_id": [1, 8], "pad_token_id": 290, "odd": [1]}
    make(here, "a", config=config)
    make(here, "b")
    (here / "a" / "generation_config.json").write_text('{"eos_token_id":1}')
    before = json.loads((here / "a" / "config.json").read_text())
    after, _, folder = written(here, recipe("tokenizer_source: union", models="ab"))
    assert {**after, "vocab_size": 300} == before
    assert after["vocab_size"] > 300
    assert (folder / "generation_config.json").read_text() == '{"eos_token_id":1}'


def test_the_plan_says_what_the_union_did(here: Path, three: dict[str, dict[str, Tensor]]) -> None:
    notes = compiled(recipe(CHOSEN)).notes
    sets = [set(z[0].get_vocab()) for z in ZOO.values()]
    said = next(n for n in notes if "the vocabulary has" in n)
    everything = set().union(*sets)
    shared = sum(sum(t in s for s in sets) > 1 for t in everything)
    only = [len(s - set().union(*(o for o in sets if o is not s))) for s in sets]
    assert said.startswith("line 9: the vocabulary has")
    assert (
        f" {shared} shared, {only[0]} only in a, {only[1]} only in b, {only[2]} only in c, " in said
    )
    assert "3 in no model" in said
    assert any("define added tokens differently" in n and "'<|end|>'" in n for n in notes)


def test_explain_speaks_of_embeddings_as_of_other_tensors(
    here: Path, three: dict[str, dict[str, Tensor]]
) -> None:
    (found,) = compiled(recipe("tokenizer_source: union")).explain(EMBED)
    assert found.inputs == tuple(f"{m}[{EMBED}]" for m in "abc")
    assert [r.value for r in found.reasons if r.parameter == "weight"] == [0.5, 0.3, 0.2]


def test_a_model_without_a_tokenizer_is_taken_to_have_the_sources(here: Path) -> None:
    make(here, "a")
    make(here, "b")
    write_model(here / "plain", tensors("p", 295), config={"vocab_size": 295})
    made = compiled(recipe("tokenizer_source: union", models=["a", "b", "plain"]))
    assert "plain has no tokenizer: it is taken to have a's" in made.notes
    write_model(here / "small", tensors("s", 280), config={"vocab_size": 280})
    error = error_of(recipe("tokenizer_source: union", models=["a", "b", "small"]))
    assert (
        error.what == "a model has no tokenizer, and its embeddings do not fit that of the source"
    )
    assert place(error) == (7, 3)
    error = error_of(recipe("tokenizer_source: small", models=["a", "b", "small"]))
    assert error.what == "the model whose tokenizer is to be taken has none"
    assert place(error) == (9, 1)


def test_a_sentencepiece_model_alone_is_refused_by_name_where_it_cannot_be_converted(
    here: Path,
) -> None:
    make(here, "a")
    write_model(here / "s", tensors("s", 300), config={"vocab_size": 300})
    (here / "s" / "tokenizer.model").write_bytes(b"\x0a\x00 no model")
    error = error_of(recipe("tokenizer_source: union", models=["a", "s"]))
    assert "a sentencepiece model alone" in error.what
    assert "save_pretrained" in str(error.do)
    assert (error.where["file"], place(error)) == ("tokenizer.model", (5, 3))


ERRORS = {
    "a model outside": (
        "x: {source: {kind: model_token, model: c, token: x}}",
        "only come from a model that is merged",
    ),
    "a token that it lacks": ("<|user|>: {source: a}", "a has no row for the token"),
    "a number beyond": (
        "x: {source: {kind: model_token, model: a, token_id: 300}}",
        "a has no row for the token",
    ),
    "a model that is not there": ("x: {source: nowhere}", "no such model"),
}


@pytest.mark.parametrize(("token", "what"), ERRORS.values(), ids=ERRORS)
def test_a_row_that_is_not_there_has_its_place(
    here: Path, three: dict[str, dict[str, Tensor]], token: str, what: str
) -> None:
    error = error_of(recipe(f"tokenizer:\n  tokens:\n    {token}", models="ab"))
    assert what in error.what
    assert place(error) == (9, token.index("{source") + 6)


def test_force_alone_is_refused(here: Path, three: dict[str, dict[str, Tensor]]) -> None:
    error = error_of(recipe("tokenizer: {tokens: {x: {force: true}}}"))
    assert error.what.startswith("force needs a source")
    assert place(error) == (9, 26)


def test_an_unsound_tokenizer_has_the_place_of_its_model(
    here: Path, three: dict[str, dict[str, Tensor]]
) -> None:
    (here / "b" / "tokenizer.json").write_text("{")
    error = error_of(recipe("tokenizer_source: union"))
    assert (error.where["file"], error.where["model"]) == ("tokenizer.json", "b")
    assert place(error) == (5, 3)
    (here / "b" / "tokenizer.json").write_bytes(b"\xff")
    assert "not UTF-8" in error_of(recipe("tokenizer_source: union")).what


def test_without_a_word_vocabularies_of_different_sizes_are_refused_with_advice(
    here: Path, three: dict[str, dict[str, Tensor]]
) -> None:
    error = error_of(recipe(""))
    assert isinstance(error, PlanError) and error.where["tensor"] in (EMBED, HEAD)
    assert "tokenizer_source: union" in str(error.do)


def test_a_model_of_two_vocabularies_is_refused(here: Path) -> None:
    make(here, "a")
    config = {"vocab_size": 300, "decoder": {"vocab_size": 310}}
    weights = {**tensors("b", 300), "decoder.embed_tokens.weight": torch.zeros(310, WIDTH)}
    write_model(here / "b", weights, config=config)
    save_tokenizer(ZOO["b"][0], here / "b")
    error = error_of(recipe("tokenizer_source: union", models="ab"))
    assert error.what.startswith("a model has several vocabularies")
    assert (error.where["model"], place(error)) == ("b", (5, 3))


def test_models_of_different_widths_are_refused(here: Path) -> None:
    make(here, "a")
    wide = {n: torch.cat([t, t], -1) if t.ndim == 2 else t for n, t in tensors("b", 293).items()}
    write_model(here / "b", wide, config={"vocab_size": 293})
    save_tokenizer(ZOO["b"][0], here / "b")
    error = error_of(recipe("tokenizer_source: union", models="ab"))
    assert error.what == "the models' embeddings are of different widths"
    assert error.where["tensor"] in (EMBED, HEAD)


SCRIPT = """
import json, merge
from merge.applying import plan_recipe
planned = plan_recipe("r.yml")
print(planned.plan.hash, json.dumps(planned.plan.notes))
"""


def test_a_plan_does_not_depend_on_the_seed_of_hashes(
    here: Path, three: dict[str, dict[str, Tensor]]
) -> None:
    (here / "r.yml").write_text(recipe(CHOSEN))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("3", "5")
    }
    assert len(outputs) == 1


# -- chat templates ------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def chats(here: Path, **templates: str | None) -> None:
    for name, template in templates.items():
        make(here, name, **({} if template is None else {"chat_template": template}))


def template_of(folder: Path) -> str | None:
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder).chat_template
    assert found is None or isinstance(found, str)
    return found


TALK = [{"role": "user", "content": "Hi"}]


def test_auto_takes_the_template_that_most_models_have(here: Path) -> None:
    chats(here, a=None, a1="first {{ messages }}", a2=TEMPLATE, a3=TEMPLATE)
    models = ["a1", "a2", "a3"]
    text = recipe("chat_template: auto", models=models, own="base_model: a\n")
    _, _, folder = written(here, text)
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert template_of(folder) == TEMPLATE
    equal = recipe("chat_template: auto", models=["a1", "a2"])
    made = compiled(equal)
    assert made.checkpoint.side.texts == {}, "the first of equally common ones, as it is"
    none = compiled(recipe("chat_template: auto", models=["a", "a"]))
    assert any("no model has a chat template" in n for n in none.notes)


def test_a_template_is_replaced_where_the_donor_keeps_it(here: Path) -> None:
    chats(here, a="old {{ messages }} here", b=None)
    (here / "a" / "chat_template.jinja").write_text("older {{ messages }}")
    (here / "mine.jinja").write_text(TEMPLATE)
    for wanted in (f"'{TEMPLATE}'", "mine.jinja"):
        made = compiled(recipe(f"chat_template: {wanted}\ntokenizer_source: union", models="ab"))
        texts = made.checkpoint.side.texts
        assert texts["chat_template.jinja"] == TEMPLATE
        assert json.loads(texts["tokenizer_config.json"])["chat_template"] == TEMPLATE


@pytest.mark.parametrize("source", ["", "\ntokenizer_source: union"])
def test_a_known_template_notes_marks_that_are_no_tokens(here: Path, source: str) -> None:
    chats(here, a=None, a1=None)
    made = compiled(recipe(f"chat_template: chatml{source}", models=["a", "a1"]))
    (note,) = [n for n in made.notes if "chat template" in n]
    assert "chatml writes <|im_start|>, <|im_end|>, which the tokenizer splits" in note
    assert not compiled(recipe(f"chat_template: alpaca{source}", models=["a"])).notes[1:]


def test_a_known_template_finds_its_marks_among_added_tokens(here: Path) -> None:
    chats(here, a=None, b=None)
    tokens = "tokenizer: {tokens: {<|im_start|>: {}, <|im_end|>: {}}}"
    text = recipe(f"chat_template: chatml\n{tokens}", models="ab")
    assert not any("chat template" in note for note in compiled(text).notes)
    _, _, folder = written(here, text)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    said = loaded.apply_chat_template(TALK, tokenize=False)
    assert said == "<|im_start|>user\nHi<|im_end|>\n"
    start = loaded.convert_tokens_to_ids("<|im_start|>")
    assert loaded.encode(said, add_special_tokens=False)[0] == start


@pytest.mark.parametrize(
    ("wanted", "do"),
    [("chatlm", "did you mean 'chatml'?"), ("{{ short }}", None), ("no such file.jinja", None)],
)
def test_what_is_no_template_is_refused(here: Path, wanted: str, do: str | None) -> None:
    chats(here, a=None)
    error = error_of(recipe(f"chat_template: '{wanted}'", models="a"))
    assert isinstance(error, RecipeError)
    assert (error.do, error.where["key"], place(error)) == (do, "chat_template", (5, 1))


def test_the_chat_template_of_the_tokenizers_source_comes_with_it(here: Path) -> None:
    chats(here, a="old {{ messages }} here", b=TEMPLATE)
    _, _, folder = written(here, recipe("tokenizer_source: b", models="ab"))
    assert template_of(folder) == TEMPLATE


def test_a_misspelt_source_is_told_its_nearest(three: dict[str, dict[str, Tensor]]) -> None:
    error = error_of(recipe("tokenizer_source: unoin"))
    assert error.do == "did you mean 'union'?" and error.where["model"] == "unoin"
    far = error_of(recipe("tokenizer_source: nowhere"))
    assert far.do is not None and "check the path" in far.do
