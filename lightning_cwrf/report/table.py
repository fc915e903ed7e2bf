"""Text tables of audits side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_cwrf.audit import FPR, AuditResult, aligned

_MODEL_ROWS = {
    "train_accuracy": "train accuracy",
    "test_accuracy": "test accuracy",
    "loss_gap": "loss gap (test − train)",
}
_SHOWN = ("auroc", f"tpr_at_fpr_{FPR:g}")
ATTACK_NAMES = {"loss": "loss attack", "lira": "LiRA", "rmia": "RMIA"}


def comparison_table(results: Mapping[str, AuditResult], seconds: Mapping[str, float] | None = None) -> str:
    """A table with a column per model and a row per measure, each value with its confidence interval.

    Args:
        results: audits by the name of the model.
        seconds: time spent on each, for a last row.

    Returns:
        The table, and under it a line for each thing the numbers cannot show.
    """
    rows: list[list[str]] = [["", *results]]
    for key, label in _MODEL_ROWS.items():
        rows.append([label, *(str(result.model[key]) for result in results.values())])
    attacks = list(dict.fromkeys(attack for result in results.values() for attack in result.estimates))
    for attack in attacks:
        for key, label in {"auroc": "AUC", f"tpr_at_fpr_{FPR:g}": f"TPR at {FPR:.1%} FPR"}.items():
            cells = (
                str(result.estimates[attack][key]) if attack in result.estimates else "failed"
                for result in results.values()
            )
            rows.append([f"{ATTACK_NAMES.get(attack, attack)} {label}", *cells])
    if seconds is not None:
        rows.append(["seconds", *(f"{seconds[name]:.1f}" for name in results)])
    return _laid_out(rows, list(results.values()))


def tradeoff_table(results: Mapping[str, Mapping[str, AuditResult]]) -> str:
    """A table with a row per model: what it is worth, and what each attack finds.

    Args:
        results: audits by the way a model was trained, and then by its defense.

    Returns:
        The table, with a defense's rows together, and under it a line for each thing the numbers cannot show.
    """
    every = [result for audits in results.values() for result in audits.values()]
    attacks = list(dict.fromkeys(attack for result in every for attack in result.estimates))
    tpr = f"tpr_at_fpr_{FPR:g}"
    rows = [["defense", "way", "train accuracy", "test accuracy"]]
    for attack in attacks:
        name = ATTACK_NAMES.get(attack, attack)
        rows[0] += [f"{name} AUC", f"{name} TPR at {FPR:.1%} FPR"]
    for defense in dict.fromkeys(defense for audits in results.values() for defense in audits):
        for way, audits in results.items():
            if defense not in audits:
                continue
            result = audits[defense]
            row = [defense, way, str(result.model["train_accuracy"]), str(result.model["test_accuracy"])]
            for attack in attacks:
                found = result.estimates.get(attack)
                row += ["failed", "failed"] if found is None else [str(found["auroc"]), str(found[tpr])]
            rows.append(row)
    return _laid_out(rows, every)


def _laid_out(rows: list[list[str]], results: Sequence[AuditResult]) -> str:
    rule = ["─" * max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = aligned([rows[0], rule, *rows[1:]])
    confidence = {f"{result.confidence:.0%}" for result in results}
    notes = dict.fromkeys(note for result in results for note in result.notes(_SHOWN))
    return "\n".join([*lines, "", f"In brackets: {'/'.join(sorted(confidence))} confidence interval.", *notes])
