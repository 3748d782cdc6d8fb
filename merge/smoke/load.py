"""Load a folder by the library that it is for, and run it: transformers and what builds on it."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merge.errors import told
from merge.ir.checkpoint import some
from merge.smoke.inputs import dummy_inputs
from merge.smoke.result import Smoke, measured, not_finite, tensors_of

__all__ = ["by_diffusers", "by_sentence_transformers", "by_transformers", "quiet"]

_SENTENCES = ["A short sentence.", "Another one, a little longer than the first."]


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_LARGE = 100_000_000
"""Parameters; less than that may be made up without harm."""


def by_transformers(folder: Path, config: Mapping[str, object]) -> Smoke:
    """A folder for transformers: the class that config.json names, else its bare model."""
    transformers: Any = import_module("transformers")
    named = config.get("architectures")
    wanted = named[0] if isinstance(named, list) and named else None
    kind = getattr(transformers, wanted, None) if isinstance(wanted, str) else None
    known = kind if hasattr(kind, "from_pretrained") else None
    types = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if known is None and (wanted is not None or config["model_type"] not in types):
        what = f"class {wanted}" if wanted else f"model type {config['model_type']}"
        version = transformers.__version__
        return Smoke(folder, notes=(f"transformers {version} has no {what} of its own",))
    kind = known or transformers.AutoModel
    if too_large := _too_large(folder, kind, transformers):
        return Smoke(folder, problems=(too_large,))
    options: dict[str, Any] = {"local_files_only": True, "ignore_mismatched_sizes": True}
    if known is None:  # which would otherwise ask on the terminal
        options["trust_remote_code"] = False
    try:
        model, info = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    except Exception as error:  # whatever a library raises over this folder is what is to be told
        return Smoke(folder, problems=(f"it does not load: {told(error)}",))
    model.eval()
    missing, unexpected = (tuple(sorted(info[k])) for k in ("missing_keys", "unexpected_keys"))
    odd = [f"{name} {list(a)}, not {list(b)}" for name, a, b in sorted(info["mismatched_keys"])]
    problems, notes = [], []
    if missing and wanted is not None:
        problems.append(f"{len(missing)} weights are missing: {some(missing)}")
    elif missing:
        notes.append(f"{len(missing)} weights of the bare model are not in it: {some(missing)}")
    if odd:
        problems.append(f"{len(odd)} weights do not fit: {some(odd)}")
    if unexpected:
        notes.append(f"{len(unexpected)} weights have no place in the model: {some(unexpected)}")
    found = Smoke(
        folder,
        f"transformers.{type(model).__name__}",
        str(model.dtype).removeprefix("torch."),
        missing,
        unexpected,
        problems=tuple(problems),
        notes=tuple(notes),
    )
    return found if odd else _run(found, model)


def _too_large(folder: Path, kind: Any, transformers: Any) -> str | None:
    """What is wrong with a config of a model far larger than its weights; None where nothing is.

    What is not stored would be made up, and may be more than the machine has memory for.
    """
    import torch

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            model = kind(config) if hasattr(kind, "config_class") else kind.from_config(config)
    except Exception:  # loading it says what is wrong
        return None
    count = sum(p.numel() for p in model.parameters())
    stored = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in _WEIGHTS)
    if count < _LARGE or count <= 2 * stored:
        return None
    return (
        f"config.json describes a model of {count:,} parameters, and the weight files hold"
        f" {stored:,} bytes: it is not loaded"
    )


def _run(found: Smoke, model: Any) -> Smoke:
    """``found`` with what one forward pass shows. In float32 where the CPU lacks a kernel."""
    import torch

    try:
        given = dummy_inputs(model)
        with torch.inference_mode():
            try:
                output = model(**_cast(given, model.dtype))
            except RuntimeError as error:
                if "not implemented for" not in str(error):
                    raise
                output = model.float()(**given)
                note = f"run in float32: no kernel here for {found.dtype}"
                found = replace(found, notes=(*found.notes, note))
    except Exception as error:  # as above: the model's own code may raise anything
        problem = f"its forward pass broke off: {told(error)}"
        return replace(found, problems=(*found.problems, problem))
    left = {"pixel_values", "input_features", "input_values"} & set(
        inspect.signature(model.forward).parameters
    ) - set(given)
    if left:
        note = f"{', '.join(sorted(left))} were not tried"
        found = replace(found, notes=(*found.notes, note))
    return measured(found, dict(tensors_of(output)))


def _cast(given: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Pictures and sounds in the model's element type."""
    return {
        k: v.to(dtype) if getattr(v, "is_floating_point", bool)() else v for k, v in given.items()
    }


def by_sentence_transformers(folder: Path, config: Mapping[str, object]) -> Smoke:
    """Its transformers part as such, for missing weights; then two sentences through the whole."""
    part = by_transformers(folder, config) if "model_type" in config else Smoke(folder)
    if find_spec("sentence_transformers") is None:
        note = "sentence-transformers is not installed, so its other modules were not tried"
        return replace(part, notes=(*part.notes, note))
    import torch

    sentence_transformers: Any = import_module("sentence_transformers")
    found = replace(part, loader="sentence_transformers.SentenceTransformer", figures=None)
    try:
        model = sentence_transformers.SentenceTransformer(
            str(folder), device="cpu", local_files_only=True
        )
        rows = torch.as_tensor(model.encode(_SENTENCES, show_progress_bar=False))
    except Exception as error:  # as above
        problem = f"sentence-transformers cannot use it: {told(error)}"
        return replace(found, problems=(*part.problems, problem))
    return measured(found, {"embeddings": rows})


def by_diffusers(folder: Path, *, whole: bool) -> Smoke:
    """A pipeline or a component for diffusers: whether it loads. It is not run."""
    if find_spec("diffusers") is None:
        return Smoke(folder, notes=("diffusers is not installed",))
    diffusers: Any = import_module("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    kind = diffusers.DiffusionPipeline if whole else diffusers.AutoModel
    try:
        model = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # as above
        return Smoke(folder, problems=(f"it does not load: {told(error)}",))
    found = Smoke(
        folder, f"diffusers.{type(model).__name__}", notes=("it was loaded, and not run",)
    )
    parts = model.components if whole else {"": model}
    weights = {
        f"{part}.{name}".strip("."): tensor.detach()
        for part, module in parts.items()
        if hasattr(module, "named_parameters")
        for name, tensor in module.named_parameters()
    }
    return replace(found, problems=not_finite(weights))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no chatter on stdout, and only errors on stderr, until it is over."""
    logging: Any = import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
