"""Whether a folder loads in the library it is for, and gives numbers: one forward pass.

The libraries are optional, and are asked to be silent. Nothing is fetched, no code of a model's
own is run. The whole model is loaded into memory, which a merge itself never does.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from merge.checkpoint import open_checkpoint
from merge.errors import RecipeError, SourceError
from merge.smoke.load import by_diffusers, by_sentence_transformers, by_transformers, quiet
from merge.smoke.result import Figures, Smoke

__all__ = ["Figures", "Smoke", "require_transformers", "smoke"]


def require_transformers() -> None:
    """Raise RecipeError unless transformers is installed; it is not imported."""
    if find_spec("transformers") is None:
        raise RecipeError(
            "the smoke check loads the model with transformers, which is not installed",
            key="--smoke",
            do="pip install 'hf-merge[transformers]', or leave --smoke out",
        )


def smoke(path: str | Path) -> Smoke:
    """Load the folder ``path`` and run it once on a short fixed input, in its own element type.

    It fails when it does not load, when weights are missing or do not fit, when the forward pass
    breaks off, and when an output holds NaN or infinity. SourceError when there is no such folder;
    RecipeError when transformers is not installed.
    """
    require_transformers()
    folder = Path(path)
    try:
        checkpoint = open_checkpoint(folder)
    except SourceError as error:
        if not folder.is_dir():
            raise
        return Smoke(folder, problems=(f"it cannot be opened: {error.what}",))
    names = {f.name for f in checkpoint.side.files}
    config = checkpoint.side.config
    if checkpoint.space != "weight":
        return Smoke(folder, notes=("a difference of weights is no model",))
    with quiet():
        if "modules.json" in names:
            return by_sentence_transformers(folder, config)
        if "model_index.json" in names or "_class_name" in config:
            return by_diffusers(folder, whole="model_index.json" in names)
        if "model_type" in config:
            return by_transformers(folder, config)
    return Smoke(folder, notes=("config.json has no model_type, so it is not for transformers",))
