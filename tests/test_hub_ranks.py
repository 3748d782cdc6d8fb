"""One plan sent to the Hub by several ranks: nothing shows before the end, and then all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import merge
from merge import applying, publishing
from merge.plan.share import Rank
from merge.publishing import Target
from merge.publishing_shares import publish_shares, send_share
from tests.conftest import MakeModel
from tests.hub import TOKEN, Hub
from tests.pushing import SHARD, state


@pytest.fixture
def recipe(make_model: MakeModel, tmp_path: Path) -> Path:
    for seed in (0, 1):
        make_model(f"m{seed}", state(seed))
    models = ", ".join(f"{{model: {tmp_path}/m{s}}}" for s in (0, 1))
    text = f"merge_method: linear\nmodels: [{models}]\nparameters: {{weight: 1}}\n"
    (tmp_path / "r.yml").write_text(text)
    return tmp_path / "r.yml"


def planned(recipe: Path) -> applying.Planned:
    return applying.plan_recipe(recipe, shard_size=SHARD, in_memory=True)


def target(hub: Hub, **how: Any) -> Any:
    return publishing.open_target(Target("me/merged", token=TOKEN, endpoint=hub.url, **how))


def local(recipe: Path, out: Path) -> dict[str, bytes]:
    applying.apply_plan(applying.plan_recipe(recipe, shard_size=SHARD), out)
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_publish_what_one_machine_writes(
    hub: Hub, recipe: Path, tmp_path: Path, world: int
) -> None:
    out = tmp_path / "out"
    for rank in range(world):
        send_share(planned(recipe), out, Rank(rank, world), target(hub))
        assert set(hub.files("me/merged")) <= {".gitattributes"}
    done = publish_shares(out, target(hub))
    assert hub.files("me/merged") == local(recipe, tmp_path / "local")
    assert done.outcome.sent == () and len(done.outcome.kept) == 6
    assert [p.name for p in tmp_path.glob("out*")] == []
    assert not hub.leaks


def test_a_missing_rank_is_named_and_nothing_is_committed(
    hub: Hub, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    send_share(planned(recipe), out, Rank(0, 2), target(hub))
    with pytest.raises(merge.SourceError, match="not all ranks have finished") as caught:
        publish_shares(out, target(hub))
    assert "run rank 1 of 2" in str(caught.value)
    assert not any(n.endswith(".safetensors") for n in hub.files("me/merged"))
    send_share(planned(recipe), out, Rank(1, 2), target(hub))
    publish_shares(out, target(hub))
    assert "model.safetensors.index.json" in hub.files("me/merged")


def test_a_rank_that_runs_again_sends_nothing_twice(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    out, rank = tmp_path / "out", Rank(0, 2)
    first = send_share(planned(recipe), out, rank, target(hub))
    assert first.sent
    hub.forget()
    assert send_share(planned(recipe), out, rank, target(hub)).sent == ()
    assert not hub.seen("PUT /upload")


def test_other_inputs_on_one_machine_are_refused(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    send_share(planned(recipe), out, Rank(0, 2), target(hub))
    other = applying.plan_recipe(
        recipe, shard_size=SHARD, in_memory=True, settings=["models.0.parameters.weight=3"]
    )
    send_share(other, out, Rank(1, 2), target(hub))
    with pytest.raises(merge.SourceError, match="did not compute the same plan"):
        publish_shares(out, target(hub))


def test_an_adapter_is_published_by_one_machine(recipe: Path, tmp_path: Path, hub: Hub) -> None:
    from dataclasses import replace

    made = planned(recipe)
    with pytest.raises(merge.PlanError, match="published by one machine"):
        send_share(
            replace(made, stages=((tmp_path / "stage", made.plan),)),
            tmp_path / "out",
            Rank(0, 2),
            target(hub),
        )


def test_the_command(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from merge_cli.app import cli

    def ran(*words: object) -> Any:
        done = CliRunner().invoke(cli, [str(w) for w in words])
        assert done.exit_code == 0, (done.output, done.exception)
        return done

    out = tmp_path / "out"
    push = ("--push", "me/merged", "--token", TOKEN)
    for rank in (0, 1):
        words = ("apply", recipe, out, "--shard-size", SHARD, "--rank", rank, "--world", 2)
        said = ran(*words, *push).stderr
    assert f"merge finish {out} --push me/merged" in said
    done = ran("finish", out, *push)
    assert done.stdout.strip() == f"{hub.url}/me/merged"
    files = hub.files("me/merged")
    name = "model.safetensors.index.json"
    assert name in files and TOKEN not in done.output + said
