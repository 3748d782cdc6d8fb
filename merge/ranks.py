"""One plan on many machines: each rank computes its files, then one of them finishes the output.

Nothing here schedules: ranks are processes that somebody else starts, as torchrun, SLURM,
Kubernetes and job arrays do, on machines that see the inputs and the folder of the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge.applying import Planned
from merge.errors import PlanError, RecipeError
from merge.plan.share import Rank, deal_plan
from merge.run import Saved, WriteOptions, check_target, save_plan
from merge.verify import holds_files, holds_plan
from merge.write.shares import Gathered, gather, share_folder, sweep_shares
from merge.write.target import check_unused

if TYPE_CHECKING:
    from merge.plan.model import Plan

__all__ = ["Rank", "apply_share", "compute_share", "deal_plan", "finish", "rank_of"]

_TOLD = (
    ("RANK", "WORLD_SIZE"),  # torchrun and others
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    # SLURM_NTASKS is there in a batch script too, which runs once, as SLURM_PROCID 0
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),  # Kubernetes gives the first, the manifest both
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),
)
_ARRAYS = (  # index, first, last, step
    (
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_MAX",
        "SLURM_ARRAY_TASK_STEP",
    ),
    ("SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE"),
    ("LSB_JOBINDEX", "", "LSB_JOBINDEX_END", "LSB_JOBINDEX_STEP"),
)


def rank_of(
    environment: Mapping[str, str], rank: int | None = None, world: int | None = None
) -> Rank | None:
    """Which rank of how many this process is; None where it works alone.

    rank, world: as given by hand, which go before what the environment says. There, pairs of
    variables count of which both are set: those of torchrun, MPI, SLURM steps, Kubernetes indexed
    jobs (with JOB_COMPLETIONS set by hand), SkyPilot, AWS Batch, Cloud Run; then the job arrays of
    SLURM, SGE and LSF.
    """
    if rank is not None and world is not None:
        found = Rank(rank, world, "--rank, --world")
    elif rank is None and world is None:
        said = _pairs(environment) or _array(environment)
        if said is None:
            return None
        found = said
    elif world == 1:
        return None
    else:
        said = _pairs(environment) or _array(environment)
        given = "--rank" if world is None else "--world"
        if said is None:
            raise RecipeError(
                f"{given} alone does not say which part of the work is meant",
                expected="both --rank and --world",
            )
        pair = (said.rank if rank is None else rank, said.world if world is None else world)
        found = Rank(*pair, f"{given}, {said.told_by}")
    return None if found.world == 1 else found


def _pairs(environment: Mapping[str, str]) -> Rank | None:
    for names in _TOLD:
        values = [environment.get(n, "") for n in names]
        if all(v.isdecimal() for v in values):
            return Rank(int(values[0]), int(values[1]), ", ".join(names))
    return None


def _array(environment: Mapping[str, str]) -> Rank | None:
    for index, first, last, step in _ARRAYS:
        at, end = environment.get(index, ""), environment.get(last, "")
        if at.isdecimal() and end.isdecimal() and int(end) > 0:
            begin = int(environment.get(first, "") or 1)
            by = int(environment.get(step, "") or 1)
            told = ", ".join(n for n in (index, first, last) if n)
            return Rank((int(at) - begin) // by, (int(end) - begin) // by + 1, told)
    return None


def apply_share(
    planned: Planned,
    out: Path,
    rank: Rank,
    how: WriteOptions = WriteOptions(),
) -> Saved:
    """Compute what ``rank`` is dealt of a recipe, beside ``out``, for `finish` to gather.

    The same command resumes. An output of the very same plan that is complete is left as it is.
    """
    if planned.extract is not None:
        raise PlanError(
            "the factors of an adapter are computed on one machine",
            do="leave out --rank and --world, and set --world 1 where the environment has them",
        )
    return [compute_share(plan, folder, rank, how) for folder, plan in planned.targets(out)][-1]


def compute_share(
    plan: Plan,
    out: Path,
    rank: Rank,
    how: WriteOptions = WriteOptions(),
) -> Saved:
    """Compute what ``rank`` is dealt of ``plan``, beside ``out``."""
    if not how.replace and not how.fresh and holds_plan(out, plan.hash):
        return Saved(out, plan, None)
    check_target(plan, out)
    check_unused(out, replace=how.replace)
    share = deal_plan(plan, rank)
    place = share_folder(out, plan.hash, rank)
    sweep_shares(out, plan.hash, rank)
    if not how.fresh and holds_files(place, share.hash):
        return Saved(place, share, None)
    ours = replace(how, replace=True)  # what is there is ours: the folder's name says so
    return save_plan(share, place, ours)


def finish(out: str | Path, *, replace: bool = False) -> Gathered:
    """Gather what the ranks computed into the folder ``out``, which appears whole or not at all.

    Needs neither the recipe nor the inputs. SourceError names the files that no rank has written
    yet, and the ranks that were to. replace: allows an ``out`` that is not empty.
    """
    return gather(Path(out), replace=replace)
