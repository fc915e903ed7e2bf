"""Text tables of audits side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, NamedTuple, TypeAlias

import torch

from lightning_cwrf.auditing import FPR, AuditResult, Estimate, RecipeAudit, aligned
from lightning_cwrf.auditing.attack_settings import settings_differ
from lightning_cwrf.auditing.findings import Findings
from lightning_cwrf.auditing.names import attack_name, metric_name
from lightning_cwrf.auditing.tables import percent
from lightning_cwrf.checks import check_number

AnyAudit: TypeAlias = AuditResult | RecipeAudit
"""An audit of one model, or of a way of training."""

MODEL_ROWS = {
    "train_accuracy": "train accuracy",
    "test_accuracy": "test accuracy",
    "loss_gap": "loss gap (test − train)",
}
_SHOWN = ("auroc", f"tpr_at_fpr_{FPR:g}")


def comparison_table(results: Mapping[str, Findings], seconds: Mapping[str, float | None] | None = None) -> str:
    """A table with a column per model and a row per measurement, each value with its confidence interval.

    Args:
        results: audits by the name of the model, or of recipes by the name of the recipe.
        seconds: the time spent on each, for a last row; None for a model that was not trained here.

    Returns:
        The table, followed by the notes of the audits.

    Raises:
        TypeError: no mapping from names to audits.
        ValueError: no audit; intervals of different confidence; one audit under two names; a model without seconds.
    """
    return _layout(comparison_rows(results, seconds), results)


def comparison_rows(
    results: Mapping[str, Findings], seconds: Mapping[str, float | None] | None = None
) -> list[list[str]]:
    """The cells of :func:`comparison_table`: the names of the models, then a row per measurement."""
    check_results(results, kinds=(AuditResult, RecipeAudit))
    check_comparable(results)
    if seconds is not None and (missing := [name for name in results if name not in seconds]):
        raise ValueError(f"seconds must have one number for each model; {', '.join(missing)} has none.")
    for name in results if seconds is not None else ():
        if seconds is not None and seconds[name] is not None:
            check_number(f"seconds of {name}", seconds[name], low=0)
    rows = [["", *results]]
    rows += [
        [label, *(cell(result, attack, metric) for result in results.values())]
        for label, attack, metric in _measures(results.values())
    ]
    if seconds is not None:
        spent = [seconds[name] for name in results]
        if any(each is not None for each in spent):
            rows.append(["seconds", *("–" if each is None else f"{each:.1f}" for each in spent)])
    return rows


class Row(NamedTuple):
    """A measure of :func:`comparison_table`: its label, its name as in ``values()``, and each audit's estimate."""

    label: str
    measure: str
    estimates: list[Estimate | None]


def compared(results: Iterable[Findings]) -> list[Row]:
    """The measures of :func:`comparison_table`; an estimate that an audit does not have is None."""
    results = list(results)
    return [
        Row(
            label,
            metric if attack is None else f"{attack}/{metric}",
            [_estimates(result, attack).get(metric) for result in results],
        )
        for label, attack, metric in _measures(results)
    ]


def cell(result: Findings, attack: str | None, metric: str) -> str:
    """An estimate as text, or why there is none; attack None: of the model itself."""
    found = _estimates(result, attack).get(metric)
    return missing(result, attack) if found is None else str(found)


def missing(result: Findings, attack: str | None) -> str:
    """Why an audit has no estimate of an attack."""
    if attack in result.failures:
        return "failed"
    return "not measured" if attack is None or attack in result.estimates else "not run"


def _measures(results: Iterable[Findings]) -> list[tuple[str, str | None, str]]:
    """The rows of :func:`comparison_table`: label, attack (None: the model itself) and metric."""
    attacks = attacks_in(results)
    own: list[tuple[str, str | None, str]] = [(label, None, key) for key, label in MODEL_ROWS.items()]
    return own + [(f"{attack_name(a)} {metric_name(key)}", a, key) for a in attacks for key in _SHOWN]


