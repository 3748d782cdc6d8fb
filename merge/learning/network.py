"""The merged model as tensors that want gradients, and tasks that run in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.errors import MergeError, PlanError, nearest, told
from merge.learning.batches import Batches, moved
from merge.learning.latents import Latents
from merge.learning.objectives import Objective, View
from merge.learning.store import Store
from merge.statistics.runs import evaluating

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["TEMPERATURE", "Job", "Network"]

TEMPERATURE = "(log temperature)"
"""Among what is learned for a task: e to this number divides the scores of its classes."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A task as learning sees it.

    places: for each merged tensor its names in the module. own: tensors of the module that are the
    task's alone, by name. free: those of them that are learned, and a correction of the task's own
    behind ``layer``, where there is one. teacher: the number of its expert.
    learn, validate: data; score: what validation counts, ``accuracy``, ``agreement`` or ``loss``.
    """

    name: str
    task: Any
    module: nn.Module
    places: Mapping[str, tuple[str, ...]]
    own: Mapping[str, Tensor]
    logits: Callable[[Any], Tensor]
    learn: Batches
    validate: Batches | None
    teacher: int | None = None
    weight: float = 1.0
    classes: int | None = None
    free: Mapping[str, Tensor] = field(default_factory=dict)
    layer: str | None = None
    device: str = "cpu"

    def run(
        self,
        theta: Mapping[str, Tensor],
        inputs: Any,
        training: Sequence[nn.Module] = (),
        *,
        plain: bool = False,
    ) -> Any:
        """What the module returns with the merged tensors, in evaluation mode.

        training: parts that run in training mode all the same. plain: without the correction.
        """
        import torch

        state = dict(self.own) | {n: t for n, t in self.free.items() if n in self.own}
        for name, places in self.places.items():
            state |= dict.fromkeys(places, theta[name])
        inputs = moved(inputs, self.device)
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        args = inputs if isinstance(inputs, tuple) else () if kwargs else (inputs,)
        try:
            with evaluating(self.module), self._corrected(plain):
                for part in training:
                    part.training = True
                return torch.func.functional_call(
                    self.module, state, args, kwargs, tie_weights=False
                )
        except MergeError as error:
            raise error.at(task=self.name) from None
        except Exception as error:  # the network's own code may raise anything
            raise PlanError(
                "a task's network cannot be run on its data",
                task=self.name,
                found=told(error),
                do="check that shapes, types and keys are those that the network takes",
            ) from error

    def view(
        self,
        theta: Mapping[str, Tensor],
        inputs: Any,
        target: Any,
        expert: Any = None,
        layer: str | None = None,
        plain: bool = False,
    ) -> View:
        """A batch run through the merged model."""
        with self._corrected(plain), self._tapped(layer) as features:
            out = self.run(theta, inputs, plain=True)
        return View(
            self.task,
            self.name,
            moved(inputs, self.device),
            moved(target, self.device),
            out,
            expert,
            lambda other: self.run(theta, other),
            self.logits if plain or TEMPERATURE not in self.free else self._scaled,
            features[0] if features else None,
            self.teacher is not None,
        )

    def _scaled(self, out: Any) -> Tensor:
        """The scores of classes, at the task's temperature."""
        return self.logits(out) / self.free[TEMPERATURE].exp()

    @contextmanager
    def _corrected(self, plain: bool) -> Iterator[None]:
        """The module with the task's correction in place, where it has one."""
        from merge.learning.surgery import DOWN, UP, correcting

        if plain or self.layer is None:
            yield
            return
        with correcting(self.module, self.layer, self.free[DOWN], self.free[UP]):
            yield

    @contextmanager
    def _tapped(self, layer: str | None) -> Iterator[list[Any]]:
        """What a layer returns, in a list, after the module ran."""
        found: list[Any] = []
        if layer is None:
            yield found
            return
        layers = dict(self.module.named_modules())
        if layer not in layers:
            near = nearest(layer, layers)
            raise PlanError(
                "a task's module has no such layer",
                task=self.name,
                layer=layer,
                expected=f"one of {', '.join(n for n in list(layers)[1:6])}, ...",
                do=f"did you mean {near!r}?" if near else None,
            )
        handle = layers[layer].register_forward_hook(lambda _m, _i, out: found.append(out))
        try:
            yield found
        finally:
            handle.remove()

    def loss(self, objective: Objective, view: View) -> Tensor:
        """The loss of a batch; errors name the task."""
        import torch

        try:
            found: object = objective.loss(view)
        except MergeError as error:
            raise error.at(task=self.name) from None
        except Exception as error:  # criteria and functions of the user's own
            raise PlanError(
                "the objective cannot be computed on a task's output",
                task=self.name,
                found=told(error),
                do="check outputs, labels and what the objective needs",
            ) from error
        if not isinstance(found, torch.Tensor) or found.numel() != 1:
            tensor = isinstance(found, torch.Tensor)
            raise PlanError(
                "the objective gives no loss",
                task=self.name,
                found=f"a tensor of {list(found.shape)}" if tensor else type(found).__name__,  # type: ignore[attr-defined]
                expected="a tensor with one number, the mean over the batch",
            )
        return found


class Network:
    """The merged tensors: leaves that collect gradients, and the coefficients they stand at.

    At any time ``theta[n] = origin[n] + sum_k applied[n][k] part_k[n]``, up to the rounding of
    updates since the last `build`.
    """

    def __init__(self, store: Store, tensors: Sequence[str], still: Collection[str] = ()) -> None:
        self.store = store
        self.still = frozenset(still) | store.empty
        self.exact = store.exact()
        self.theta: dict[str, Tensor] = {}
        self.applied: dict[str, Tensor] = {}
        self.tensors = tuple(tensors)

    def build(self, wanted: Mapping[str, Tensor], kinds: Mapping[str, Any]) -> None:
        """Make every tensor from its origin and its exact parts, in place where it is there."""
        import torch

        with torch.no_grad():
            for name in self.tensors:
                value = self.exact.origin(name)
                if name not in self.store.empty and bool(wanted[name].any()):
                    for step, part in zip(wanted[name], self.exact.parts(name), strict=True):
                        part.add_to(value, step, kinds[name])
                self.put(name, value)
                self.applied[name] = wanted[name].detach().clone()

    def load(self, read: Callable[[str], Tensor]) -> None:
        """Take other tensors: those of an expert, or of any candidate."""
        for name in self.tensors:
            self.put(name, read(name))
        self.applied = {}

    def put(self, name: str, value: Tensor) -> None:
        """Set one tensor; those that do not move collect no gradients."""
        import torch

        with torch.no_grad():
            if name in self.theta:
                self.theta[name].copy_(value)
            else:
                self.theta[name] = value.requires_grad_(name not in self.still)

    def move(self, name: str, wanted: Tensor, parts: Iterable[Any], kind: Any) -> None:
        """Bring one tensor to other coefficients by adding the difference, in place."""
        import torch

        with torch.no_grad():
            step = wanted - self.applied[name]
            for number, part in zip(step, parts, strict=True):
                if bool(number.any()):
                    part.add_to(self.theta[name], number, kind)
            self.applied[name] = wanted.clone()

    def wanted(self, latents: Latents, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The coefficients of every tensor: from the latents, but for those that do not move."""
        import torch

        with torch.no_grad():
            return {
                n: fixed[n] if n in fixed else latents.coefficients_of(n).detach().clone()
                for n in self.tensors
            }
