"""What a comparison of audits amounts to, in sentences for the terminal and the page."""

import math
from dataclasses import replace

import pytest

from lightning_cwrf.report.changes import conclusion, gain
from lightning_cwrf.report.verdict import verdict
from tests.auditing.cases import estimate
from tests.report.cases import audited


def at(auc, low, high, accuracy=0.8, **more):
    return audited(auc, low=low, high=high, accuracy=accuracy, **more)


BEFORE = at(0.9, 0.85, 0.95, accuracy=0.97)


def test_overlapping_intervals_are_no_gain_and_a_loss_of_accuracy_is_told():
    after = replace(at(0.88, 0.8, 0.93), model_metrics=BEFORE.model_metrics)
    after.model_metrics["test_accuracy"] = estimate(0.97, 0.95, 0.98)
    before = replace(BEFORE, model_metrics={**after.model_metrics, "test_accuracy": estimate(0.97, 0.96, 0.98)})
    fallen = replace(after, model_metrics={**after.model_metrics, "test_accuracy": estimate(0.93, 0.91, 0.94)})
    assert gain(before, fallen) == (
        "No gain in privacy was shown: no measure of an attack is lower by more than the intervals. Test accuracy fell "
        "from 0.970 to 0.930."
    )
    assert gain(before, after).endswith("Test accuracy went from 0.970 to 0.970, and the intervals overlap.")


def mixed():
    found = at(0.6, 0.5, 0.7)
    found.estimates["lira"]["auroc"] = estimate(0.99, 0.96, 1.0)
    return found


CHANGED = {
    "lower": (at(0.6, 0.5, 0.7), "A gain in privacy was shown: loss attack AUC and LiRA AUC fell. Test accuracy"),
    "higher": (at(0.99, 0.96, 1.0), "Privacy was lost: loss attack AUC and LiRA AUC rose."),
    "both": (mixed(), "Gain and loss of privacy: loss attack AUC fell, but LiRA AUC rose."),
    "other examples": (at(0.6, 0.5, 0.7, n=8), "Whether privacy was gained is not known: the two audits are of diff"),
    "nothing ran": (audited(attacks=[]), "Whether privacy was gained is not known: there is no verdict on one"),
    "not run": (at(0.6, 0.5, 0.7, attacks=["loss"]), "A gain in privacy was shown: loss attack AUC fell."),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_gain_is_told_where_the_intervals_show_it(case):
    after, said = CHANGED[case]
    assert gain(BEFORE, after).startswith(said)


def test_attacks_that_two_audits_do_not_share_show_no_gain():
    one, other = at(0.9, 0.8, 1.0, attacks=["loss"]), at(0.6, 0.5, 0.7, attacks=["lira"])
    assert gain(one, other).startswith("Whether privacy was gained is not known: the two audits have no attack in")


def test_accuracies_that_are_no_numbers_cannot_be_compared():
    odd = at(0.6, 0.5, 0.7)
    odd = replace(odd, model_metrics={**odd.model_metrics, "test_accuracy": estimate(math.nan, 0.0, 1.0)})
    assert gain(BEFORE, odd).endswith("Test accuracies cannot be compared.")


def test_a_conclusion_has_every_verdict_and_compares_the_first_and_neighbours():
    results = {"finished": BEFORE, "control": at(0.6, 0.5, 0.7), "hardened": at(0.61, 0.5, 0.7)}
    lines = conclusion(results)
    assert lines[:3] == [f"{name}: {verdict(result).headline}" for name, result in results.items()]
    assert [line.partition(":")[0] for line in lines[3:]] == [
        "finished → control",
        "finished → hardened",
        "control → hardened",
    ]
    assert "No gain" in lines[-1]
    assert conclusion({"only": BEFORE}) == [f"only: {verdict(BEFORE).headline}"]
