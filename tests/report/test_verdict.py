"""The verdict of the HTML page, and its comparison of before and after: no more than the audits show."""

import math
import re
from dataclasses import replace

import pytest
import torch

from lightning_cwrf.auditing import audit_outputs
from lightning_cwrf.metrics.functional import resolvable_auc
from lightning_cwrf.outputs import ModelOutputs
from lightning_cwrf.report.changes import same_examples
from lightning_cwrf.report.verdict import rule, verdict
from tests.auditing.cases import estimate
from tests.report.cases import MANY, audited, page_of, random_audit

pytestmark = pytest.mark.slow


def test_an_attack_that_finds_members_is_named_with_its_uncertainty(tmp_path):
    result = random_audit(shift=2.0, attacks=["loss"])
    page, _ = page_of(result, tmp_path)
    auc = result.estimates["loss"]["auroc"]
    assert "Members can be told from non-members: loss attack beats guessing." in page.text
    bounds = f"(interval: {100 * auc.interval.low:.1f}% to {100 * auc.interval.high:.1f}%)"
    assert f"ranks the member higher in {100 * auc.value:.1f}% of cases {bounds}; guessing does so in 50%." in page.text
    members, nonmembers = result.scores["loss"][:60], result.scores["loss"][60:]
    found = int((members > nonmembers.max()).sum())
    assert f"Without accusing one of the 60 non-members, loss attack finds {found} of 60 members" in page.text
    assert "p ≤ 0.025: that is 5% divided by 2 tests" in page.text


@pytest.mark.parametrize("seed", range(3))
def test_an_audit_that_finds_nothing_says_what_it_could_not_have_seen_and_never_safe(tmp_path, seed):
    page, _ = page_of(random_audit(seed=seed, attacks=["loss", "entropy"]), tmp_path)
    assert "No attack that ran could be told from guessing. Another attack may do better." in page.text
    assert "no false positive rate below 1.7% can be seen" in page.text
    least = f"{resolvable_auc(60, 60, 1 - 0.05 / 4):.3f}"  # the four tests of the verdict together
    assert f"an AUC below {least} cannot be told from guessing" in page.text
    assert f"an AUC of at least {least} is significantly better than chance" in page.text
    assert ["the smallest that this audit can tell from guessing", least] in page.cells
    assert "No attack with shadow models ran." in page.text
    assert "read these numbers as those of a weak attacker" in page.text
    assert "an audit bounds nothing from above" in page.text
    assert not re.search(r"\b(safe|secure|private)\b", page.text, re.I)


def test_shadow_models_are_named_where_an_attack_used_them(tmp_path):
    page, _ = page_of(audited(), tmp_path)
    assert "LiRA compared the model with shadow models." in page.text
    assert "No attack with shadow models ran" not in page.text


def test_p_values_are_judged_all_together(tmp_path):
    """Four tests: 0.04 alone is no finding."""

    def at(p):
        estimates = {
            attack: {**found, "auroc": replace(found["auroc"], p_value=p)}
            for attack, found in audited().estimates.items()
        }
        for found in estimates.values():
            found["tpr_at_fpr_0.001"] = replace(found["tpr_at_fpr_0.001"], p_value=1.0)
        return audited(estimates=estimates)

    page, _ = page_of({"a": at(0.04)}, tmp_path)
    assert "No attack that ran could be told from guessing." in page.text
    page, _ = page_of({"a": at(0.0125)}, tmp_path, overwrite=True)
    assert "Members can be told from non-members: loss attack and LiRA beat guessing." in page.text


def test_an_attack_below_chance_gives_no_verdict(tmp_path):
    result = audited(0.2, low=0.1, high=0.3, attacks=["loss"])
    for found in result.estimates.values():
        found.update({name: replace(each, p_value=1.0) for name, each in found.items()})
    page, _ = page_of(result, tmp_path)
    assert "loss attack did worse than guessing" in page.text
    assert "this audit says nothing about the model" in page.text
    assert "could be told from guessing" not in page.text
    assert "are members and non-members swapped" in page.text


