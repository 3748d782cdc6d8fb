"""Patience with failures of the Hub, and of the way to it, that pass."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

from merge.errors import MergeError
from merge.hub.told import Place, causes_of, response_of, status_of, told

__all__ = ["TRIES", "passes", "patiently", "wait"]

T = TypeVar("T")

TRIES = 6  # of a request that fails for a reason that may pass
_PASSING = {408, 429, 500, 502, 503, 504}
_LONGEST_WAIT = 300.0  # seconds


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
    found = [e for e in causes_of(error) if isinstance(e, TransportError)]
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
