"""A Hub on loopback that speaks the real protocol, for tests: no mocks, the client is the real one.

``with Hub(folder) as hub:`` serves repos at ``hub.url`` and the bytes of large files at a second
port, as the real Hub serves them from a CDN, so a token that follows there is seen
(``hub.leaks``). Commits are immutable snapshots. Every request is noted (`Hub.requests`), and
`Hub.fault` makes those that match fail in a chosen way. By hand::

    python tests/hub.py --repo org/name=folder --repo org/other=folder
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit

TOKEN = "hf_TestOnlyTokenThatMustNeverBeShown00"
"""The one token that is known: of the user ``me``, who may write to ``me`` and ``org``."""

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack", ".h5")
_PIECE = 1 << 20  # bytes moved at once
_DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """A file of a commit: where its bytes lie, and whether it is kept as a large file."""

    path: Path
    size: int
    oid: str  # sha1 as git has it
    sha256: str
    large: bool


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: Mapping[str, File]


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[int, dict[str, Any]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)  # cardData and such, merged into info

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["refs/heads/main"]]

    def commit_at(self, revision: str) -> Commit | None:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        return self.commits.get(revision)


@dataclass
class Fault:
    """How requests fail whose ``METHOD /path?query`` is found by ``pattern``, ``times`` times.

    status: answer with that, with ``headers`` and ``code`` (X-Error-Code). cut: close the line
    after so many bytes of the body. whole: ignore the Range. shift: serve a range that was not
    asked for, so many bytes later. corrupt: flip one bit of the body. lost: do the work, close
    without an answer. refuse: close before any work. delay: seconds before the answer. before:
    call this first (another's commit, say), then go on. received: the same once the whole body is
    there. skip: let so many pass first.
    """

    pattern: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    code: str | None = None
    message: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    whole: bool = False
    shift: int = 0
    corrupt: bool = False
    lost: bool = False
    refuse: bool = False
    delay: float = 0.0
    before: Callable[[], object] | None = None
    received: Callable[[], object] | None = None
    hits: int = 0


@dataclass
class Request:
    """One request and what became of it; ``sent`` and ``received`` count bytes of bodies."""

    method: str
    path: str
    range: str | None
    authorised: bool
    blobs: bool  # came to the port of large files
    status: int = 0
    sent: int = 0
    received: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class Refused(Exception):
    """An answer that is an error, with the headers by which the client tells its kind."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = {k.replace("_", "-"): v for k, v in headers.items()}


class Hub:
    """A running Hub. Close it, or use it as a context.

    folder: where bytes are kept. multipart: size of the parts in which large files are to be
    sent, None for one piece. xet: address of a content store (``local://folder``) that the token
    routes name; without it they answer 404, as a Hub without xet does. page: entries of a page of
    a listing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        multipart: int | None = None,
        xet: str | None = None,
        page: int = 1000,
        token: str = TOKEN,
    ) -> None:
        self.folder = folder
        self.multipart, self.xet, self.page, self.token = multipart, xet, page, token
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, Path] = {}  # sha256 to bytes; without any commit too
        self.accepted: set[str] = set()  # gated repos that the user of the token may read
        self.read_only = False  # the token may read and not write
        self.attributes = True  # repos say that weights are large files, whatever their size
        self.ignored: set[str] = set()  # files that a .gitignore of the repos names
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.leaks: list[str] = []  # requests to the second port that carried a token
        self.epoch = 0  # locations signed before it have expired
        self.lock = threading.RLock()
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        self._servers = [_server(self, blobs=False), _server(self, blobs=True)]
        self.url, self.blobs_url = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)
        self._threads = [
            threading.Thread(target=s.serve_forever, args=(0.05,), daemon=True)
            for s in self._servers
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    # -- what a test sets up ----------------------------------------------------------------------

    def create(self, repo: str, *, private: bool = False, gated: bool = False) -> Repo:
        """A repo with one empty commit."""
        made = Repo(repo, private, gated)
        with self.lock:
            self.repos[repo] = made
            self._advance(made, "refs/heads/main", {}, "initial commit")
        return made

    def commit(
        self, repo: str, files: Mapping[str, bytes | Path], *, revision: str = "main"
    ) -> str:
        """Files added to a branch (made as needed, with its repo); the commit's sha."""
        with self.lock:
            held = self.repos.get(repo) or self.create(repo)
            ref = f"refs/heads/{revision}"
            held.refs.setdefault(ref, held.refs["refs/heads/main"])
            old = held.commits[held.refs[ref]].files
            new = {name: self._file(name, content) for name, content in files.items()}
            return self._advance(held, ref, {**old, **new}, "commit").sha

    def upload(self, repo: str, folder: Path, *, revision: str = "main") -> str:
        """All files of a folder, in one commit; large ones stay where they are."""
        found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*"))}
        return self.commit(repo, {n: p for n, p in found.items() if p.is_file()}, revision=revision)

    def tag(self, repo: str, name: str, revision: str = "main") -> None:
        held = self.repos[repo]
        at = held.commit_at(revision)
        assert at is not None
        held.refs[f"refs/tags/{name}"] = at.sha

    def fault(self, pattern: str, **how: Any) -> Fault:
        """The next requests that ``pattern`` finds fail; see `Fault`."""
        made = Fault(pattern, **how)
        self.faults.append(made)
        return made

    def expire(self) -> None:
        """All locations handed out so far are refused from now on."""
        self.epoch += 1

    def forget(self) -> None:
        """Requests so far are not counted, and faults that are left do not strike."""
        self.requests.clear()
        self.faults.clear()
        self.leaks.clear()

    # -- what a test looks at ---------------------------------------------------------------------

    def seen(self, pattern: str) -> list[Request]:
        """The requests whose ``METHOD /path?query`` the pattern finds."""
        with self.lock:
            return [r for r in self.requests if re.search(pattern, str(r))]

    def sent(self, pattern: str = "") -> int:
        """Bytes of bodies sent in answer to requests that the pattern finds."""
        return sum(r.sent for r in self.seen(pattern))

    def received(self, pattern: str = "") -> int:
        return sum(r.received for r in self.seen(pattern))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision and their bytes."""
        at = self.repos[repo].commit_at(revision)
        assert at is not None, f"no revision {revision} in {repo}"
        return {name: file.path.read_bytes() for name, file in at.files.items()}

    # -- bytes and commits ------------------------------------------------------------------------

    def _file(self, name: str, content: bytes | Path) -> File:
        if isinstance(content, bytes):
            path = self.folder / "blobs" / hashlib.sha256(content).hexdigest()
            path.write_bytes(content)
            return self._described(name, path, name.endswith(LARGE))
        return self._described(name, content.resolve(), name.endswith(LARGE))

    def _described(self, name: str, path: Path, large: bool) -> File:
        size = path.stat().st_size
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
        with path.open("rb") as f:
            while piece := f.read(_PIECE):
                sha256.update(piece)
                sha1.update(piece)
        self.blobs[sha256.hexdigest()] = path
        return File(path, size, sha1.hexdigest(), sha256.hexdigest(), large)

    def _advance(self, repo: Repo, ref: str, files: Mapping[str, File], title: str) -> Commit:
        parent = repo.refs.get(ref)
        told = json.dumps([repo.id, parent, title, {n: f.sha256 for n, f in sorted(files.items())}])
        sha = hashlib.sha1(told.encode()).hexdigest()
        made = Commit(sha, parent, title, dict(files))
        repo.commits[sha] = made
        repo.refs[ref] = sha
        return made

    def strike(self, request: Request) -> Fault | None:
        """The fault that this request meets, counted."""
        with self.lock:
            for fault in self.faults:
                if not re.search(fault.pattern, str(request)):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                elif fault.hits < fault.times:
                    fault.hits += 1
                    return fault
        return None


def _server(hub: Hub, *, blobs: bool) -> ThreadingHTTPServer:
    class Bound(_Handler):
        pass

    Bound.hub, Bound.of_blobs = hub, blobs

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 64

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that hangs up is no error of ours."""

    return Quiet(("127.0.0.1", 0), Bound)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/models/{_REPO}"
_ROUTES: list[tuple[str, re.Pattern[str], str]] = [
    (method, re.compile(pattern + r"/?"), name)
    for method, pattern, name in (
        ("GET", r"/api/agent-harnesses", "harnesses"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/models", "search"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", rf"{_API}/auth-check(?P<write>/write)?", "auth_check"),
        ("GET", rf"{_API}/refs", "refs"),
        ("GET", rf"{_API}/commits/(?P<rev>[^/]+)", "commits"),
        ("GET", rf"{_API}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", rf"{_API}/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("POST", rf"{_API}/branch/(?P<name>[^/]+)", "branch"),
        ("DELETE", rf"{_API}/(?P<kind>branch|tag)/(?P<name>[^/]+)", "unref"),
        ("POST", rf"{_API}/tag/(?P<rev>[^/]+)", "tag"),
        ("PUT", rf"{_API}/settings", "settings"),
        ("POST", rf"{_API}/discussions", "discuss"),
        ("GET", rf"{_API}/discussions/(?P<num>\d+)", "discussion"),
        ("POST", rf"{_API}/discussions/(?P<num>\d+)/(?P<verb>merge|status)", "settle"),
        ("POST", rf"{_API}/preupload/(?P<rev>[^/]+)", "preupload"),
        ("GET", rf"{_API}/xet-(?P<kind>read|write)-token/(?P<rev>[^/]+)", "xet_token"),
        ("POST", rf"{_API}/commit/(?P<rev>[^/]+)", "commit"),
        ("GET", rf"{_API}(?:/revision/(?P<rev>[^/]+))?", "info"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", "verify"),
        ("GET", rf"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )
]
_BLOB_ROUTES: list[tuple[str, re.Pattern[str], str]] = [
    ("GET", re.compile(r"/blob/(?P<oid>\w+)"), "blob"),
    ("PUT", re.compile(r"/upload/(?P<oid>\w+)"), "upload"),
    ("PUT", re.compile(r"/upload/(?P<oid>\w+)/(?P<part>\d+)"), "upload"),
    ("POST", re.compile(r"/upload/(?P<oid>\w+)/complete"), "complete"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each time
    hub: Hub
    of_blobs: bool

    def log_message(self, *_: object) -> None:
        """Nothing: a test looks at `Hub.requests`."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.query = dict(parse_qsl(split.query))
        token = self.headers.get("Authorization")
        self.request_seen = Request(
            self.command, self.path, self.headers.get("Range"), token is not None, self.of_blobs
        )
        with self.hub.lock:
            self.hub.requests.append(self.request_seen)
            if self.of_blobs and token is not None:
                self.hub.leaks.append(str(self.request_seen))
        self.fault = self.hub.strike(self.request_seen) or Fault("")
        if self.fault.delay:
            time.sleep(self.fault.delay)
        if self.fault.refuse:
            self._hang_up()
            return
        self.body_read = False
        self.body: bytes | None = None
        try:
            if self.fault.before is not None:
                self.fault.before()
            if self.fault.received is not None:
                self.body = b"".join(self._pieces())
                self.fault.received()
            if self.fault.status is not None:
                raise Refused(
                    self.fault.status,
                    self.fault.code,
                    self.fault.message or f"injected {self.fault.status}",
                    **self.fault.headers,
                )
            self._route(split.path)
        except Refused as refused:
            self._error(refused)
        except (BrokenPipeError, ConnectionResetError):
            self._hang_up()

    def _route(self, path: str) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in _BLOB_ROUTES if self.of_blobs else _ROUTES:
            if verb == method and (found := pattern.fullmatch(path)):
                values = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                getattr(self, f"_on_{name}")(**values)
                return
        raise Refused(404, None, f"no such route: {self.command} {path}")

    # -- answers ----------------------------------------------------------------------------------

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(2)

    def _error(self, error: Refused) -> None:
        headers = {"X-Error-Message": error.message, **error.headers}
        if error.code is not None:
            headers["X-Error-Code"] = error.code
        self._json({"error": error.message}, error.status, headers)

    def _json(
        self, value: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        body = json.dumps(value).encode()
        self._answer(status, {"Content-Type": "application/json", **(headers or {})}, body)

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self._drain()
        if self.fault.lost:
            self._hang_up()
            return
        self.request_seen.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and body:
            cut = self.fault.cut
            self.wfile.write(body if cut is None else body[:cut])
            self.request_seen.sent += len(body if cut is None else body[:cut])
            if cut is not None:
                self._hang_up()

    def _bytes(self, path: Path, headers: Mapping[str, str]) -> None:
        """A file or the range of it that was asked for, with the faults that strike bodies."""
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        begin, end, status = 0, size, 200
        if asked and asked.group() != "bytes=-" and not self.fault.whole:
            if asked[1]:
                begin, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else size, size)
            else:
                begin = max(size - int(asked[2]), 0)
            if begin >= size:
                raise Refused(416, None, "range not satisfiable", Content_Range=f"bytes */{size}")
            status = 206
            if self.fault.shift:
                begin, end = begin + self.fault.shift, min(end + self.fault.shift, size)
        extra = {"Content-Range": f"bytes {begin}-{end - 1}/{size}"} if status == 206 else {}
        length = {"Content-Length": str(end - begin), "Accept-Ranges": "bytes"}
        self._answer(status, {**headers, **extra, **length})
        if self.command == "HEAD" or self.fault.lost:
            return
        stop = end if self.fault.cut is None else min(end, begin + self.fault.cut)
        with path.open("rb") as f:
            f.seek(begin)
            at = begin
            while at < stop:
                piece = f.read(min(_PIECE, stop - at))
                if self.fault.corrupt and at == begin:
                    piece = piece[:-1] + bytes([piece[-1] ^ 0x40])
                self.wfile.write(piece)
                at += len(piece)
                self.request_seen.sent += len(piece)
        if stop < end:
            self._hang_up()

    # -- bodies of requests -----------------------------------------------------------------------

    def _pieces(self) -> Iterator[bytes]:
        """The body of the request, whether its length is told or it comes in chunks."""
        self.body_read = True
        if self.body is not None:
            yield self.body
        elif "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield from self._exactly(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            yield from self._exactly(int(self.headers.get("Content-Length") or 0))

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size > 0:
            piece = self.rfile.read(min(size, _PIECE))
            if not piece:
                raise ConnectionResetError
            size -= len(piece)
            self.request_seen.received += len(piece)
            yield piece

    def _drain(self) -> None:
        """What is left of the body, so that the line can be used again."""
        if not self.body_read:
            for _ in self._pieces():
                pass

    def _body(self) -> Any:
        raw = b"".join(self._pieces())
        if "x-www-form-urlencoded" in (self.headers.get("Content-Type") or ""):
            return parse_qs(raw.decode())
        return json.loads(raw) if raw else {}

    # -- who may what -----------------------------------------------------------------------------

    def _known(self) -> bool:
        """Whether the request bears the token; another token is refused."""
        given = self.headers.get("Authorization")
        if given is None:
            return False
        if given != f"Bearer {self.hub.token}":
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return True

    def _repo(self, repo: str, *, content: bool = False, write: bool = False) -> Repo:
        known = self._known()
        held = self.hub.repos.get(repo)
        if held is None or (held.private and not known):
            status = 404 if known else 401
            message = "Repository not found" if known else "Invalid username or password."
            raise Refused(status, "RepoNotFound", message)
        if content and held.gated and repo not in self.hub.accepted:
            raise Refused(
                403 if known else 401,
                "GatedRepo",
                f"Access to model {repo} is restricted and you are not in the authorized list.",
            )
        if write:
            self._may_write(repo)
        return held

    def _may_write(self, repo: str) -> None:
        if not self._known():
            raise Refused(401, None, "Invalid username or password.")
        if repo.partition("/")[0] not in ("me", "org") or self.hub.read_only:
            raise Refused(
                403, None, f"You don't have the rights to write under the namespace of {repo}"
            )

    def _at(self, repo: Repo, rev: str) -> Commit:
        if (found := repo.commit_at(rev)) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return found

    # -- reading ----------------------------------------------------------------------------------

    def _on_harnesses(self) -> None:
        self._json({"standardEnvVars": [], "harnesses": {}})

    def _on_whoami(self) -> None:
        if not self._known():
            raise Refused(401, None, "Invalid username or password.")
        role = "read" if self.hub.read_only else "write"
        orgs = [{"type": "org", "name": "org", "fullname": "org", "roleInOrg": role}]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self._json({"type": "user", "name": "me", "fullname": "Me", "orgs": orgs, "auth": auth})

    def _on_search(self) -> None:
        known, word = self._known(), self.query.get("search", "").lower()
        found = [
            r
            for r in self.hub.repos.values()
            if word in r.id.lower()
            and (known or not r.private)
            and self.query.get("author", r.id.partition("/")[0]) == r.id.partition("/")[0]
        ]
        self._json([self._told(r, r.head) for r in found[: int(self.query.get("limit", 100))]])

    def _told(self, repo: Repo, at: Commit) -> dict[str, Any]:
        return {
            "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.partition("/")[0],
            "sha": at.sha,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} for name in sorted(at.files)],
            "createdAt": _DATE,
            "lastModified": _DATE,
            **repo.card,
        }

    def _on_info(self, repo: str, rev: str = "main") -> None:
        held = self._repo(repo)
        self._json(self._told(held, self._at(held, rev)))

    def _on_auth_check(self, repo: str, write: str = "") -> None:
        self._repo(repo, content=not write, write=bool(write))
        self._json({})

    def _on_refs(self, repo: str) -> None:
        held = self._repo(repo)
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        answer: dict[str, list[dict[str, str]]] = {"converts": []}
        for kind, prefix in kinds.items():
            answer[kind] = [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in held.refs.items()
                if ref.startswith(prefix)
            ]
        if "include_prs" not in self.query:
            del answer["pullRequests"]
        self._json(answer)

    def _on_commits(self, repo: str, rev: str) -> None:
        held = self._repo(repo)
        at: Commit | None = self._at(held, rev)
        found = []
        while at is not None:
            told = {"id": at.sha, "title": at.title, "message": "", "date": _DATE}
            found.append({**told, "authors": [{"user": "me"}]})
            at = held.commits[at.parent] if at.parent else None
        self._json(found)

    def _entry(self, name: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": file.size, "oid": file.oid}
        if file.large:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        return entry

    def _on_tree(self, repo: str, rev: str, path: str = "") -> None:
        held = self._repo(repo)
        files = self._at(held, rev).files
        prefix = f"{path}/" if path else ""
        entries: dict[str, dict[str, Any]] = {}
        for name, file in sorted(files.items()):
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(folder.encode()).hexdigest()
                entries.setdefault(folder, {"type": "directory", "path": folder, "oid": oid})
            entries[name] = self._entry(name, file)
        if prefix and not entries:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {rev!r}")
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            entries = {n: e for n, e in entries.items() if "/" not in n.removeprefix(prefix)}
        begin = int(self.query.get("cursor", 0))
        shown = list(entries.values())[begin : begin + self.hub.page]
        headers = {}
        if begin + self.hub.page < len(entries):
            rest = {**self.query, "cursor": str(begin + self.hub.page)}
            query = "&".join(f"{k}={quote(v)}" for k, v in rest.items())
            link = f"{self.hub.url}{urlsplit(self.path).path}?{query}"
            headers["Link"] = f'<{link}>; rel="next"'
        self._json(shown, headers=headers)

    def _on_paths_info(self, repo: str, rev: str) -> None:
        held = self._repo(repo)
        files = self._at(held, rev).files
        asked = self._body().get("paths", [])
        asked = [asked] if isinstance(asked, str) else asked
        found = [self._entry(name, files[name]) for name in asked if name in files]
        folders = {p for p in asked if any(n.startswith(f"{p}/") for n in files)}
        self._json(
            found + [{"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(folders)]
        )

    def _on_resolve(self, repo: str, rev: str, path: str) -> None:
        held = self._repo(repo, content=True)
        at = self._at(held, rev)
        if path not in at.files:
            raise Refused(404, "EntryNotFound", "Entry not found", X_Repo_Commit=at.sha)
        file = at.files[path]
        headers = {"X-Repo-Commit": at.sha, "ETag": f'"{file.oid}"'}
        if not file.large:
            self._bytes(file.path, headers)
            return
        headers["X-Linked-Etag"] = f'"{file.sha256}"'
        headers["X-Linked-Size"] = str(file.size)
        signed = f"{self.hub.blobs_url}/blob/{file.sha256}?Signature={self.hub.epoch}"
        self._answer(302, {**headers, "Location": signed})

    def _on_blob(self, oid: str) -> None:
        if int(self.query.get("Signature", -1)) < self.hub.epoch:
            raise Refused(403, None, "AccessDenied: Request has expired")
        if oid not in self.hub.blobs:
            raise Refused(404, None, "NoSuchKey")
        self._bytes(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def _on_xet_token(self, repo: str, kind: str, rev: str) -> None:
        held = self._repo(repo, content=kind == "read", write=kind == "write")
        self._at(held, rev)
        if self.hub.xet is None:
            raise Refused(404, None, "no xet here")
        expires = int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": self.hub.xet,
            "X-Xet-Access-Token": "xet-access",
            "X-Xet-Token-Expiration": str(expires),
        }
        answer = {"casUrl": self.hub.xet, "exp": expires, "accessToken": "xet-access"}
        self._json(answer, headers=headers)

    # -- repos and refs ---------------------------------------------------------------------------

    def _on_create(self) -> None:
        asked = self._body()
        owner = asked.get("organization") or "me"
        repo = f"{owner}/{asked['name']}"
        self._may_write(repo)
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        with self.hub.lock:
            if repo in self.hub.repos:
                raise_ = {"error": "You already created this model repo", **answer}
                self._json(raise_, 409, {"X-Error-Message": raise_["error"]})
                return
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.create(repo, private=private)
        self._json(answer)

    def _on_delete(self) -> None:
        asked = self._body()
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self._repo(repo, write=True)
        del self.hub.repos[repo]
        self._json({})

    def _on_settings(self, repo: str) -> None:
        held = self._repo(repo, write=True)
        asked = self._body()
        held.private = asked.get("visibility", "private" if held.private else "") == "private"
        held.gated = bool(asked.get("gated", held.gated))
        self._json({})

    def _on_branch(self, repo: str, name: str) -> None:
        held = self._repo(repo, write=True)
        start = self._at(held, self._body().get("startingPoint") or "main")
        self._new_ref(held, f"refs/heads/{name}", start)

    def _on_tag(self, repo: str, rev: str) -> None:
        held = self._repo(repo, write=True)
        self._new_ref(held, f"refs/tags/{self._body()['tag']}", self._at(held, rev))

    def _new_ref(self, repo: Repo, ref: str, at: Commit) -> None:
        with self.hub.lock:
            if ref in repo.refs:
                raise Refused(409, None, f"Reference already exists: {ref}")
            repo.refs[ref] = at.sha
        self._json({})

    def _on_unref(self, repo: str, kind: str, name: str) -> None:
        held = self._repo(repo, write=True)
        ref = f"refs/{'heads' if kind == 'branch' else 'tags'}/{name}"
        if held.refs.pop(ref, None) is None:
            raise Refused(404, "RevisionNotFound", f"no {ref}")
        self._json({})

    def _on_discuss(self, repo: str) -> None:
        held = self._repo(repo)
        self._may_write("me/any")  # anyone with a token that writes may open one
        asked = self._body()
        self._json({"num": self._pull(held, held.head, asked["title"]), "pullRequest": True})

    def _pull(self, repo: Repo, at: Commit, title: str) -> int:
        with self.hub.lock:
            num = len(repo.pulls) + 1
            repo.pulls[num] = {"title": title, "status": "draft", "base": "refs/heads/main"}
            repo.refs[f"refs/pr/{num}"] = at.sha
        return num

    def _on_discussion(self, repo: str, num: str) -> None:
        held = self._repo(repo)
        if (pull := held.pulls.get(int(num))) is None:
            raise Refused(404, None, "Discussion not found")
        author = {"name": "me", "type": "user"}
        self._json(
            {
                "num": int(num),
                "title": pull["title"],
                "status": pull["status"],
                "isPullRequest": True,
                "events": [],
                "createdAt": _DATE,
                "author": author,
                "repo": {"name": repo, "type": "model"},
                "changes": {"base": pull["base"], "mergeCommitId": pull.get("merged")},
                "filesWithConflicts": [],
                "diff": "",
            }
        )

    def _on_settle(self, repo: str, num: str, verb: str) -> None:
        held = self._repo(repo, write=True)
        if (pull := held.pulls.get(int(num))) is None:
            raise Refused(404, None, "Discussion not found")
        with self.hub.lock:
            if verb == "merge":
                if pull["status"] == "closed":
                    raise Refused(400, None, "closed pull requests cannot be merged")
                files = {**held.head.files, **held.commits[held.refs[f"refs/pr/{num}"]].files}
                made = self.hub._advance(held, "refs/heads/main", files, f"merge {num}")
                pull.update(status="merged", merged=made.sha)
            else:
                pull["status"] = self._body()["status"]
        event = {"id": "1", "type": "status-change", "createdAt": _DATE}
        data = {"status": pull["status"]}
        self._json({"newStatus": {**event, "author": {"name": "me"}, "data": data}})

    # -- writing ----------------------------------------------------------------------------------

    def _on_validate_yaml(self) -> None:
        content = self._body()["content"]
        errors = []
        if re.search(r"^license:\s*not-a-licence", content, re.MULTILINE):
            errors = [{"message": '"license" must be one of [apache-2.0, mit, ...]'}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _on_preupload(self, repo: str, rev: str) -> None:
        held = self._repo(repo, write="create_pr" not in self.query)
        at, answer = self._at(held, rev), []
        for asked in self._body()["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            told = self.hub.attributes and (path.endswith(LARGE) or b"\0" in sample)
            large = told or asked["size"] > 10_000_000
            current = at.files.get(path)
            oid = None if current is None else current.sha256 if current.large else current.oid
            mode = "lfs" if large else "regular"
            ignore = path in self.hub.ignored
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
        self._json({"files": answer, "commitOid": at.sha})

    def _on_batch(self, repo: str) -> None:
        held = self._repo(repo)
        self._may_write("me/any" if held.pulls else repo)
        asked = self._body()
        parts = self.hub.multipart if "multipart" in asked["transfers"] else None
        objects = []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            held_at = self.hub.blobs.get(oid)
            if held_at is not None and held_at.stat().st_size == size:
                objects.append({"oid": oid, "size": size})
                continue
            href = f"{self.hub.blobs_url}/upload/{oid}"
            upload: dict[str, Any] = {"href": f"{href}?size={size}"}
            if parts is not None and size > parts:
                count = -(-size // parts)
                urls = {str(i): f"{href}/{i}" for i in range(1, count + 1)}
                upload = {
                    "href": f"{href}/complete?size={size}",
                    "header": {"chunk_size": str(parts), **urls},
                }
            verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"}
            actions = {"upload": upload, "verify": verify}
            objects.append({"oid": oid, "size": size, "actions": actions})
        self._json({"transfer": "multipart" if parts else "basic", "objects": objects})

    def _incoming(self, oid: str, part: str | None = None) -> Path:
        return self.hub.folder / f"{oid}.{part or 'whole'}.{threading.get_ident()}.incoming"

    def _on_upload(self, oid: str, part: str | None = None) -> None:
        path, digest = self._incoming(oid, part), hashlib.sha256()
        with path.open("wb") as f:
            for piece in self._pieces():
                f.write(piece)
                digest.update(piece)
        if part is None:
            self._keep(oid, path)
        else:
            path.replace(self.hub.folder / f"{oid}.{part}")
        self._answer(200, {"ETag": f'"{digest.hexdigest()}"'})

    def _keep(self, oid: str, path: Path) -> None:
        """What came is kept under its name, if it is what the name says and as long as was said."""
        found = self.hub._described("", path, True)
        del self.hub.blobs[found.sha256]
        if found.sha256 != oid or found.size != int(self.query["size"]):
            path.unlink()
            raise Refused(400, None, "the bytes are not those of the oid")
        path.replace(self.hub.folder / "blobs" / oid)
        self.hub.blobs[oid] = self.hub.folder / "blobs" / oid

    def _on_complete(self, oid: str) -> None:
        whole = self._incoming(oid)
        with whole.open("wb") as f:
            for part in sorted(self._body()["parts"], key=lambda p: p["partNumber"]):
                path = self.hub.folder / f"{oid}.{part['partNumber']}"
                if not path.exists():
                    raise Refused(400, None, f"part {part['partNumber']} never came")
                with path.open("rb") as piece:
                    shutil.copyfileobj(piece, f)
                path.unlink()
        self._keep(oid, whole)
        self._json({"success": True})

    def _on_verify(self, repo: str) -> None:
        self._repo(repo)
        asked = self._body()
        held = self.hub.blobs.get(asked["oid"])
        if held is None or held.stat().st_size != asked["size"]:
            raise Refused(404, None, "object not found")
        self._json({})

    def _on_commit(self, repo: str, rev: str) -> None:
        pull = "create_pr" in self.query
        held = self._repo(repo, write=not pull)
        lines = [json.loads(x) for x in b"".join(self._pieces()).splitlines() if x.strip()]
        header = next(x["value"] for x in lines if x["key"] == "header")
        with self.hub.lock:
            base = self._at(held, rev)
            if (parent := header.get("parentCommit")) and parent != base.sha:
                raise Refused(
                    412, None, "A commit has happened since. Please refresh and try again."
                )
            files = dict(base.files)
            for line in lines:
                self._change(files, line["key"], line["value"])
            ref, url = f"refs/heads/{rev}", None
            if pull:
                num = self._pull(held, base, header["summary"])
                ref, url = f"refs/pr/{num}", f"{self.hub.url}/{repo}/discussions/{num}"
            elif rev.startswith("refs/"):
                ref = rev
            elif ref not in held.refs:
                raise Refused(400, None, f"{rev} is no branch")
            made = self.hub._advance(held, ref, files, header["summary"])
        self._json(
            {
                "success": True,
                "commitOid": made.sha,
                "commitUrl": f"{self.hub.url}/{repo}/commit/{made.sha}",
                "hookOutput": "",
                "pullRequestUrl": url,
            }
        )

    def _change(self, files: dict[str, File], key: str, value: Mapping[str, Any]) -> None:
        """One line of a commit. With xet the bytes go past this server, so a hash is believed."""
        if key == "file":
            files[value["path"]] = self.hub._file("", base64.b64decode(value["content"]))
        elif key == "lfsFile":
            path = self.hub.blobs.get(value["oid"])
            if path is None and self.hub.xet is None:
                raise Refused(400, None, f"{value['path']}: no object {value['oid']} was uploaded")
            size = value["size"] if path is None else path.stat().st_size
            missing = self.hub.folder / "in-the-content-store"
            files[value["path"]] = File(
                path or missing, size, value["oid"][:40], value["oid"], True
            )
        elif key == "deletedFile":
            files.pop(value["path"], None)
        elif key == "deletedFolder":
            for name in [n for n in files if n.startswith(value["path"].rstrip("/") + "/")]:
                del files[name]


def main() -> None:
    """Serve folders until interrupted; prints the address for HF_ENDPOINT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", action="append", default=[], help="org/name=folder")
    parser.add_argument("--store", type=Path, default=Path("hub-store"), help="where bytes go")
    parser.add_argument("--xet", help="address of a content store, local://...")
    given = parser.parse_args()
    with Hub(given.store, xet=given.xet) as hub:
        for pair in given.repo:
            repo, _, folder = pair.partition("=")
            hub.upload(repo, Path(folder))
        print(f"HF_ENDPOINT={hub.url} HF_TOKEN={hub.token}", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
