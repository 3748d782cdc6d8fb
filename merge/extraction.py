"""A model's difference to its base as a PEFT adapter: extracted, and written as its own folder."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge import run, stream
from merge.adapters.changes import Choice, Embeddings
from merge.adapters.decompose import Budget
from merge.adapters.extract import extract
from merge.adapters.products import difference_of, products_of
from merge.adapters.report import ExtractReport
from merge.adapters.tree import task_of, tree_of
from merge.adapters.written import written
from merge.checkpoint import open_checkpoint
from merge.errors import PlanError, RecipeError
from merge.ir.checkpoint import Checkpoint, short
from merge.ir.dtypes import parse_dtype
from merge.ir.expr import Expr
from merge.ir.side import Side
from merge.plan.model import OutputFile, Plan, SideOutput
from merge.run import PlanOptions

if TYPE_CHECKING:
    from torch import Tensor

    from merge.recipe.schema import RecipeModel

__all__ = ["CONFIG", "REPORT", "AdapterOutput", "Extraction", "extract_lora", "output_of"]

CONFIG = "adapter_config.json"
REPORT = "extract_report.json"
_STEM = "adapter_model"


@dataclass(frozen=True, slots=True)
class Extraction:
    """An adapter that is ready to be written.

    checkpoint: the adapter's tensors under PEFT's names; factors are in memory, what is stored
    whole is still to be computed. config: adapter_config.json. report: what is kept of each module.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    report: ExtractReport

    def save(self, out: str | Path, *, card: bool = True, replace: bool = False) -> Path:
        """Write the adapter as a folder that peft loads; whole or not at all. card: a README.md."""
        return self.checkpoint.save(out, card=card, replace=replace)


