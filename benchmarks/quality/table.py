"""The table of all lines and seeds, as Markdown, and their figures as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from benchmarks.quality.fixture import Fixture
from benchmarks.quality.measure import DRAWS, difference, figures
from benchmarks.quality.rows import Made, Row
from benchmarks.quality.sources import versions
from benchmarks.report import save, table

REFERENCE = "tsv_tuned"
"""The line that others are compared with, on the same texts."""

HEAD = ("merge", "needs", "runs", "mean", "95 %", "of experts", "95 %", "each run", "worst task",
        "minus TSV-M", "95 %")  # fmt: skip

Lines = Mapping[str, Made]


def write(rows: Sequence[Row], every: Sequence[tuple[Fixture, Lines]]) -> str:
    """Write the results of all seeds; returns the text."""
    parts, data = [], []
    for made, lines in every:
        text, facts = one_seed(rows, made, lines)
        parts.append(text)
        data.append(facts)
    text = "\n\n".join([*parts, NOTES])
    title = "What merges are worth"
    save("quality", title, text, {"seeds": data, "sources": versions()})
    return text


def one_seed(rows: Sequence[Row], made: Fixture, lines: Lines) -> tuple[str, dict[str, object]]:
    """The table of one seed and its figures."""
    if "individual" not in lines:
        return f"## Seed {made.seed}\n\nThe experts are not measured yet.", {"seed": made.seed}
    experts = lines["individual"].runs[0]
    cells, facts = [], []
    for row in rows:
        if row.key not in lines:
            continue
        runs = lines[row.key].runs
        found = figures(runs, experts)
        each = [figures([run], experts).normalised for run in runs]
        line = [row.title, row.data, str(len(runs)),
                f"{found.mean:.1f}", f"{found.low:.1f} to {found.high:.1f}",
                f"{found.normalised:.1f}",
                f"{found.normalised_low:.1f} to {found.normalised_high:.1f}",
                ", ".join(f"{value:.1f}" for value in each) if len(each) > 1 else "",
                f"{found.worst:.0f} ({found.worst_task})"]  # fmt: skip
        if REFERENCE in lines:
            points, low, high = difference(runs, lines[REFERENCE].runs)
            line += [f"{points:+.1f}", f"{low:+.1f} to {high:+.1f}"]
        else:
            line += ["", ""]
        cells.append(line)
        per_task = {n: 100 * float(np.mean([np.mean(r[n]) for r in runs])) for n in experts}
        facts.append({
            "row": row.key, "title": row.title, "needs": row.data, **asdict(found),
            "tasks": per_task, "runs": len(runs), "each": each, "settings": lines[row.key].settings,
        })  # fmt: skip
    sizes = ", ".join(
        f"{t.name} {len(t.labels)} classes, {len(t.train)} + {len(t.valid)} + {len(t.adapt)} + "
        f"{len(t.test)} texts" for t in made.tasks
    )  # fmt: skip
    text = f"## Seed {made.seed}\n\n{table(HEAD, cells)}\n\n"
    text += f"Training, validation, unlabelled and test texts: {sizes}."
    return text, {"seed": made.seed, "rows": facts}


NOTES = f"""\
## How to read it

The base is all-MiniLM-L6-v2 (22 M parameters: mean pooling, unit norm, 24 tokens). Each expert is
the base after 100 steps of 16 texts on one task; heads are prototypes of five texts under the base
and never trained. Accuracies are per cent of test texts, averaged over tasks; "of experts" is each
task's accuracy in parts of its expert's, averaged, "worst task" the least of them. Intervals come
of {DRAWS} resamples of the test texts within tasks, the same texts for both sides of a comparison.

"needs" says what a merge saw besides weights: about 90 labelled validation texts a task, by which
one scale is chosen; about 210 unlabelled texts a task (inputs), with validation texts for the
choice among candidates; 64 labelled texts a task (labels), likewise; "more inputs" adds the
unlabelled texts of training, about 900 a task in all. Test texts are never seen.
Random and learned merges are the mean of several runs; a seed draws the numbers of the former, the
order of the latter's texts. "each run" is of the experts, too.

A scale chosen on 700 texts is itself uncertain by about two points, so a tuned merge may do worse
on test texts than one at its usual scale. Merges that learn single numbers take 60 steps at a rate
of 0.01 in place of the published 500 or more at 0.001. A merge whose row is not there was not made
in the run that wrote this table."""
