"""What travels beside the weights: config, tokenizer and other small files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

__all__ = ["Side", "SideFile"]


@dataclass(frozen=True, slots=True)
class SideFile:
    """A small file to copy: ``name`` is relative to the checkpoint, ``path`` where it lies.

    Size and time are those at which it was seen, so that another version is another plan. fetch:
    of a file that lies elsewhere, what brings it here and returns its path.
    """

    name: str
    path: str
    size: int
    mtime_ns: int
    fetch: Callable[[], str] | None = field(default=None, compare=False, repr=False)

    def local(self) -> str:
        """The path of the file on this machine; it is fetched where it lies elsewhere."""
        return self.path if self.fetch is None else self.fetch()


@dataclass(frozen=True, slots=True)
class Side:
    """The side files of a checkpoint; ``config`` is config.json as parsed, not to be changed.

    texts: files that are written anew, by name; they stand in for copied ones of the same name.
    code: programs that came with the model, copied only when asked. card: the model's README.md,
    never copied, since what it says is not true of what is made from it. configs: config.json of
    components in folders, by folder; each is also among ``files``.
    """

    files: tuple[SideFile, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)
    left: tuple[str, ...] = ()  # files that are not copied, such as other weights and pictures
    texts: Mapping[str, str] = field(default_factory=dict)
    code: tuple[SideFile, ...] = ()
    card: SideFile | None = None
    configs: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def with_config(self, config: Mapping[str, object]) -> Side:
        """The same with another config, which is then written anew and not copied."""
        files = tuple(f for f in self.files if f.name != "config.json")
        return replace(self, files=files, config=config)

    def with_texts(self, texts: Mapping[str, str]) -> Side:
        """The same with these files written anew."""
        return replace(self, texts={**self.texts, **texts})

    def without(self, names: Collection[str]) -> Side:
        """The same without the files of these names."""
        files = tuple(f for f in self.files if f.name not in names)
        texts = {n: t for n, t in self.texts.items() if n not in names}
        return replace(self, files=files, texts=texts)

    def with_code(self) -> Side:
        """The same with the programs among the files to copy."""
        return replace(self, files=(*self.files, *self.code))

    def with_architecture(self, name: str | None) -> Side:
        """The same with ``name`` as the config's architecture; as it is where that is None."""
        return self if name is None else self.with_config({**self.config, "architectures": [name]})
