"""How a model's tensors are called in the tree of its class, where that is not as in its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.adapters.follow import shared_head
from merge.adapters.library import architecture, library_names
from merge.ir.checkpoint import Checkpoint

__all__ = ["Tree", "task_of", "tree_of"]

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)


@dataclass(frozen=True, slots=True)
class Tree:
    """names: from those in the files to those in the tree, where they differ. tied: names in the
    tree that are in no file, and the ones in the files that they stand for."""

    names: Mapping[str, str]
    tied: Mapping[str, str]

    def named(self, name: str) -> str:
        """A tensor's name in the tree."""
        return self.names.get(name, name)

    def path(self, name: str) -> str:
        """The module of a weight, in the tree."""
        return self.named(name).removesuffix(".weight")


def tree_of(model: Checkpoint) -> Tree:
    """The tree of the model's class, which config.json names, as transformers knows it."""
    stored = [n for n in model.tensors if n not in model.tied]
    known = library_names(stored, model.side.config)
    tied = {n: o for n, o in model.tied.items() if n in model.tensors}
    if known.names:
        files = {new: old for old, new in known.names.items()}
        tied |= {a: files[o] for a, o in known.tied.items() if o in files}
    elif (source := shared_head(model)) is not None:
        tied["lm_head.weight"] = source
    return Tree({o: n for o, n in known.names.items() if o != n}, tied)


def task_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's word for what the model is for, by its class in config.json; None where it has none.

    >>> task_of({"architectures": ["LlamaForCausalLM"]})
    'CAUSAL_LM'
    """
    name = architecture(config)
    if name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    found = next((task for end, task in _TASKS if name.endswith(end)), None)
    return found or ("FEATURE_EXTRACTION" if name.endswith("Model") else None)
