"""The tokenizer of a checkpoint, read from the small files beside its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from merge.errors import SourceError
from merge.ir.checkpoint import Checkpoint
from merge.ir.side import Side, SideFile
from merge.vocabulary.chat import FILES, FURTHER
from merge.vocabulary.output import is_whole
from merge.vocabulary.parse import PIECES, TEXTS

__all__ = ["is_of_tokenizer", "names_of", "path_of", "text_of", "texts_of", "tokenizer_texts"]

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def is_of_tokenizer(name: str) -> bool:
    """Whether a file goes with the tokenizer: its tokens in any form, or a chat template.

    >>> is_of_tokenizer("merges.txt"), is_of_tokenizer("preprocessor_config.json")
    (True, False)
    """
    return name in (*TEXTS, *PIECES, *FILES) or is_whole(name) or name.startswith(FURTHER)


def tokenizer_texts(checkpoint: Checkpoint) -> dict[str, str]:
    """The files that say what the tokens are, by name; {} where there are none.

    A lone sentencepiece model is converted by transformers, to a tokenizer.json. SourceError where
    that is not installed, or cannot.
    """
    side = checkpoint.side
    texts = texts_of(side, lambda name: name in TEXTS)
    if {"tokenizer.json", "vocab.json", "vocab.txt"} & texts.keys():
        return texts
    for file in side.files:
        if file.name in _SENTENCEPIECE:
            return {**texts, "tokenizer.json": _converted(file, side, checkpoint.label)}
    return {}


def texts_of(side: Side, wanted: Callable[[str], bool]) -> dict[str, str]:
    """The text files of a checkpoint whose names are wanted, those that were written anew too."""
    return {name: text_of(side, name) for name in names_of(side) if wanted(name)}


def names_of(side: Side) -> list[str]:
    """The names of a checkpoint's side files, those that were written anew too."""
    return list(dict.fromkeys([*(f.name for f in side.files), *side.texts]))


def text_of(side: Side, name: str) -> str:
    """The text of a side file; SourceError where it is no UTF-8 or cannot be read."""
    if name in side.texts:
        return side.texts[name]
    path = path_of(side, name)
    local = next((f.local() for f in side.files if f.name == name), path)
    try:
        return Path(local).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"a text file is not UTF-8 at byte {error.start}", file=path, do="save it as UTF-8"
        ) from None
    except OSError as error:
        raise SourceError(f"a side file cannot be read: {error.strerror}", file=path) from None


def path_of(side: Side, name: str) -> str:
    """Where a side file lies; its name where it was written anew."""
    return next((f.path for f in side.files if f.name == name), name)


def _converted(file: SideFile, side: Side, label: str) -> str:
    """tokenizer.json for a sentencepiece model, as transformers makes it."""
    do = (
        "write its tokenizer.json once, with transformers, sentencepiece and protobuf installed:"
        " AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )
    what = "the tokenizer is a sentencepiece model alone, which transformers must convert"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise SourceError(what, model=label, file=file.name, do=do) from None
    try:
        for other in side.files:  # it reads what lies beside, too
            if is_of_tokenizer(other.name) or other.name == "config.json":
                other.local()
        loaded = AutoTokenizer.from_pretrained(str(Path(file.local()).parent))
        return str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # of the many libraries behind it, each with errors of its own
        found = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise SourceError(what, model=label, file=file.name, found=found, do=do) from None
