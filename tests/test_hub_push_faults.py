"""Publishing while things go wrong: success after another try, or an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

import merge
from merge.errors import SinkError
from tests.conftest import MakeModel
from tests.hub import TOKEN, Hub
from tests.pushing import Push, mean_of, saved

REQUESTS = {
    "looking": "GET /api/models/me/merged",
    "listing": "GET /api/models/me/merged/tree",
    "preupload": "POST .*/preupload/",
    "batch": "POST .*/objects/batch",
    "put": "PUT /upload/",
    "verify": "POST .*/objects/verify",
    "commit": "POST .*/commit/",
}
PASSING = (408, 429, 500, 502, 503, 504)
FINAL = (401, 403, 404, 413)


@pytest.fixture
def mean(make_model: MakeModel) -> merge.Checkpoint:
    return mean_of(make_model, tensors=3)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits; how long would have been waited."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


@pytest.mark.parametrize("status", PASSING)
@pytest.mark.parametrize("request_", REQUESTS)
def test_what_passes_is_tried_again(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path, request_: str, status: int
) -> None:
    hub.create("me/merged")
    fault = hub.fault(REQUESTS[request_], status=status, times=2)
    push(mean)
    assert fault.hits == 2
    assert hub.files("me/merged") == saved(mean, tmp_path / "local")
    assert len(hub.repos["me/merged"].commits) == 2


@pytest.mark.parametrize("status", [*PASSING, *FINAL])
@pytest.mark.parametrize("request_", [r for r in REQUESTS if r != "verify"])
def test_what_does_not_pass_is_an_error_with_a_remedy(
    hub: Hub, push: Push, mean: merge.Checkpoint, request_: str, status: int
) -> None:
    hub.create("me/merged")
    skip = 2 if request_ == "looking" else 0  # the repo is there, then the server fails
    hub.fault(REQUESTS[request_], status=status, times=999, skip=skip)
    with pytest.raises(SinkError) as caught:
        push(mean)
    error = caught.value
    assert error.where["repo"] == "me/merged"
    assert f"status {status}" in str(error.found)
    assert error.do
    if request_ in ("preupload", "batch", "put"):
        assert error.where["file"] == "model-00001-of-00003.safetensors"
    assert TOKEN not in str(error)
    assert not hub.files("me/merged")


def test_a_server_that_cannot_verify_has_the_bytes_all_the_same(
    hub: Hub, push: Push, mean: merge.Checkpoint
) -> None:
    """Asked again, it says that it holds them; in the end digests are compared."""
    fault = hub.fault(REQUESTS["verify"], status=500, times=999)
    push(mean)
    assert fault.hits == 3 * 6  # the client's own tries, for each file
    hub.faults.clear()
    hub.fault(REQUESTS["verify"], status=403, times=999)
    hub.blobs.clear()
    with pytest.raises(SinkError, match="sending a file failed"):
        push(mean, repo="me/other", fresh=True)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("how", ["refuse", "lost"])
def test_a_line_that_breaks(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path, request_: str, how: str
) -> None:
    hub.create("me/merged")
    fault = hub.fault(REQUESTS[request_], **{how: True})
    done = push(mean)
    assert fault.hits == 1
    assert hub.files("me/merged") == saved(mean, tmp_path / "local")
    assert done.outcome.commit == hub.repos["me/merged"].head.sha
    assert len(hub.repos["me/merged"].commits) == 2  # one that was answered or not, but one


def test_a_signed_address_that_has_expired_is_asked_for_again(
    hub: Hub, push: Push, mean: merge.Checkpoint
) -> None:
    fault = hub.fault(REQUESTS["put"], status=403)
    push(mean)
    assert fault.hits == 1 and len(hub.seen("objects/batch")) == 4


def test_how_long_the_server_asks_to_wait(
    hub: Hub, push: Push, mean: merge.Checkpoint, impatient: list[float]
) -> None:
    hub.fault(REQUESTS["commit"], status=429, headers={"Retry_After": "17"})
    push(mean)
    assert impatient == [17.0]


@pytest.mark.parametrize("status", [None, 503, 409])
def test_somebody_else_moves_the_branch(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path, status: int | None
) -> None:
    """Whatever the answer to our commit was: theirs is not built over, and is named."""

    def theirs() -> None:
        hub.commit("me/merged", {"theirs.txt": b"hello"})

    hub.create("me/merged")
    hub.fault(REQUESTS["commit"], before=theirs, status=status)
    with pytest.raises(SinkError, match="moved by somebody else") as caught:
        push(mean)
    head = hub.repos["me/merged"].head
    assert head.sha[:12] in str(caught.value.found) and "by me" in str(caught.value.found)
    assert set(head.files) == {"theirs.txt"}
    hub.forget()
    push(mean)
    assert not hub.seen("PUT /upload")
    local = saved(mean, tmp_path / "local")
    assert hub.files("me/merged") == {**local, "theirs.txt": b"hello"}


def test_a_conflict_is_waited_out(hub: Hub, push: Push, mean: merge.Checkpoint) -> None:
    fault = hub.fault(REQUESTS["commit"], status=409)
    push(mean)
    assert fault.hits == 1


def test_bytes_that_did_not_arrive_whole(hub: Hub, push: Push, mean: merge.Checkpoint) -> None:
    hub.fault(REQUESTS["put"], status=400, message="BadDigest", times=99)
    with pytest.raises(SinkError, match="sending a file failed") as caught:
        push(mean)
    assert "BadDigest" in str(caught.value.found)


def test_a_repo_that_says_it_has_what_it_has_not(
    hub: Hub, push: Push, mean: merge.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests are compared at the end: here with a server that mixes files up."""
    from dataclasses import replace

    from tests import hub as module

    def mixed(self: object, name: str, file: module.File) -> dict[str, object]:
        other = replace(file, sha256="0" * 64) if name.startswith("model-00002") else file
        return entry(self, name, other)

    entry = module._Handler._entry
    monkeypatch.setattr(module._Handler, "_entry", mixed)
    with pytest.raises(SinkError, match="does not hold what was sent") as caught:
        push(mean)
    assert caught.value.where["file"] == "model-00002-of-00003.safetensors"


def test_secrets_and_signatures_are_not_shown(hub: Hub, push: Push, mean: merge.Checkpoint) -> None:
    address = "https://store.example/x?X-Amz-Signature=abcdef"
    hub.fault(REQUESTS["commit"], status=413, message=f"no: {TOKEN} at {address}")
    with pytest.raises(SinkError) as caught:
        push(mean)
    assert "<token>" in str(caught.value) and "abcdef" not in str(caught.value)


def test_an_operation_without_its_bytes_is_one_request(hub: Hub) -> None:
    """What is taken from the client that is not its public face: a release may change it."""
    from huggingface_hub import HfApi

    from merge.write.hub import HubRepo, Target
    from merge.write.ledger import Sent

    hub.commit("me/other", {"model.safetensors": b"the bytes"})
    held = hub.repos["me/other"].head.files["model.safetensors"]
    hub.create("me/merged")
    sent = Sent(path="m.safetensors", size=9, sha256=held.sha256, sample=b"the bytes".hex())
    repo = HubRepo(HfApi(endpoint=hub.url, token=TOKEN), Target("me/merged", token=TOKEN))
    head = repo.head("main")
    hub.forget()
    repo.commit("main", head, "one", [sent])
    assert [r.method for r in hub.requests if "agent" not in r.path] == ["POST"]
    assert hub.files("me/merged") == {"m.safetensors": b"the bytes"}
