"""What the Hub's client raises, as errors of ours.

A message never holds what opens doors: no token, no signed part of an address, no header.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from merge.errors import HubError, MergeError, SourceError

__all__ = ["Place", "causes_of", "offline", "response_of", "said_by", "status_of", "told"]

_QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")
_LONGEST = 300  # characters of what a server says
_LOG_IN = "log in with `hf auth login`, or give a token: HF_TOKEN, --token"


@dataclass(frozen=True, slots=True)
class Place:
    """What was being read, for errors. secrets: texts that must not be shown."""

    repo: str
    revision: str | None = None
    file: str | None = None
    secrets: tuple[str, ...] = ()

    def at(self) -> dict[str, Any]:
        return {"repo": self.repo, "revision": self.revision, "file": self.file}


@dataclass(frozen=True, slots=True)
class _Telling:
    """How one kind of failure is told. do: {repo} in it is the repo's name."""

    what: str
    do: str | None = None
    expected: str | None = None
    error: type[MergeError] = SourceError


_BY_CLASS = {  # of huggingface_hub.errors; a class that another one derives from comes after it
    "GatedRepoError": _Telling(
        "the repo is gated, and this account has not been given access",
        do="ask for access at https://huggingface.co/{repo}, then " + _LOG_IN,
    ),
    "RepositoryNotFoundError": _Telling(
        "no such model on the Hub, or it is private",
        expected="a repo that may be read",
        do="check the name; if it is private, " + _LOG_IN,
    ),
    "RevisionNotFoundError": _Telling(
        "the repo has no such revision",
        expected="a branch, a tag, a commit or refs/pr/N",
        do="see https://huggingface.co/{repo}/commits/main for what there is",
    ),
    "RemoteEntryNotFoundError": _Telling(
        "the repo has no such file", do="see https://huggingface.co/{repo}/tree"
    ),
    "HFValidationError": _Telling("not the id of a repo", expected="org/name"),
}
_BY_STATUS = {
    401: _Telling("the Hub does not accept the token", do=_LOG_IN),
    403: _Telling(
        "the token may not read this",
        do="give the token the right to read {repo}, or another: HF_TOKEN, --token",
    ),
    429: _Telling(
        "the Hub limits requests",
        do="wait for five minutes, then run the same command again; with a token more requests are"
        " let through",
        error=HubError,
    ),
}
_OTHER_STATUS = _Telling(
    "the Hub cannot serve this",
    do="run the same command again later: what is finished is kept",
    error=HubError,
)
_NO_ANSWER = _Telling(
    "the Hub cannot be reached",
    do="check the network, a proxy and HF_ENDPOINT, then run the same command again",
    error=HubError,
)


def told(error: BaseException, place: Place) -> MergeError:
    """An error of the client as one of ours."""
    from huggingface_hub import errors

    kinds = tuple(type(e) for e in causes_of(error))

    def is_a(*wanted: type[BaseException]) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    status, said = status_of(error), said_by(error, place.secrets)
    telling = next((t for name, t in _BY_CLASS.items() if is_a(getattr(errors, name))), None)
    if telling is None and is_a(errors.OfflineModeIsEnabled, errors.RevisionResolutionError):
        return offline(place)
    if telling is None:
        telling = _NO_ANSWER if status is None else _BY_STATUS.get(status, _OTHER_STATUS)
    return telling.error(
        telling.what,
        found=said if status is None else f"status {status}: {said}",
        expected=telling.expected,
        do=telling.do and telling.do.format(repo=place.repo),
        **place.at(),
    )


def offline(place: Place) -> SourceError:
    """The error for what is needed, is not in the cache, and may not be fetched."""
    what = "model" if place.file is None else "file"
    return SourceError(
        f"no such {what} in the cache of the Hub's client, and offline mode is on (HF_HUB_OFFLINE)",
        do=f"unset HF_HUB_OFFLINE, or fetch it with a network first: `hf download {place.repo}`",
        **place.at(),
    )


def status_of(error: BaseException | None) -> int | None:
    """The status of the answer behind an error, where there was one."""
    found = getattr(response_of(error), "status_code", None)
    return found if isinstance(found, int) else None


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came of, the client wraps some twice."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def response_of(error: BaseException | None) -> object:
    """The answer behind an error, where there was one."""
    found = (getattr(e, "response", None) for e in causes_of(error))
    return next((r for r in found if r is not None), None)


def said_by(error: BaseException, secrets: tuple[str, ...]) -> str:
    """What the server or the client says, in a bounded line without secrets."""
    causes = list(causes_of(error))
    message = next((m for e in causes if (m := getattr(e, "server_message", None))), None)
    text = str(message or causes[-1]) or type(causes[-1]).__name__
    for secret in secrets:
        text = text.replace(secret, "<token>")
    line = " ".join(_QUERY.sub(r"\1", text).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
