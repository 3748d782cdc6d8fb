"""Networks that are zipped, run on data: likenesses up to a cut, norms, a module that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge.alignment.repair import repair
from merge.alignment.taps import Tap, taps_of
from merge.errors import PlanError, RecipeError, hint
from merge.ir.checkpoint import Checkpoint
from merge.partial.joined import Membership
from merge.partial.likeness import correlations
from merge.partial.modules import resized_module
from merge.parting_data import Networks
from merge.statistics.norms import batch_norms
from merge.statistics.runs import run
from merge.symmetry.axes import factors_of
from merge.symmetry.symmetry import Symmetry
from merge.tasks import state_of
from merge.transport.coupling import Couplings
from merge.transport.mapped import roles_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

__all__ = ["likenesses", "measured", "network_of"]


def likenesses(
    networks: Networks, groups: Sequence[str], until: str | None
) -> dict[str, NDArray[Any]]:
    """Of each group the correlations of all networks' units, by layers up to the cut."""
    symmetry = networks.symmetry
    if until is not None:
        symmetry = _before(networks, until)
        _cut_of(networks, until)
    return correlations(symmetry, networks.modules, networks.batches, groups)


def measured(
    networks: Networks, merged: Checkpoint, couplings: Sequence[Couplings]
) -> tuple[Checkpoint, list[str]]:
    """The zipped checkpoint with the statistics of BatchNorm that it has on the data."""
    module = networks.modules[0]
    if not batch_norms(module):
        return merged, []
    states = [m.state_dict() for m in networks.modules]
    state = networks.joined(states, couplings, roles_of(networks.symmetry))
    found = repair(resized_module(module, state), state, [], networks.batches)
    told = f"{found.kind} of {len(found.layers)} layers"
    return networks.changed(merged, found.tensors), [told]


def network_of(
    networks: Networks,
    checkpoint: Checkpoint,
    members: Mapping[str, Membership],
    until: str | None,
    outputs: str,
) -> nn.Module:
    """The module with the zipped tensors; with a cut, the rests of all networks behind it."""
    import torch

    from merge.training.zipped import ZippedNetwork

    state = state_of_resized(networks, checkpoint)
    front = resized_module(networks.modules[0], state).eval()
    if until is None:
        return front
    tap, group = _cut_of(networks, until)
    size = networks.symmetry.groups[group].size
    plain = torch.arange(size).repeat(len(networks.modules), 1)
    index = torch.as_tensor(members[group].index) if group in members else plain
    made = ZippedNetwork(front, networks.modules, until, index, tap.channel, outputs)
    return made.eval()


def state_of_resized(networks: Networks, checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's tensors under the module's names, whatever their sizes."""
    if networks.task.load is not None:
        own = {n: tuple(t.shape) for n, t in networks.modules[0].state_dict().items()}
        sizes = {n: checkpoint.tensors[f].shape for n, f in networks.files.items()}
        if own == sizes:
            return state_of(networks.task, checkpoint)
    state = checkpoint.state_dict()
    return {name: state[file] for name, file in networks.files.items()}


# -- cuts ------------------------------------------------------------------------------------------
def _called(networks: Networks, until: str) -> list[str]:
    """Modules that are called until the cut has run for the first time, in the order they end."""
    module = networks.modules[0]
    names = dict(module.named_modules())
    if until not in names or not until:
        raise RecipeError(
            "the network has no module of that name to be zipped up to",
            key="until",
            found=until,
            expected="the name of a module, such as layers.3",
            do=hint(until, names),
        )
    ended: list[str] = []
    with ExitStack() as stack:
        for name, part in names.items():

            def note(_part: Any, _args: Any, _out: Any, name: str = name) -> None:
                if until not in ended:
                    ended.append(name)

            stack.callback(part.register_forward_hook(note).remove)
        run(module, networks.batches[0])
    if until not in ended:
        raise PlanError("the data never reaches the module at the cut", until=until)
    return ended


def _before(networks: Networks, until: str) -> Symmetry:
    """The symmetry with the tensors of layers that run before the cut, and inside of it."""
    ended = set(_called(networks, until))
    tensors = {
        n: layout
        for n, layout in networks.symmetry.tensors.items()
        if n.rpartition(".")[0] in ended
    }
    return replace(networks.symmetry, tensors=tensors)


def _cut_of(networks: Networks, until: str) -> tuple[Tap, str]:
    """The last layer in the module at the cut, and the group that its outputs are."""
    ended = _called(networks, until)
    inside = [n for n in ended if n == until or n.startswith(f"{until}.")]
    layers = [n for n in ended if f"{n}.weight" in networks.symmetry.tensors]
    last = ([n for n in layers if n in inside] or layers or [""])[-1]
    found = [
        t for t in taps_of(networks.modules[0], networks.symmetry) if t.output and t.module == last
    ]  # fmt: skip
    groups = [f.group for t in found for f in factors_of(t.axis)]
    if len(groups) != 1 or groups[0] is None:
        raise PlanError(
            "networks cannot be zipped up to there",
            until=until,
            found="what it gives is no single group of units",
            expected="a layer or block whose outputs are units, before the last",
            do="name an earlier module, or zip all of the network",
        )
    return found[0], groups[0]
