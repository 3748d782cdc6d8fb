"""A recipe run on a Ray cluster: a task for each weight file, wherever there is room.

A task plans the recipe anew (from headers), computes its file as `merge.ranks` does and leaves it
beside the output; the driver gathers them. So inputs and output lie where all nodes see them, the
bytes are those of a single machine, and a task whose worker dies is given to another, which takes
it up where it stopped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from merge import ranks, run
from merge.applying import Planned, plan_recipe
from merge.errors import MergeError, PlanError, RecipeError
from merge.plan.model import Plan
from merge.plan.share import Rank, deal_plan
from merge.run import WriteOptions
from merge.write.shares import Gathered
from merge.write.target import check_unused

__all__ = ["apply_on_ray"]

_TRIES = 5  # after the first, for a task whose worker or node died


def apply_on_ray(
    recipe: Path,
    planned: Planned,
    out: Path,
    options: Mapping[str, Any],
    *,
    address: str | None = None,
    how: WriteOptions = WriteOptions(),
) -> Gathered:
    """Run ``recipe``, as ``planned``, into ``out`` on a Ray cluster; the same command resumes.

    options: the keywords with which `plan_recipe` planned it; ``threads`` is also how many cores a
    task asks for, 1 by default. address: of a cluster, ``auto`` for the one that runs
    here; by default that of RAY_ADDRESS, or else a cluster of this machine's cores for the time of
    the run. how: progress is told the bytes of each file that is done. PlanError for a plan that
    other machines cannot make the same.
    """
    try:
        import ray
    except ImportError:
        raise RecipeError(
            "the engine 'ray' is not installed", do="pip install 'hf-merge[ray]'"
        ) from None
    options = {**options, "threads": options.get("threads") or 1}
    if planned.extract is not None:
        raise PlanError(
            "the factors of an adapter are computed on one machine", do="--engine local"
        )
    place = str(Path.cwd())
    work = []
    for number, (folder, plan) in enumerate(planned.targets(out)):
        run.check_target(plan, folder)
        check_unused(folder, replace=how.replace)
        for rank in _ranks(plan):
            size = deal_plan(plan, rank).write_bytes
            work.append((number, str(folder), rank, plan.hash, size))
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    try:
        task = ray.remote(_share).options(num_cpus=options["threads"], max_retries=_TRIES)
        key = (str(recipe), tuple(sorted(options.items())), place)
        there = replace(how, progress=None)
        waiting = {
            task.remote(*key, number, folder, rank, plan, there): size
            for number, folder, rank, plan, size in work
        }
        while waiting:
            done, _ = ray.wait(list(waiting))
            for reference in done:
                failed = _result(ray, reference)
                if failed is not None:
                    raise failed
                size = waiting.pop(reference)
                if how.progress is not None:
                    how.progress(size)
    finally:
        if ours:
            ray.shutdown()
    return [ranks.finish(f, replace=how.replace) for f, _ in planned.targets(out)][-1]


def _ranks(plan: Plan) -> list[Rank]:
    """One for each weight file."""
    world = max(1, len(plan.files))
    return [Rank(r, world, "--engine ray") for r in range(world)]


def _connect(ray: Any, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    where = address or os.environ.get("RAY_ADDRESS")
    try:
        if where:
            ray.init(address=where, log_to_driver=False, logging_level="error")
        else:
            ray.init(address="local", _node_ip_address="127.0.0.1", logging_level="error", **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlanError(
            "the Ray cluster cannot be reached",
            found=error,
            expected=where or "a cluster on this machine",
            do="start one with `ray start --head`, or give its address: --ray-address",
        ) from None


def _result(ray: Any, reference: Any) -> MergeError | None:
    try:
        found: MergeError | None = ray.get(reference)
    except ray.exceptions.RayError as error:
        return PlanError(
            "a task failed on the cluster",
            found=str(error).strip().splitlines()[-1],
            do="nothing is lost: mend the cause and run the same command again, it will resume",
        )
    return found


def _share(
    recipe: str,
    options: tuple[tuple[str, Any], ...],
    place: str,
    number: int,
    folder: str,
    rank: Rank,
    plan: str,
    how: WriteOptions,
) -> MergeError | None:
    """In a worker: compute one file; an error of ours is returned, as Ray would wrap it."""
    os.chdir(place)
    try:
        planned = _planned(recipe, options, place)
        mine = planned.targets(Path(folder))[number][1]
        if mine.hash != plan:
            raise PlanError(
                "a machine of the cluster does not see the same inputs",
                found=f"plan {mine.hash[:16]}",
                expected=f"plan {plan[:16]}",
                do="put recipe and models where all machines see the same files, times included",
            )
        ranks.compute_share(mine, Path(folder), rank, how)
    except MergeError as error:
        return error
    return None


@lru_cache(maxsize=1)
def _planned(recipe: str, options: tuple[tuple[str, Any], ...], _place: str) -> Planned:
    """Planned once for all files that a worker computes."""
    return plan_recipe(recipe, **dict(options))
