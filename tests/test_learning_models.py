"""Learning on models of transformers: adapters as experts, heads that are tasks' own, names."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor

import merge
from merge.differences import Stored
from merge.experts import Experts
from tests.adapters import family, lora, opened, train


def texts(vocabulary: int, seed: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (12, 7), generator=draw)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_are_experts_as_thin_factors(kind: str, tmp_path: Path) -> None:
    """The differences that factors stand for; the same merge, whichever way they are kept."""
    how = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    config = lora(**how) if kind == "gpt2" else lora()
    one = train(tmp_path, family(kind), config, name="a", seed=1)
    two = train(tmp_path, family(kind), config, base=one.base, name="b", seed=2)
    ones = {"a": one, "b": two}
    experts = {n: opened(it) for n, it in ones.items()}
    base = merge.open(ones["a"].base)
    stored = Stored(*_together(experts, base))
    thin = [n for n in base if stored.factors(0, n) is not None]
    assert thin
    for name in thin:
        left, s, right = stored.factors(0, name) or ()  # type: ignore[misc]
        torch.testing.assert_close((left * s) @ right.T, stored.delta(0, name))
    module = transformers.AutoModelForCausalLM.from_pretrained(ones["a"].base).eval()
    batches = texts(module.config.vocab_size, 0)
    tasks = {n: merge.Task(module, F.cross_entropy, batches) for n in experts}
    settings: dict[str, Any] = {"objective": "language_model", "steps": 3, "granularity": "tensor"}
    found = [
        merge.learn(experts, base=base, tasks=tasks, memory=m, **settings)
        for m in ("resident", "stream")
    ]
    assert found[0].history == found[1].history
    state = found[0].checkpoint.state_dict()
    deltas = [e.state_dict() for e in experts.values()]
    root = base.state_dict()
    for name in thin:
        rows = found[0].coefficients.block_of(name).values
        truth = root[name] + sum(
            c * (d[name] - root[name]) for (c,), d in zip(rows, deltas, strict=True)
        )
        torch.testing.assert_close(state[name], truth)


def _together(
    experts: dict[str, merge.Checkpoint], base: merge.Checkpoint
) -> tuple[merge.Checkpoint, Any]:
    made = Experts.of(experts, base)
    return made.base, made.experts


def test_heads_of_classifiers_are_each_tasks_own(tmp_path: Path) -> None:
    """Experts with heads of different sizes; the base is the encoder alone, by other names."""
    torch.manual_seed(0)
    config = family("bert", "BertForSequenceClassification").config
    encoder = transformers.BertModel(config)
    encoder.save_pretrained(tmp_path / "base")
    experts, tasks = {}, {}
    for i, classes in enumerate((2, 4)):
        own = type(config)(**{**config.to_dict(), "num_labels": classes})
        expert = transformers.BertForSequenceClassification(own)
        state = {n: t + 0.02 * torch.randn_like(t) for n, t in encoder.state_dict().items()}
        expert.bert.load_state_dict(state)
        expert.save_pretrained(tmp_path / f"task {i}")
        experts[f"task {i}"] = tmp_path / f"task {i}"
        blank = transformers.BertForSequenceClassification(own)  # its head is the expert's then
        batches = texts(config.vocab_size, i)
        tasks[f"task {i}"] = merge.Task(blank, F.cross_entropy, [], adapt=batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = merge.learn(experts, base=tmp_path / "base", tasks=tasks, steps=4, every=2)
    assert set(found.checkpoint) == set(merge.open(tmp_path / "base"))
    for i, name in enumerate(tasks):
        module = found.module(name)
        head = merge.open(experts[name]).state_dict()["classifier.weight"]
        assert torch.equal(module.classifier.weight, head)
        assert module(**texts(config.vocab_size, i)[0]).logits.shape == (4, (2, 4)[i])
    found.checkpoint.save(tmp_path / "merged")
    transformers.BertModel.from_pretrained(tmp_path / "merged")
