"""Data for models of transformers: arrays for its classifiers, texts for its language models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.analysis.named import told
from merge.analysis.task import Batch, Task
from merge.errors import RecipeError, SourceError
from merge.smoke.load import quiet

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["arrays", "texts"]

_SIZE = 64  # samples in a batch of arrays
_TEXTS = 8  # windows of text in a batch
_WINDOW = 128  # tokens
_MASKED = 0.15  # share of tokens that a masked language model is to find


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


def _of(
    folder: Path,
    train: Sequence[Batch],
    test: Sequence[Batch],
    classes: bool,
    check: Callable[[Any], None] | None = None,
    count: Callable[[Batch], float] | None = None,
) -> Task:
    load = _loader(folder)
    module = load(folder)
    if check is not None:
        check(module)
    return Task(
        module,
        _own_loss,
        train,
        test,
        _share_right if classes else None,
        lambda place: load(place).state_dict(),
        count,
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


def arrays(file: Path, folder: Path, batch: int | None, limit: int | None) -> Task:
    """Arrays x and y of a .npz file, for the classifier in ``folder``."""
    import numpy as np
    import torch

    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as loaded:
            found = {name: loaded[name] for name in loaded.files}
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise SourceError("the arrays cannot be read", file=file, found=told(error)) from None
    missing = [name for name in ("x", "y") if name not in found]
    if missing:
        raise SourceError(
            "the file lacks an array",
            file=file,
            found=", ".join(found) or "none",
            expected="x and y, and x_test and y_test where there are any",
        )
    x, y = found["x"], found["y"]
    if len(x) != len(y) or not len(x):
        raise SourceError(
            "there is not one y for each x", file=file, found=f"{len(x)} x, {len(y)} y"
        )
    labels = [found[n] for n in ("y", "y_test") if n in found]
    if any(part.dtype.kind not in "iu" or part.ndim != 1 for part in labels):
        raise SourceError(
            "the labels are not whole numbers, one for each sample",
            file=file,
            found=", ".join(f"{part.dtype} {list(part.shape)}" for part in labels),
        )
    lowest = min(int(part.min()) for part in labels if len(part))
    if lowest < 0:
        raise SourceError("a label is out of range", file=file, found=lowest, expected="0 and up")
    if "x_test" in found:
        x_test, y_test = found["x_test"], found["y_test"]
    else:
        cut = max(1, len(x) - len(x) // 5)
        x, x_test, y, y_test = x[:cut], x[cut:], y[:cut], y[cut:]
    x, y, x_test, y_test = (part[:limit] for part in (x, y, x_test, y_test))
    key = "pixel_values" if x.ndim == 4 else "input_ids"
    highest = max(int(part.max()) for part in labels if len(part))

    def check(module: Any) -> None:
        """A classifier tells so many classes apart, and the labels are among them."""
        classes = getattr(module.config, "num_labels", 0)
        if "Classification" in type(module).__name__ and 1 < classes <= highest:
            raise SourceError(
                "a label is out of range",
                file=file,
                found=f"label {highest}",
                expected=f"0 to {classes - 1}: the model tells {classes} classes apart",
                model=folder,
                do="number the classes from 0, or take the model that was trained on them",
            )

    def batches(inputs: Any, targets: Any) -> list[Batch]:
        plain = torch.as_tensor(inputs)
        plain = plain.float() if plain.is_floating_point() else plain.long()
        labels = torch.as_tensor(targets).long()
        size = batch or _SIZE
        pairs = zip(torch.split(plain, size), torch.split(labels, size), strict=True)
        return [({key: a, "labels": b}, b) for a, b in pairs]

    test = batches(x_test, y_test) if len(x_test) else ()
    return _of(folder, batches(x, y), test, True, check)


def texts(file: Path, folder: Path, batch: int | None, limit: int | None) -> Task:
    """Texts in windows of 128 tokens, for the language model in ``folder``."""
    import torch
    import transformers

    lines = _read_texts(file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = [i for t in lines for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id or 0]]
    count = len(ids) // _WINDOW
    if not count:
        raise SourceError(
            "there is too little text", file=file, found=f"{len(ids)} tokens", expected=_WINDOW
        )
    windows = torch.tensor(ids[: count * _WINDOW]).reshape(count, _WINDOW)
    masked = tokenizer.mask_token_id

    def inputs_of(part: Tensor) -> Batch:
        inputs = {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        return ({**inputs, **_masked(part, masked)} if masked is not None else inputs, None)

    cut = max(1, count - count // 5)
    train, test = (
        [inputs_of(part) for part in torch.split(half[:limit], batch or _TEXTS) if len(part)]
        for half in (windows[:cut], windows[cut:])
    )
    return _of(folder, train, test, False, count=_to_be_found)


def _to_be_found(batch: Batch) -> float:
    """Tokens of a batch that the loss is the mean over."""
    return float((batch[0]["labels"] != -100).sum())


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
