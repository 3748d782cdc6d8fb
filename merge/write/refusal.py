"""What the Hub refused to take or did not manage to, as an error with a remedy.

Beside what reading meets (`merge.hub.told`): rights to write, limits, commits that meet others.
"""

from __future__ import annotations

from merge.errors import SinkError
from merge.hub.patience import passes as passes_reading
from merge.hub.told import Place, response_of, said_by, status_of

__all__ = ["passes", "refusal"]

_REMEDIES = {
    401: "log in with `hf auth login`, or give a token that writes: HF_TOKEN or --token",
    402: "the account's plan does not allow it: see the storage limits of {repo}'s owner",
    403: "give a token that may write to {repo} (HF_TOKEN or --token); without the right to write,"
    " propose the model with --create-pr",
    404: "check the name and the branch; a private repo is hidden from tokens that may not read it",
    409: "another change of {repo} is under way: run the same command again when it is done",
    412: "look at what has changed there, then run the same command again: what was sent is kept",
    413: "the server takes no files of this size: make smaller ones with --shard-size",
    429: "wait for five minutes, then run the same command again: what was sent is not sent again",
}
_LATER = "run the same command again later: what was sent is not sent again"
_NO_LINE = "check the network, then run the same command again: what was sent is not sent again"


def passes(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later.

    A commit may meet another one. Addresses of a storage are signed for a time: refused there, a
    new one may be asked for.
    """
    status = status_of(error)
    return status == 409 or (status == 403 and _is_signed(error)) or passes_reading(error)


def _is_signed(error: BaseException) -> bool:
    """Whether the request went to a storage, which takes a signed address and no token."""
    request = getattr(response_of(error), "request", None)
    return request is not None and "authorization" not in request.headers


def refusal(error: BaseException, what: str, place: Place) -> SinkError:
    """``error`` of any library as one that names repo, file, status and remedy.

    what: was being done, such as "sending a file".
    """
    status, said = status_of(error), said_by(error, place.secrets)
    do = _NO_LINE
    if status is not None:
        said = f"status {status}: {said}"
        do = _REMEDIES.get(status, _LATER if status >= 500 or status == 408 else "")
    return SinkError(
        f"{what} failed",
        found=said,
        do=do.format(repo=place.repo) or None,
        **place.at(),
    )
