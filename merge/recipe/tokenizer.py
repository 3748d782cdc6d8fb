"""What a recipe says about the vocabulary, checked against the models: they must agree for now.

Where all models have one and the same tokenizer, every choice of a source comes to the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference
from merge.recipe.document import Place
from merge.recipe.read import Stage
from merge.recipe.sections import Assembly

__all__ = ["check_vocabulary"]

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "added_tokens.json",
)


def check_vocabulary(
    stage: Stage,
    assembly: Assembly,
    open_at: Callable[[Reference, Place], Checkpoint],
    notes: list[str],
) -> None:
    """Refuse a merge of different vocabularies; note what needs no doing, or is not done yet."""
    model, document = stage.model, stage.document
    if model.chat_template is not None:
        line = document.where(("chat_template",))["line"]
        notes.append(f"line {line}: chat_template is not applied yet: the donor's is kept")
    key = "tokenizer" if model.tokenizer is not None else "tokenizer_source"
    source = model.tokenizer_source if model.tokenizer is None else model.tokenizer.source
    if source is None:
        return
    models = {i.called: i.model for s in assembly.sections for i in s.inputs}
    if str(source) not in ("union", "base"):
        models[str(source)] = open_at(source, (key, "source") if key == "tokenizer" else (key,))
    known = {called: _tokenizer(m) for called, m in models.items()}
    donor = _tokenizer(assembly.donor)
    other = next((called for called, files in known.items() if files and files != donor), None)
    entry = model.tokenizer
    if other is None and not (entry and (entry.tokens or entry.pad_to_multiple_of)):
        line = document.where((key,))["line"]
        notes.append(f"line {line}: all models have one tokenizer, which is taken as it is")
        return
    raise document.error(
        f"{key}: merging different vocabularies is not supported yet",
        (key,),
        key=key,
        found=f"the tokenizer of {other} differs from that of {assembly.donor.label}"
        if other
        else "a vocabulary that is to be changed",
        expected="models with one and the same tokenizer",
        do="leave the key out to keep the donor's vocabulary, if the models' embeddings agree",
    )


def _tokenizer(model: Checkpoint) -> dict[str, bytes]:
    """The files that define the model's vocabulary."""
    return {f.name: Path(f.path).read_bytes() for f in model.side.files if f.name in _FILES}
