"""The network of one task of a learned merge, made from the files of an output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge.checkpoint import open_checkpoint
from merge.errors import MergeError, PlanError
from merge.learning.own import built
from merge.task_files import read_own

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load_task"]


def load_task(out: str | Path, task: str, module: nn.Module | None = None) -> nn.Module:
    """The network of one task of a learned merge, ready to run.

    It has the merged tensors, those that were learned for the task alone, such as its head, and
    its correction. out: a folder that `merge apply` or `Learned.save` wrote, or such a repo on the
    Hub. module: the network's code, of which a copy is returned; a network of transformers is made
    as the task's ``config.json`` says. PlanError for a name that is no task's, and for a network
    that does not fit.

    Example::

        network = merge.load_task("out", "topics")
        network.save_pretrained("topics")  # a whole model, for transformers alone
    """
    own, config = read_own(out, task)
    network = _made(config, task) if module is None else module
    try:
        return built(network, own, open_checkpoint(str(out)).state_dict())
    except MergeError as error:
        raise error.at(model=out) from None


def _made(config: Mapping[str, object], task: str) -> nn.Module:
    """The network that a task's config names, its tensors as they happen to be."""
    if not config:
        raise PlanError(
            "a task was learned in a network of your own",
            task=task,
            do="give its code: merge.load_task(out, task, module=Net())",
        )
    try:
        import transformers
    except ImportError:
        raise PlanError(
            "a task's network is one of transformers, which is not installed",
            task=task,
            do="pip install 'hf-merge[transformers]'",
        ) from None
    import torch

    from merge.smoke.load import quiet

    named: Any = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    found: Any = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise PlanError(
            "transformers does not have the class of a task's network",
            task=task,
            found=named,
            do="update transformers, or give the network's code as module=",
        )
    kind: Any = found
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            made: nn.Module = kind(kind.config_class.from_dict(dict(config)))
    except Exception as error:  # whatever the library raises over this config
        raise PlanError(
            "a task's network cannot be made as its config says", task=task, found=error
        ) from error
    return made
