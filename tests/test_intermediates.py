"""Results of one method under another: computed once where they fit, and the same bytes anyway."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import merge
from merge import methods
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Apply
from merge.ir.merging import merge_checkpoints
from merge.methods.core.schema import Method
from merge.plan.keep import nearest_applies

SIZE = 300_000  # more than a tile, of which 1.2 MB are held


def state(seed: int, *shape: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(shape or (SIZE,), generator=draw)}


BASE, A, B = merge.open(state(0)), merge.open(state(1)), merge.open(state(2))


def run(
    method: Method, models: list[Checkpoint], base: Checkpoint = BASE, **parameters: object
) -> Checkpoint:
    bound = method.bind(len(models), parameters)
    return merge_checkpoints(method, models, base, lambda _: bound)


def counted(method: Method) -> tuple[Method, list[int]]:
    """The method, and the elements that each of its calls was for."""
    calls: list[int] = []

    def function(operands: list[Tensor], **rest: Any) -> Tensor:
        out: Tensor = method.function(operands, **rest)
        calls.append(out.numel())
        return out

    return dataclasses.replace(method, function=function), calls


def two_stages(inner: Method) -> Checkpoint:
    """TIES, which measures, over the results of ``inner`` and a model."""
    experts = run(inner, [A, B], weight=0.5, density=0.5)
    return run(methods.get("ties"), [experts, A], weight=1.0, density=0.3)


def test_an_intermediate_that_fits_is_computed_once() -> None:
    inner, calls = counted(methods.get("dare_linear"))
    two_stages(inner).state_dict(threads=1)
    assert sum(calls) == SIZE


def test_one_that_does_not_fit_is_computed_on_every_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, calls = counted(methods.get("dare_linear"))
    lazy = two_stages(inner)
    kept = lazy.state_dict(threads=1)
    first = sum(calls)
    monkeypatch.setattr("merge.engine.evaluate.nearest_applies", lambda _node: [])
    again = lazy.state_dict(threads=1)
    assert sum(calls) - first > 2 * SIZE
    assert torch.equal(kept["w"], again["w"])


def test_the_plan_says_what_becomes_of_intermediates() -> None:
    big = merge.open({"w": torch.zeros(3_000_000)})
    inner = run(methods.get("dare_linear"), [big], big, weight=0.5, density=0.5)
    lazy = run(methods.get("ties"), [inner, big], big, weight=1.0, density=0.3)
    plan = lazy.plan(threads=1)
    [note] = [n for n in plan.notes if "earlier stage" in n]
    assert note.startswith(
        "1 tensors hold the result of an earlier stage in memory, up to 11.44 MiB"
    )
    assert plan.budget.keep == 12_000_000
    small = lazy.plan(threads=1, memory="64MiB")
    [note] = [n for n in small.notes if "earlier stage" in n]
    assert "3 times" in note and "--memory 91.55MiB would hold it" in note
    assert small.budget.keep == 0
    [note] = [n for n in lazy.plan(threads=1, memory="92MiB").notes if "earlier stage" in n]
    assert "in memory" in note


def test_a_merge_of_one_stage_says_nothing_about_it() -> None:
    lazy = run(methods.get("ties"), [A, B], weight=1.0, density=0.3)
    assert not [n for n in lazy.plan().notes if "earlier stage" in n]
    assert lazy.plan().steps[0].kept_bytes == 0


STACKS: dict[str, Callable[[], Checkpoint]] = {
    "ties of della": lambda: run(
        methods.get("ties"),
        [run(methods.get("della"), [A, B], weight=1.0, density=0.5), B],
        weight=1.0,
        density=0.5,
    ),
    "slerp of ties and dare": lambda: merge.slerp(
        [
            run(methods.get("ties"), [A, B], weight=1.0, density=0.5),
            run(methods.get("dare_ties"), [A, B], weight=1.0, density=0.5),
        ],
        t=0.3,
    ),
    "model_stock of sce of breadcrumbs": lambda: run(
        methods.get("model_stock"),
        [
            run(
                methods.get("sce"),
                [run(methods.get("breadcrumbs"), [A, B], weight=1.0, density=0.5), B],
                select_topk=0.4,
            ),
            A,
        ],
    ),
}


@pytest.mark.parametrize("stack", STACKS)
def test_bytes_do_not_depend_on_memory_or_threads(stack: str) -> None:
    lazy = STACKS[stack]()
    outs = []
    for memory, threads in (("4GiB", 1), ("64MiB", 2), ("4GiB", 4)):
        plan = lazy.plan(memory=memory, threads=threads)
        assert plan.budget.buffers <= plan.budget.memory
        outs.append(_computed(lazy, memory, threads))
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def _computed(lazy: Checkpoint, memory: str, threads: int) -> Tensor:
    from merge.engine.execute import execute
    from merge.write.memory import MemorySink

    plan = lazy.plan(memory=memory, threads=threads)
    sink = MemorySink(plan)
    execute(plan, sink)
    return sink.tensors["w"]


def test_methods_on_rows_and_matrices_nest_with_all_others() -> None:
    """A sample of a matrix, as selection takes it, must be whole rows there, or the whole."""
    base, a, b = (merge.open(state(s, 700, 600)) for s in (3, 4, 5))
    for inner in ("iso_c", "della", "tsv", "arcee_fusion"):
        weight = {"weight": 1.0, "density": 0.6} if inner == "della" else {}
        models = [b] if inner == "arcee_fusion" else [a, b]
        first = getattr(merge, inner)(models, base=base, **weight)
        for outer in ("ties", "breadcrumbs", "della", "sce", "wudi", "model_stock"):
            rest = (
                {} if outer in ("sce", "wudi", "model_stock") else {"weight": 1.0, "density": 0.5}
            )
            whole = getattr(merge, outer)([first, a], base=base, **rest).state_dict()["w"]
            written = merge.open({"w": first.state_dict()["w"]})
            apart = getattr(merge, outer)([written, a], base=base, **rest).state_dict()["w"]
            close = torch.isclose(whole, apart, atol=1e-4, rtol=1e-4)
            assert close.float().mean() > 0.999, (inner, outer)


def test_the_nearest_results_are_found_through_sums() -> None:
    root = two_stages(methods.get("dare_linear")).tensors["w"]
    outer = next(e for e in root.operands if isinstance(e, Apply))
    assert [n.method.name for n in nearest_applies(outer)] == ["dare_linear"]
