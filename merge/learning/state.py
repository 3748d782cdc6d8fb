"""Where learning stands, so that it can be taken up again to the bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge.errors import PlanError, SourceError
from merge.learning.coefficients import Coefficients
from merge.learning.judge import Candidate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["State", "Step"]

_FORMAT = "merge-learning-state"


@dataclass(frozen=True, slots=True)
class Step:
    """One step: its number from 1 on, the loss of each task, and the score where one was due."""

    number: int
    losses: Mapping[str, float]
    score: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Everything that the next step depends on, but for the data and the experts.

    settings: a text that stands for the settings; a state of others is refused. tensors: rows of
    latent numbers (``row/...``, and where they started: ``start/...``), moments of the optimisers
    (``moment/...``), learned tensors of the tasks (``free/...``), the best so far (``best/...``).
    """

    settings: str
    step: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    alive: tuple[str, ...] = ()
    trials: tuple[Candidate, ...] = ()
    best: Candidate | None = None
    history: tuple[Step, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    def header(self) -> str:
        """All but the tensors, as JSON."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": 1,
                "settings": self.settings,
                "step": self.step,
                "alive": list(self.alive),
                "trials": [_plain(c) for c in self.trials],
                "best": None if self.best is None else _plain(self.best),
                "history": [[s.number, dict(s.losses), s.score] for s in self.history],
                "skipped": dict(self.skipped),
            }
        )

    @classmethod
    def parse(cls, header: str, tensors: Mapping[str, Tensor], settings: str) -> State:
        """The state of a header and its tensors; refused unless it is of these settings."""
        try:
            found = json.loads(header)
            if found["format"] != _FORMAT or found["version"] != 1:
                raise ValueError(str(found["format"]))
            state = cls(
                found["settings"],
                int(found["step"]),
                dict(tensors),
                tuple(found["alive"]),
                tuple(_parsed(c) for c in found["trials"]),
                None if found["best"] is None else _parsed(found["best"]),
                tuple(Step(n, losses, score) for n, losses, score in found["history"]),
                {k: int(v) for k, v in found["skipped"].items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(
                "this is no state of learning", found=f"{type(error).__name__}: {error}"
            ) from None
        if state.settings != settings:
            ours, theirs = json.loads(settings), json.loads(state.settings)
            odd = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
            raise PlanError(
                "the state was saved under other settings",
                key=odd[0] if odd else None,
                found=theirs.get(odd[0]) if odd else None,
                expected=ours.get(odd[0]) if odd else None,
                do="learn with the settings of the state, or into another file",
            )
        return state


def _plain(candidate: Candidate) -> dict[str, Any]:
    known = candidate.coefficients
    return {
        "name": candidate.name,
        "score": candidate.score,
        "tasks": dict(candidate.tasks),
        "allowed": candidate.allowed,
        "coefficients": None if known is None else known.to_json(),
    }


def _parsed(found: Mapping[str, Any]) -> Candidate:
    text = found["coefficients"]
    return Candidate(
        found["name"],
        float(found["score"]),
        found["tasks"],
        bool(found["allowed"]),
        None if text is None else Coefficients.from_json(text),
    )
