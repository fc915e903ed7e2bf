"""What a search found: every candidate's fate, the audits of the last ones on held-out examples, and the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path

from lightning.pytorch import Callback

from lightning_cwrf._version import __version__
from lightning_cwrf.auditing.names import attack_name, metric_name
from lightning_cwrf.auditing.recipe_result import Difference, RecipeAudit
from lightning_cwrf.auditing.saved import read_json, write_json
from lightning_cwrf.auditing.tables import aligned, markdown_table, markdown_text, percent
from lightning_cwrf.auditing.values import Estimate, estimate_of
from lightning_cwrf.callbacks import DefenseCallback
from lightning_cwrf.data import Batches
from lightning_cwrf.metrics import Interval
from lightning_cwrf.recipes import ShadowRecipe
from lightning_cwrf.report.plots import plot_tradeoff
from lightning_cwrf.searching.selection import ACCURACY, Standing, front_of
from lightning_cwrf.weights.vanilla import VanillaSource

BASE = "no defense"
"""What the base models are called among the audits."""

_FORMAT = "lightning_cwrf.RecipeSearch/2"


@dataclass(frozen=True)
class Trial:
    """One candidate, by its last audit on the examples that choose.

    Attributes:
        name: of the candidate.
        rewinds: whether it rewinds weights.
        models: how many of its models that audit has.
        test_accuracy: its estimate.
        leak: the estimate of what the search makes low.
        accuracy_change: its test accuracy minus that of the base models, in pairs.
        dropped: why it got no more models; None: it is a finalist.
    """

    name: str
    rewinds: bool
    models: int
    test_accuracy: Estimate
    leak: Estimate
    accuracy_change: Difference
    dropped: str | None


@dataclass(frozen=True)
class RecipeSearch:
    """The result of :func:`~lightning_cwrf.search_recipes`.

    Attributes:
        floor: the test accuracy that may be lost.
        measure: what the search makes low.
        trials: every candidate, in the order they were given.
        audits: of the base models (``"no defense"``) and of each finalist, on the held-out half of the examples.
        best: the name of the finalist with the lowest measure among those within the floor; None: none is within it.
        remarks: why the search ended early, if it did.
        recipes: of all candidates; empty in a search that was loaded from a file.
    """

    floor: float
    measure: str
    trials: list[Trial]
    audits: dict[str, RecipeAudit] = field(repr=False)
    best: str | None
    remarks: list[str] = field(default_factory=list, repr=False)
    recipes: Mapping[str, ShadowRecipe] = field(default_factory=dict, repr=False)

    @property
    def finalists(self) -> list[Trial]:
        """The candidates of the last round."""
        return [each for each in self.trials if each.dropped is None]

    @property
    def front(self) -> list[str]:
        """The finalists that no other one equals or exceeds in both privacy and accuracy, on the held-out half."""
        return front_of(self._standings())

    @property
    def recipe(self) -> ShadowRecipe:
        """The best candidate's recipe.

        Raises:
            ValueError: no candidate is within the floor, or the search was loaded from a file, which has no recipes.
        """
        if self.best is None:
            raise ValueError(f"no candidate loses at most {percent(self.floor)} of test accuracy: raise floor.")
        if self.best not in self.recipes:
            raise ValueError("a search that was loaded from a file has no recipes; run it again: its store has them.")
        return self.recipes[self.best]

    def callbacks(self, vanilla: VanillaSource, *, members: Batches | None = None) -> list[Callback]:
        """The callbacks that harden your finished model as the best candidate does, for one ``Trainer.fit``.

        The Trainer's other arguments are ``self.recipe.trainer_kwargs``.

        Args:
            vanilla: the weights from before the training, as for :class:`~lightning_cwrf.PrivacyScoringCallback`;
                without effect where the best candidate does not rewind.
            members: your plain training data, if the training is augmented.
        """
        recipe = self.recipe
        found = [] if recipe.callbacks is None else recipe.callbacks()
        if recipe.cwrf is not None:
            found += recipe.cwrf.callbacks(vanilla, members, augmented=recipe.augment is not None)
        return found if recipe.defense is None else [*found, DefenseCallback(recipe.defense)]

    def conclusions(self) -> list[str]:
        """What the search shows, in sentences; the figures are those of the held-out half."""
        base, attack = self.audits[BASE], self._leak_name()
        if self.best is None:
            return [
                f"No candidate loses at most {_points(self.floor)} of test accuracy. Raise floor, or try weaker "
                "strengths or a longer fine-tuning."
            ]
        found = self.audits[self.best]
        change = found.minus(base, ACCURACY)
        leak, accuracy = (
            f"{found.estimate(name)} instead of {base.estimate(name)}" for name in (self.measure, ACCURACY)
        )
        gained = found.minus(base, self.measure)
        lines = [f"Best: {self.best}. {attack} {leak}: {gained}; test accuracy {accuracy}: {change}."]
        if gained.interval.high >= 0:
            lines.append(f"It was not shown to leak less than {BASE}.")
        if change.interval.low > 0:
            lines.append(
                "The fine-tuning made the test accuracy higher: the base models may not be trained as yours was. Are "
                "the arguments of the first training right?"
            )
        if change.interval.high < -self.floor:
            lines.append(
                f"It loses more accuracy than the floor of {_points(self.floor)}, at least "
                f"{_points(-change.interval.high)}: the half of the examples that chose it was too kind. Search again "
                "with more models, or a smaller floor."
            )
        elif change.value < -self.floor:
            lines.append(
                f"The estimate of the loss of accuracy, {_points(-change.value)}, exceeds the floor of "
                f"{_points(self.floor)} here; on the half that chose it did not. For less, ask for a smaller floor."
            )
        elif change.interval.low < -self.floor:
            lines.append(
                f"The loss of accuracy may exceed the floor of {_points(self.floor)}: its interval reaches "
                f"{_points(-change.interval.low)}."
            )
        lines += [f"{self.best}: {remark}" for remark in found.remarks]
        rival = self._rival()
        if rival is not None:
            lines.append(self._compared(self.best, rival))
        better = [name for name, audit in self.audits.items() if self._is_better(audit, found)]
        if better:
            lines.append(
                f"Here {' and '.join(better)} had the better estimates of both accuracy and leak, by luck or not: the "
                "choice was made on the other half."
            )
        if len(self.trials) > 1:
            lines.append(
                "These figures are of other examples than the choice, but of the same models, which flatters the best "
                "of many candidates: before you report it, audit its recipe on models of another seed."
            )
        return lines

    def plot(self, path: str | PathLike[str]) -> Path:
        """Plot the test accuracy and LiRA's AUC of the finalists and the base models (:func:`plot_tradeoff`)."""
        rewinds = {each.name: each.rewinds for each in self.trials}
        ways: dict[str, dict[str, RecipeAudit]] = {BASE: {BASE: self.audits[BASE]}}
        for name, audit in self.audits.items():
            if name != BASE:
                ways.setdefault("CWRF" if rewinds[name] else "fine-tuned, r = 0", {})[name] = audit
        return plot_tradeoff(ways, path)

    def save(self, path: str | PathLike[str]) -> Path:
        """Save as one JSON file, without the recipes."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("recipes", "audits")}
        audits = {name: each.content() for name, each in self.audits.items()}
        return write_json({"format": _FORMAT, "version": __version__, **own, "audits": audits}, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RecipeSearch:
        """Load what :meth:`save` saved.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a search, is damaged, was changed, or is of another version.
        """
        content = read_json(path, _FORMAT, what="saved search", writer="RecipeSearch.save")
        content["audits"] = {name: RecipeAudit.of_content(each) for name, each in content["audits"].items()}
        for each in content["trials"]:
            for name in ("test_accuracy", "leak"):
                each[name] = estimate_of(each[name])
            change = each["accuracy_change"]
            each["accuracy_change"] = Difference(change["value"], Interval(*change["interval"]), change["p_value"])
        content["trials"] = [Trial(**each) for each in content["trials"]]
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})

    def to_markdown(self) -> str:
        """What ``print`` shows, as Markdown."""
        told = [f"- {markdown_text(line)}" for line in (*self.conclusions(), *self.remarks)]
        tables = [[*markdown_table(rows), ""] for rows in (self._held_out_rows(), self.dropped_rows()) if rows[1:]]
        return "\n".join([f"{self.size()}.", "", *(line for table in tables for line in table), *told]) + "\n"

    def __str__(self) -> str:
        lines = [self.size(), "", *aligned(self._held_out_rows())]
        dropped = self.dropped_rows()
        lines += ["", *aligned(dropped)] if dropped[1:] else []
        return "\n".join([*lines, "", *self.conclusions(), *self.remarks])

    def size(self) -> str:
        """How many candidates and models the search had."""
        models = sorted({each.models for each in self.trials})
        numbers = [f"{sum(each.models >= n for each in self.trials)} with {n}" for n in models]
        return (
            f"search over {len(self.trials)} recipes, {', '.join(numbers)} models; at most {_points(self.floor)} of "
            "test accuracy may be lost"
        )

    def _held_out_rows(self) -> list[list[str]]:
        """A row per finalist, on the half of the examples that took no part in the choice."""
        rows = [["held-out half", "test accuracy", self._leak_name(), "change of accuracy"]]
        for name, audit in self.audits.items():
            change = "" if name == BASE else str(audit.minus(self.audits[BASE], ACCURACY))
            mark = f"{name} (best)" if name == self.best else name
            rows.append([mark, str(audit.estimate(ACCURACY)), str(audit.estimate(self.measure)), change])
        return rows

    def dropped_rows(self) -> list[list[str]]:
        """A row per candidate that is no finalist, with the reason, by its last audit on the half that chooses."""
        rows = [["dropped, on the half that chooses", "models", "test accuracy", self._leak_name(), "why"]]
        dropped = [(each, each.dropped) for each in self.trials if each.dropped is not None]
        return rows + [[t.name, str(t.models), str(t.test_accuracy), str(t.leak), why] for t, why in dropped]

    def _is_better(self, audit: RecipeAudit, than: RecipeAudit) -> bool:
        return (
            audit.estimate(ACCURACY).value > than.estimate(ACCURACY).value
            and audit.estimate(self.measure).value < than.estimate(self.measure).value
        )

    def _leak_name(self) -> str:
        attack, _, metric = self.measure.partition("/")
        return f"{metric_name(metric)} of {attack_name(attack)}"

    def _standings(self) -> dict[str, Standing]:
        base = self.audits[BASE]
        return {
            each.name: Standing.of(self.audits[each.name], base, self.floor, self.measure, rewinds=each.rewinds)
            for each in self.finalists
        }

    def _rival(self) -> str | None:
        """The finalist of the other kind, rewinding or not, whose accuracy is closest to the best one's."""
        standings = self._standings()
        chosen = standings[self.best or ""]
        others = {name: each for name, each in standings.items() if each.rewinds != chosen.rewinds}
        return min(others, key=lambda name: abs(others[name].accuracy - chosen.accuracy), default=None)

    def _compared(self, name: str, rival: str) -> str:
        leak = self.audits[name].minus(self.audits[rival], self.measure)
        accuracy = self.audits[name].minus(self.audits[rival], ACCURACY)
        told = f"{self._leak_name()} differs by {leak}, test accuracy by {accuracy}"
        if leak.interval.low <= 0 <= leak.interval.high:
            return f"{name} and {rival} cannot be told apart in privacy here: {told}."
        return f"Against {rival}: {told}."


def _points(share: float) -> str:
    return f"{100 * share:.3g} points"
