"""The test Hub itself: the unmodified client reads and writes it, and meets each fault."""

from __future__ import annotations

import warnings
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import get_hf_file_metadata

from tests.hub import TOKEN, Hub

WEIGHTS = bytes(range(256)) * 300


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def public(hub: Hub) -> str:
    hub.commit("org/name", {"config.json": b"{}", "sub/model.safetensors": WEIGHTS})
    return "org/name"


def blob(hub: Hub, name: str = "org/name") -> str:
    """The location of the weights, as the client finds it."""
    url = hf_hub_url(name, "sub/model.safetensors", endpoint=hub.url)
    return get_hf_file_metadata(url, token=TOKEN, endpoint=hub.url).location


def test_the_client_reads(hub: Hub, api: HfApi, public: str, tmp_path: Path) -> None:
    hub.page = 2
    at = api.resolve_revision(public)
    assert at.resolved == hub.repos[public].head.sha
    tree = {e.path: e for e in api.list_repo_tree(public, recursive=True, revision=at.resolved)}
    assert set(tree) == {"config.json", "sub", "sub/model.safetensors"}
    assert tree["sub/model.safetensors"].lfs.size == len(WEIGHTS)
    assert len(hub.seen("/tree/")) == 2
    path = api.hf_hub_download(public, "sub/model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    assert try_to_load_from_cache(public, "sub/model.safetensors") == path
    assert api.list_repo_refs(public, include_pull_requests=True).branches[0].name == "main"
    assert api.whoami()["name"] == "me"
    assert [m.id for m in api.list_models(search="nam")] == [public]
    assert api.snapshot_download(public, local_dir=tmp_path / "snap")
    assert (tmp_path / "snap" / "sub" / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.leaks == []
    assert hub.sent("/blob/") == len(WEIGHTS), "the second time from the cache"


@pytest.mark.parametrize("multipart", [None, 1 << 15])
def test_the_client_writes(hub: Hub, api: HfApi, multipart: int | None) -> None:
    hub.multipart = multipart
    url = api.create_repo("me/out", private=True)
    assert url.repo_id == "me/out" and hub.repos["me/out"].private
    api.create_repo("me/out", exist_ok=True)
    add = CommitOperationAdd("a/model.safetensors", WEIGHTS)
    api.preupload_lfs_files("me/out", [add])
    assert hub.received("PUT /upload") == len(WEIGHTS)
    assert len(hub.seen("PUT /upload")) == (1 if multipart is None else 3)
    head = api.model_info("me/out").sha
    done = api.create_commit(
        "me/out",
        [add, CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n")],
        commit_message="one",
        parent_commit=head,
    )
    assert hub.files("me/out") == {
        "a/model.safetensors": WEIGHTS,
        "README.md": b"---\nlicense: mit\n---\n",
    }
    again = CommitOperationAdd("b.safetensors", WEIGHTS)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("me/out", [again], commit_message="two", parent_commit=head)
    assert hub.received("PUT /upload") == len(WEIGHTS), "the bytes were there"
    api.create_branch("me/out", branch="next", revision=done.oid)
    api.create_tag("me/out", tag="v1", revision="next")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("me/out", tag="v1")
    api.create_commit(
        "me/out", [CommitOperationDelete("a/")], commit_message="three", revision="next"
    )
    assert set(hub.files("me/out", "next")) == {"README.md"}
    assert set(hub.files("me/out", "v1")) == {"README.md", "a/model.safetensors"}
    found = api.get_paths_info("me/out", ["a/model.safetensors"], revision=done.oid)
    assert found[0].lfs.sha256 == add.upload_info.sha256.hex()
    assert [c.title for c in api.list_repo_commits("me/out")] == ["one", "initial commit"]


def test_pull_requests(hub: Hub, api: HfApi, public: str) -> None:
    head = hub.repos[public].head.sha
    done = api.create_commit(
        public, [CommitOperationAdd("x.txt", b"x")], commit_message="x", create_pr=True
    )
    assert done.pr_revision == "refs/pr/1"
    assert hub.repos[public].head.sha == head
    more = CommitOperationAdd("y.txt", b"y")
    api.create_commit(public, [more], commit_message="y", revision="refs/pr/1")
    details = api.get_discussion_details(public, 1)
    assert details.is_pull_request and details.git_reference == "refs/pr/1"
    api.merge_pull_request(public, 1)
    assert {"x.txt", "y.txt", "config.json"} <= set(hub.files(public))
    assert api.create_pull_request(public, title="another").num == 2


def test_a_bad_card_is_refused_before_the_upload(hub: Hub, api: HfApi, public: str) -> None:
    card = CommitOperationAdd("README.md", b"---\nlicense: not-a-licence\n---\n")
    weights = CommitOperationAdd("w.safetensors", b"0" * 9)
    with pytest.raises(ValueError, match="license"):
        api.create_commit(public, [weights, card], commit_message="x")
    assert not hub.seen("PUT|/batch|/commit/")


def test_who_may_what(hub: Hub, api: HfApi, public: str) -> None:
    nobody = HfApi(endpoint=hub.url, token=False)
    wrong = HfApi(endpoint=hub.url, token="hf_wrong")
    hub.create("org/secret", private=True)
    hub.create("org/gated", gated=True)
    hub.commit("org/gated", {"config.json": b"{}"})
    for each in (nobody, api):
        with pytest.raises(RepositoryNotFoundError):
            each.model_info("org/nothing")
    with pytest.raises(RepositoryNotFoundError):
        nobody.model_info("org/secret")
    assert api.model_info("org/secret").private
    with pytest.raises(HfHubHTTPError, match="401"):
        wrong.model_info(public)
    for each in (nobody, api):
        assert each.model_info("org/gated").gated == "auto"
        with pytest.raises(GatedRepoError):
            each.auth_check("org/gated")
        with pytest.raises(GatedRepoError):
            each.hf_hub_download("org/gated", "config.json")
    hub.accepted.add("org/gated")
    assert Path(api.hf_hub_download("org/gated", "config.json")).read_bytes() == b"{}"
    with pytest.raises(RevisionNotFoundError):
        api.model_info(public, revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(public, "nothing.json")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("google/mine")
    hub.read_only = True
    with pytest.raises(HfHubHTTPError, match="403"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=public)


def test_ranges_and_faults(hub: Hub, public: str) -> None:
    url = blob(hub)
    ask = {"Range": "bytes=100-199"}
    with httpx2.Client() as client:
        good = client.get(url, headers=ask)
        assert (good.status_code, good.content) == (206, WEIGHTS[100:200])
        assert good.headers["Content-Range"] == f"bytes 100-199/{len(WEIGHTS)}"
        assert client.get(url, headers={"Range": "bytes=-7"}).content == WEIGHTS[-7:]
        assert client.get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"}).status_code == 416

        hub.fault("/blob/", whole=True)
        assert client.get(url, headers=ask).status_code == 200
        hub.fault("/blob/", corrupt=True)
        bad = client.get(url, headers=ask)
        assert len(bad.content) == 100 and bad.content != WEIGHTS[100:200]
        hub.fault("/blob/", shift=10)
        shifted = client.get(url, headers=ask)
        assert shifted.content == WEIGHTS[110:210]
        assert shifted.headers["Content-Range"].startswith("bytes 110-209/")
        for kind in ({"cut": 10}, {"lost": True}, {"refuse": True}):
            hub.fault("/blob/", **kind)
            with pytest.raises(httpx2.RemoteProtocolError):
                client.get(url, headers=ask)
        for status in (401, 403, 404, 408, 416, 429, 500, 503):
            hub.fault("/blob/", status=status, headers={"Retry-After": "0"})
            assert client.get(url, headers=ask).status_code == status
        assert client.get(url, headers=ask).content == WEIGHTS[100:200]
        hub.expire()
        assert client.get(url, headers=ask).status_code == 403
        assert client.get(blob(hub), headers=ask).status_code == 206
        client.get(url, headers={**ask, "Authorization": f"Bearer {TOKEN}"})
        assert len(hub.leaks) == 1


def test_another_s_commit_comes_between(hub: Hub, api: HfApi, public: str) -> None:
    head = hub.repos[public].head.sha
    hub.fault("POST .*/commit/", before=lambda: hub.commit(public, {"theirs.txt": b"!"}))
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(
            public,
            [CommitOperationAdd("ours.txt", b"?")],
            commit_message="ours",
            parent_commit=head,
        )
    assert "ours.txt" not in hub.files(public) and "theirs.txt" in hub.files(public)


def test_a_lost_answer_is_a_commit_all_the_same(hub: Hub, api: HfApi, public: str) -> None:
    hub.fault("POST .*/commit/", lost=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        api.create_commit(public, [CommitOperationAdd("a.txt", b"a")], commit_message="a")
    assert hub.files(public)["a.txt"] == b"a"


def test_a_blob_that_never_came_cannot_be_committed(hub: Hub, api: HfApi, public: str) -> None:
    hub.fault("PUT /upload", status=500, times=99)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr("time.sleep", lambda _: None)
        with pytest.raises(RuntimeError, match=r"w\.safetensors"):
            api.create_commit(
                public, [CommitOperationAdd("w.safetensors", b"0" * 99)], commit_message="w"
            )
    assert "w.safetensors" not in hub.files(public)


def test_xet_from_end_to_end(
    hub: Hub, api: HfApi, public: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet's folder store takes the bytes; the Hub sees hashes alone."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = f"local://{tmp_path / 'cas'}"
    done = api.create_commit(
        public, [CommitOperationAdd("w.safetensors", WEIGHTS)], commit_message="w"
    )
    found = api.get_paths_info(public, ["w.safetensors"], revision=done.oid)
    assert found[0].lfs.size == len(WEIGHTS)
    assert not hub.seen("PUT|/batch")
    assert any((tmp_path / "cas").rglob("*"))
