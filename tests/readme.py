"""README.md's table of methods, made from the registry: ``python -m tests.readme`` writes it."""

from __future__ import annotations

from pathlib import Path

from merge import methods

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: begin", "<!-- methods: end -->"


def method_table() -> str:
    """The table as Markdown."""
    rows = ["| method | what comes out | parameters |", "|---|---|---|"]
    for m in methods.registry().values():
        keys = ", ".join(
            f"`{p.key}`" + ("" if p.required else f" = {p.default}".lower())
            for p in m.parameters.values()
        )
        rows.append(f"| `{m.name}` | {m.summary} | {keys or 'none'} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """README's text with the table as it should be."""
    head, _, rest = text.partition(BEGIN)
    marker, _, tail = rest.partition("-->\n")
    return f"{head}{BEGIN}{marker}-->\n{method_table()}\n{END}{tail.partition(END)[2]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