def test_an_attack_whose_interval_is_below_chance_gives_no_verdict():
    """As of members and non-members swapped by mistake, in a small audit."""
    result = random_audit(n=200, shift=-0.25, seed=1, attacks=["loss"])
    assert 0.4 < result.estimates["loss"]["auroc"].value < result.estimates["loss"]["auroc"].interval.high < 0.5
    said = verdict(result)
    assert said.level == "unknown"
    assert "or it is chance, which does this in at most about 2.5% of audits" in said.headline


def with_loss(value=0.5, low=0.4, high=0.6, p_value=1.0, **more):
    each = estimate(value, low, high, p_value=p_value)
    return audited(attacks=["loss"], estimates={"loss": {"auroc": each, "tpr_at_fpr_0.001": each}}, **more)


def test_what_was_not_measured_is_not_called_not_found():
    nan = math.nan
    assert verdict(with_loss()).level == "not found"
    for unmeasured in (
        with_loss(nan, nan, nan),
        with_loss(p_value=nan),
        with_loss(nan, nan, nan, p_value=None),
        audited(estimates={"loss": {"balanced_accuracy": estimate(0.5, 0.4, 0.6)}}, attacks=["loss"]),
        audited(estimates={}, attacks=[], failures={"loss": "no data"}),
    ):
        assert verdict(unmeasured).level == "unknown"
    assert not rule({"it": with_loss(p_value=nan)})
    result = with_loss(failures={"rmia": "no population"})
    result.estimates["lira"] = {"auroc": estimate(nan, nan, nan)}
    said = verdict(result)
    assert said.level == "not found"
    assert said.details[0] == "Failed, and not part of this verdict: RMIA."
    assert said.details[1].endswith("and not part of this verdict: LiRA.")


def test_examples_are_compared_by_content():
    """Equal labels alone are not the same data."""
    targets = torch.arange(20) % 3

    def of(inputs):
        sides = [
            ModelOutputs(torch.randn(20, 3), targets, [f"{inputs}-{side}-{i}" for i in range(20)]) for side in "ab"
        ]
        return audit_outputs(*sides)

    assert same_examples(of("x"), of("x"))
    assert not same_examples(of("x"), of("y"))
    assert same_examples(of("x"), replace(of("x"), examples=""))


def test_before_and_after_say_no_more_than_the_intervals(tmp_path):
    page, _ = page_of(MANY, tmp_path)
    assert "before → after: A gain in privacy was shown: loss attack AUC and LiRA AUC fell." in page.text
    assert "Loss attack AUC and LiRA AUC are lower; for the other measures of attacks the" in page.text
    same = {"a": audited(0.7), "b": audited(0.65), "c": audited(0.95, low=0.91, high=0.99)}
    page, _ = page_of(same, tmp_path, overwrite=True)
    assert "For all measures of attacks the intervals overlap." in page.text
    assert "a → b: No gain in privacy was shown" in page.text
    assert "a → c: Privacy was lost: loss attack AUC and LiRA AUC rose." in page.text
    assert "Loss attack AUC and LiRA AUC are higher;" in page.text
    assert "these audits cannot tell" in page.text
    assert "different examples" not in page.text
    assert "compared by labels alone" in page.text
    page, _ = page_of({"a": audited(), "b": audited(n=8)}, tmp_path, overwrite=True)
    assert "is not known: the two audits are of different examples, or read them differently." in page.text
    assert "by labels alone" not in page.text
    page, _ = page_of(audited(), tmp_path, overwrite=True)
    assert "Before and after" not in page.text


def test_an_attack_that_failed_on_one_model_is_not_compared(tmp_path):
    page, _ = page_of({"a": audited(), "b": audited(attacks=["loss"], failures={"lira": "no"})}, tmp_path)
    assert "LiRA AUC and LiRA TPR at 0.1% FPR cannot be compared." in page.text
    assert ["LiRA AUC", "0.750 [0.600, 0.900]", "failedcannot be compared"] in page.cells


def test_an_audit_in_which_every_attack_failed_says_nothing(tmp_path):
    page, text = page_of(audited(attacks=[]), tmp_path)
    assert "No attack could run: this audit says nothing about the model." in page.text
    assert "RMIA failed: no population" in page.text
    assert "ROC of" not in text
