"""Texts as batches of tokens: classified, or windows for a language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.errors import RecipeError, SourceError, told
from merge.smoke.load import quiet
from merge.streams.batches import Collate
from merge.streams.examples import Example
from merge.streams.labels import Classes
from merge.streams.models import Runner
from merge.streams.spec import DataSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["classified", "open_tokenizer", "paired", "to_be_found", "windowed", "windows"]

_MASKED = 0.15  # share of tokens that a masked language model is to find
Encode = Callable[[Sequence[Example]], Mapping[str, Any]]


def open_tokenizer(runner: Runner) -> Any:
    """The tokenizer beside the model."""
    if runner.folder is None:
        raise RecipeError(
            "texts need the folder of a model with a tokenizer",
            found="no folder",
            do="give the folder of such a model, or data that is a merge.Task",
        )
    try:
        import transformers

        with quiet():
            return transformers.AutoTokenizer.from_pretrained(runner.folder, local_files_only=True)
    except ImportError:
        raise RecipeError(
            "texts are cut into tokens by transformers, which is not installed",
            do="pip install 'hf-merge[transformers]', or give data as module:function",
        ) from None
    except Exception as error:  # whatever a tokenizer's own code raises over this folder
        raise SourceError(
            "there is no tokenizer that can be read beside the model",
            folder=Path(runner.folder),
            found=told(error),
        ) from None


def classified(tokenizer: Any, runner: Runner, spec: DataSpec, classes: Classes) -> Collate:
    """Makes a batch of texts: as long as its longest, cut at ``tokens``, padded on the right."""
    encode = _encoder(tokenizer, runner, spec)

    def collate(examples: Sequence[Example]) -> tuple[Any, Any]:
        import torch

        known = [None if e.label is None else classes[e.label] for e in examples]
        target = None if None in known else torch.tensor(known)
        return dict(encode(examples)), target

    return collate


def paired(tokenizer: Any, runner: Runner, spec: DataSpec) -> Collate:
    """Makes a batch of texts, and of those that mean the same as its target."""
    encode = _encoder(tokenizer, runner, spec)

    def collate(examples: Sequence[Example]) -> tuple[Any, Any]:
        queries = [replace(e, value=e.value[:-1]) for e in examples]
        positives = [replace(e, value=e.value[-1:]) for e in examples]
        return dict(encode(queries)), dict(encode(positives))

    return collate


def _encoder(tokenizer: Any, runner: Runner, spec: DataSpec) -> Encode:
    import torch

    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id or 0
    inner = getattr(runner.module, "config", None)
    if inner is not None and getattr(inner, "pad_token_id", 0) is None:
        inner.pad_token_id = pad  # a decoder classifies by its last token that is none
    longest = min(spec.tokens, int(getattr(tokenizer, "model_max_length", spec.tokens)))

    def encode(examples: Sequence[Example]) -> Mapping[str, Tensor]:
        rows = [tokenizer(*e.value, truncation=True, max_length=longest) for e in examples]
        width = max(1, *(len(row["input_ids"]) for row in rows))
        fill = {"input_ids": pad, "token_type_ids": 0, "attention_mask": 0}
        keys = [k for k in fill if all(k in row for row in rows)]
        made = {
            k: torch.tensor([[*row[k], *[fill[k]] * (width - len(row[k]))] for row in rows])
            for k in keys
        }
        if "attention_mask" not in made:
            held = [[int(i < len(row["input_ids"])) for i in range(width)] for row in rows]
            made["attention_mask"] = torch.tensor(held)
        return made

    return encode


def windows(examples: Sequence[Example], tokenizer: Any, spec: DataSpec) -> list[Example]:
    """The texts one after another, an end of text after each, in windows of ``tokens``."""
    ids: list[int] = []
    for example in examples:
        for text in example.value:
            ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id or 0]
    count = len(ids) // spec.tokens
    cut = [tuple(ids[i * spec.tokens : (i + 1) * spec.tokens]) for i in range(count)]
    return [Example(window, None, repr(window).encode()) for window in cut]


def windowed(tokenizer: Any) -> Collate:
    """Makes a batch of windows with the tokens to be foretold, or found where they are masked."""
    masked = tokenizer.mask_token_id

    def collate(examples: Sequence[Example]) -> tuple[Any, Any]:
        import torch

        part = torch.tensor([e.value for e in examples])
        inputs = {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        return ({**inputs, **_masked(part, masked)} if masked is not None else inputs, None)

    return collate


def to_be_found(batch: tuple[Any, Any]) -> float:
    """Tokens of a batch that the loss is the mean over."""
    return float((batch[0]["labels"] != -100).sum())


def _masked(part: Tensor, token: int) -> Mapping[str, Tensor]:
    """Some tokens hidden, the same ones each time, and only those to be found."""
    import torch

    draw = torch.Generator().manual_seed(int(part.sum()))
    hidden = torch.rand(part.shape, generator=draw) < _MASKED
    return {"input_ids": part.masked_fill(hidden, token), "labels": part.masked_fill(~hidden, -100)}
