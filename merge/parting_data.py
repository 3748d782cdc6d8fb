"""Two networks that are merged in part, run on data: units judged, maps fitted, norms measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from merge.alignment.repair import repair
from merge.analysis.task import Task
from merge.checkpoint.memory import open_state_dict
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import cast
from merge.ir.expr import Expr
from merge.partial import joined as tensors_of
from merge.partial.fit import error_of, fitted
from merge.partial.gather import Wanted, normals, run_order
from merge.partial.joined import axis_maps, kinds_of
from merge.partial.likeness import alike_by_activations
from merge.partial.modules import resized_module
from merge.statistics.examples import first_examples, size_of
from merge.statistics.layers import Layer, linear_layers
from merge.statistics.norms import batch_norms
from merge.symmetry.symmetry import Symmetry
from merge.tasks import names_in_files, state_of
from merge.transport.coupling import Couplings, Roles
from merge.transport.mapped import roles_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

__all__ = ["Networks"]

Told = Callable[[str], None] | None


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """Aligned networks in modules of their own, with the batches that they are run on.

    symmetry: with the module's names. files: what the checkpoint calls the module's tensors.
    """

    task: Task
    modules: tuple[nn.Module, ...]
    symmetry: Symmetry
    batches: Sequence[Any]
    files: Mapping[str, str]

    @classmethod
    def of(
        cls, task: Task, networks: Sequence[Checkpoint], own: Symmetry, samples: int
    ) -> Networks:
        """The networks' tensors in copies of the task's module."""
        modules = []
        for checkpoint in networks:
            module = copy.deepcopy(task.module)
            module.load_state_dict(state_of(task, checkpoint))
            modules.append(module.eval().requires_grad_(False))
        known = names_in_files(task, networks[0])
        files = {n: known.get(n, n) for n in modules[0].state_dict()}
        layouts = {n: own.tensors[f] for n, f in files.items() if f in own.tensors}
        inside = replace(own, tensors=layouts)
        batches = first_examples(task.inputs(), samples)
        return cls(task, tuple(modules), inside, batches, files)

    def alike(self, groups: Collection[str]) -> dict[str, NDArray[Any]]:
        """For each group the correlation of each pair of units."""
        return alike_by_activations(self.symmetry, self.modules, self.batches, groups)

    def uses(self) -> dict[str, float]:
        """How often each number of a linear map is used for one example, by the checkpoint's names.

        Maps that the network never calls are used never.
        """
        from merge.statistics.grams import watched
        from merge.statistics.runs import run

        counts: dict[str, float] = {}
        examples = size_of(self.batches[0])

        def see(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = layer.rows(args, kwargs, ()).shape[-2]
            file = self.files[layer.weight]
            counts[file] = counts.get(file, 0.0) + rows / examples

        with watched(self.modules[0], self._layers(self.modules[0]), see):
            run(self.modules[0], self.batches[0])
        return counts

    def _layers(self, module: nn.Module) -> list[Layer]:
        """Linear maps and convolutions whose symmetry is known, in the order of the module."""
        return [x for x in linear_layers(module) if x.weight in self.symmetry.tensors]

    # -- the merged network --------------------------------------------------------------------
    def finished(
        self,
        merged: Checkpoint,
        couplings: Sequence[Couplings],
        *,
        fit: bool,
        sequential: bool,
        ridge: float,
        progress: Told = None,
    ) -> tuple[Checkpoint, dict[str, tuple[float, float]], list[str]]:
        """The merged checkpoint with maps fitted and norms measured anew; errors; what was done."""
        states = [m.state_dict() for m in self.modules]
        roles = roles_of(self.symmetry)
        plain = self.joined(states, couplings, roles)
        changed: dict[str, Tensor] = {}
        errors: dict[str, tuple[float, float]] = {}
        notes: list[str] = []
        if fit:
            changed, errors = self._fitted(plain, couplings, roles, sequential, ridge, progress)
            notes.append(f"{len(errors)} linear maps fitted to what the networks gave")
        state = {**plain, **changed}
        if batch_norms(self.modules[0]):
            found = repair(resized_module(self.modules[0], state), state, [], self.batches)
            changed |= found.tensors
            notes.append(f"{found.kind} of {len(found.layers)} layers")
        return self.changed(merged, changed), errors, notes

    def joined(
        self, states: Sequence[Mapping[str, Tensor]], couplings: Sequence[Couplings], roles: Roles
    ) -> dict[str, Tensor]:
        """All of the merged network's tensors in memory."""
        found: dict[str, Tensor] = {}
        for name, first in states[0].items():
            layout = self.symmetry.tensors.get(name)
            if layout is None or not first.is_floating_point():
                found[name] = first
                continue
            values = [s[name].double() for s in states]
            found[name] = tensors_of.joined(name, values, layout, couplings, roles).to(first.dtype)
        return found

    def _fitted(
        self,
        plain: Mapping[str, Tensor],
        couplings: Sequence[Couplings],
        roles: Roles,
        sequential: bool,
        ridge: float,
        progress: Told,
    ) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
        merged = resized_module(self.modules[0], plain).eval()
        layers = {x.weight: x for x in self._layers(merged) if _is_fitted(merged, x)}
        parents = [{x.weight: x for x in self._layers(m)} for m in self.modules]
        order = run_order(merged, list(layers.values()), self.batches[0])
        wanted = {
            name: self._wanted(
                name, tuple(p[name] for p in parents), layers[name] if sequential else None,
                couplings, roles,
            )
            for name in order
        }  # fmt: skip
        together = {}
        if not sequential:
            together = normals(list(wanted.values()), self.modules, self.batches)
        changed: dict[str, Tensor] = {}
        errors: dict[str, tuple[float, float]] = {}
        parts = dict(merged.named_modules())
        for name in order:
            if progress is not None:
                progress(f"{self.files[name]} is fitted")
            part: Any = parts[layers[name].module]
            turned = type(part).__name__ == "Conv1D"
            old = part.weight.detach()
            flat = old.T if turned else old.flatten(1)
            bias = None if part.bias is None else part.bias.detach()
            normal = (
                normals([wanted[name]], self.modules, self.batches, merged)[name]
                if sequential
                else together[name]
            )
            rows, columns = self._kinds(name, couplings, roles, flat.shape[1])
            new, shift = fitted(flat, bias, normal, rows, columns, ridge)
            errors[self.files[name]] = (
                error_of(flat, bias, normal),
                error_of(new, shift, normal),
            )
            shaped = (new.T if turned else new.reshape(old.shape)).to(old.dtype).contiguous()
            part.weight.copy_(shaped)
            changed[name] = shaped
            if shift is not None:
                part.bias.copy_(shift)
                changed[f"{layers[name].module}.bias"] = part.bias.detach().clone()
        return changed, errors

    def _axes(self, name: str, roles: Roles) -> tuple[int, int]:
        """Which axes of a map's weight are its outputs and its inputs."""
        turned = roles.inputs[name] == frozenset({0})
        return (1, 0) if turned else (0, 1)

    def _wanted(
        self,
        name: str,
        layers: tuple[Layer, ...],
        own: Layer | None,
        couplings: Sequence[Couplings],
        roles: Roles,
    ) -> Wanted:
        import torch

        outputs, inputs = self._axes(name, roles)
        axes = self.symmetry.tensors[name].axes
        out = axis_maps(axes[outputs], couplings)
        into = axis_maps(axes[inputs], couplings)
        targets, shift = [], torch.zeros(len(out[0]), dtype=torch.float64)
        kernel = 1
        for module, layer, matrix in zip(self.modules, layers, out, strict=True):
            part: Any = module.get_submodule(layer.module)
            weight = part.weight.detach().double()
            kernel = weight[0, 0].numel()
            flat = weight.T if outputs else weight.flatten(1)
            targets.append(matrix @ flat)
            if part.bias is not None:
                shift = shift + matrix @ part.bias.detach().double()
        eye = torch.eye(kernel, dtype=torch.float64)
        spread = tuple(torch.kron(m.contiguous(), eye) for m in into)
        return Wanted(name, layers, spread, tuple(targets), shift, own)

    def _kinds(
        self, name: str, couplings: Sequence[Couplings], roles: Roles, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Of which networks a map's outputs and inputs are, as bits."""
        outputs, inputs = self._axes(name, roles)
        axes = self.symmetry.tensors[name].axes
        rows = kinds_of(axis_maps(axes[outputs], couplings))
        channels = kinds_of(axis_maps(axes[inputs], couplings))
        return rows, channels.repeat_interleave(columns // len(channels))

    def changed(self, merged: Checkpoint, changed: Mapping[str, Tensor]) -> Checkpoint:
        """The checkpoint with some of the module's tensors, stored in its types."""
        tensors: dict[str, Expr] = dict(merged.tensors)
        new = open_state_dict({self.files[n]: t for n, t in changed.items()}, "fitted")
        for file, expr in new.tensors.items():
            tensors[file] = cast(expr, merged.tensors[file].dtype)
        for second, first in merged.tied.items():
            tensors[second] = tensors[first]
        return replace(merged, tensors=tensors)


def _is_fitted(module: nn.Module, layer: Layer) -> bool:
    """Whether a layer is one map for all of its inputs, and its weight in no other layer."""
    part: Any = module.get_submodule(layer.module)
    shared = sum(getattr(m, "weight", None) is part.weight for m in module.modules())
    return len(layer.gram) in (2, 3) and layer.gram[-1] in (1, layer.gram[0]) and shared == 1
