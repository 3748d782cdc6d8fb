"""The model card of a merge: its facts, gathered from recipe, graph and inputs."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from merge import methods
from merge.ir.checkpoint import Checkpoint, short, some
from merge.ir.expr import Apply, Expr, InputFile, Read, walk
from merge.ir.reference import parse_reference
from merge.ir.side import Side
from merge.plan.model import human_bytes
from merge.provenance import Provenance, Statement, is_hub_id, provenance
from merge.recipe.explain import Made
from merge.recipe.learned import COEFFICIENTS, TASKS
from merge.recipe.read import Recipe
from merge.recipe.used import Used, donor_of, fixed, stages_of, used_models
from merge.write.card import Card, CardInput, MethodLine, card_text, code
from merge.write.licence import Licence, settle

__all__ = ["checkpoint_card", "command", "recipe_card"]

Known = tuple[CardInput, Provenance]

# Tags of the donor that a merge keeps: they tell of its task and its form, which are the donor's,
# not of how its weights came about or are stored.
_HOLD = {
    "chat", "code", "conversational", "feature-extraction", "moe", "multilingual", "multimodal",
    "sentence-similarity", "sentence-transformers", "text-generation-inference", "vision",
}  # fmt: skip


def recipe_card(
    recipe: Recipe,
    made: Sequence[Made],
    this: Made,
    result: Checkpoint,
    command: str,
    licence: str | None = None,
) -> tuple[str, tuple[str, ...]]:
    """README.md for what a recipe makes, or a stage of it that is saved, and notes for the plan.

    made: how the stages were compiled; this: the one that makes ``result``. command: makes the
    output again. licence: the author's word for it.
    """
    used = used_models(made, this)
    stages = stages_of(made, this)
    rows = {model.called: _known(model) for model in used}
    known = [pair for pairs in rows.values() for pair in pairs]
    donor = rows[donor_of(made, this)[0]]
    merged = [i for i, _ in known if {"base", "model", "adapter"} & set(i.roles)]
    called = dict.fromkeys(short(i.hub or i.name) for i in merged)
    card = Card(
        _title("Merge", list(called)),
        methods=tuple(_method(m, len(stages) > 1) for m in stages),
        recipe=recipe.text,
        stage=this.stage.name if this is not made[-1] else None,
        command=command,
    )
    return _written(card, result, known, donor[0][1], licence)


def checkpoint_card(result: Checkpoint) -> tuple[str, tuple[str, ...]]:
    """README.md for a checkpoint that was put together in Python: what it is made of."""
    nodes = [n for e in result.tensors.values() for n in walk(e)]
    files = _files(nodes)
    known: list[Known] = []
    donor: Provenance | None = None
    formula = result.label
    adapter = _library(result.side) == "peft"  # whose factors are in memory
    for root in dict.fromkeys([*result.roots, *(() if adapter else files)]):
        found, name = Provenance(), root.partition(" #")[0]
        if root in result.roots:
            found, name = provenance(root, files.get(root, ())), short(root)
        else:  # in memory, with a number that is of this process alone
            formula = formula.replace(root, name)
        known.append((_shown(found.hub or name, ("input",), found), found))
        if donor is None and any(f.path.startswith(f"{root}/") for f in result.side.files):
            donor = found
    applied = dict.fromkeys(n.method.name for n in nodes if isinstance(n, Apply))
    copied = len(known) == 1 and all(isinstance(n, Read) for n in nodes)
    registry = methods.registry()
    named = [registry[name] for name in applied if name in registry]
    card = Card(
        _title("Adapter" if adapter else "Copy" if copied else "Merge", [i.name for i, _ in known]),
        merged=not copied,
        formula=None if copied else formula,
        methods=tuple(MethodLine(m.name, m.summary, m.paper) for m in named),
    )
    return _written(card, result, known, donor)


def command(settings: Sequence[str], **options: object) -> str:
    """The command that makes an output again from the recipe in it.

    options: those that decide its bytes, by their long names; what is None or False is left out.
    """
    words = ["merge", "apply", "merge_recipe.yml", "OUT"]
    words += [word for setting in settings for word in ("--set", setting)]
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def _written(
    card: Card,
    result: Checkpoint,
    known: Sequence[Known],
    donor: Provenance | None,
    chosen: str | None = None,
) -> tuple[str, tuple[str, ...]]:
    """The text of ``card`` with all that ``result`` and the inputs say, and notes.

    donor: of config and tokenizer. chosen: the licence, in the author's word.
    """
    from merge import __version__

    stated = [p.card for _, p in known]
    # statistics are measurements of a model: they need no licence, but may have one
    own = [i for i, _ in known if i.licence != Licence() or set(i.roles) != {"statistics"}]
    licence, note = settle([(i.name, i.licence) for i in own], chosen)
    notes = [
        f"the model card of {i.name} is not taken into account: {p.card.problem}"
        for i, p in known
        if p.card.problem is not None
    ]
    says = Statement() if donor is None else donor.card
    held = [tag for tag in says.tags if tag.lower() in _HOLD]
    card = replace(
        card,
        version=__version__,
        inputs=tuple(i for i, _ in known),
        output=_output(result),
        left_out=_left_out(result),
        licence=licence,
        library=_library(result.side) or says.library,
        pipeline=says.pipeline,
        tags=tuple(dict.fromkeys(["hf-merge", *(m.name for m in card.methods), *held])),
        languages=tuple(dict.fromkeys(w for s in stated for w in s.languages)),
        datasets=tuple(dict.fromkeys(w for s in stated for w in s.datasets)),
    )
    return card_text(card), tuple(notes if note is None else [*notes, note])


# -- the inputs ------------------------------------------------------------------------------------


def _known(used: Used) -> list[Known]:
    """A row for a model of the recipe, and one for each adapter on it."""
    files = _files(n for e in used.model.tensors.values() for n in walk(e))
    roots = used.model.roots or ("",)
    out: list[Known] = []
    for root, (name, revision) in zip(roots, _named(used.called, roots), strict=True):
        found = provenance(root, files.get(root, ()), name) if root else Provenance()
        if found.hub is None and is_hub_id(name) and not Path(name).exists():
            found = replace(found, hub=name, revision=found.revision or revision)
        roles = ("adapter",) if out else tuple(used.roles)
        out.append((_shown(name, roles, found, "" if out else _parameters(used)), found))
    return out


def _named(called: str, roots: Sequence[str]) -> list[tuple[str, str | None]]:
    """Name and revision of what lies at each root: of the model, then of adapters on it."""
    reference = parse_reference(called)
    if len(roots) == 1:  # a folder may have a name that reads as a model and more
        whole = reference.adapter is not None or Path(roots[0]).name == Path(called).name
        return [(called, None) if whole else (reference.path, reference.revision)]
    inner: list[tuple[str, str | None]] = [(short(root), None) for root in roots]
    inner[-1] = reference.adapter or called, reference.adapter_revision
    if reference.adapter is not None:
        inner[0] = reference.path, reference.revision
    return inner


def _shown(name: str, roles: tuple[str, ...], found: Provenance, parameters: str = "") -> CardInput:
    return CardInput(
        name,
        roles,
        parameters,
        found.hub,
        found.revision,
        found.made_from,
        found.card.licence,
        found.weights,
    )


def _files(nodes: Iterable[Expr]) -> dict[str, tuple[InputFile, ...]]:
    """The files of each source that is read, by the source's identity."""
    found = {n.source.identity: n.source for n in nodes if isinstance(n, Read)}
    return {identity: source.files for identity, source in found.items()}


