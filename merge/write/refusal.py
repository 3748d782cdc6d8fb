"""What the Hub refused or did not manage, as an error with a remedy, and patience with what passes.

The client retries most requests by itself, but not commits and questions about a repo. Nothing of
a message is shown that may hold a secret: no headers, no signed part of an address, no token.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from merge.errors import MergeError, SinkError

__all__ = ["Doing", "passes", "patiently", "refusal", "status_of", "wait"]

T = TypeVar("T")

_PASSING = {408, 409, 429, 500, 502, 503, 504}
_TRIES = 4
_SIGNED = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")
_LONGEST = 500  # characters of what a server says

_REMEDIES = {
    401: "log in with `hf auth login`, or give a token that writes: HF_TOKEN or --token",
    402: "the account's plan does not allow it: see the storage limits of {repo}'s owner",
    403: "give a token that may write to {repo} (HF_TOKEN or --token); without the right to write,"
    " propose the model with --create-pr",
    404: "check the name and the branch; a private repo is hidden from tokens that may not read it",
    408: "run the same command again: what was sent is not sent again",
    409: "another change of {repo} is under way: run the same command again when it is done",
    412: "look at what has changed there, then run the same command again: what was sent is kept",
    413: "the server takes no files of this size: make smaller ones with --shard-size",
    429: "wait for some minutes, then run the same command again: what was sent is not sent again",
}
_LATER = "the Hub has trouble: run the same command again later; what was sent is not sent again"
_NO_LINE = "check the network, then run the same command again: what was sent is not sent again"


@dataclass(frozen=True, slots=True)
class Doing:
    """What is being done, for errors: "sending a file", where. secret: never shown."""

    what: str
    repo: str
    file: str | None = None
    secret: str | None = None


def patiently(call: Callable[[], T], doing: Doing, *, tries: int = _TRIES) -> T:
    """What ``call`` returns; what passes is tried again, the rest raised as a SinkError."""
    for attempt in range(tries):
        try:
            return call()
        except MergeError:
            raise
        except Exception as error:  # whichever library it came from: told with its place
            if attempt + 1 == tries or not passes(error):
                raise refusal(error, doing) from error
            wait(error, attempt)
    raise AssertionError("there is a last try")


def wait(error: BaseException, attempt: int) -> None:
    """Until the next try: as long as the server says, else 1, 2, 4, ... seconds."""
    told = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    time.sleep(min(float(told), 300.0) if told.isdigit() else 2.0**attempt)


def passes(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later.

    Addresses of a storage are signed for a time: refused there, a new one may be asked for.
    """
    from httpx2 import TransportError

    first = _cause(error)
    status = status_of(first)
    if status is None:
        return isinstance(first, TransportError)
    return status in _PASSING or (status == 403 and _is_signed(first))


def status_of(error: BaseException) -> int | None:
    """The status of the answer that made ``error``, if there was one."""
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def refusal(error: BaseException, doing: Doing) -> SinkError:
    """``error`` of any library as one that names repo, file, status and remedy."""
    first = _cause(error)
    status = status_of(first)
    told = getattr(first, "server_message", None) or str(first) or type(first).__name__
    said = _safe(told, doing.secret)
    if status is None:
        do = _NO_LINE
    else:
        said = f"status {status}: {said}"
        do = _REMEDIES.get(status, _LATER if status >= 500 else "")
    return SinkError(
        f"{doing.what} failed",
        repo=doing.repo,
        file=doing.file,
        found=said,
        do=do.format(repo=doing.repo) or None,
    )


def _cause(error: BaseException) -> BaseException:
    """The first error of the network: the client wraps those of uploads."""
    inner: BaseException = error
    while status_of(inner) is None and inner.__cause__ is not None:
        inner = inner.__cause__
    return inner if status_of(inner) is not None else error


def _is_signed(error: BaseException) -> bool:
    """Whether the request went to a storage, which takes a signed address and no token."""
    request = getattr(getattr(error, "response", None), "request", None)
    return request is not None and "authorization" not in request.headers


def _safe(text: str, secret: str | None) -> str:
    """One bounded line of ``text``, without what signs addresses and without the secret."""
    if secret:
        text = text.replace(secret, "<token>")
    line = " ".join(_SIGNED.sub(r"\1", text).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
