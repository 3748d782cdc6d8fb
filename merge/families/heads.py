"""Heads of tasks: what fine-tunes of one model for different tasks do not share.

A head stands outside the layers and ends a task: a classifier, the answers of a questionnaire. The
head of a language model is none of these: it counts tokens, as the embeddings do, and is merged
with them; but where it belongs to a larger head, as in BERT's masked language model, it goes with
that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merge.errors import PlanError
from merge.families.layers import place_of
from merge.families.roles import role_of
from merge.families.vocabulary import vocabulary_tensors
from merge.ir.align import Missing, short, some
from merge.ir.assembly import select
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Expr
from merge.ir.side import Side

__all__ = ["FOLDER", "Headless", "check_heads", "task_heads", "without_heads"]

FOLDER = "heads"
"""Where the heads of single models lie beside a merge; no model is made of what is there."""

_GENERATES = re.compile(r"LMHead|DoubleHeads|For(CausalLM|ConditionalGeneration|Speech)")
"""Classes whose head that counts tokens is part of the model, and not of a task."""
_TASK = re.compile(r"^(\w+?)For[A-Z]\w*$")
_OF_A_HEAD = (
    "architectures", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "classifier_dropout", "classifier_pooling",
)  # fmt: skip
"""Keys of config.json that speak of a head."""


@dataclass(frozen=True, slots=True)
class Headless:
    """Models without their heads, the first one's config following; and heads of the result."""

    models: list[Checkpoint]
    heads: Checkpoint | None


def task_heads(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of a checkpoint that are heads of tasks."""
    outside = [n for n in checkpoint.tensors if n not in checkpoint.folders and place_of(n) is None]
    heads = [n for n in outside if role_of(n, checkpoint.tensors[n].shape) == "head"]
    if not heads:
        return frozenset()
    tokens = vocabulary_tensors(checkpoint)
    named = _architectures(checkpoint.side)
    if named and not any(_GENERATES.search(a) for a in named):
        return frozenset(heads)
    modules = {_module(n) for n in heads if n not in tokens}
    return frozenset(n for n in heads if _module(n) in modules)


def check_heads(models: Sequence[Checkpoint], missing: Missing = "error") -> None:
    """PlanError unless the models have heads of the same names and shapes."""
    every = sorted({n for m in models for n in task_heads(m)})
    tokens = {n for m in models for n in vocabulary_tensors(m)} if every else set()
    odd = []
    for name in every:
        shapes = {m.tensors[name].shape for m in models if name in m.tensors}
        lacking = missing == "error" and any(name not in m.tensors for m in models)
        if lacking or (len(shapes) > 1 and name not in tokens):
            odd.append(name)
    if odd:
        found = [
            f"{short(m.label)}: {list(m.tensors[n].shape) if n in m.tensors else 'none'}"
            for n in odd[:1]
            for m in models
        ]
        raise PlanError(
            "the models have different heads",
            tensor=some(odd),
            found=", ".join(found),
            expected="heads of the same shape in every model",
            do="say in the recipe what becomes of them: 'heads: base' or the name of a model whose"
            " heads are taken, 'heads: drop', or 'heads: keep' to save each model's beside the"
            " result",
        )


def without_heads(
    models: Sequence[Checkpoint], rule: str, whose: int = 0, kept: Mapping[str, int] | None = None
) -> Headless:
    """The models without heads; ``rule`` says what the result has in their place.

    ``take``: the heads of the model ``whose``, and what its config says of them. ``drop``: none.
    ``keep``: the first model's, and in folders ``heads/NAME`` those of the models in ``kept``.
    """
    every = frozenset(n for m in models for n in task_heads(m))
    if not every:
        return Headless(list(models), None)
    owner = models[whose if rule == "take" else 0]
    saved = {f"{FOLDER}/{n}": models[i] for n, i in (kept or {}).items() if rule == "keep"}
    why = {
        "take": f"the result has the heads of {short(owner.label)}",
        "drop": "the recipe drops heads",
        "keep": "each model's heads are saved beside the result",
    }[rule]
    used = [] if rule == "drop" else [owner, *saved.values()]
    out = [_stripped(m, every, None if any(m is u for u in used) else why) for m in models]
    if rule == "drop":
        return Headless([_without_task(out[0]), *out[1:]], None)
    side = out[0].side.with_texts(
        {
            f"{path}/config.json": json.dumps(_with_head({}, m.side.config), indent=2) + "\n"
            for path, m in saved.items()
            if every & m.tensors.keys()
        }
    )
    if owner is not models[0]:
        side = side.with_config(_with_head(side.config, owner.side.config))
    heads = _heads_of({"": owner, **saved}, every)
    return Headless([replace(out[0], side=side), *out[1:]], heads)


def _stripped(model: Checkpoint, heads: frozenset[str], why: str | None) -> Checkpoint:
    """The model without these tensors, which are dropped for that reason, if there is one."""
    own = [n for n in model.tensors if n in heads]
    if not own:
        return model
    rest = select(model, {n: n for n in model.tensors if n not in heads})
    dropped = dict.fromkeys(own, why) if why is not None else {}
    return replace(rest, dropped={**model.dropped, **dropped})


def _heads_of(owners: Mapping[str, Checkpoint], heads: frozenset[str]) -> Checkpoint | None:
    """The heads of models, each in its folder, as one checkpoint; None where they have none."""
    tensors: dict[str, Expr] = {}
    folders: dict[str, str] = {}
    for folder, model in owners.items():
        for name in model.tensors:
            if name in heads and name not in model.tied:
                full = f"{folder}/{name}" if folder else name
                tensors[full] = model.tensors[name]
                folders |= {full: folder} if folder else {}
    first = owners[""]
    if not tensors:
        return None
    return replace(first, tensors=tensors, folders=folders, tied={}, dropped={}, notes=())


def _module(name: str) -> str:
    """The first word of a head's name: ``vocab_projector`` goes with ``vocab_transform``."""
    return re.split(r"[._]", name, maxsplit=1)[0]


def _architectures(side: Side) -> list[str]:
    value = side.config.get("architectures")
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _with_head(config: Mapping[str, object], owner: Mapping[str, object]) -> dict[str, object]:
    """``config`` saying of heads what ``owner`` says."""
    rest = {k: v for k, v in config.items() if k not in _OF_A_HEAD}
    return {**rest, **{k: owner[k] for k in _OF_A_HEAD if k in owner}}


def _without_task(model: Checkpoint) -> Checkpoint:
    """The model with the class that has no head, where config.json lets us tell which that is."""
    config, named = model.side.config, _architectures(model.side)
    if not named or any(_GENERATES.search(a) for a in named):
        return model
    bases = [f"{m[1]}Model" for a in named if (m := _TASK.match(a))]
    if len(bases) < len(named):
        note = f"config.json: check architectures, {', '.join(named)}, now that heads are dropped"
        return replace(model, notes=(*model.notes, note))
    said = {**_with_head(config, {}), "architectures": bases}
    return replace(model, side=model.side.with_config(said))
