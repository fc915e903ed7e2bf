"""Differences of recipes: what may be compared, and what a measure without any spread shows."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_cwrf import RecipeAudit
from lightning_cwrf.attacks import create_attack, register_attack
from lightning_cwrf.attacks.base import ATTACKS
from lightning_cwrf.metrics.base import METRICS, MembershipMetric, register_metric
from lightning_cwrf.report import comparison_table, write_report
from lightning_cwrf.report.changes import conclusion
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership
from tests.auditing.recipes import run, simulated
from tests.report.cases import audited


def test_the_same_examples_with_other_labels_are_another_pool():
    shadows = simulated()
    relabelled = replace(shadows, targets=torch.arange(96) % 2)
    with pytest.raises(ValueError, match="another pool"):
        run(shadows, ["loss"]).minus(run(relabelled, ["loss"]), "loss/auroc")


def test_attacks_with_other_settings_are_not_compared(tmp_path):
    shadows = simulated(leak=2.0)
    one, other = run(shadows, ["loss", "lira"]), run(shadows, ["loss", create_attack("lira", online=False)])
    assert one.attack_settings["lira"] == "lira(online=True, variance='auto')"
    for audit in (other, RecipeAudit.load(other.save(tmp_path / "audit.json"))):
        with pytest.raises(ValueError, match=r"under one name, lira\(online=True, .*\) and lira\(online=False"):
            one.minus(audit, "lira/auroc")
        assert one.minus(audit, "loss/auroc").value == 0
        told = " ".join(conclusion({"before": one, "after": audit}))
        assert "A gain" not in told
        assert "lost" not in told
        assert "before and after ran different attacks as lira" in comparison_table({"before": one, "after": audit})
    given = run(shadows, ["loss", create_attack("lira", online=True, variance="auto")])
    assert given.minus(one, "lira/auroc").value == 0
    unknown = replace(one, attack_settings={})  # as older versions saved it
    assert unknown.minus(other, "lira/auroc").value != 0


def test_two_attacks_of_one_name_are_told_apart_by_their_functions():
    def rank(evidence):
        return -evidence.logits[:, 0]

    audits = []
    for each in (rank, lambda evidence: evidence.logits[:, 0]):
        with ATTACKS.temporary():
            register_attack("own")(each)
            audits.append(run(simulated(), ["own"]))
    with pytest.raises(ValueError, match=r"different attacks under one name, own: .*rank"):
        audits[0].minus(audits[1], "own/auroc")


def test_audits_of_one_model_with_other_settings_show_no_gain(tmp_path):
    before, after = audited(0.9, low=0.8, high=1.0), audited(0.6, low=0.5, high=0.7)
    told = " ".join(conclusion({"a": before, "b": after}))
    assert "loss attack AUC and LiRA AUC fell" in told
    settings = [{"lira": "lira(online=True)"}, {"lira": "lira(online=False)"}]
    before, after = (replace(a, attack_settings=s) for a, s in zip((before, after), settings, strict=True))
    audits = {"a": before, "b": after}
    told = " ".join(conclusion(audits))
    assert "loss attack AUC fell" in told
    page = write_report(audits, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a and b ran different attacks as lira" in page
    assert "LiRA AUC fell" not in told


def test_a_table_says_that_recipes_are_of_different_pools():
    audits = {"one": run(simulated(), ["loss"]), "other": run(simulated(seed=1), ["loss"])}
    assert "one and other have other pools, labels" in comparison_table(audits)


def test_a_loss_of_accuracy_is_told_with_its_interval_and_is_not_excused_by_other_measures():
    before, after = (run(simulated(better=better, models=16), ["loss", "lira"]) for better in (1.0, 0.85))
    difference = after.minus(before, "test_accuracy")
    assert difference.interval.high < 0
    told = conclusion({"before": before, "after": after})[-1]
    assert f"Test accuracy fell from {before.estimate('test_accuracy').value:.3f} to " in told
    assert str(difference) in told


def test_a_table_says_that_recipes_have_different_numbers_of_models():
    audits = {"few": run(simulated(), ["loss"]), "many": run(simulated(models=10), ["loss"])}
    assert "different numbers of models (few of 8, many of 10)" in comparison_table(audits)
    assert "numbers of models" not in comparison_table({"few": audits["few"], "again": audits["few"]})


def constant(value, models=8, examples=64):
    """Members are always sure, and non-members have this margin: every model has the same AUC."""
    membership = balanced_membership(models, examples, 0)
    margin = torch.where(membership, 5.0, value) + 1e-3 * torch.arange(models)[:, None]
    targets = torch.ones(examples, dtype=torch.long)
    return ShadowOutputs.from_arrays(torch.stack([torch.zeros_like(margin), margin], -1), membership, targets)


def test_a_measure_that_is_the_same_in_all_models_is_not_certain():
    found, chance = run(constant(1.0), ["loss"]), run(constant(5.0), ["loss"])
    assert (found.estimate("loss/auroc").value, chance.estimate("loss/auroc").value) == (1.0, 0.5)
    difference = found.minus(chance, "loss/auroc")
    mine, others = (each.estimate("loss/auroc").interval for each in (found, chance))
    assert difference.value == 0.5
    assert difference.interval == (mine.low - others.high, mine.high - others.low)
    assert difference.p_value == pytest.approx(0.05)
    near = found.minus(run(constant(4.95), ["loss"]), "train_accuracy")
    assert (near.value, near.p_value) == (0.0, 1.0)
    nothing = chance.minus(run(constant(5.0), ["loss"]), "loss/tpr_at_fpr_0.001")
    assert nothing.value == 0
    assert nothing.interval.high > 0.05
    assert nothing.p_value == 1.0


def test_a_measure_that_is_no_number_stays_so_when_it_is_saved(tmp_path):
    class Odd(MembershipMetric):
        value_function = staticmethod(lambda scores, members: torch.tensor(float("nan")))
        interval_function = staticmethod(lambda scores, members, confidence: (float("nan"), float("nan")))

    with METRICS.temporary():
        register_metric("odd")(Odd)
        found = run(simulated(), ["loss"])
    for audit in (found, RecipeAudit.load(found.save(tmp_path / "odd.json"))):
        difference = audit.minus(audit, "loss/odd")
        assert math.isnan(difference.value)
        assert math.isnan(difference.p_value)


def test_the_chance_of_the_tpr_is_that_of_each_models_non_members():
    """From 999 to 1,000 non-members one false positive is allowed at an FPR of 0.1 %, and chance doubles."""
    found = run(simulated(examples=1999, population=40), ["loss"])
    members = found.is_member.sum(1)
    assert sorted(set((1999 - members).tolist())) == [999, 1000]
    measure = "loss/tpr_at_fpr_0.001"
    mean = (1 / 1000 + 2 / 1001) / 2
    assert found.estimate(measure).p_value == pytest.approx(found.jackknives[measure].p_value(mean))
