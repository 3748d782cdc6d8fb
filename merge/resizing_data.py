"""A model that is shrunk on data: run whole and in parts, to see what matters and to make up."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from merge.analysis.task import Task
from merge.checkpoint.memory import open_state_dict
from merge.ir.checkpoint import Checkpoint
from merge.ir.derived import Whole, cast
from merge.resize.fold import folded
from merge.resize.importance import activation_importance
from merge.resize.influence import least_influential, passed_by, stream_of
from merge.resize.refit import refitted
from merge.resize.selection import kept
from merge.statistics.examples import first_examples
from merge.statistics.grams import gathered_grams
from merge.statistics.layers import Layer, linear_layers, masks_of, unpadded
from merge.statistics.lazy import computed_checkpoint, cut
from merge.symmetry.axes import factors_of
from merge.symmetry.symmetry import Symmetry
from merge.tasks import names_in_files, open_data, state_of
from merge.transport.coupling import Coupling, Roles

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from merge.blocks import Blocks
    from merge.ir.expr import Expr

__all__ = ["Known"]

_HELD = 1 << 30  # bytes of moments at a time
_OUTPUTS = ("last_hidden_state", "logits")


@dataclass(slots=True, eq=False)
class Known:
    """A task with a model's weights in its module, and what has been left out of it so far.

    names: of the module's tensors in the checkpoint as it stands, for those that are left.
    """

    task: Task
    batches: Sequence[Any]
    ridge: float
    names: dict[str, str]
    gone: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: Checkpoint, data: str | Task, samples: int, ridge: float) -> Known:
        """The module of ``data`` with a copy of the checkpoint's weights."""
        task = open_data(data, checkpoint)
        module = copy.deepcopy(task.module)
        module.load_state_dict(state_of(task, checkpoint))
        files = names_in_files(task, checkpoint)
        names = {n: files.get(n, n) for n in module.state_dict()}
        own = replace(task, module=module.eval().requires_grad_(False))
        return cls(own, first_examples(task.inputs(), samples), ridge, names)

    @property
    def module(self) -> nn.Module:
        return self.task.module

    def run(self, batch: Any) -> Any:
        """What the network gives without the blocks that are left out."""
        with passed_by(self.module, self.gone):
            return self.task.output({}, batch)

    def features(self, batch: Any) -> Tensor:
        """The network's output as rows: of hidden states or logits, without padding."""
        return _rows(batch, _tensor(self.run(batch)))

    # -- blocks --------------------------------------------------------------------------------
    def least_influential(
        self, blocks: Sequence[str], count: int, progress: Callable[[str], None] | None
    ) -> list[tuple[str, float]]:
        """The blocks to leave out, by what the checkpoint calls them, with their influences."""
        modules = {self._module_of(b): b for b in blocks}

        def told(name: str, score: float) -> None:
            if progress is not None:
                progress(f"{modules[name]} goes, influence {score:.4f}")

        found = least_influential(
            self.module, list(modules), count, self.features, self.batches, told
        )
        return [(modules[name], score) for name, score in found]

    def without(
        self,
        checkpoint: Checkpoint,
        blocks: Blocks,
        gone: Sequence[int],
        fit: bool,
        notes: list[str],
    ) -> Checkpoint:
        """The checkpoint whose blocks before those that go make up for them."""
        tensors: dict[str, Expr] = dict(checkpoint.tensors)
        order = list(gone) if fit else []
        for number in order:
            name = self._module_of(blocks.name(number))
            before = [n for n in range(number) if self._module_of(blocks.name(n)) not in self.gone]
            if before:
                new = self._fold(self._module_of(blocks.name(before[-1])), name, notes)
                made = open_state_dict({self.names[n]: t for n, t in new.items()}, "fitted")
                for file, expr in made.tensors.items():
                    tensors[file] = cast(expr, checkpoint.tensors[file].dtype)
            self.gone.append(name)
        self.gone = [self._module_of(blocks.name(n)) for n in gone]
        left = [n for n in range(blocks.count) if n not in gone]
        self.names = {
            n: _renumbered(file, blocks, left)
            for n, file in self.names.items()
            if not any(n.startswith(f"{g}.") for g in self.gone)
        }
        return replace(checkpoint, tensors=tensors)

    def _fold(self, before: str, name: str, notes: list[str]) -> dict[str, Tensor]:
        """New weights of the module, which it has from now on."""
        found = folded(self.module, before, name, self.run, self.batches, _rows, self.ridge)
        changed: dict[str, Tensor] = {f"{found.linear}.weight": found.weight}
        if found.bias is not None:
            changed[f"{found.linear}.bias"] = found.bias
        state = self.module.state_dict()
        if found.norm is not None:
            ours, theirs = found.norm
            changed |= {
                n: state[theirs + n.removeprefix(ours)].clone()
                for n in state
                if n.startswith(f"{ours}.")
            }
        changed = {n: t.to(state[n].dtype).contiguous() for n, t in changed.items()}
        self.module.load_state_dict({**state, **changed})
        share = 100 * found.error
        notes.append(f"{found.linear} makes up for {name}: {share:.1f} % of what it did remains")
        return changed

    def _module_of(self, block: str) -> str:
        """The module whose tensors begin with ``block`` in the checkpoint."""
        for name, file in self.names.items():
            if file.startswith(f"{block}."):
                rest = file.removeprefix(block)
                if name.endswith(rest):
                    return name.removesuffix(rest)
        return block

    # -- widths --------------------------------------------------------------------------------
    def importance(self, symmetry: Symmetry, groups: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Scores of units by activations. symmetry: of the checkpoint as it stands."""
        inside = {n: symmetry.tensors[f] for n, f in self.names.items() if f in symmetry.tensors}
        return activation_importance(
            self.module, replace(symmetry, tensors=inside), groups, self.run, self.batches, _rows
        )

    def refitted(
        self,
        old: Checkpoint,
        narrow: Checkpoint,
        symmetry: Symmetry,
        roles: Roles,
        couplings: Mapping[str, Coupling],
        progress: Callable[[str], None] | None,
    ) -> Checkpoint:
        """``narrow`` with the linear maps that read fewer units fitted to what they gave."""
        layers = {
            self.names[layer.weight]: layer
            for layer in linear_layers(self.module)
            if layer.weight in self.names and _is_matrix(self.module, layer)
        }
        layers = {
            file: layer
            for file, layer in layers.items()
            if file in symmetry.tensors and _reads_cut(symmetry, roles, file, couplings)
        }
        moments = self._moments(layers)
        tensors: dict[str, Expr] = dict(narrow.tensors)
        for file in layers:
            for name, expr in self._fitted(file, old, symmetry, roles, couplings, moments):
                tensors[name] = expr
            if progress is not None:
                progress(f"{file} is fitted to what it gave before")
        return replace(narrow, tensors=tensors)

    def _moments(self, layers: Mapping[str, Layer]) -> Checkpoint:
        """E [z, 1] [z, 1]^T of the inputs z of each layer, a portion of layers at a time."""
        shapes = {f: (layer.gram[0] + 1, layer.gram[0] + 1) for f, layer in layers.items()}

        def compute(wanted: Sequence[str]) -> Mapping[str, Tensor]:
            chosen = [_with_ones(layers[f]) for f in wanted]
            found = gathered_grams(self.module, chosen, self.run, self.batches)
            return {f: found[layers[f].weight] for f in wanted}

        portions = cut(list(shapes), lambda f: 8 * math.prod(shapes[f]), _HELD // 2)
        return computed_checkpoint("moments of inputs", shapes, portions, compute, "float64")

    def _fitted(
        self,
        file: str,
        old: Checkpoint,
        symmetry: Symmetry,
        roles: Roles,
        couplings: Mapping[str, Coupling],
        moments: Checkpoint,
    ) -> list[tuple[str, Expr]]:
        import torch

        layout = symmetry.tensors[file]
        inside = next(iter(roles.inputs[file]))
        inputs = torch.as_tensor(kept(layout, inside, couplings))
        outputs = torch.as_tensor(kept(layout, 1 - inside, couplings))
        ridge, turned = self.ridge, inside == 0
        bias_name = file.removesuffix("weight") + "bias"
        bias = old.tensors.get(bias_name)
        digest = hashlib.sha256(inputs.numpy().tobytes() + outputs.numpy().tobytes()).hexdigest()

        def solve(weight: Tensor, seen: Tensor, *own: Tensor) -> tuple[Tensor, Tensor | None]:
            plain = weight.T if turned else weight
            chosen = own[0][outputs] if own else None
            return refitted(plain[outputs], chosen, seen, inputs, ridge)

        def weight_of(weight: Tensor, seen: Tensor, *own: Tensor) -> Tensor:
            found = solve(weight, seen, *own)[0]
            return (found.T if turned else found).contiguous().to(weight.dtype)

        def bias_of(weight: Tensor, seen: Tensor, own: Tensor) -> Tensor:
            found = solve(weight, seen, own)[1]
            assert found is not None
            return found.to(weight.dtype)

        given = (old.tensors[file], moments.tensors[file], *([] if bias is None else [bias]))
        sizes = (len(outputs), len(inputs))
        shape = (sizes[1], sizes[0]) if turned else sizes
        scratch = 6 * layout.shape[inside] ** 2 + 4 * math.prod(layout.shape)
        dtype = old.tensors[file].dtype
        out: list[tuple[str, Expr]] = [
            (file, Whole(f"fitted {digest}", weight_of, given, (), shape, dtype, scratch))
        ]
        if bias is not None:
            made = Whole(f"fitted bias {digest}", bias_of, given, (), (sizes[0],), bias.dtype,
                         scratch)  # fmt: skip
            out.append((bias_name, made))
        return out


def _is_matrix(module: nn.Module, layer: Layer) -> bool:
    part = dict(module.named_modules())[layer.module]
    return type(part).__name__ in ("Linear", "Conv1D")


def _reads_cut(
    symmetry: Symmetry, roles: Roles, file: str, couplings: Mapping[str, Coupling]
) -> bool:
    """Whether a matrix reads a group that was cut, other than through a norm, which sees it all."""
    layout = symmetry.tensors[file]
    inside = roles.inputs[file]
    if len(layout.axes) != 2 or len(inside) != 1:
        return False
    read = {f.group for f in factors_of(layout.axes[next(iter(inside))])}
    return any(g in couplings and not _normed(symmetry, g) for g in read if g is not None)


def _normed(symmetry: Symmetry, group: str) -> bool:
    return any(
        layout.groups() == [group] and len(layout.axes) == 1 and name.endswith("weight")
        for name, layout in symmetry.tensors.items()
    )


def _with_ones(layer: Layer) -> Layer:
    """The layer with a column of ones behind its inputs."""

    def rows(args: tuple[Any, ...], kwargs: dict[str, Any], masks: Sequence[Tensor]) -> Tensor:
        import torch

        found = layer.rows(args, kwargs, masks)
        return torch.cat([found, found.new_ones(*found.shape[:-1], 1)], dim=-1)

    size = layer.gram[0] + 1
    return replace(layer, gram=(size, size), rows=rows)


def _renumbered(file: str, blocks: Blocks, left: Sequence[int]) -> str:
    """What a tensor is called once the layers that are left are counted anew."""
    for new, number in enumerate(left):
        if file.startswith(f"{blocks.name(number)}."):
            return blocks.name(new) + file.removeprefix(blocks.name(number))
    return file


def _tensor(out: Any) -> Tensor:
    """Hidden states or logits of what a network returns."""
    for name in _OUTPUTS:
        found = getattr(out, name, None)
        if found is not None:
            return stream_of(found)
    return stream_of(tuple(out.values()) if hasattr(out, "values") else out)


def _rows(batch: Any, value: Tensor) -> Tensor:
    return unpadded(value, masks_of(batch))