def extract_lora(
    model: object,
    base: object,
    *,
    rank: int | None = None,
    energy: float | None = None,
    embeddings: Embeddings | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Extraction:
    """The difference of a model to its base as a LoRA: W - B is B_r A_r of rank r, or nearly so.

    model, base: anything `merge.open` takes. rank: the most for a matrix. energy: the share, in (0,
    1], of the sum of squares over all matrices that is kept at least: the singular values of all
    are pooled and the largest kept. Without either, matrices are kept exactly. embeddings: ``full``
    stores changed embeddings whole, ``lora`` as factors, ``skip`` not at all; if not given, as
    factors where the difference is a sum of adapters, else whole. include, exclude: regular
    expressions over the names of modules. dtype: how the adapter is stored; factors in float32 if
    not given. progress: called with the bytes of each matrix that is done, as the model has it.

    Norms, and what else is no matrix, are stored whole (``modules_to_save``), biases beside the
    factors. What is left out stands in the report. Raises PlanError for what no adapter can hold.
    """
    if rank is not None and rank < 1:
        raise RecipeError("a rank is at least 1", key="rank", found=rank)
    if energy is not None and not 0.0 < energy <= 1.0:
        raise RecipeError(
            "an energy is a share of the whole", key="energy", found=energy, expected="in (0, 1]"
        )
    tuned, root = open_checkpoint(model), open_checkpoint(base)
    stored = None if dtype is None else parse_dtype(dtype)
    task = task_of(tuned.side.config)
    options = PlanOptions(memory, threads, device)

    def bare(exprs: Mapping[str, Expr]) -> Checkpoint:
        return Checkpoint(dict(exprs), f"{tuned.label} - {root.label}", mass=0.0)

    def evaluate(exprs: Mapping[str, Expr]) -> Iterator[tuple[str, Tensor]]:
        return stream.tensors(bare(exprs).cast("float32"), options)

    found = extract(
        tuned,
        root,
        evaluate=evaluate,
        measure=lambda exprs: stream.squares(bare(exprs), options),
        budget=Budget(rank, energy),
        choice=Choice(embeddings, _patterns(include, "include"), _patterns(exclude, "exclude")),
        task=task,
        dtype=None if stored is None else _torch_dtype(stored.name),
        progress=None if progress is None else lambda name: progress(tuned[name].nbytes),
    )
    if not found.low and not found.changes.whole and not found.changes.biases:
        raise _nothing(tuned, root)
    adapter = written(tuned, found, tree_of(tuned), base=root.label, task=task)
    texts = {CONFIG: adapter.config_text, REPORT: found.report.text}
    made = Checkpoint(
        {**_in_memory(adapter.factors), **adapter.stored},
        f"adapter of {short(tuned.label)} over {short(root.label)}",
        side=Side(texts=texts),
        out_dtype=stored,
        stems={"": _STEM},
        notes=found.report.notes,
        roots=tuple(dict.fromkeys((*tuned.roots, *root.roots))),
    )
    return Extraction(made, adapter.config, found.report)


@dataclass(frozen=True, slots=True)
class AdapterOutput:
    """The result of a recipe, to be written as an adapter over ``base``.

    settings: keywords of `extract_lora`.
    """

    model: Checkpoint
    base: Checkpoint
    settings: Mapping[str, Any]

    def plan(self, options: PlanOptions) -> Plan:
        """What will be read, from headers alone; sizes are those of the largest ranks there are."""
        exprs: dict[str, Expr] = {}
        size = 0
        for name, expr in self.model.tensors.items():
            if name in self.model.tied or expr.dtype.kind != "float":
                continue
            other = self.base.tensors.get(name)
            comparable = other is not None and other.shape == expr.shape
            found = difference_of(expr, other) if other is not None and comparable else expr
            if found is not None:
                exprs[name] = found
                size += _bytes(found, self.settings.get("rank"))
        label = f"adapter of {self.model.label} over {short(self.base.label)}"
        read = Checkpoint(exprs, label, mass=0.0, roots=self.model.roots)
        if not exprs:
            raise _nothing(self.model, self.base)
        made = run.plan(read, replace(options, card=False))
        note = (
            "an adapter is written, not a model: its factors are computed first, and the size is"
            " that of the largest ranks there may be"
        )
        file = OutputFile(f"{_STEM}.safetensors", b"", size, len(exprs))
        side = tuple(SideOutput(name) for name in (CONFIG, REPORT))
        return replace(made, files=(file,), side=side, notes=(note, *made.notes))

    def extracted(
        self, options: PlanOptions, progress: Callable[[int], None] | None = None
    ) -> Extraction:
        """The adapter. progress: as for `extract_lora`."""
        return extract_lora(
            self.model, self.base, **self.settings, memory=options.memory,
            threads=options.threads, device=options.device, progress=progress,
        )  # fmt: skip


def output_of(
    model: Checkpoint, base: Checkpoint, recipe: RecipeModel, dtype: str | None = None
) -> AdapterOutput:
    """The adapter that a recipe wants of its result. dtype: goes before the recipe's."""
    assert recipe.output is not None
    wanted = recipe.output.adapter
    stored = dtype or (None if model.out_dtype is None else model.out_dtype.name)
    return AdapterOutput(model, base, {**wanted.model_dump(), "dtype": stored})


def _bytes(expr: Expr, rank: int | None) -> int:
    """Bytes of float32 factors of a difference at most, or of the whole."""
    shape = expr.shape
    if len(shape) < 2:
        return 4 * math.prod(shape)
    products = products_of(expr)
    sides = shape[0], math.prod(shape[1:])
    most = min(*sides, *([] if rank is None else [rank]))
    if products is not None:
        most = min(most, sum(p.rank for _, p in products))
    return 4 * most * sum(sides)


def _nothing(model: Checkpoint, base: Checkpoint) -> PlanError:
    return PlanError(
        "the model is its base, so there is nothing to extract",
        model=model.label,
        against=base.label,
    )


def _in_memory(factors: Mapping[str, Tensor]) -> dict[str, Expr]:
    from merge.checkpoint.memory import open_state_dict

    return dict(open_state_dict(factors).tensors)


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _patterns(texts: Sequence[str], key: str) -> list[re.Pattern[str]]:
    found = []
    for text in texts:
        try:
            found.append(re.compile(text))
        except re.error as error:
            raise RecipeError(
                "not a regular expression", key=key, found=repr(text), expected=error
            ) from None
    return found
