"""Tasks from a line of text: arrays, texts, or a function of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.analysis.named import called, is_function, told
from merge.analysis.task import Batch, Task
from merge.errors import RecipeError, SourceError
from merge.smoke.load import quiet

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["open_task"]

_SIZE = 64  # examples in a batch of arrays
_TEXTS = 8  # windows of text in a batch
_WINDOW = 128  # tokens
_MASKED = 0.15  # share of tokens that a masked language model is to find


def open_task(data: str, folder: str | Path | None = None) -> Task:
    """The task that ``data`` names.

    ``module:function``: what the function returns, called without arguments; the module is looked
    for in the current folder too. ``x.npz``: arrays x and y, and x_test and y_test or else the last
    fifth of them, for the classifier in ``folder``. ``x.jsonl`` (with a key "text") or ``x.txt``:
    texts for the language model in ``folder``. Classifiers and language models are those of
    transformers. RecipeError for what is none of these, SourceError for what cannot be read.
    """
    suffix = Path(data).suffix.lower()
    if suffix in (".npz", ".jsonl", ".txt"):
        if not Path(data).is_file():
            raise SourceError("there is no such data", file=data)
        if folder is None or not (Path(folder) / "config.json").is_file():
            raise RecipeError(
                "this kind of data needs a model of transformers to run it in",
                found="no folder with a config.json" if folder is None else str(folder),
                do="give the folder of such a model, or data as module:function",
            )
        return _arrays(Path(data), Path(folder)) if suffix == ".npz" else _texts(data, Path(folder))
    if is_function(data):
        return _own(data)
    raise RecipeError(
        "this is no data that is known here",
        found=repr(data),
        expected="a .npz of x and y, a .jsonl or .txt of texts, or module:function",
    )


def _own(text: str) -> Task:
    made = called(text)
    if not isinstance(made, Task):
        raise SourceError(
            "the function does not return a task",
            function=text,
            found=type(made).__name__,
            expected="merge.Task(module, criterion, train=[(inputs, target), ...])",
        )
    return made


# -- models of transformers ------------------------------------------------------------------------
def _loader(folder: Path) -> Callable[[Any], Any]:
    """Loads a model of the class that the folder's config names, in float32."""
    try:
        import transformers
    except ImportError:
        raise RecipeError(
            "models are run by transformers, which is not installed",
            do="pip install 'hf-merge[transformers]', or give data as module:function",
        ) from None
    config = json.loads((folder / "config.json").read_text())
    named = (config.get("architectures") or ["none"])[0]
    kind = getattr(transformers, named, None)
    if kind is None:
        raise SourceError(
            "transformers does not have the class that the config names",
            file=folder / "config.json",
            found=named,
            do="update transformers, or give data as module:function",
        )

    def load(place: Any) -> Any:
        with quiet():
            return kind.from_pretrained(
                place, dtype="float32", attn_implementation="eager", local_files_only=True
            ).eval()

    return load


def _of(folder: Path, train: Sequence[Batch], test: Sequence[Batch], classes: bool) -> Task:
    load = _loader(folder)
    module = load(folder)
    return Task(
        module,
        _own_loss,
        train,
        test,
        _share_right if classes else None,
        lambda place: load(place).state_dict(),
    )


def _own_loss(out: Any, _target: Any) -> Tensor:
    if getattr(out, "loss", None) is None:
        raise SourceError(
            "the model gives no loss on this data",
            found=type(out).__name__,
            expected="a classifier, or a language model",
            do="take the model with the head that it was trained with",
        )
    found: Tensor = out.loss
    return found


def _share_right(out: Any, target: Any) -> float:
    return float((out.logits.argmax(-1) == target).float().mean())


def _arrays(file: Path, folder: Path) -> Task:
    import numpy as np
    import torch

    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise SourceError("the arrays cannot be read", file=file, found=told(error)) from None
    missing = [name for name in ("x", "y") if name not in arrays]
    if missing:
        raise SourceError(
            "the file lacks an array",
            file=file,
            found=", ".join(arrays) or "none",
            expected="x and y, and x_test and y_test where there are any",
        )
    x, y = arrays["x"], arrays["y"]
    if len(x) != len(y) or not len(x):
        raise SourceError(
            "there is not one y for each x", file=file, found=f"{len(x)} x, {len(y)} y"
        )
    labels = [arrays[n] for n in ("y", "y_test") if n in arrays]
    if any(part.dtype.kind not in "iu" or part.ndim != 1 for part in labels):
        raise SourceError(
            "the labels are not whole numbers, one for each sample",
            file=file,
            found=", ".join(f"{part.dtype} {list(part.shape)}" for part in labels),
        )
    lowest = min(int(part.min()) for part in labels if len(part))
    if lowest < 0:
        raise SourceError("a label is out of range", file=file, found=lowest, expected="0 and up")
    if "x_test" in arrays:
        x_test, y_test = arrays["x_test"], arrays["y_test"]
    else:
        cut = max(1, len(x) - len(x) // 5)
        x, x_test, y, y_test = x[:cut], x[cut:], y[:cut], y[cut:]
    key = "pixel_values" if x.ndim == 4 else "input_ids"

    def batches(inputs: Any, targets: Any) -> list[Batch]:
        plain = torch.as_tensor(inputs)
        plain = plain.float() if plain.is_floating_point() else plain.long()
        labels = torch.as_tensor(targets).long()
        pairs = zip(torch.split(plain, _SIZE), torch.split(labels, _SIZE), strict=True)
        return [({key: a, "labels": b}, b) for a, b in pairs]

    return _of(folder, batches(x, y), batches(x_test, y_test) if len(x_test) else (), True)


def _texts(file: str, folder: Path) -> Task:
    import torch
    import transformers

    texts = _read_texts(Path(file))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [i for t in texts for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id or 0]]
    count = len(ids) // _WINDOW
    if not count:
        raise SourceError(
            "there is too little text", file=file, found=f"{len(ids)} tokens", expected=_WINDOW
        )
    windows = torch.tensor(ids[: count * _WINDOW]).reshape(count, _WINDOW)
    masked = tokenizer.mask_token_id

    def batch(part: Tensor) -> Batch:
        inputs = {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        return ({**inputs, **_masked(part, masked)} if masked is not None else inputs, None)

    made = [batch(part) for part in torch.split(windows, _TEXTS)]
    cut = max(1, len(made) - len(made) // 5)
    return _of(folder, made[:cut], made[cut:], False)


def _masked(part: Tensor, token: int) -> Mapping[str, Tensor]:
    """Some tokens hidden, the same ones each time, and only those to be found."""
    import torch

    draw = torch.Generator().manual_seed(int(part.sum()))
    hidden = torch.rand(part.shape, generator=draw) < _MASKED
    return {"input_ids": part.masked_fill(hidden, token), "labels": part.masked_fill(~hidden, -100)}


def _read_texts(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    if file.suffix.lower() == ".txt":
        return [line for line in lines if line.strip()]
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            texts.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError):
            raise SourceError(
                "a line is no JSON object with a key 'text'", file=file, line=number
            ) from None
    return texts
