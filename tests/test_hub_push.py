"""Publishing on the test Hub: shard by shard without a disk, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from merge_cli import app

import merge
from merge import applying, publishing, run
from merge.errors import OutputRefused, PlanError, RecipeError, SinkError, SourceError
from merge.plan.model import human_bytes
from merge.run import PlanOptions
from merge.write.shard import held_in_memory
from tests.conftest import MakeModel
from tests.hub import TOKEN, Hub
from tests.pushing import Push, mean_of, saved, state


@pytest.fixture
def mean(make_model: MakeModel) -> merge.Checkpoint:
    return mean_of(make_model)


def test_what_is_published_is_what_is_saved(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    done = push(mean)
    local = saved(mean, tmp_path / "local")
    assert len(done.outcome.sent) == len([n for n in local if n.endswith(".safetensors")]) > 3
    assert hub.files("me/merged") == local
    assert done.url == f"{hub.url}/me/merged"
    assert len(hub.repos["me/merged"].commits) == 2  # the first, empty one, and ours
    assert not hub.leaks


def test_a_finished_folder_is_published(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    local = saved(mean, tmp_path / "local")
    (tmp_path / "local" / ".cache").mkdir()
    (tmp_path / "local" / ".cache" / "x").write_text("not ours")
    first = push(tmp_path / "local")
    assert hub.files("me/merged") == local
    again = push(tmp_path / "local")
    assert not again.outcome.made and not again.outcome.sent
    assert again.outcome.commit == first.outcome.commit == hub.repos["me/merged"].head.sha
    hub.forget()
    push(tmp_path / "local", repo="me/other")
    assert hub.files("me/other") == local
    assert not hub.seen("PUT /upload")  # the bytes were there, of the other repo


def test_a_damaged_folder_is_not_published(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    saved(mean, tmp_path / "local")
    file = next((tmp_path / "local").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(SourceError, match="not what was written") as caught:
        push(tmp_path / "local")
    assert "differs from what was written" in str(caught.value)
    assert "me/merged" not in hub.repos


def models_seen(hub: Hub, repo: str = "me/merged", ref: str = "refs/heads/main") -> list[set[str]]:
    """What a reader of the branch could find, commit by commit, the newest first."""
    held = hub.repos[repo]
    at, found = held.commits[held.refs[ref]], []
    while True:
        found.append(set(at.files))
        if at.parent is None:
            return found
        at = held.commits[at.parent]


def test_many_files_come_in_rounds_that_load_nowhere(
    hub: Hub, push: Push, make_model: MakeModel, tmp_path: Path
) -> None:
    many = mean_of(make_model, tensors=104)
    push(many)
    local = saved(many, tmp_path / "local")
    assert hub.files("me/merged") == local
    seen = models_seen(hub)
    assert [len(s) for s in seen] == [len(local), 104, 100, 50, 0]
    assert not any({"config.json", "model.safetensors.index.json"} & s for s in seen[1:])


def test_a_model_is_replaced_at_one_blow(
    hub: Hub, push: Push, make_model: MakeModel, tmp_path: Path
) -> None:
    old = {
        "config.json": b"{}",
        "pytorch_model.bin": b"old",
        "model-00001-of-00055.safetensors": b"old too",
        "notes.txt": b"not ours",
    }
    hub.commit("me/merged", old)
    many = mean_of(make_model, tensors=55)
    done = push(many)
    assert done.outcome.removed == ("pytorch_model.bin",)
    wanted = saved(many, tmp_path / "local")
    assert hub.files("me/merged") == {**wanted, "notes.txt": b"not ours"}
    assert models_seen(hub)[1] == set(old)
    assert [r for r in hub.repos["me/merged"].refs if r != "refs/heads/main"] == []
    again = push(many)
    assert not again.outcome.made
    assert len(models_seen(hub)) == 3
    assert not [r for r in hub.repos["me/merged"].refs if r != "refs/heads/main"]


def test_a_branch_is_made(hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path) -> None:
    hub.commit("me/merged", {"config.json": b"{}", "model.safetensors": b"old"})
    done = push(mean, branch="v2")
    assert done.url.endswith("/me/merged/tree/v2")
    assert hub.files("me/merged", "v2") == saved(mean, tmp_path / "local")
    assert set(hub.files("me/merged")) == {"config.json", "model.safetensors"}


def test_a_pull_request_changes_no_branch(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    hub.commit("org/model", {"config.json": b"{}", "pytorch_model.bin": b"old"})
    before = hub.repos["org/model"].head.sha
    done = push(mean, repo="org/model", create_pr=True, message="Better weights")
    assert done.url.endswith("/org/model/discussions/1")
    repo = hub.repos["org/model"]
    assert repo.head.sha == before
    assert repo.pulls[1]["status"] == "open" and repo.pulls[1]["title"] == "Better weights"
    assert hub.files("org/model", "refs/pr/1") == saved(mean, tmp_path / "local")
    again = push(mean, repo="org/model", create_pr=True)
    assert not again.outcome.made and list(repo.pulls) == [1]


def test_a_pull_request_of_many_files(hub: Hub, push: Push, make_model: MakeModel) -> None:
    hub.commit("org/model", {"config.json": b"{}", "pytorch_model.bin": b"old"})
    push(mean_of(make_model, tensors=55), repo="org/model", create_pr=True)
    seen = models_seen(hub, "org/model", "refs/pr/1")
    assert [len(s) for s in seen[1:4]] == [57, 52, 2]
    assert "pytorch_model.bin" not in seen[0] and "config.json" in seen[0]


def test_weights_that_the_server_wants_in_the_commit(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    """In a repo whose .gitattributes says nothing, files below 10 MB are not large files."""
    hub.attributes = False
    push(mean)
    assert hub.files("me/merged") == saved(mean, tmp_path / "local")
    assert not hub.seen("PUT /upload")


def test_a_file_that_the_repo_ignores_is_missed(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    """The client leaves out what a .gitignore names, and says nothing."""
    folder = tmp_path / "local"
    saved(mean, folder)
    hub.ignored = {"config.json"}
    with pytest.raises(SinkError, match="does not hold what was sent") as caught:
        push(folder)
    assert caught.value.where == {"repo": "me/merged", "file": "config.json"}
    assert ".gitignore" in str(caught.value)


def test_a_state_dict_is_published(hub: Hub, push: Push) -> None:
    push(merge.open(state(3)))
    assert "model.safetensors.index.json" in hub.files("me/merged")


def test_without_anonymous_memory_a_temporary_file_does(
    hub: Hub,
    push: Push,
    mean: merge.Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("os.memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert not held_in_memory()
    push(mean)
    assert hub.files("me/merged") == saved(mean, tmp_path / "local")
    assert not list((tmp_path / "temporary").iterdir())


# -- who may, and what is said before any work ----------------------------------------------------


def test_a_repo_has_an_owner(push: Push, mean: merge.Checkpoint) -> None:
    for name in ("merged", "a/b/c", "../x", "me/", "me/.."):
        with pytest.raises(RecipeError, match="named with its owner"):
            push(mean, repo=name)
    with pytest.raises(RecipeError, match="against the main branch"):
        push(mean, branch="x", create_pr=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"repo": "other/model"}, "may not make repos of other"),
        ({"repo": "them/there"}, "right to write"),
        ({"token": "hf_AnotherTokenThatIsNotKnown"}, "status 401"),
        ({"create_pr": True}, "no such repo to propose"),
    ],
)
def test_who_may_not_write_is_told_before_any_work(
    hub: Hub, push: Push, mean: merge.Checkpoint, how: dict[str, object], message: str
) -> None:
    hub.create("them/there")
    with pytest.raises(SinkError, match=message) as caught:
        push(mean, **how)
    assert caught.value.where["repo"] == how.get("repo", "me/merged")
    assert "token" in str(caught.value) or "create-pr" in str(caught.value)
    assert not hub.seen("preupload|repos/create|PUT")


def test_reading_is_enough_for_a_pull_request(hub: Hub, push: Push, mean: merge.Checkpoint) -> None:
    hub.create("org/model")
    hub.read_only = True
    with pytest.raises(SinkError, match="right to write") as caught:
        push(mean, repo="org/model")
    assert "--create-pr" in str(caught.value)


def test_no_token_at_all(hub: Hub, mean: merge.Checkpoint) -> None:
    with pytest.raises(SinkError, match="needs a token"):
        publishing.open_target(publishing.Target("me/x", endpoint=hub.url))
    assert not hub.requests


def test_a_card_that_the_hub_refuses_costs_no_work(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    saved(mean, tmp_path / "local")
    card = tmp_path / "local" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: not-a-licence\n", 1))
    with pytest.raises(SinkError, match="does not take the model card") as caught:
        push(tmp_path / "local")
    assert "license" in str(caught.value.found)
    assert "me/merged" not in hub.repos


def test_a_server_without_xet_says_how_to_do_without(
    hub: Hub, push: Push, mean: merge.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(SinkError, match="no xet storage") as caught:
        push(mean)
    assert "HF_HUB_DISABLE_XET=1" in str(caught.value.do)
    assert not hub.seen("preupload")


def test_the_route_of_xet(
    hub: Hub,
    push: Push,
    mean: merge.Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bytes go past this server into a store of their own; digests tell that they are right.

    The server's question for large files knows nothing of that store, so after a failure all is
    sent again, of which the store has everything already.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.xet = f"local://{tmp_path}/store"
    hub.fault("POST .*/commit/", status=413)
    with pytest.raises(SinkError, match="commit failed"):
        push(mean)
    stored = sum(p.stat().st_size for p in (tmp_path / "store").rglob("*") if p.is_file())
    done = push(mean)
    again = sum(p.stat().st_size for p in (tmp_path / "store").rglob("*") if p.is_file())
    assert done.outcome.made and again < 1.1 * stored
    local = saved(mean, tmp_path / "local")
    found = hub.repos["me/merged"].head.files
    assert set(found) == set(local)
    for name in done.outcome.sent:
        assert found[name].sha256 == hashlib.sha256(local[name]).hexdigest()
    assert not hub.seen("PUT")


def test_a_weight_file_must_fit_the_memory(mean: merge.Checkpoint) -> None:
    plan = run.plan(mean, PlanOptions(memory="8MiB", in_memory=True))
    assert plan.held_file == plan.files[0].size
    assert "of one weight file at a time" in str(plan)
    with pytest.raises(PlanError, match="too small") as caught:
        run.plan(mean, PlanOptions(memory=plan.held_file + 1000, in_memory=True))
    assert "--shard-size" in str(caught.value.do)
    assert run.plan(mean).held_file == 0


# -- for whose eyes -------------------------------------------------------------------------------


@pytest.fixture
def gated(make_model: MakeModel) -> merge.Checkpoint:
    folder = make_model("gated", state(0))
    (folder / "README.md").write_text("---\nextra_gated_prompt: You agree\nlicense: mit\n---\n")
    return merge.average([folder, make_model("open", state(1))])


def test_a_repo_is_private_where_an_input_is_not_for_everyone(
    hub: Hub, push: Push, gated: merge.Checkpoint, mean: merge.Checkpoint
) -> None:
    said: list[str] = []
    done = push(gated, notice=said.append)
    assert done.private and hub.repos["me/merged"].private
    assert any("made private" in text and "gated" in text for text in said)
    assert not push(mean, repo="me/other").private
    assert not hub.repos["me/other"].private
    assert push(gated, repo="me/third", private=False).private is False
    assert not hub.repos["me/third"].private
    push(mean, repo="me/fourth", private=True)
    assert hub.repos["me/fourth"].private


def test_nothing_gated_goes_into_a_public_repo_unless_that_is_said(
    hub: Hub, push: Push, gated: merge.Checkpoint, mean: merge.Checkpoint
) -> None:
    hub.create("me/merged")
    with pytest.raises(OutputRefused, match="not everyone may read") as caught:
        push(gated)
    assert "--no-private" in str(caught.value.do) and "gated" in str(caught.value.found)
    push(gated, private=False)
    with pytest.raises(OutputRefused, match="public already"):
        push(mean, private=True)
    hub.create("me/hidden", private=True)
    push(gated, repo="me/hidden")


def test_inputs_are_known_by_the_card_too(
    hub: Hub, push: Push, mean: merge.Checkpoint, tmp_path: Path
) -> None:
    hub.create("org/secret", private=True)
    hub.create("org/open")
    saved(mean, tmp_path / "local")
    card = tmp_path / "local" / "README.md"
    names = "base_model:\n- org/secret\n- org/open\n- org/gone\n"
    card.write_text(card.read_text().replace("---\n", f"---\n{names}", 1))
    said: list[str] = []
    assert push(tmp_path / "local", notice=said.append).private
    assert [t for t in said if "org/secret" in t and "org/open" not in t]


def test_the_library_publishes(
    hub: Hub, mean: merge.Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert mean.push_to_hub("me/straight") == f"{hub.url}/me/straight"
    folder = mean.save(tmp_path / "local")
    assert merge.push(folder, "me/folder") == f"{hub.url}/me/folder"
    assert hub.files("me/straight") == hub.files("me/folder")
    assert "model.safetensors" in hub.files("me/folder")


def test_the_command(
    hub: Hub,
    mean: merge.Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = mean.save(tmp_path / "local")

    def ran(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["merge", "push", str(folder), *words, "--token", TOKEN])
        with pytest.raises(SystemExit) as end:
            app.main()
        return (int(end.value.code or 0), *capsys.readouterr())

    assert ran("me/merged") == (
        0,
        f"{hub.url}/me/merged\n",
        f"sending model.safetensors ({human_bytes((folder / 'model.safetensors').stat().st_size)})"
        f"\n1 weight file sent, commit {hub.repos['me/merged'].head.sha[:12]} checked\n",
    )
    code, out, said = ran("me/merged", "--json", "-q")
    assert code == 0 and said == "" and json.loads(out)["already_complete"]
    code, out, said = ran("them/merged", "--json")
    assert code == 4 and json.loads(out)["where"] == {"repo": "them/merged"}
    code, out, said = ran("me/merged", "--branch", "x", "--create-pr")
    assert code == 2 and out == "" and "leave one of them out" in said


def test_from_the_hub_to_the_hub(
    hub: Hub, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte of the inputs comes once and none lies on the disk; the result is a folder's."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    size = 0
    for seed, name in enumerate(("one", "two")):
        folder = make_model(name, state(seed, tensors=40))
        size += sum(s.nbytes for s in merge.open(folder).values())
        hub.upload(f"org/{name}", folder)
    hub.repos["org/two"].private = True
    recipe = tmp_path / "mean.yml"
    models = "".join(f"  - {{model: org/{n}, parameters: {{weight: 1}}}}\n" for n in ("one", "two"))
    recipe.write_text(f"merge_method: linear\nmodels:\n{models}")
    repo = publishing.open_target(publishing.Target("me/merged", token=TOKEN, endpoint=hub.url))
    planned = applying.plan_recipe(recipe, shard_size=8000, in_memory=True)
    hub.forget()
    done = publishing.push_planned(planned, repo)
    assert len(done.outcome.sent) > 10 and done.private
    assert hub.sent("GET /blob/") <= 1.02 * size + 2 * 20_000  # and two headers
    kept = [p for p in (tmp_path / "hf-home").rglob("*") if p.is_file() and not p.is_symlink()]
    assert not [p for p in kept if p.stat().st_size > 100_000]
    out = applying.apply_plan(applying.plan_recipe(recipe, shard_size=8000), tmp_path / "out").path
    assert hub.files("me/merged") == {p.name: p.read_bytes() for p in out.iterdir()}
    assert not hub.leaks
