"""Some units of a group kept and the others left out, as a coupling that moves tensors.

Weight subcloning (Samragh et al. 2023, arXiv:2312.09299): units are put in the order of their
importance, which changes nothing, and the least are cut off. What reads them is then scaled up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merge.errors import PlanError
from merge.symmetry.symmetry import Layout
from merge.transport.coupling import Coupling, Couplings
from merge.transport.plans import Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["kept", "most", "selected"]


def most(scores: NDArray[np.float64], count: int, group: str = "") -> NDArray[np.int64]:
    """The ``count`` units of highest score, in their old order; of equal ones the first.

    >>> import numpy as np
    >>> most(np.array([0.5, 2.0, 0.5, 1.0]), 3).tolist()
    [0, 1, 3]
    """
    import numpy as np

    if not 1 <= count <= len(scores):
        raise PlanError(
            "a group cannot be cut to that many units",
            group=group or None,
            found=count,
            expected=f"1 to {len(scores)}",
        )
    found: NDArray[np.int64] = np.sort(np.argsort(-scores, kind="stable")[:count])
    return found


def selected(index: NDArray[np.int64], count: int, scale: float = 1.0) -> Coupling:
    """Of ``count`` units those of ``index``; what reads them is multiplied by ``scale``.

    Not a transport plan in the strict sense: what the units that go gave is lost, not shared out.
    """
    import numpy as np

    mass = np.zeros((count, len(index)))
    mass[index, np.arange(len(index))] = 1.0
    return Coupling(Plan(mass, np.full(count, 1.0 / scale), np.ones(len(index))))


def kept(layout: Layout, axis: int, couplings: Couplings) -> NDArray[np.int64]:
    """Which positions along an axis of a tensor remain after selections."""
    import numpy as np
    import torch

    from merge.transport.coupling import Roles, transported

    line = Layout((layout.shape[axis],), (layout.axes[axis],))
    places = torch.arange(layout.shape[axis], dtype=torch.float64)
    plain = {g: Coupling(_unscaled(c.plan)) for g, c in couplings.items()}
    moved = transported("", places, line, plain, Roles({"": frozenset()}))
    found: NDArray[np.int64] = np.rint(moved.numpy()).astype(np.int64)
    return found


def _unscaled(plan: Plan) -> Plan:
    """The plan with maps of what is read and what is written that are one and the same."""
    import numpy as np

    return Plan(plan.mass, np.ones(len(plan.a)), plan.b)
