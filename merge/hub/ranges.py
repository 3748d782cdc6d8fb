"""Ranges of a file on the Hub, straight into the reader's buffer.

The file's location is asked for once; the storage behind it is then asked for ranges, without the
token. A body that breaks off is taken up at the byte that was reached, an expired location is
renewed, and no answer is believed that is not the range that was asked for.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from merge.errors import HubError, MergeError
from merge.hub.patience import TRIES, passes, wait
from merge.hub.told import Place, told

if TYPE_CHECKING:
    from merge.hub.client import Entry, Hub, Pinned

__all__ = ["RemoteFile"]

_TIMEOUT = 60.0  # seconds in which something must come
_EXPIRED = (401, 403, 404, 410, 416)  # what storages say of a location that is over


class _WrongAnswer(Exception):
    """An answer that is no range that was asked for; the text says how."""


class RemoteFile:
    """One file of a repo at a commit. Any thread may read it; each read is a request of its own."""

    def __init__(self, hub: Hub, pinned: Pinned, name: str, entry: Entry) -> None:
        self.hub, self.pinned, self.name, self.entry = hub, pinned, name, entry
        self._lock = threading.Lock()
        self._location: str | None = None

    @property
    def place(self) -> Place:
        return self.hub.place(self.pinned.repo, self.pinned.asked or self.pinned.commit, self.name)

    def __str__(self) -> str:
        return f"{self.pinned}/{self.name}"

    def read_into(self, begin: int, view: memoryview) -> None:
        """Fill ``view`` with the file's bytes from ``begin`` on.

        Raises SourceError or HubError when that fails for good.
        """
        done = attempt = 0
        while done < len(view):
            location = self._located()
            reached = done
            try:
                for piece in self._ask(location, begin + done, begin + len(view)):
                    view[done : done + len(piece)] = piece
                    done += len(piece)
                if done < len(view):
                    raise _WrongAnswer(f"an end at byte {begin + done}")
            except MergeError:
                raise
            except Exception as error:  # of HTTP or the network, or an answer that is wrong
                attempt = 1 if done > reached else attempt + 1
                if attempt >= TRIES:
                    raise self._failed(error) from None
                if getattr(error, "status", None) in _EXPIRED:
                    self._expired(location)
                    if attempt > 1:
                        wait(None, attempt - 2)
                elif isinstance(error, _WrongAnswer) or passes(error):
                    wait(error, attempt - 1)
                else:
                    raise self._failed(error) from None

    def _ask(self, location: str, begin: int, end: int) -> Any:
        """The pieces of one answer; raises when it is another range, or none."""
        from huggingface_hub import get_session, utils

        headers = self.hub.headers() if self._is_hub(location) else {}
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", location, headers=headers, timeout=_TIMEOUT, follow_redirects=True
        ) as answer:
            if answer.status_code in _EXPIRED:
                raise _Expired(answer)
            if answer.status_code >= 400:
                answer.read()
                utils.hf_raise_for_status(answer)  # type: ignore[attr-defined]
            whole = begin == 0 and end == self.entry.size
            if answer.status_code == 206:
                expected = f"bytes {begin}-{end - 1}/{self.entry.size}"
                if (got := answer.headers.get("Content-Range", "no Content-Range")) != expected:
                    raise _WrongAnswer(f"{got}, asked for {expected}")
            elif not (answer.status_code == 200 and whole):
                raise _WrongAnswer(
                    f"status {answer.status_code}: the whole file, asked for a range of it"
                )
            left = end - begin
            for piece in answer.iter_raw():
                if len(piece) > left:
                    raise _WrongAnswer("more bytes than were asked for")
                left -= len(piece)
                yield piece

    def _is_hub(self, location: str) -> bool:
        """Whether a location is the Hub itself, which wants the token; no other server gets it."""
        ours, theirs = urlsplit(self.hub.endpoint), urlsplit(location)
        return (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc)

    def _located(self) -> str:
        """Where the bytes are; asked for once, and again when that is over."""
        with self._lock:
            if self._location is None:
                self._location = self._locate()
            return self._location

    def _expired(self, location: str) -> None:
        with self._lock:
            if self._location == location:
                self._location = None

    def _locate(self) -> str:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        from merge.hub.patience import patiently
        from merge.hub.told import offline

        place = self.place
        if self.hub.is_offline:
            raise offline(place)
        repo, commit, endpoint = self.pinned.repo, self.pinned.commit, self.hub.endpoint
        url = hf_hub_url(repo, self.name, revision=commit, endpoint=endpoint)
        headers = self.hub.headers()
        found = patiently(
            lambda: get_hf_file_metadata(url, headers=headers, endpoint=endpoint, timeout=_TIMEOUT),
            place,
        )
        if found.size is not None and found.size != self.entry.size:
            raise HubError(
                "the file has another size than the listing of the commit says",
                found=f"{found.size} bytes",
                expected=f"{self.entry.size} bytes",
                do="run the same command again later",
                **place.at(),
            )
        return found.location

    def _failed(self, error: Exception) -> MergeError:
        if isinstance(error, _WrongAnswer):
            return HubError(
                "the storage does not send the range that it is asked for",
                found=str(error),
                do="fetch the model whole: --download, or `hf download " + self.pinned.repo + "`",
                **self.place.at(),
            )
        return told(error, self.place)


class _Expired(Exception):
    """The storage refuses a location; ``response`` is what it said."""

    def __init__(self, response: Any) -> None:
        super().__init__(f"status {response.status_code} from the storage")
        self.status = response.status_code
        self.response = response
