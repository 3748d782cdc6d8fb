"""What the Hub's client raises, as errors of ours, and patience with what passes.

A message never holds what opens doors: no token, no signed part of an address, no header.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from merge.errors import HubError, MergeError, SourceError

__all__ = ["Place", "passes", "patiently", "response_of", "said_by", "status_of", "told", "wait"]

T = TypeVar("T")

TRIES = 6  # of a request that fails for a reason that may pass
_PASSING = {408, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 300.0  # seconds
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


def patiently(
    call: Callable[[], T],
    place: Place,
    *,
    may_pass: Callable[[BaseException], bool] | None = None,
    tell: Callable[[BaseException, Place], MergeError] | None = None,
    tries: int = TRIES,
) -> T:
    """What ``call`` returns; what may pass is tried again, all else raised as ours.

    may_pass: `passes`, unless another is given. tell: `told`, for reading; writing has its own.
    """
    for attempt in range(tries):
        try:
            return call()
        except MergeError:
            raise
        except Exception as error:  # of the client, of HTTP, of the network: all are told
            if attempt + 1 == tries or not (may_pass or passes)(error):
                raise (tell or told)(error, place) from None
            wait(error, attempt)
    raise AssertionError("the last try returns or raises")


def passes(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    from httpx2 import TransportError, UnsupportedProtocol

    status = status_of(error)
    if status is not None:
        return status in _PASSING
    found = [e for e in _causes(error) if isinstance(e, TransportError)]
    return bool(found) and not isinstance(found[0], UnsupportedProtocol)


def wait(error: BaseException | None, attempt: int) -> None:
    """Until the next try: as long as the server says, else 1, 2, 4 and 8 seconds."""
    seconds = min(2.0**attempt, 8.0)
    headers = getattr(response_of(error), "headers", None) or {}
    if (after := str(headers.get("Retry-After", ""))).isdigit():
        seconds = float(after)
    elif (reset := re.search(r"\br=0;\s*t=(\d+)", str(headers.get("RateLimit", "")))) is not None:
        seconds = float(reset[1]) + 1.0
    time.sleep(min(seconds, _LONGEST_WAIT))


def status_of(error: BaseException | None) -> int | None:
    """The status of the answer behind an error, where there was one."""
    found = getattr(response_of(error), "status_code", None)
    return found if isinstance(found, int) else None


def told(error: BaseException, place: Place) -> MergeError:
    """An error of the client as one of ours."""
    from huggingface_hub import errors

    kinds = {type(e) for e in _causes(error)}

    def is_a(*wanted: type[BaseException]) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    status, repo, at = status_of(error), place.repo, place.at()
    said = said_by(error, place.secrets)
    web = f"https://huggingface.co/{repo}"
    if is_a(errors.GatedRepoError):
        return SourceError(
            "the repo is gated, and this account has not been given access",
            found=_status(status, said),
            do=f"ask for access at {web}, then {_LOG_IN}",
            **at,
        )
    if is_a(errors.RepositoryNotFoundError):
        return SourceError(
            "no such model on the Hub, or it is private",
            found=_status(status, said),
            expected="a repo that may be read",
            do=f"check the name; if it is private, {_LOG_IN}",
            **at,
        )
    if is_a(errors.RevisionNotFoundError):
        return SourceError(
            "the repo has no such revision",
            found=_status(status, said),
            expected="a branch, a tag, a commit or refs/pr/N",
            do=f"see {web}/commits/main for what there is",
            **at,
        )
    if is_a(errors.RemoteEntryNotFoundError):
        return SourceError(
            "the repo has no such file", found=_status(status, said), do=f"see {web}/tree", **at
        )
    if is_a(errors.OfflineModeIsEnabled, errors.RevisionResolutionError):
        return offline(place)
    if is_a(errors.HFValidationError):
        return SourceError("not the id of a repo", found=said, expected="org/name", **at)
    if status == 401:
        return SourceError(
            "the Hub does not accept the token", found=_status(status, said), do=_LOG_IN, **at
        )
    if status == 403:
        return SourceError(
            "the token may not read this",
            found=_status(status, said),
            do=f"give the token the right to read {repo}, or another: HF_TOKEN, --token",
            **at,
        )
    if status is not None:
        do = "run the same command again later: what is finished is kept"
        if status == 429:
            do = (
                "wait for five minutes, then run the same command again; with a token more"
                " requests are let through"
            )
        what = "the Hub limits requests" if status == 429 else "the Hub cannot serve this"
        return HubError(what, found=_status(status, said), do=do, **at)
    return _no_line(said, at)


def offline(place: Place) -> SourceError:
    """The error for what is needed, is not in the cache, and may not be fetched."""
    what = (
        "no such model in the cache of the Hub's client"
        if place.file is None
        else ("no such file in the cache of the Hub's client")
    )
    return SourceError(
        f"{what}, and offline mode is on (HF_HUB_OFFLINE)",
        do=f"unset HF_HUB_OFFLINE, or fetch it with a network first: `hf download {place.repo}`",
        **place.at(),
    )


def _no_line(said: str, at: dict[str, Any]) -> HubError:
    return HubError(
        "the Hub cannot be reached",
        found=said,
        do="check the network, a proxy and HF_ENDPOINT, then run the same command again",
        **at,
    )


def _status(status: int | None, said: str) -> str:
    return said if status is None else f"status {status}: {said}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came of, the client wraps some twice."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def response_of(error: BaseException | None) -> object:
    """The answer behind an error, where there was one."""
    found = (getattr(e, "response", None) for e in _causes(error))
    return next((r for r in found if r is not None), None)


def said_by(error: BaseException, secrets: tuple[str, ...]) -> str:
    """What the server or the client says, in a bounded line without secrets."""
    causes = list(_causes(error))
    message = next((m for e in causes if (m := getattr(e, "server_message", None))), None)
    text = str(message or causes[-1]) or type(causes[-1]).__name__
    for secret in secrets:
        text = text.replace(secret, "<token>")
    line = " ".join(_QUERY.sub(r"\1", text).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
