"""Two networks cut and joined by a fitted linear map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from merge.analysis.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merge.training.stitched import Stitched

__all__ = ["stitch"]


def stitch(
    front: nn.Module,
    back: nn.Module,
    cut: tuple[str, str],
    data: Task | Sequence[Any],
    *,
    samples: int = 100,
    ridge: float = 1e-4,
) -> Stitched:
    """A module: ``front`` through block ``cut[0]``, a linear map, ``back`` from ``cut[1]`` on.

    The map is fitted by ridge regression to what ``back`` has at its cut, on ``samples`` examples,
    padding left out (stitchable networks; Pan et al. 2023, arXiv:2302.06586). data: a `Task`, whose
    training inputs are run, or batches of inputs that both networks take. Small before large (fast
    before slow) is the usual direction. Its ``error`` is the share of the variance that the map
    leaves. The networks are copied, without the blocks that are never run.

    Example::

        joined = merge.stitch(small, large, ("layers.3", "layers.8"), batches)
        torch.save(joined.state_dict(), "joined.pt")
    """
    from merge.statistics.examples import first_examples
    from merge.statistics.layers import masks_of, unpadded
    from merge.training.stitched import stitched

    def rows(batch: Any, value: Tensor) -> Tensor:
        return unpadded(value, masks_of(batch))

    inputs = data.inputs() if isinstance(data, Task) else list(data)
    return stitched(front.eval(), back.eval(), cut, first_examples(inputs, samples), rows, ridge)
