"""A recipe about to be run, from a recipe file or from a lock file, and the lock that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merge.ir.checkpoint import Checkpoint
from merge.ir.reference import Reference
from merge.recipe.pinned import Lock, check_learned, check_same, lock_text, pinned, read_lock
from merge.recipe.read import Recipe, parse_recipe, read_recipe

__all__ = ["Locked"]

Option = str | int | bool | None


@dataclass(frozen=True, slots=True)
class Locked:
    """A recipe with the options that decide the bytes, and the models that were opened for it."""

    recipe: Recipe
    options: Mapping[str, Option]
    opener: Callable[[Reference], Checkpoint]
    lock: Lock | None = None
    opened: dict[str, Checkpoint] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        path: Path,
        opener: Callable[[Reference], Checkpoint],
        settings: Sequence[str],
        *,
        lenient: bool,
        **options: Option,
    ) -> Locked:
        """The recipe at ``path``. An option that is not given is that of the lock file, if any."""
        lock = read_lock(path)
        if lock is None:
            recipe = read_recipe(path, lenient=lenient, settings=settings)
            return cls(recipe, {**options, "lenient": lenient}, opener)
        lenient = lenient or bool(lock.options.get("lenient"))
        recipe = parse_recipe(
            lock.recipe, str(path), lenient=lenient, settings=[*lock.settings, *settings]
        )
        both = {k: lock.options.get(k) if v is None else v for k, v in options.items()}
        return cls(recipe, {**both, "lenient": lenient}, opener, lock)

    def open(self, reference: Reference) -> Checkpoint:
        """The model of that name, at the commit that the lock file says."""
        called = str(reference)
        wanted = reference if self.lock is None else pinned(reference, self.lock)
        opened = self.opener(wanted)
        if self.lock is not None:
            check_same(called, opened, self.lock)
        self.opened[called] = opened
        return opened

    def check_learned(self, files: Mapping[str, str | bytes]) -> None:
        """SourceError where what was learned is not what it was when the lock was written.

        files: the files that tell it, by their paths in the output.
        """
        if self.lock is not None:
            check_learned(files, self.lock)

    def written(self, version: str, learned: Mapping[str, str | bytes]) -> str:
        """The text of the lock file, once all models are opened.

        version: of this program. learned: files of what was learned, by their paths.
        """
        recipe = self.recipe
        return lock_text(
            recipe.source, recipe.settings, self.options, self.opened, version, learned
        )

    def text(self, option: str) -> str | None:
        """An option's value as text."""
        value = self.options.get(option)
        return None if value is None else str(value)

    def number(self, option: str) -> int | None:
        """An option's value as a whole number."""
        value = self.options.get(option)
        return None if value is None else int(value)

    def flag(self, option: str) -> bool:
        """Whether an option is given."""
        return bool(self.options.get(option))