def _estimates(result: Findings, attack: str | None) -> Mapping[str, Estimate]:
    return result.model_metrics if attack is None else result.estimates.get(attack, {})


def comparison_notes(results: Iterable[Findings]) -> list[str]:
    """The notes below :func:`comparison_table`, each once."""
    results = list(results)
    notes = dict.fromkeys(note for result in results for note in result.notes(_SHOWN))
    return [f"In brackets: {percent(results[0].confidence)} confidence interval.", *notes]


def attacks_in(results: Iterable[Findings]) -> list[str]:
    """The attacks that ran on at least one model."""
    return list(dict.fromkeys(attack for result in results for attack in result.estimates))


def tradeoff_table(results: Mapping[str, Mapping[str, Findings]]) -> str:
    """A table with a row per model: its accuracies, and the results of each attack.

    Args:
        results: audits by the way of training, then by defense.

    Returns:
        The table, grouped by defense, followed by the notes of the audits.

    Raises:
        TypeError: no audits by way of training and defense.
        ValueError: no audit; intervals of different confidence; one audit under two names.
    """
    check_tradeoff(results)
    named = {f"{d} ({way})": r for way, audits in results.items() for d, r in audits.items()}
    check_comparable(named)
    every = list(named.values())
    attacks = attacks_in(every)
    rows = [["defense", "way", "train accuracy", "test accuracy"]]
    for attack in attacks:
        rows[0] += [f"{attack_name(attack)} {metric_name(key)}" for key in _SHOWN]
    for defense in dict.fromkeys(defense for audits in results.values() for defense in audits):
        for way, audits in results.items():
            if defense not in audits:
                continue
            result = audits[defense]
            accuracies = (result.model_metrics[name] for name in ("train_accuracy", "test_accuracy"))
            row = [defense, way, *map(str, accuracies)]
            for attack in attacks:
                row += [cell(result, attack, key) for key in _SHOWN]
            rows.append(row)
    return _layout(rows, named)


def check_results(results: Any, attack: str | None = None, kinds: tuple[type[Findings], ...] = (AuditResult,)) -> None:
    """Raise unless ``results`` are audits by name, at least one, all with this attack (None: with any).

    ``kinds`` are those that can be shown; plots of scores are of one model each.
    """
    if not isinstance(results, Mapping):
        raise TypeError(
            f"results must be audits by the name of the model, such as {{'before': result}}, not a "
            f"{type(results).__name__}."
        )
    if not results:
        raise ValueError("there is no audit to show: results is empty.")
    for name, result in results.items():
        if not str(name).strip():
            raise ValueError("an audit has an empty name: name what was audited.")
        if isinstance(result, Mapping):
            raise TypeError(
                f"{name!r} is a {type(result).__name__} of audits, not an AuditResult: results by way and defense are "
                "for tradeoff_table and plot_tradeoff."
            )
        if not isinstance(result, kinds):
            wanted = " or a ".join(each.__name__ for each in kinds)
            raise TypeError(f"{name!r} must be an {wanted}, not a {type(result).__name__}.")
        if attack is not None and attack not in result.estimates:
            raise ValueError(
                f"{name!r} was not audited with {attack!r}; it has {', '.join(result.estimates) or 'none'}."
            )


def check_tradeoff(results: Any, attack: str | None = None) -> None:
    """Raise unless ``results`` are audits by way of training and defense, at least one, all with this attack."""
    if not isinstance(results, Mapping) or any(isinstance(audits, Findings) for audits in results.values()):
        kind = "audits by one name" if isinstance(results, Mapping) else f"a {type(results).__name__}"
        raise TypeError(
            f"results must be audits by the way a model was trained and then by its defense, such as "
            f"{{'from scratch': {{'relaxloss': result}}}}, not {kind}."
        )
    if not any(results.values()):
        raise ValueError("there is no audit to show: results is empty.")
    for audits in results.values():
        if audits or not isinstance(audits, Mapping):
            check_results(audits, attack, (AuditResult, RecipeAudit))


