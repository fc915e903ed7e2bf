"""What a hardening writes beside its audits, for reports of them and for the model's card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_cwrf.auditing.saved import digest_of, read_json, write_json
from lightning_cwrf.commands.base import UsageError
from lightning_cwrf.files import digest
from lightning_cwrf.weights.masks import WeightMask

RECORD = "settings.json"
HARDENED = "hardened.ckpt"
MASK = "mask.safetensors"
_FORMAT = "lightning_cwrf.Hardening/1"
_BEFORE, _AFTER = "finished.json", "hardened.json"


@dataclass(frozen=True)
class Record:
    """The settings of one hardening, seconds by audit, and what its audits, models and mask are, by content."""

    path: Path
    settings: dict[str, Any]
    seconds: dict[str, float | None]
    audits: dict[str, str]
    mask: str
    weights: dict[str, str] = field(default_factory=dict)
    """Digests of the audited weights, by audit; records of early versions have none."""

    def is_of(self, weights: str) -> bool | None:
        """Whether weights with this digest are the hardened ones; None where that cannot be known.

        The weights before the hardening, and those of its control, are not.
        """
        own = self.weights.get(_AFTER)
        return weights == own if weights and own else None

    def check_mask(self, mask: WeightMask, path: Path) -> None:
        """Raise unless it is the mask of this hardening."""
        if digest(mask.masks) != self.mask:
            raise UsageError(f"{path} is not the mask of the hardening that {self.path} is about: name its own.")


def write_record(
    folder: Path,
    settings: Mapping[str, Any],
    seconds: Mapping[str, float | None],
    weights: Mapping[str, str],
) -> None:
    """Write what a hardening was made with, beside its mask and the audits that ``seconds`` names.

    ``weights`` has the digests of the audited weights, by the same names.
    """
    content = {
        "format": _FORMAT,
        "settings": settings,
        "seconds": seconds,
        "audits": {name: digest_of(folder / name) for name in seconds},
        "mask": digest(WeightMask.load(folder / MASK).masks),
        "weights": weights,
    }
    write_json(content, folder / RECORD)


def read_record(path: Path) -> Record:
    """Read what :func:`write_record` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file, or damaged.
    """
    content = read_json(path, _FORMAT, what="record of a hardening", writer="cwrf harden")
    content.pop("format")
    return Record(path, **content)


def records_of(audits: Sequence[Path]) -> list[Record]:
    """The records of the hardenings that these audits are from.

    Raises:
        UsageError: an audit has the name of a hardening's own beside its record, and is another.
    """
    found = []
    for folder in dict.fromkeys(path.parent for path in audits):
        path = folder / RECORD
        if not path.is_file():
            continue
        record = read_record(path)
        given = [each for each in audits if each.parent == folder and each.name in record.audits]
        for each in given:
            if digest_of(each) != record.audits[each.name]:
                raise UsageError(
                    f"{each} is another audit than the one that the hardening wrote, and {path} has settings for that "
                    "one: give it another name or folder, or report the hardening's own."
                )
        if any(each.name != _BEFORE for each in given):
            found.append(record)
    return found
