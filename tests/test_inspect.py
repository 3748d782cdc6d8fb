"""What `merge inspect` says of models of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from merge_cli.inspect import inspect_command

from merge.inspect import inspect

from .architectures import DECODERS, PARTS, new_model

WANTED = {
    "gemma": {
        "roles": {"attention": 12, "mlp": 9, "norm": 7, "embedding": 1},
        "tied": {"the head": "model.embed_tokens.weight"},
        "experts": {"layout": None, "count": 0},
    },
    "llama": {
        "roles": {"attention": 12, "mlp": 9, "norm": 7, "head": 1, "embedding": 1},
        "vocabulary": {"rows": [40], "tensors": ["lm_head.weight", "model.embed_tokens.weight"]},
        "tied": {},
    },
    "mixtral": {"experts": {"layout": "per expert", "count": 2}},
    "bert": {"tied": {"the head": "bert.embeddings.word_embeddings.weight"}},
    "vit": {"vocabulary": {"rows": [], "tensors": []}, "tied": {}},
}


@pytest.mark.parametrize(("name", "wanted"), WANTED.items(), ids=WANTED)
def test_a_models_facts(name: str, wanted: dict[str, object], tmp_path: Path) -> None:
    new_model(DECODERS[name]).save_pretrained(tmp_path / "a")
    found = inspect(tmp_path / "a")
    assert {key: found[key] for key in wanted} == wanted
    assert sum(found["roles"].values()) == found["tensors"]


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    new_model(DECODERS["mixtral"]).save_pretrained(tmp_path / "a", save_original_format=False)
    assert inspect(tmp_path / "a")["experts"] == {"layout": "fused", "count": 2}


def test_sub_models_have_their_stacks(tmp_path: Path) -> None:
    new_model(PARTS["llava text"]).save_pretrained(tmp_path / "a")
    found = inspect(tmp_path / "a")
    parts = found["sub_models"]
    assert {p: list(f["stacks"].values()) for p, f in parts.items()} == {
        "text": [3], "vision": [3], "projector": [],
    }  # fmt: skip
    assert sum(p["tensors"] for p in parts.values()) == found["tensors"]
    assert sum(p["parameters"] for p in parts.values()) == found["parameters"]
    text = CliRunner().invoke(inspect_command, [str(tmp_path / "a")]).output
    assert "parts       30 text, 4 projector, 55 vision" in text
    assert "vocabulary  40 rows in language_model.lm_head.weight" in text