def check_comparable(results: Mapping[str, Findings]) -> None:
    """Raise a ValueError for intervals of different confidence, and for one audit under two names."""
    levels = {f"{result.confidence:.6g}": name for name, result in results.items()}
    if len(levels) > 1:
        raise ValueError(
            "the audits have intervals of different confidence, which cannot be compared: "
            f"{', '.join(f'{level} ({name})' for level, name in levels.items())}. Audit them at one confidence."
        )
    for (first, one), (second, other) in combinations(results.items(), 2):
        if _is_same_audit(one, other):
            raise ValueError(
                f"{first!r} and {second!r} are the same audit: the same weights, examples and scores. Audit each model "
                "when it has its own weights: a fit changes the model itself, so audit the finished one before it."
            )


def same_weights(first: Findings, other: Findings) -> bool:
    """Whether two audits are known to be of the same weights."""
    if not isinstance(first, AuditResult) or not isinstance(other, AuditResult):
        return False  # a recipe has many
    return first.weights == other.weights != ""


def comparison_remarks(results: Mapping[str, Findings]) -> list[str]:
    """What makes audits differ beside the models."""
    return [*of_one_model(results), *of_other_attacks(results), *of_other_sizes(results), *of_other_pools(results)]


def of_one_model(results: Mapping[str, Findings]) -> list[str]:
    """A remark for every two audits of the same weights, which a comparison says are two models."""
    return [
        f"{first} and {second} are audits of the same weights: differences between them are not of the model."
        for (first, one), (second, other) in combinations(results.items(), 2)
        if same_weights(one, other)
    ]


def of_other_sizes(results: Mapping[str, Findings]) -> list[str]:
    """A remark where recipes are attacked with different numbers of models."""
    sizes = {name: len(result) for name, result in results.items() if isinstance(result, RecipeAudit)}
    if len(set(sizes.values())) < 2:
        return []
    told = ", ".join(f"{name} of {size}" for name, size in sizes.items())
    return [f"The recipes have different numbers of models ({told}): more shadow models are a stronger attack."]


def of_other_pools(results: Mapping[str, Findings]) -> list[str]:
    """A remark for recipes that are not of one pool and membership, and are no pairs."""
    recipes = [(name, result) for name, result in results.items() if isinstance(result, RecipeAudit)]
    return [
        f"{first} and {name} have other pools, labels, memberships or populations: they differ by these too, and are "
        "not compared in pairs."
        for (first, one), (name, other) in combinations(recipes, 2)
        if len(one) == len(other) and one.data != other.data
    ]


def of_other_attacks(results: Mapping[str, Findings]) -> list[str]:
    """A remark for every two audits that ran different attacks under one name."""
    return [
        f"{first} and {second} ran different attacks as {attack}, {one.attack_settings[attack]} and "
        f"{other.attack_settings[attack]}: their rows do not compare."
        for (first, one), (second, other) in combinations(results.items(), 2)
        for attack in settings_differ(one.attack_settings, other.attack_settings)
    ]


def _is_same_audit(first: Findings, other: Findings) -> bool:
    if not isinstance(first, AuditResult) or not isinstance(other, AuditResult) or not same_weights(first, other):
        return False
    return (
        first.examples == other.examples != ""
        and first.scores.keys() == other.scores.keys()
        and all(torch.equal(scores, other.scores[attack]) for attack, scores in first.scores.items())
    )


def _layout(rows: list[list[str]], results: Mapping[str, Findings]) -> str:
    rule = ["─" * max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = aligned([rows[0], rule, *rows[1:]])
    remarks = [*comparison_remarks(results), *comparison_notes(results.values())]
    return "\n".join([*lines, "", *remarks])
