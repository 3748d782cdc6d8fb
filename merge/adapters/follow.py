"""What else of a model changes with an adapter: ties, the vocabulary's size, the task's head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge.adapters.config import AdapterConfig
from merge.errors import PlanError
from merge.families.ties import SCALED
from merge.families.vocabulary import input_embedding, text_configs, vocabulary_tensors
from merge.ir.checkpoint import Checkpoint

__all__ = ["follow", "shared_head"]

_LANGUAGE = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
_NOT_LM_HEAD = {"whisper": "proj_out.weight", "biogpt": "output_projection.weight"}
_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_CLASS = re.compile(r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForPreTraining|Model)$")


def shared_head(model: Checkpoint) -> str | None:
    """The input embedding, where the head is the very same matrix and not stored beside it."""
    kinds = model.side.config.get("architectures")
    name = kinds[0] if isinstance(kinds, list) and kinds else ""
    said = [c.get("tie_word_embeddings") for c in text_configs(model.side.config)]
    if not _LANGUAGE.search(str(name)) or next((s for s in said if s is not None), None) is False:
        return None
    matrices = [n for n in vocabulary_tensors(model) if len(model.tensors[n].shape) == 2]
    return matrices[0] if len(matrices) == 1 and input_embedding(matrices[0], (1, 1)) else None


def follow(
    base: Checkpoint, made: Checkpoint, config: AdapterConfig, heads: set[str], alone: set[str]
) -> Checkpoint:
    """``made`` with ties and a config that describe it.

    heads: those that ``base`` has no tensor for, and ``made`` has. alone: tensors that were changed
    without those that are tied to them.
    """
    tensors, source = dict(made.tensors), shared_head(base)
    if source in alone and not heads and source is not None:
        kind = str(base.side.config.get("model_type"))
        tensors[_NOT_LM_HEAD.get(kind, "lm_head.weight")] = base.tensors[source]
        heads = {kind}
    if heads and base.side.config.get("model_type") in SCALED:
        raise PlanError(
            "an adapter changes embeddings and head apart, and in this family a head of its own"
            " sees features of another scale",
            model=made.label,
            found=", ".join(sorted(heads)),
            do="train the adapter with the two tied, or on other modules",
        )
    tied = {n: o for n, o in base.tied.items() if tensors[n] == tensors[o]}
    data: Mapping[str, Any] = base.side.config
    if heads or tied != base.tied:
        data = _with(data, "tie_word_embeddings", None, False)
        data = {**data, "tie_word_embeddings": False}
    made = replace(made, tensors=tensors, tied=tied)
    data = _with_rows(base, made, data)
    data = _with_task(base, made, data, config)
    return made if data is base.side.config else replace(made, side=made.side.with_config(data))


def _with(data: Mapping[str, Any], key: str, old: Any, new: Any) -> dict[str, Any]:
    """The config with another value of a key wherever it stands, or where it is ``old``."""
    return {
        k: new
        if k == key and old in (None, v)
        else _with(v, key, old, new)
        if isinstance(v, dict)
        else v
        for k, v in data.items()
    }


def _with_rows(base: Checkpoint, made: Checkpoint, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The vocabulary's size, where the adapter brings embeddings of another."""
    axes = vocabulary_tensors(base)
    sizes = {n: made.tensors[n].shape[axis] for n, axis in axes.items()}
    before = {n: base.tensors[n].shape[axis] for n, axis in axes.items()}
    if sizes == before:
        return data
    if len(set(sizes.values())) > 1:
        raise PlanError(
            "an adapter brings embeddings of another vocabulary, but not all that belong to it",
            model=made.label,
            found=", ".join(f"{n}: {size}" for n, size in sizes.items()),
            expected="one number of tokens",
        )
    new = next(iter(sizes.values()))
    for old in sorted(set(before.values())):
        data = _with(data, "vocab_size", old, new)
    return data


def _with_task(
    base: Checkpoint, made: Checkpoint, data: Mapping[str, Any], config: AdapterConfig
) -> Mapping[str, Any]:
    """The class and the labels, where the adapter brings the head of its task."""
    brought = [n for n in made.tensors if n not in base.tensors or made.tensors[n].shape
               != base.tensors[n].shape]  # fmt: skip
    heads = [n for n in brought if config.saves(n.rpartition(".")[0])]
    kinds = data.get("architectures")
    if config.task not in _TASKS or not heads or not isinstance(kinds, list) or not kinds:
        return data
    if any(n not in base.tensors for n in heads):
        data = {**data, "architectures": [_CLASS.sub("", str(kinds[0])) + _TASKS[config.task]]}
    weights = [made.tensors[n].shape[0] for n in heads if len(made.tensors[n].shape) == 2]
    if config.task == "QUESTION_ANS" or not weights:
        return data
    names = {str(i): f"LABEL_{i}" for i in range(weights[-1])}
    if len(data.get("id2label") or {}) == len(names):
        return data
    return {**data, "id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
