"""The module that runs a task's examples: the transformers class of a folder, or one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.analysis.named import called
from merge.errors import RecipeError, SourceError
from merge.smoke.load import quiet
from merge.streams.spec import DataSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Runner", "config_of", "logits_of", "open_runner"]


@dataclass(frozen=True, slots=True)
class Runner:
    """A module, its config, the folder that it is from, and how others are loaded.

    load: from a folder to the module's tensors; None where the tensors that lie there are it.
    """

    module: nn.Module
    config: Mapping[str, Any]
    folder: Path | None = None
    load: Callable[[Any], Mapping[str, Tensor]] | None = None


def open_runner(spec: DataSpec, folder: Path | None, kind: str) -> Runner:
    """What runs the examples. kind: the auto class for a folder whose config names no class.

    RecipeError where there is neither a folder of transformers nor a function.
    """
    if spec.model is not None:
        import torch

        made = called(spec.model)
        if not isinstance(made, torch.nn.Module):
            raise SourceError(
                "the function does not return a module",
                function=spec.model,
                found=type(made).__name__,
                expected="a torch.nn.Module",
            )
        return Runner(made.eval(), config_of(made), folder)
    if folder is None or not (folder / "config.json").is_file():
        raise RecipeError(
            "this kind of data needs a model of transformers to run it in",
            found="no folder with a config.json" if folder is None else str(folder),
            do="give the folder of such a model, a model as module:function, or data that is a"
            " merge.Task",
        )
    bare = spec.head is not None or spec.positive is not None
    load = _loader(folder, "AutoModel" if bare else kind, bare)
    module = load(folder)
    return Runner(module, config_of(module), folder, lambda place: load(place).state_dict())


def config_of(module: nn.Module) -> Mapping[str, Any]:
    """A module's config as plain data; {} where it has none."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    return dict(to_dict()) if callable(to_dict) else {}


def logits_of(out: Any) -> Tensor:
    """The scores of classes in what a module returns; SourceError where there are none."""
    import torch

    found = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
    if found is None and isinstance(out, tuple) and out and isinstance(out[0], torch.Tensor):
        found = out[0]
    if found is None:
        raise SourceError(
            "the model gives no scores of classes on this data",
            found=type(out).__name__,
            expected="a classifier",
            do="take the model with the head that it was trained with, or set head: prototypes",
        )
    return found


def _loader(folder: Path, kind: str, bare: bool) -> Callable[[Any], nn.Module]:
    """Loads a model of the class that the folder's config names, in float32."""
    try:
        import transformers
    except ImportError:
        raise RecipeError(
            "models are run by transformers, which is not installed",
            do="pip install 'hf-merge[transformers]', or give data as module:function",
        ) from None
    try:
        config = json.loads((folder / "config.json").read_text())
        named = kind if bare else (config.get("architectures") or [kind])[0]
    except (ValueError, AttributeError, LookupError):
        raise SourceError("the file is no JSON object", file=folder / "config.json") from None
    found = getattr(transformers, str(named), None)
    if found is None:
        raise SourceError(
            "transformers does not have the class that the config names",
            file=folder / "config.json",
            found=named,
            do="update transformers, or give data as module:function",
        )

    def load(place: Any) -> nn.Module:
        with quiet():
            made, info = found.from_pretrained(
                place,
                dtype="float32",
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
        if info["missing_keys"]:  # which the library makes up
            raise SourceError(
                "a model lacks weights of the class that would run it",
                folder=place,
                tensor=min(info["missing_keys"]),
                found=f"{len(info['missing_keys'])} weights are missing for {found.__name__}",
                do="take the model with the head that it was trained with, or set head: prototypes",
            )
        module: nn.Module = made.eval()
        return module

    return load
