"""Registries of named things that users can add to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name. Errors list the names that exist.

    Args:
        kind: what an entry is, for messages: ``"attack"``.

    >>> attacks = Registry[str]("attack")
    >>> attacks.add("loss", "the loss attack")
    >>> attacks.find("lira")
    Traceback (most recent call last):
    ValueError: there is no attack 'lira'; available: loss.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, T] = {}

    def add(self, name: Any, entry: T) -> None:
        """Register an entry; the same one twice is fine.

        Raises:
            TypeError: the name is not a string.
            ValueError: another entry has this name.
        """
        article = "an" if self._kind[0] in "aeiou" else "a"
        if not isinstance(name, str):
            raise TypeError(
                f"{article} {self._kind}'s name must be a string, not {name!r}; write "
                f'@register_{self._kind}("my_{self._kind}").'
            )
        if self._entries.setdefault(name, entry) != entry:
            raise ValueError(f"there is already {article} {self._kind} {name!r}; choose another name.")

    def find(self, name: Any) -> T:
        """The entry of this name, or a ValueError that lists the available names."""
        if name not in self._entries:
            raise ValueError(f"there is no {self._kind} {name!r}; available: {', '.join(self.names())}.")
        return self._entries[name]

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries.values())

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """Forget on exit what is registered inside; for tests."""
        before = dict(self._entries)
        try:
            yield
        finally:
            self._entries = before
