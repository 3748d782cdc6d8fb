"""Which licence a merge may state: the one that all inputs state, never one of our own choice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from merge.errors import RecipeError

__all__ = ["Licence", "check_identifier", "settle"]

_NOT_COMMERCIAL = {"nc", "noncommercial", "mnpl"}
_RESEARCH = {"research", "mrl", "amlr", "deepfloyd"}
"""Words in licences' identifiers and names that say so, and short names of licences that do."""


@dataclass(frozen=True, slots=True)
class Licence:
    """What a model's card states, in the Hub's words; all is None where it states nothing.

    identifier: of the Hub's list, such as apache-2.0, or "other" with a name; several that hold
    together are divided by " + ". gated: the model is given out only to those who accept terms.
    """

    identifier: str | None = None
    name: str | None = None
    link: str | None = None
    gated: bool = False

    @property
    def stated(self) -> bool:
        return self.identifier is not None or self.name is not None

    @property
    def limits(self) -> tuple[str, ...]:
        """Why nobody but the author of a merge can say what its licence is."""
        words = re.findall(r"[a-z]+", f"{self.identifier or ''} {self.name or ''}".lower())
        pairs = {f"{a}{b}" for a, b in pairwise(words)}
        found = []
        if _NOT_COMMERCIAL & set(words) or {"noncommercial", "nonproduction"} & pairs:
            found.append("not for commercial use")
        if _RESEARCH & set(words):
            found.append("for research only")
        if self.gated:
            found.append("gated")
        if " + " in (self.identifier or ""):
            found.append("several licences")
        return tuple(found)

    def __str__(self) -> str:
        """In a few words, for tables and notes.

        >>> str(Licence("other", "qwen-research"))
        'other: qwen-research (for research only)'
        """
        named = [w for w in (self.identifier, self.name) if w]
        words = ": ".join(named) or "none stated"
        return words + (f" ({', '.join(self.limits)})" if self.limits else "")


def check_identifier(text: str) -> str:
    """``text`` as it is; RecipeError unless it has the shape of a licence's identifier."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", text):
        raise RecipeError(
            "a licence is named by its identifier on the Hub",
            found=repr(text),
            expected="small letters, digits, dots and hyphens, such as apache-2.0, or other",
        )
    return text


def settle(
    inputs: Sequence[tuple[str, Licence]], chosen: str | None = None
) -> tuple[Licence | None, str | None]:
    """The licence to state, if any, and a note where inputs state one and the result does not.

    inputs: each model's name and licence. chosen: the author's own word, which counts; name and
    link come from the inputs where all state that very licence.

    >>> settle([("a", Licence("mit")), ("b", Licence("apache-2.0"))])
    (None, 'the licences differ: a: mit, b: apache-2.0; set `--license`')
    """
    common = _common([licence for _, licence in inputs])
    if chosen is not None:
        same = common is not None and common.identifier == chosen
        return (common if same else Licence(chosen)), None
    if not any(licence.stated or licence.gated for _, licence in inputs):
        return None, None
    listed = ", ".join(f"{name}: {licence}" for name, licence in inputs)
    if any(licence.limits for _, licence in inputs):
        return None, f"no licence is taken over from inputs with limits: {listed}; set `--license`"
    if common is None:
        return None, f"the licences differ: {listed}; set `--license`"
    return common, None


def _common(licences: Sequence[Licence]) -> Licence | None:
    """The one licence that all state. A link is kept where it is the same in all.

    A licence "other" without a name is told by its link alone.
    """
    first = licences[0] if licences else Licence()
    if first.identifier is None:
        return None
    link = first.link if all(o.link == first.link for o in licences) else None
    for other in licences:
        if other.identifier != first.identifier or _folded(other.name) != _folded(first.name):
            return None
    if first.identifier == "other" and first.name is None and link is None:
        return None
    return replace(first, link=link, gated=False)


def _folded(name: str | None) -> str:
    return (name or "").casefold()
