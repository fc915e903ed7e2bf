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
        self._article = "an" if kind[0] in "aeiou" else "a"
        self._entries: dict[str, T] = {}

    def add(self, name: Any, entry: T) -> None:
        """Register an entry; the same one twice is fine, and so is a class that was defined again by the same name."""
        self.check_name(name)
        known = self._entries.get(name, entry)
        if known != entry and _path_of(known) != _path_of(entry):
            raise ValueError(f"there is already {self._article} {self._kind} {name!r}; choose another name.")
        self._entries[name] = entry

    def check_name(self, name: Any) -> None:
        """Raise a TypeError unless the name is a string; a decorator without its parentheses passes the class."""
        if not isinstance(name, str):
            raise TypeError(
                f"{self._article} {self._kind}'s name must be a string, not {name!r}; write "
                f'@register_{self._kind}("my_{self._kind}").'
            )

    def find(self, name: Any) -> T:
        """The entry of this name, or a ValueError that lists the available names."""
        if name not in self._entries:
            raise ValueError(f"there is no {self._kind} {name!r}; available: {', '.join(self.names())}.")
        return self._entries[name]

    def get(self, name: str) -> T | None:
        """The entry of this name, or None."""
        return self._entries.get(name)

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


def _path_of(entry: Any) -> Any:
    """Where a class is defined: a notebook's cell that is run twice defines it twice. Other entries are themselves."""
    return (entry.__module__, entry.__qualname__) if isinstance(entry, type) else entry
