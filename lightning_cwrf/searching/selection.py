"""Which candidates go on to more models: those that the audits so far do not rule out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_cwrf.auditing.recipe_result import Difference, RecipeAudit
from lightning_cwrf.auditing.values import Estimate

ACCURACY = "test_accuracy"


@dataclass(frozen=True)
class Standing:
    """A candidate after a round.

    Attributes:
        audit: of its models, on the examples that choose.
        accuracy_change: its test accuracy minus that of the base models, in pairs.
        leak_change: likewise of the measure.
        within: whether it loses no more than the floor allows, by the estimate alone, and its models learned something.
        rewinds: whether its recipe rewinds weights.
    """

    audit: RecipeAudit
    accuracy_change: Difference
    leak_change: Difference
    within: bool
    rewinds: bool
    measure: str

    @classmethod
    def of(cls, audit: RecipeAudit, base: RecipeAudit, floor: float, measure: str, *, rewinds: bool) -> Standing:
        change = audit.minus(base, ACCURACY)
        within = change.value >= -floor and not audit.remarks
        return cls(audit, change, audit.minus(base, measure), within, rewinds, measure)

    @property
    def accuracy(self) -> float:
        return self.audit.estimate(ACCURACY).value

    @property
    def leak(self) -> Estimate:
        return self.audit.estimate(self.measure)

    def beats(self, other: Standing) -> bool:
        """Whether it is better in one of privacy and accuracy beyond the error, and no worse in the other."""
        if self.accuracy >= other.accuracy and self.audit.minus(other.audit, self.measure).interval.high < 0:
            return True
        no_worse = self.leak.value <= other.leak.value
        return no_worse and self.audit.minus(other.audit, ACCURACY).interval.low > 0


def ruled_out(standings: Mapping[str, Standing], floor: float) -> dict[str, str]:
    """The candidates that need no more models, and why.

    The best that rewinds and the best that does not stay: the search compares them at its end.
    """
    stays = {best(standings, rewinds=True), best(standings, rewinds=False)}
    found = {}
    for name, each in standings.items():
        if name in stays:
            continue
        if each.audit.remarks:
            found[name] = each.audit.remarks[0]
        elif each.accuracy_change.interval.high < -floor:
            found[name] = f"loses too much test accuracy: {each.accuracy_change}"
        elif each.leak_change.interval.low > 0:
            found[name] = f"leaks more than no defense: {each.leak_change}"
        elif (better := next((n for n, other in standings.items() if other.beats(each)), None)) is not None:
            found[name] = f"{better} is better in one of privacy and accuracy, and no worse in the other"
    return found


def ranked(standings: Mapping[str, Standing]) -> list[str]:
    """All names, the best that rewinds and the best that does not first, then by fronts, the outermost first.

    A front has the candidates that no other one equals or exceeds in both privacy and accuracy, by their estimates.
    """
    order = [n for n in (best(standings, rewinds=False), best(standings, rewinds=True)) if n is not None]
    order.sort(key=lambda name: _key(standings[name]))
    rest = {name: each for name, each in standings.items() if name not in order}
    while rest:
        front = front_of(rest)
        order += sorted(front, key=lambda name: _key(rest[name]))
        rest = {name: each for name, each in rest.items() if name not in front}
    return order


def front_of(standings: Mapping[str, Standing]) -> list[str]:
    """The names of those that no other one equals or exceeds in both privacy and accuracy, by their estimates."""

    def exceeds(a: Standing, b: Standing) -> bool:
        return (
            a.accuracy >= b.accuracy
            and a.leak.value <= b.leak.value
            and (a.accuracy, a.leak.value) != (b.accuracy, b.leak.value)
        )

    return [n for n, each in standings.items() if not any(exceeds(other, each) for other in standings.values())]


def best(standings: Mapping[str, Standing], *, rewinds: bool | None = None) -> str | None:
    """The safest of those within the floor; of none within it, the most accurate. None: there is no such candidate."""
    found = {n: each for n, each in standings.items() if rewinds is None or each.rewinds == rewinds}
    return min(found, key=lambda name: _key(found[name]), default=None)


def _key(standing: Standing) -> tuple[bool, float]:
    return not standing.within, standing.leak.value if standing.within else -standing.accuracy