def _parameters(used: Used) -> str:
    """The model's own parameters, and its layers, as a table's cell."""
    parts = [_value(key, value) for key, value in fixed(used.levels).items()]
    if used.spans:
        parts.insert(0, f"layers {some([f'{a} to {b - 1}' for a, b in used.spans])}")
    return "; ".join(parts)


def _value(key: str, value: object) -> str:
    words = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{code(key)} {'varies' if value is None else code(words)}"


# -- the result ------------------------------------------------------------------------------------


def _title(what: str, names: Sequence[str]) -> str:
    """``Merge of a, b and c``."""
    shown = [code(name) for name in names]
    if 1 < len(shown) < 5:
        shown = [", ".join(shown[:-1]) + f" and {shown[-1]}"]
    return f"{what} of {some(shown)}"


def _method(made: Made, several: bool) -> MethodLine:
    method, top = made.reader.method, made.reader.known.get(())
    shared = fixed([top] if top else [])
    learned = COEFFICIENTS in made.side
    summary = method.summary
    if learned:
        summary += f" Its coefficients were learned from data: `{COEFFICIENTS}` has them."
    if any(name.startswith(f"{TASKS}/") for name in made.side):
        summary += f" `{TASKS}/` has what was learned for single tasks."
    return MethodLine(
        method.name,
        summary,
        method.paper,
        made.stage.name if several else None,
        "" if learned else ", ".join(_value(k, v) for k, v in shared.items()),
    )


def _library(side: Side) -> str | None:
    """The library that loads a folder with these side files, by its name on the Hub."""
    names = {f.name for f in side.files} | set(side.texts)
    for file, library in (
        ("modules.json", "sentence-transformers"),
        ("model_index.json", "diffusers"),
        ("adapter_config.json", "peft"),
        ("open_clip_config.json", "open_clip"),
    ):
        if file in names:
            return library
    if "_class_name" in side.config:
        return "diffusers"
    if "pretrained_cfg" in side.config:
        return "timm"
    return "transformers" if {"model_type", "architectures"} & set(side.config) else None


def _output(result: Checkpoint) -> tuple[str, ...]:
    """How much there is, and of which types."""
    specs = [spec for name, spec in result.items() if name not in result.tied]
    count = sum(s.numel for s in specs)
    size = human_bytes(sum(s.nbytes for s in specs))
    types = Counter(s.dtype.name for s in specs).most_common()
    listed = ", ".join(f"{name} ({n} tensors)" if len(types) > 1 else name for name, n in types)
    space = "" if result.space == "weight" else ", a difference of weights"
    return (f"{len(specs)} tensors, {count:,} parameters, {size}{space}", f"stored as {listed}")


def _left_out(result: Checkpoint) -> tuple[str, ...]:
    """Tensors of inputs that are not in it, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in result.dropped.items():
        reasons.setdefault(why, []).append(name)
    return tuple(f"{some([*map(code, names)])}, since {why}" for why, names in reasons.items())
