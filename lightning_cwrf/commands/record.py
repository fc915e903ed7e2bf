"""What a hardening writes beside its audits, so that a report of them can be made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_cwrf.auditing.saved import digest_of, read_json, write_json
from lightning_cwrf.commands.base import UsageError
from lightning_cwrf.files import digest
from lightning_cwrf.weights.masks import WeightMask

RECORD = "settings.json"
MASK = "mask.safetensors"
_FORMAT = "lightning_cwrf.Hardening/1"
_BEFORE = "finished.json"


@dataclass(frozen=True)
class Record:
    """The settings of one hardening, seconds by audit, and what its audits and its mask are, by content."""

    path: Path
    settings: dict[str, Any]
    seconds: dict[str, float | None]
    audits: dict[str, str]
    mask: str

    def check_mask(self, mask: WeightMask, path: Path) -> None:
        """Raise unless it is the mask of this hardening."""
        if digest(mask.masks) != self.mask:
            raise UsageError(f"{path} is not the mask of the hardening that {self.path} is about: name its own.")


def write_record(folder: Path, settings: Mapping[str, Any], seconds: Mapping[str, float | None]) -> None:
    """Write what a hardening was made with, beside its mask and the audits that ``seconds`` names."""
    audits = {name: digest_of(folder / name) for name in seconds}
    mask = digest(WeightMask.load(folder / MASK).masks)
    content = {"format": _FORMAT, "settings": settings, "seconds": seconds, "audits": audits, "mask": mask}
    write_json(content, folder / RECORD)


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
        content = read_json(path, _FORMAT, what="record of a hardening", writer="cwrf harden")
        content.pop("format")
        record = Record(path, **content)
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
