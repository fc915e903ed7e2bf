"""A digest of everything that shapes a shadow model, so that stored outputs are never mistaken for another's."""

from __future__ import annotations

import hashlib
from typing import Any

from lightning_cwrf.shadows.identity.describe import Describer, Unsupported, as_text


def identity(value: Any, version: str | None = None) -> str:
    """A hex digest of a value's content.

    Supported are plain values, containers, tensors, data sets and their loaders, dataclasses, other objects by their
    state, functions, classes and partials.

    A function is identified by what it does: its live code, its defaults, and what it reads by name, wherever it was
    defined (a file, a notebook, standard input). Values that it reads count by content, functions and classes of the
    user's own modules by their code in turn, and environment variables by their present value. A class is identified by
    its present attributes. So a changed setting, a reassigned attribute or a redefined class changes the identity, and
    a comment does not. Installed packages count by name only.

    A recipe itself must be neither a closure nor a lambda. Use a :func:`functools.partial` or a dataclass with
    ``__call__`` for one with arguments. A dataclass field is identified by its name, or by ``metadata["identity"]``,
    which keeps the identity of a field that was renamed; ``metadata["identity_values"]`` has the old words of values
    that were, and ``metadata["identity_without_default"]`` leaves a field that came later out at its default.

    Args:
        value: what to identify.
        version: part of the digest if given. Parts of the value that have no content to compare (locks, open files) are
            then left out, instead of an error.

    Raises:
        TypeError: a value without comparable content; it names the value and what to pass instead.

    >>> identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1}), identity(1) == identity(1.0)
    (True, False)
    """
    if version is not None and not (isinstance(version, str) and version):
        raise TypeError(f"version must be a text that is not empty, not {version!r}.")
    try:
        content = Describer(ignore_unknown=version is not None).describe(value)
    except Unsupported as error:
        raise TypeError(str(error)) from error.__cause__
    return hashlib.sha256(as_text(content if version is None else ["version", version, content]).encode()).hexdigest()
