"""Sizes of groups as expressions over the keys of config.json.

``num_attention_heads/num_key_value_heads``; ``head_dim or hidden_size/num_attention_heads`` takes
the first alternative whose keys the config has, and not as null; ``text_config.hidden_size`` and
``depths[i]`` look inside. Where a key is a fraction, such as the share of rotary coordinates, the
size is rounded down.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

from merge.errors import PlanError, RecipeError

__all__ = ["assigned", "evaluate", "key_of", "look_up", "parse_size"]


def parse_size(text: str) -> ast.expr:
    """The expression, checked; `RecipeError` where it has anything but keys, numbers, + - * / or.

    >>> evaluate("hidden_size/heads", {"hidden_size": 12, "heads": 3})
    4
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise _wrong(text, text) from None
    for node in ast.walk(tree):
        fine = isinstance(
            node,
            ast.Name | ast.Attribute | ast.Subscript | ast.BinOp | ast.BoolOp | ast.Or | ast.Add
            | ast.Sub | ast.Mult | ast.Div | ast.Load,
        ) or (isinstance(node, ast.Constant) and type(node.value) is int)  # fmt: skip
        if not fine:
            raise _wrong(text, ast.unparse(node) if isinstance(node, ast.expr) else str(node))
    return tree


def evaluate(
    text: str, config: Mapping[str, object], numbers: Mapping[str, int] | None = None
) -> int | None:
    """The size, or None where the config has none of the alternatives' keys.

    >>> evaluate("head_dim or hidden_size/heads", {"head_dim": None, "hidden_size": 8, "heads": 2})
    4
    """
    tree = parse_size(text)
    for choice in tree.values if isinstance(tree, ast.BoolOp) else [tree]:
        value = _value(choice, config, numbers or {})
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or int(value) < 1:
            raise _no_size(choice, value)
        if isinstance(value, float) and not value.is_integer() and not _has_factor(choice, config):
            raise _no_size(choice, value)
        return int(value)
    return None


def look_up(text: str, config: Mapping[str, object]) -> object:
    """The value of an expression, whatever it is; None where the config has none of its keys."""
    tree = parse_size(text)
    choices = tree.values if isinstance(tree, ast.BoolOp) else [tree]
    return next((v for c in choices if (v := _value(c, config, {})) is not None), None)


def key_of(text: str) -> str | None:
    """The key that a size is stated by, where it is one: the first alternative.

    >>> key_of("num_key_value_heads or num_attention_heads"), key_of("hidden_size/heads")
    ('num_key_value_heads', None)
    """
    if not text:
        return None
    tree = parse_size(text)
    first = tree.values[0] if isinstance(tree, ast.BoolOp) else tree
    return ast.unparse(first) if isinstance(first, ast.Name | ast.Attribute) else None


def assigned(key: str, config: Mapping[str, object], size: int) -> dict[str, object]:
    """``config`` with another size under a key, which may look inside.

    >>> assigned("text_config.hidden_size", {"text_config": {"hidden_size": 8}}, 4)
    {'text_config': {'hidden_size': 4}}
    """
    first, _, rest = key.partition(".")
    if not rest:
        return {**config, first: size}
    inner = config.get(first)
    return {**config, first: assigned(rest, inner if isinstance(inner, Mapping) else {}, size)}


def _has_factor(choice: ast.expr, config: Mapping[str, object]) -> bool:
    """Whether a key of the expression is a fraction, so that the size is rounded down."""
    leaves = (n for n in ast.walk(choice) if isinstance(n, ast.Name | ast.Attribute))
    return any(isinstance(_value(leaf, config, {}), float) for leaf in leaves)


def _no_size(choice: ast.expr, value: object) -> PlanError:
    return PlanError(
        f"the config gives no size by '{ast.unparse(choice)}'",
        found=value,
        expected="a whole number of at least 1",
    )


def _value(node: ast.expr, config: Mapping[str, object], numbers: Mapping[str, int]) -> object:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return numbers[node.id] if node.id in numbers else config.get(node.id)
    if isinstance(node, ast.Attribute):
        inner = _value(node.value, config, numbers)
        return inner.get(node.attr) if isinstance(inner, Mapping) else None
    if isinstance(node, ast.Subscript):
        entries, at = (_value(n, config, numbers) for n in (node.value, node.slice))
        fits = isinstance(entries, list | tuple) and isinstance(at, int) and at < len(entries)
        return entries[at] if fits else None  # type: ignore[index]
    if isinstance(node, ast.BinOp):
        left, right = (_value(n, config, numbers) for n in (node.left, node.right))
        if not isinstance(left, int | float) or not isinstance(right, int | float):
            return None
        if isinstance(node.op, ast.Div):
            return left // right if right and left % right == 0 else left / (right or 1)
        if isinstance(node.op, ast.Mult):
            return left * right
        return left + right if isinstance(node.op, ast.Add) else left - right
    return None


def _wrong(text: str, found: str) -> RecipeError:
    return RecipeError(
        f"'{text}' is no size",
        found=found,
        expected="config keys and whole numbers joined by + - * / and 'or'",
    )
