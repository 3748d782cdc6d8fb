"""The small files of a model, damaged in every way: a plan, or an error that says where and what.

Each file is changed by a seeded generator, a value at a time; nothing but errors of ours may come
out, each with the file or the model that it is about and what to do or what was expected.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken

from merge import applying
from merge.errors import MergeError
from tests.folders import UNET, pipeline, written
from tests.tokens import save_tokenizer, word_piece

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 7, 10**30, 1.5, float("nan"), 1e308, "", "x", "\ud800", "../../x",
    "(", "\0", [], {}, [[]], [None], [1, "a"], {"a": 1}, {"": None}, [{}], [0] * 5, "union",
)  # fmt: skip
WORDS = ["▁" + w for w in ("one", "two", "three", "four")]
MUTATIONS = 30
"""For each file. Thousands were tried; these are the ones that stay."""


@dataclass(frozen=True)
class Target:
    """A file of a folder, and the recipe that reads it; ``{}`` stands for the damaged folder."""

    folder: str
    file: str
    recipe: str


def union(other: str) -> str:
    return (
        "merge_method: linear\ntokenizer_source: union\nchat_template: auto\nmodels:\n"
        "  - {model: {}, parameters: {weight: 0.5}}\n"
        f"  - {{model: ROOT/{other}, parameters: {{weight: 0.5}}}}\n"
    )


SELF = """merge_method: linear
models: [{model: {}, parameters: {weight: 1.0}}]
"""
SLICES = """merge_method: passthrough
slices:
  - sources: [{model: {}, layer_range: [0, 2]}]
  - sources: [{model: {}, layer_range: [1, 2]}]
"""
TARGETS = [
    *(Target("a", f, union("b")) for f in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")),
    Target("a", "config.json", SLICES),
    Target("lora", "adapter_config.json", SELF),
    Target("pipe", "model_index.json", SELF),
    Target("pipe", "unet/config.json", SELF),
    Target("sentences", "modules.json", SELF),
    Target("sentences", "README.md", SELF),
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    for name, added in {"a": ["<|a|>", "<|both|>"], "b": ["<|both|>", "<|b|>"]}.items():
        _model(root / name, added)
    lora = {
        f"base_model.model.model.layers.{i}.q_proj.lora_{part}.weight": torch.ones(shape)
        for i in range(2)
        for part, shape in {"A": (2, 4), "B": (4, 2)}.items()
    }
    (root / "lora").mkdir()
    save_file(lora, root / "lora" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(root / "a"), "r": 2, "lora_alpha": 4,
        "target_modules": ["q_proj"], "rank_pattern": {"layers.0.q_proj": 2}, "bias": "none",
        "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "modules_to_save": None,
        "trainable_token_indices": None, "layer_replication": None, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    written(root / "lora" / "adapter_config.json", config)
    pipeline(root / "pipe", UNET)
    _model(root / "sentences", [])
    written(root / "sentences" / "modules.json", [{"idx": 0, "path": "", "type": "T"}])
    written(root / "sentences" / "README.md", "---\nlicense: mit\ntags: [a, b]\n---\n# It\n")
    return root


def _model(folder: Path, added: list[str]) -> None:
    tokenizer = word_piece(WORDS, [AddedToken(t, special=True) for t in added])
    template = "{{ messages[0]['content'] }}"
    save_tokenizer(tokenizer, folder, pad_token="[PAD]", chat_template=template)
    rows = tokenizer.get_vocab_size()
    tensors = {f"model.layers.{i}.q_proj.weight": torch.ones(4, 4) for i in range(2)}
    tensors |= {n: torch.ones(rows, 4) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama", "vocab_size": rows, "num_hidden_layers": 2, "hidden_size": 4,
        "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "eos_token_id": 1,
    }  # fmt: skip
    written(folder / "config.json", config)
    ids = {"eos_token_id": [1, 2], "forced_decoder_ids": [[1, 2]], "suppress_tokens": [3]}
    written(folder / "generation_config.json", ids)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in [*inner][:12]:
            yield from _paths(each, (*at, key))


def _mutated(data: Any, draw: random.Random) -> Any:
    """One to three values replaced or removed."""
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        path = draw.choice([*_paths(data)])
        if not path:
            return copy.deepcopy(draw.choice(ODD))
        inside = data
        for key in path[:-1]:
            inside = inside[key]
        if draw.random() < 0.2:
            del inside[path[-1]]
        else:
            inside[path[-1]] = copy.deepcopy(draw.choice(ODD))
    return data


def _damaged(text: str, draw: random.Random) -> str:
    """The text cut off, with another character, nested, twice, or empty."""
    at = draw.randrange(len(text))
    return draw.choice(
        (
            text[:at],
            text[:at] + draw.choice('{}[]",:\0é-0\n') + text[at + 1 :],
            "[" * 50_000,
            '{"a":' * 900 + "1" + "}" * 900,
            text + text,
            "",
            "\ufeff" + text,
        )
    )


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.folder}-{t.file}")
def test_a_damaged_file_gives_a_plan_or_an_error_that_says_what_to_do(
    target: Target, root: Path, tmp_path: Path
) -> None:
    draw = random.Random(f"{target.folder} {target.file} {target.recipe}")
    text = (root / target.folder / target.file).read_text()
    refused = 0
    for i in range(MUTATIONS):
        folder = tmp_path / f"m{i}"
        shutil.copytree(root / target.folder, folder, copy_function=os.link)
        (folder / target.file).unlink()
        whole = target.file.endswith(".json") and draw.random() < 0.8
        new = json.dumps(_mutated(json.loads(text), draw)) if whole else _damaged(text, draw)
        (folder / target.file).write_text(new)
        recipe = tmp_path / f"{i}.yml"
        recipe.write_text(target.recipe.replace("{}", str(folder)).replace("ROOT", str(root)))
        try:
            applying.plan_recipe(recipe)
        except MergeError as error:
            refused += 1
            assert error.where.keys() & {"file", "model", "tensor"}, f"{new[:500]}\n{error}"
            assert error.do or error.expected, f"{new[:500]}\n{error}"
    assert refused or target.file == "README.md", "the damage does not reach what is read"
