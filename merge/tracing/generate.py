"""Make the templates that are shipped: ``python -m merge.tracing.generate [MODEL ...] [--check]``.

With ``--check`` nothing is written: it says which templates are not what would be derived.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from merge.errors import SourceError
from merge.symmetry.templates import Template
from merge.tracing.build import build
from merge.tracing.shipped import FAMILIES

__all__ = ["main", "text_of"]


def text_of(template: Template) -> str:
    """The template as it is written."""
    return json.dumps(template.to_json(), indent=1) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Derive the templates named, or all; 1 where ``--check`` finds one that differs."""
    wanted = [a for a in arguments if not a.startswith("-")] or list(FAMILIES)
    folder = Path(__file__).parent.parent / "symmetry" / "templates"
    wrong = 0
    for model in wanted:
        if model not in FAMILIES:
            raise SourceError("no such family", model=model, expected=", ".join(FAMILIES))
        text = text_of(build(FAMILIES[model]))
        file = folder / f"{model}.json"
        if "--check" in arguments:
            differs = not file.is_file() or file.read_text(encoding="utf-8") != text
            wrong += differs
            print(f"{model}: {'differs' if differs else 'as derived'}")
            continue
        file.write_text(text, encoding="utf-8")
        print(f"{model}: {len(text):,} bytes")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
