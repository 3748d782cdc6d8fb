"""The callbacks of this room for the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from merge.errors import RecipeError
from merge.training.callback import Callback

__all__ = ["trainer_callback"]


def trainer_callback(*parts: Callback) -> Any:
    """A ``TrainerCallback`` of transformers that runs the parts, in their order.

    At the end of a run they act in their order too: an average that is put into the network comes
    before the push of its difference, if it is given before. Needs the extra ``transformers``.

    Example::

        Trainer(model, args, train_dataset=data,
                callbacks=[merge.trainer_callback(merge.WeightAverage("ema", on="step"))])
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise RecipeError(
            "transformers is not installed", do="pip install 'hf-merge[transformers]'"
        ) from None

    class Parts(TrainerCallback):
        """Calls the parts at their times."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            for part in parts:
                part.begin(_bare(known["model"]), known.get("optimizer"))

        def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            for part in parts:
                part.step(_bare(known["model"]), state.global_step)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            for part in parts:
                part.epoch(_bare(known["model"]), round(state.epoch))

        def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            for part in parts:
                part.end(_bare(known["model"]))

    return Parts()


_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Attributes in which wrappers hold the network that they share among devices, or compile."""


def _bare(module: Any) -> Any:
    """The network inside its wrappers."""
    while (attribute := _WRAPPERS.get(type(module).__name__)) is not None:
        module = getattr(module, attribute)
    return module
