"""Derives the symmetry of every causal language model type in the installed transformers.

    python benchmarks/symmetry_scan.py [TYPE ...]

For each type a tiny twin is made from its default config, shrunk without looking at the type, and
traced. A random element of all groups that were found is then applied to weights in float64:

    exact     the outputs stay as they are
    frozen    the same, but less than half of the parameters is in any group
    wrong     the outputs changed, so the check took freedom away that the rules had left
    not run   the twin does not run with a shrunk config, or there is no default to start from

Nothing may be wrong. Writes ``results/symmetry-scan.md``; needs no network and takes minutes.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.symmetry.symmetry import Symmetry
from merge.tracing.derive import derive
from merge.tracing.shrink import shrunk
from merge.tracing.twins import main_outputs, make_twin, model_class, quiet

LIMIT = 60  # seconds for one type
MEMORY = 12 * 2**30  # bytes of address space; a twin that needs more is none

MISSING: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"layer_types": ["full_attention"] * 3, "num_hidden_layers": 3},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What default configs leave open; a config that a model was trained with has it."""

AFTER: Mapping[str, Mapping[str, Any]] = {
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "mamba2": {"n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""Settings of twins that the shrinking, which knows no types, gets wrong."""


@dataclass(frozen=True)
class Row:
    """What became of one type."""

    kind: str
    status: str
    groups: int = 0
    moved: float = 0.0
    deviation: float = 0.0
    seconds: float = 0.0
    said: str = ""


def scan(kind: str, name: str) -> Row:
    """One type: a twin, its symmetry, and what the check says."""
    started = time.perf_counter()
    try:
        found = model_class(name)
        with quiet():
            full = found.config_class(**MISSING.get(kind, {})).to_dict()
        twin = make_twin(found, {**shrunk(full), **AFTER.get(kind, {})})
        derived = derive(twin.module, twin.inputs, pick=main_outputs)
    except (Exception, MemoryError) as error:  # models do all sorts of things with such a config
        text = " ".join(str(error).split())[:110].replace("|", "/")
        return Row(kind, "not run", said=f"{type(error).__name__}: {text}")
    symmetry = derived.symmetry
    moved = share_moved(symmetry)
    wrong = any("the check failed" in note for note in symmetry.notes)
    return Row(
        kind,
        "wrong" if wrong else "exact" if moved >= 0.5 else "frozen",
        sum(bool(g.flags) for g in symmetry.groups.values()),
        moved,
        derived.deviation,
        time.perf_counter() - started,
        "; ".join(symmetry.notes)[:160],
    )


def share_moved(symmetry: Symmetry) -> float:
    """The share of the parameters that some group moves."""
    free = {n for n, g in symmetry.groups.items() if g.flags}
    sizes = {n: math.prod(t.shape) for n, t in symmetry.tensors.items()}
    moving = (n for n, t in symmetry.tensors.items() if free & set(t.groups()))
    return sum(sizes[n] for n in moving) / max(1, sum(sizes.values()))


def table(rows: Sequence[Row]) -> str:
    """The results as Markdown."""
    import torch
    import transformers

    counts = Counter(row.status for row in rows)
    shown = ", ".join(f"{counts[s]} {s}" for s in ("exact", "frozen", "wrong", "not run"))
    lines = [
        "# Symmetries of all causal language model types",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}: "
        f"{len(rows)} types, {shown}.",
        "",
        "`python benchmarks/symmetry_scan.py` makes this table and says what the columns mean.",
        "Groups are those of a twin of a few layers; the deviation is relative, in float64.",
        "",
        "| type | status | groups | moved | deviation | s | notes |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        figures = f"{row.groups} | {row.moved:.3f} | {row.deviation:.0e} | {row.seconds:.1f}"
        shown = figures if row.status != "not run" else "| | |"
        lines.append(f"| {row.kind} | {row.status} | {shown} | {row.said} |")
    return "\n".join(lines) + "\n"


class Overtime(Exception):
    """One type took too long."""


def main(wanted: Sequence[str]) -> int:
    """Scan the types; 1 where one is wrong."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def stop(*_: object) -> None:
        raise Overtime(f"more than {LIMIT} seconds")

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, stop)
    rows = []
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if wanted and kind not in wanted:
            continue
        signal.alarm(LIMIT)
        row = scan(kind, name if isinstance(name, str) else name[0])
        signal.alarm(0)
        rows.append(row)
        print(f"{row.status:8} {row.kind:28} {row.moved:.3f} {row.said}", flush=True)
    text = table(rows)
    print(text.splitlines()[2])
    if not wanted:
        file = Path(__file__).parent / "results" / "symmetry-scan.md"
        file.write_text(text, encoding="utf-8")
    return int(any(row.status == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
