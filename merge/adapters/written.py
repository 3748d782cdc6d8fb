"""An extracted difference as PEFT writes it: names of tensors, and adapter_config.json."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge.adapters.config import read_config
from merge.adapters.extract import Extracted, Low
from merge.adapters.tree import Tree
from merge.families.roles import role_of
from merge.ir.checkpoint import Checkpoint
from merge.ir.expr import Expr

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Written", "written"]

_NONE = "dummy-target-modules"
"""What peft takes for no module at all."""

_ROOT = "base_model.model."


@dataclass(frozen=True, slots=True)
class Written:
    """factors, stored: tensors of the file, made here and as they are in the model. config: the
    data of adapter_config.json."""

    factors: Mapping[str, Tensor]
    stored: Mapping[str, Expr]
    config: Mapping[str, Any]

    @property
    def config_text(self) -> str:
        """adapter_config.json."""
        return json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"


def written(
    model: Checkpoint, found: Extracted, tree: Tree, *, base: str, task: str | None
) -> Written:
    """The adapter's tensors and config, over the base of that name.

    alpha is the rank everywhere, so that B A is added as it is. What is tied to a tensor of the
    adapter is written too, and the config says that it is tied.
    """
    modules = {tree.path(n): low for n, low in found.low.items()}
    stored = {
        tree.named(name): expr
        for name, expr in model.tensors.items()
        if name not in model.tied and _inside(name, found.changes.whole)
    }
    whole = dict.fromkeys(_module(m, model, tree) for m in found.changes.whole)
    ties = False
    for name, source in tree.tied.items():
        if source in found.low:
            low = found.low[source]
            modules[name.removesuffix(".weight")] = Low(low.right.T, low.left.T)
            ties = True
        elif _inside(name, whole) or _inside(source, found.changes.whole):
            stored[name] = model.tensors[source]
            ties = True
            if not _inside(name, whole):
                whole[name.rpartition(".")[0]] = None
    for name in found.changes.biases:
        path = tree.named(name).removesuffix(".bias")
        stored[f"{path}.base_layer.bias" if path in modules else f"{path}.bias"] = model.tensors[
            name
        ]
    config = _config(model, found, tree, modules, list(whole))
    ties &= all(role_of(name, ()) == "head" for name in tree.tied)  # peft ties nothing else
    config |= {"task_type": task, "base_model_name_or_path": base, "ensure_weight_tying": ties}
    return Written(
        {_ROOT + n: t for path, low in modules.items() for n, t in _factors(path, low).items()},
        {_ROOT + n: e for n, e in stored.items()},
        config,
    )


def _factors(path: str, low: Low) -> dict[str, Tensor]:
    left, right = low.left.contiguous(), low.right.contiguous()
    if low.embedding:
        return {f"{path}.lora_embedding_A": right, f"{path}.lora_embedding_B": left}
    return {f"{path}.lora_A.weight": right, f"{path}.lora_B.weight": left}


def _module(path: str, model: Checkpoint, tree: Tree) -> str:
    """A module's path in the tree, by that of a tensor in it."""
    name = next(n for n in model.tensors if n.startswith(f"{path}."))
    return tree.named(name).removesuffix(name.removeprefix(path))


def _inside(name: str, modules: Mapping[str, object]) -> bool:
    """Whether a tensor lies in one of the modules."""
    path = name
    while path := path.rpartition(".")[0]:
        if path in modules:
            return True
    return False


def _config(
    model: Checkpoint, found: Extracted, tree: Tree, modules: Mapping[str, Low], whole: list[str]
) -> dict[str, Any]:
    ranks = {path: low.rank for path, low in modules.items()}
    experts = [r for path, r in ranks.items() if re.search(r"\.experts\.\d+\.", path)]
    common = Counter(experts or ranks.values()).most_common()
    rank = max((r for r, n in common if n == common[0][1]), default=1)
    patterns = {path: r for path, r in ranks.items() if r != rank}
    beside = {n.removesuffix(".bias") for n in found.changes.biases}
    targeted = {n.removesuffix(".weight") for n in found.low}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(low.turned and not low.embedding for low in modules.values()),
        "bias": "none" if not beside else "lora_only" if beside <= targeted else "all",
        "target_modules": _targets(model, set(modules), tree),
        "modules_to_save": whole or None,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "init_lora_weights": True,
    }
    checked = read_config(config, "adapter_config.json")
    if any(checked.rank_of(path) != r for path, r in ranks.items()):
        exact = {f"^{re.escape(path)}": r for path, r in patterns.items()}
        config |= {"rank_pattern": exact, "alpha_pattern": dict(exact)}
    return config


def _targets(model: Checkpoint, modules: set[str], tree: Tree) -> list[str] | str:
    """The last words of the modules' paths where these are no others', else the paths."""
    if not modules:
        return _NONE
    leaves = {path.rpartition(".")[2] for path in modules}
    every = {tree.path(n) for n in model.tensors if n.endswith(".weight")}
    alike = {path for path in every if path.rpartition(".")[2] in leaves}
    return sorted(leaves if alike <= modules else modules)
