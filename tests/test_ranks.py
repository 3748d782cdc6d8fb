"""One plan on several machines: the shares cover it, and the bytes are those of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import merge
from merge import applying, ranks, run
from merge.plan.model import OutputFile
from merge.plan.share import Rank, deal, deal_plan
from merge.run import WriteOptions
from merge.write.shares import share_folder

from .faults.conftest import files_of

MakeModel = Callable[..., Path]


def cli(*words: object) -> tuple[int, str, str]:
    """A command in this process: its exit code, and what it printed to stdout and stderr."""
    from click.testing import CliRunner
    from merge_cli.app import cli as group

    done = CliRunner().invoke(group, [str(w) for w in words])
    error = done.exception
    if isinstance(error, merge.MergeError):
        return error.exit_code, done.stdout, f"{done.stderr}{error}"
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def recipe(make_model: MakeModel, tmp_path: Path) -> Path:
    """An average of two models whose output has six weight files of unequal size."""
    draw = torch.Generator().manual_seed(3)
    for name in ("a", "b"):
        tensors = {
            f"model.layers.{i}.w": torch.randn(40 + 30 * i, 50, generator=draw) for i in range(7)
        }
        make_model(name, tensors)
    text = f"merge_method: linear\nmodels:\n  - model: {tmp_path}/a\n  - model: {tmp_path}/b\n"
    (tmp_path / "average.yml").write_text(text + "parameters: {weight: 1}\n")
    return tmp_path / "average.yml"


def planned(recipe: Path) -> applying.Planned:
    return applying.plan_recipe(recipe, shard_size="40kB")


# -- dealing ---------------------------------------------------------------------------------------
sizes = st.lists(st.integers(0, 10**6), max_size=30)


@given(sizes, st.integers(1, 12))
def test_every_file_is_dealt_to_one_rank_and_no_rank_gets_far_more_than_its_part(
    sizes: list[int], world: int
) -> None:
    files = [OutputFile(f"f{i}", b"", size, 1) for i, size in enumerate(sizes)]
    parts = deal(files, world)
    assert len(parts) == world
    assert sorted(f.name for part in parts for f in part) == sorted(f.name for f in files)
    loads = [sum(f.size for f in part) for part in parts]
    assert max(loads) <= sum(sizes) / world + max(sizes, default=0)
    assert parts == deal(files, world)


def test_the_largest_files_go_first_to_whoever_has_least() -> None:
    files = [OutputFile(n, b"", size, 1) for n, size in (("a", 3), ("b", 9), ("c", 4), ("d", 5))]
    # 9 | 5, then 4 joins 5 (9 | 9), then 3 joins the first
    assert [[f.name for f in part] for part in deal(files, 2)] == [["a", "b"], ["c", "d"]]


# -- the bytes -------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [2, 5, 7])
def test_ranks_give_the_bytes_of_one_machine(recipe: Path, tmp_path: Path, world: int) -> None:
    made = planned(recipe)
    assert len(made.plan.files) == 6
    applying.apply_plan(made, tmp_path / "one")
    out = tmp_path / "many"
    for rank in reversed(range(world)):
        assert not out.exists()
        ranks.apply_share(planned(recipe), out, Rank(rank, world))
    done = ranks.finish(out)
    assert (done.path, done.plan, done.ranks) == (out, made.plan.hash, world)
    assert files_of(out) == files_of(tmp_path / "one")
    assert [p.name for p in tmp_path.glob("many*")] == ["many"]
    assert merge.verify(out).ok


def test_a_missing_rank_is_named_with_its_files(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = planned(recipe)
    for rank in (0, 2):
        ranks.apply_share(made, out, Rank(rank, 3))
    with pytest.raises(merge.SourceError, match="not all ranks have finished") as caught:
        ranks.finish(out)
    missing = [f.name for f in deal(made.plan.files, 3)[1]]
    said = str(caught.value)
    assert missing and all(name in said for name in missing)
    assert "run rank 1 of 3" in said and "shares 0 of 3, 2 of 3" in said
    assert not out.exists()
    ranks.apply_share(made, out, Rank(1, 3))
    assert ranks.finish(out).ranks == 3


def test_files_of_another_world_count_too(recipe: Path, tmp_path: Path) -> None:
    """A file has the same bytes whoever computed it."""
    out, made = tmp_path / "out", planned(recipe)
    ranks.apply_share(made, out, Rank(0, 2))
    with pytest.raises(merge.SourceError, match="rank 1 of 2"):
        ranks.finish(out)
    for rank in range(5):
        ranks.apply_share(made, out, Rank(rank, 5))
    applying.apply_plan(made, tmp_path / "one")
    ranks.finish(out)
    assert files_of(out) == files_of(tmp_path / "one")


def test_shares_of_two_plans_are_refused(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ranks.apply_share(planned(recipe), out, Rank(0, 2))
    other = applying.plan_recipe(recipe, shard_size="40kB", settings=["parameters.weight=2"])
    ranks.apply_share(other, out, Rank(1, 2))
    with pytest.raises(merge.SourceError, match="did not compute the same plan"):
        ranks.finish(out)
    ranks.apply_share(other, out, Rank(0, 2))  # which replaces what that rank left
    assert ranks.finish(out).plan == other.plan.hash


def test_a_share_is_taken_up_and_a_finished_one_left_alone(recipe: Path, tmp_path: Path) -> None:
    out, made, rank = tmp_path / "out", planned(recipe), Rank(0, 2)
    first = ranks.apply_share(made, out, rank)
    assert first.report is not None and first.report.chunks > 0
    assert ranks.apply_share(made, out, rank).report is None
    again = ranks.apply_share(made, out, rank, WriteOptions(fresh=True))
    assert again.report is not None and again.report.resumed_chunks == 0


def test_a_share_that_was_cut_short_is_refused(recipe: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out", planned(recipe)
    for rank in range(2):
        ranks.apply_share(made, out, Rank(rank, 2))
    name = deal(made.plan.files, 2)[1][0].name
    place = share_folder(out, made.plan.hash, Rank(1, 2)) / name
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(merge.SourceError, match="not what its ledger says") as caught:
        ranks.finish(out)
    assert str(place) in str(caught.value)
    ranks.apply_share(made, out, Rank(1, 2))  # finds the damage and mends it
    ranks.finish(out)
    assert merge.verify(out).ok


def test_a_damaged_ledger_names_the_file(recipe: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out", planned(recipe)
    ranks.apply_share(made, out, Rank(0, 2))
    ledger = share_folder(out, made.plan.hash, Rank(0, 2)) / "merge_share.json"
    ledger.write_text(ledger.read_text().replace("model-", "../model-"))
    with pytest.raises(merge.SourceError, match="ledger is damaged") as caught:
        ranks.finish(out)
    assert str(ledger) in str(caught.value)


def test_kept_stages_are_shared_out_too(make_model: MakeModel, tmp_path: Path) -> None:
    for i, name in enumerate("abc"):
        values = [torch.full((50, 50), float(i + j)) for j in range(3)]
        make_model(name, {f"model.layers.{j}.w": value for j, value in enumerate(values)})
    text = (
        f"name: inner\nsave: {tmp_path}/inner\nmerge_method: linear\n"
        f"models: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\nparameters: {{weight: 1}}\n"
        f"---\nmerge_method: linear\nmodels: [{{model: inner}}, {{model: {tmp_path}/c}}]\n"
        "parameters: {weight: 1}\n"
    )
    (tmp_path / "r.yml").write_text(text)
    made = applying.plan_recipe(tmp_path / "r.yml", shard_size="20kB")
    for rank in range(2):
        ranks.apply_share(made, tmp_path / "out", Rank(rank, 2))
    for folder in ("inner", "out"):
        ranks.finish(tmp_path / folder)
        assert merge.verify(tmp_path / folder).ok


def test_weights_of_this_process_cannot_be_shared_out() -> None:
    checkpoint = merge.open({"w": torch.ones(4)})
    with pytest.raises(merge.PlanError, match="only this process has") as caught:
        deal_plan(run.plan(checkpoint), Rank(0, 2))
    assert caught.value.where["tensor"] == "w"


# -- who am I --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("environment", "rank", "world"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4"}, 1, 4),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, 2, 4),
        ({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "3"}, 0, 3),
        ({"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}, 1, 2),
        (
            {
                "SLURM_ARRAY_TASK_ID": "14",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_MAX": "16",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            2,
            4,
        ),
        ({"SGE_TASK_ID": "3", "SGE_TASK_FIRST": "1", "SGE_TASK_LAST": "3"}, 2, 3),
        ({"LSB_JOBINDEX": "1", "LSB_JOBINDEX_END": "6"}, 0, 6),
    ],
)
def test_the_environment_says_which_rank(
    environment: dict[str, str], rank: int, world: int
) -> None:
    found = ranks.rank_of(environment)
    assert found is not None
    assert (found.rank, found.world) == (rank, world)
    assert all(name in environment for name in found.told_by.split(", "))


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script, which runs once
        {"SGE_TASK_ID": "undefined", "SGE_TASK_LAST": "undefined"},
        {"LSB_JOBINDEX": "0", "LSB_JOBINDEX_END": "0"},
        {"RANK": "x", "WORLD_SIZE": "4"},
    ],
)
def test_elsewhere_a_process_works_alone(environment: dict[str, str]) -> None:
    assert ranks.rank_of(environment) is None


def test_what_is_given_by_hand_goes_before_the_environment() -> None:
    told = {"RANK": "1", "WORLD_SIZE": "4"}
    assert ranks.rank_of(told, 0, 3) == Rank(0, 3, "--rank, --world")
    assert ranks.rank_of(told, world=1) is None
    found = ranks.rank_of(told, rank=2)
    assert found is not None and (found.rank, found.world) == (2, 4)
    with pytest.raises(merge.RecipeError, match="--rank alone"):
        ranks.rank_of({}, rank=2)
    with pytest.raises(merge.PlanError, match="no such rank"):
        ranks.rank_of({}, 3, 3)


# -- the command -----------------------------------------------------------------------------------
def test_the_command_says_what_is_to_follow(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for rank in ("0", "1"):
        code, said, told = cli(
            "apply", recipe, out, "--shard-size", "40kB", "--rank", rank, "--world", "2"
        )
        assert code == 0, told
        assert f"this is rank {rank} of 2 (from --rank, --world)" in told
        assert f"when all 2 ranks are done: merge finish {out}" in told
        assert said.strip().endswith(f"-{rank}-of-2")
    code, said, _ = cli("finish", out, "--json")
    assert code == 0
    assert json.loads(said)["ranks"] == 2
    code, said, told = cli("finish", out)
    assert (code, said.strip()) == (0, str(out)) and "was there already" in told
    code, _, told = cli("finish", tmp_path / "nothing")
    assert code == 2 and "there is nothing to finish" in told
    code, _, told = cli("apply", recipe, out, "--rank", "0", "--world", "2", "--smoke")
    assert code == 2 and "a share of a model cannot be loaded" in told
