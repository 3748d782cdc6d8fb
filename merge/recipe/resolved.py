"""A recipe's text with other values in it, comments kept: what ran, so that it runs again."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from merge.recipe.document import Document, read_documents
from merge.recipe.parser import load
from merge.recipe.read import Recipe, Stage, parse_recipe
from merge.recipe.settings import addressed, override

__all__ = ["resolved", "with_coefficients"]


def resolved(
    recipe: Recipe, settings: Sequence[str], *, without: Sequence[str] = (), head: str = ""
) -> str:
    """The text of ``recipe`` with its settings and these put in, and without some keys.

    head: comment lines at its top. Anchors and comments stay where what they stand at does.
    """
    from ruamel.yaml import YAML

    documents = read_documents(recipe.source, "recipe", last_wins=True)
    trees = [tree for tree, _ in load(recipe.source, last_wins=True) if tree is not None]
    final = documents[recipe.stages.index(recipe.final)]
    wanted = [addressed(s, documents, final) for s in (*recipe.settings, *settings)]
    for document, tree in zip(documents, trees, strict=True):
        for setting in [s for d, s in wanted if d is document]:
            _put(tree, document, setting)
        for key in without:
            tree.pop(key, None)
    yaml = YAML(typ="rt")
    yaml.width = 4096
    out = io.StringIO()
    yaml.dump_all(trees, out)
    return head + out.getvalue()


def with_coefficients(recipe: Recipe, stage: Stage, *, tasks: bool = False) -> Recipe:
    """The recipe with ``learn:`` of a stage taking what lies beside it: coefficients, and where
    there are ``tasks``, the tensors of tasks' own."""
    name = "" if stage.name is None or stage is recipe.final else f"{stage.name}:"
    head = "# coefficients learned as the recipe said are in coefficients.json\n"
    taken = "coefficients: coefficients.json" + (", tasks: tasks" if tasks else "")
    head = "" if recipe.source.startswith(head) else head
    text = resolved(recipe, [f"{name}learn={{{taken}}}"], head=head)
    return parse_recipe(text, stage.document.name, lenient=stage.lenient)


def _put(tree: Any, document: Document, setting: str) -> None:
    """Set one value in a tree of ruamel's."""
    path = setting.partition("=")[0].split(".")
    value: Any = override(document.data, setting)
    for key in path:
        value = value[int(key)] if isinstance(value, list) else value[key]
    for key in path[:-1]:
        if isinstance(tree, list):
            tree = tree[int(key)]
            continue
        if not isinstance(tree.get(key), dict | list):
            tree[key] = {}
        tree = tree[key]
    tree[int(path[-1]) if isinstance(tree, list) else path[-1]] = value
