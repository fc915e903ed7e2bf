"""Parts of the data, persons, and lists of members: against slow versions, and without a signal."""

import math
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from lightning_cwrf.auditing import AuditResult, audit_logits
from lightning_cwrf.metrics.functional import (
    auroc_p_value,
    benjamini_hochberg,
    holm,
    membership_auroc,
    tpr_at_fpr,
    tpr_p_value,
)
from lightning_cwrf.report import write_report
from tests.auditing.cases import estimate, made
from tests.oracles import discoveries as oracle


def result_of(scores, is_member, targets=None, **changes):
    n = len(scores)
    targets = torch.arange(n) % 2 if targets is None else targets
    return made(
        scores={"lira": scores.double()}, is_member=is_member, targets=targets, losses=-scores.double(), **changes
    )


def drawn(seed, n=300, shift=0.0):
    """n members and n non-members of three classes; members of class 2 score higher by ``shift``."""
    generator = torch.Generator().manual_seed(seed)
    is_member, targets = torch.arange(2 * n) < n, torch.randint(3, (2 * n,), generator=generator)
    scores = torch.randn(2 * n, generator=generator) + shift * (is_member & (targets == 2))
    return result_of(scores, is_member, targets)


def test_slices_by_hand():
    result = drawn(0, shift=2.0)
    found = result.slices(fpr=0.1)
    p = []
    for each, c in zip(found, (0, 1, 2), strict=True):
        chosen = result.targets == c
        scores, inside = result.scores["lira"][chosen], result.is_member[chosen]
        assert (each.value, each.members, each.nonmembers) == (c, int(inside.sum()), int((~inside).sum()))
        assert each.estimates["auroc"].value == float(membership_auroc(scores, inside))
        assert each.estimates["tpr_at_fpr_0.1"].value == float(tpr_at_fpr(scores, inside, 0.1))
        p += [auroc_p_value(scores, inside), tpr_p_value(scores, inside, 0.1)]
    adjusted = [e.p_value for s in found for e in s.estimates.values()]
    assert adjusted == holm(torch.tensor(p, dtype=torch.float64)).tolist()
    assert found.leaking() == [2]
    # Of the slice alone, the interval at 1 − 0.05 / 3.
    alone = result_of(scores, inside, confidence=1 - 0.05 / 3).slices([1] * len(scores))
    assert found[2].estimates["auroc"].interval == pytest.approx(alone[0].estimates["auroc"].interval)


def test_slices_are_printed_and_in_pandas():
    found = drawn(0, shift=2.0).slices(fpr=0.1)
    text = str(found)
    assert " ".join(text.splitlines()[0].split()) == "class members non-members AUC p TPR at 10% FPR p"
    assert "all 3 slices together at 95% (Bonferroni)" in text
    assert "all 6 tests (Holm)" in text
    assert "Better than guessing: 2." in text
    assert "| class |" in found.to_markdown()
    assert "<table" in found._repr_html_()
    frame = found.to_pandas()
    assert len(frame) == 6
    assert frame.value.tolist() == [e.value for s in found for e in s.estimates.values()]
    assert frame.p_value.tolist() == [e.p_value for s in found for e in s.estimates.values()]


def test_slices_by_loss_and_by_a_column():
    result = drawn(1)
    found = result.slices("loss_decile")
    assert [each.value for each in found] == list(range(1, 11))
    assert [each.members + each.nonmembers for each in found] == 10 * [60]
    ranks = result.losses.argsort().argsort()
    first = (ranks < 60) & result.is_member
    assert found[0].members == int(first.sum())
    words = ["ab"[i % 2] for i in range(600)]
    for column in (words, np.array(words), pd.Series(words, name="ward"), tuple(words), list(np.array(words))):
        by = result.slices(column)
        assert [each.value for each in by] == ["a", "b"]
        assert [each.estimates for each in by] == [each.estimates for each in result.slices(words)]
    assert result.slices(pd.Series(words, name="ward")).by == "ward"
    assert len(result.slices(torch.arange(600) % 4)) == 4
    assert len(result.slices(list(torch.arange(600) % 4))) == 4  # tensors in a list are their values
    assert [each.value for each in result.slices([*words[:-1], 3])] == ["a", "b", 3]  # no order: as they come


def test_a_slice_of_one_side_is_shown_and_not_measured():
    result = drawn(2)
    column = torch.where(result.is_member & (torch.arange(600) < 5), 9, 0)
    found = result.slices(column)
    assert [(each.value, each.members, bool(each.estimates)) for each in found] == [(0, 295, True), (9, 5, False)]
    assert "not measured" in str(found)
    assert "all 1 slices" in str(found)
    assert found.to_pandas().value.isna().sum() == 2


@pytest.mark.slow
def test_without_a_signal_few_audits_have_a_slice_that_leaks():
    """Of 100 audits with six tests each: intervals that hold together, and any slice at 5 % in at most 5 %."""
    held = found = 0
    for seed in range(100):
        slices = drawn(seed, n=150).slices(fpr=0.1)
        found += bool(slices.leaking())
        held += all(s.estimates["auroc"].interval.low <= 0.5 <= s.estimates["auroc"].interval.high for s in slices)
    assert found <= stats.binom.ppf(0.999, 100, 0.05)
    assert held >= stats.binom.ppf(0.001, 100, 0.95)


@pytest.mark.parametrize(
    ("by", "settings", "message"),
    [
        ("group", {}, "'class', 'loss_decile' or a column"),
        ([1, 2], {}, "each of the 12 audited examples, members first; it has 2"),
        ([None] + 11 * [1], {}, r"no value for 1 examples \(first \[0\]\)"),
        ([1.0] * 11 + [math.nan], {}, r"first \[11\]"),
        (list(range(12)), {}, "no slice by column has both"),
        ([[1]] * 12, {}, "which can be compared"),
        (3, {}, "no list but int"),
        ("class", {"attack": "nn"}, "this audit has no attack 'nn'"),
        ("class", {"fpr": 0}, "fpr"),
    ],
)
def test_slices_that_cannot_be_made_raise(by, settings, message):
    with pytest.raises(ValueError, match=message):
        made().slices(by, **settings)


def persons(seed, n=40, signal=0.0):
    """An audit of n + n persons with 1 to 4 examples each, whose scores share their person's noise."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, 2 * n)
    who = np.repeat(np.arange(2 * n), sizes)
    z = rng.normal(size=2 * n)[who] + 0.3 * rng.normal(size=len(who)) + signal * (who < n)
    inside = int((who < n).sum())
    y = np.ones(len(who), dtype=int)
    return audit_logits(members=(z[:inside], y[:inside]), nonmembers=(z[inside:], y[inside:])), who.tolist()


@pytest.mark.filterwarnings("ignore:the model")
def test_persons_by_hand():
    result, who = persons(0, signal=1.0)
    own = defaultdict(list)
    for person, score in zip(who, result.scores["loss"].tolist(), strict=True):
        own[person].append(score)
    for combine, value in (("mean", lambda s: sum(s) / len(s)), ("sum", sum), ({"loss": "sum"}, sum)):
        found = result.user_level([f"person {i}" for i in who], combine=combine)
        assert found.scores["loss"].tolist() == pytest.approx([value(own[i]) for i in range(80)])
        assert found.is_member.tolist() == [i < 40 for i in range(80)]
    expected = float(membership_auroc(found.scores["loss"], found.is_member))
    assert found.estimates["loss"]["auroc"].value == expected
    assert set(found.estimates["loss"]) == set(result.estimates["loss"])
    assert "40 members, 40 non-members" in str(found)
    assert f"80 persons with 1 to 4 of the {len(who)} examples" in str(found)
    one_each = result.user_level(range(len(who)))
    for name in ("auroc", "advantage", "mu_lower_bound"):
        assert one_each.estimates["loss"][name] == result.estimates["loss"][name]


@pytest.mark.filterwarnings("ignore:the model")
def test_persons_of_several_classes_are_saved_and_reported(tmp_path):
    result, who = persons(0)
    result.targets[1::2] = 0
    found = result.user_level(who)
    classes = [{int(result.targets[i]) for i, w in enumerate(who) if w == person} for person in range(80)]
    assert found.targets.tolist() == [c.pop() if len(c) == 1 else -1 for c in classes]
    assert AuditResult.load(found.save(tmp_path / "users.json")).values() == found.values()
    text = write_report({"users": found}, tmp_path / "report.html", class_names=["no", "yes"]).read_text()
    assert "<td>several</td>" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model")
def test_examples_of_one_person_are_too_sure_and_persons_are_not():
    """Without a signal, 30 audits: intervals over persons hold 1/2; those over examples often do not."""
    held = {"examples": 0, "persons": 0}
    for seed in range(30):
        result, who = persons(seed)
        for name, each in (("examples", result), ("persons", result.user_level(who))):
            low, high = each.estimates["loss"]["auroc"].interval
            held[name] += low <= 0.5 <= high
    assert held["persons"] >= stats.binom.ppf(0.001, 30, 0.95)
    assert held["examples"] < held["persons"]


@pytest.mark.parametrize(
    ("groups", "combine", "message"),
    [
        ([0] * 6 + [1] * 5 + [0], "mean", r"1 groups have members and non-members \(0\)"),
        ([0] * 12, "mean", "1 groups have members"),
        ([0] * 11, "mean", "each of the 12"),
        ([None] * 12, "mean", "no value for 12"),
        (list(range(12)), "max", "combine must be 'mean' or 'sum'"),
        (list(range(12)), {"rmia": "sum"}, "an attack in combine must be 'loss' or 'lira'"),
    ],
)
def test_persons_that_cannot_be_audited_raise(groups, combine, message):
    with pytest.raises(ValueError, match=message):
        by_hand().user_level(groups, combine=combine)


def by_hand():
    return made(model={"test_accuracy": estimate(0.5, 0.4, 0.6)})


def test_infinite_scores_of_both_signs_have_no_mean():
    result = by_hand()
    result.scores["loss"][0], result.scores["loss"][1] = math.inf, -math.inf
    with pytest.raises(ValueError, match="infinite scores of both signs by loss"):
        result.user_level([0, 0, *range(1, 11)])


def leaky(seed, share=0.3, m=200, n=400):
    generator = torch.Generator().manual_seed(seed)
    is_member = torch.arange(m + n) < m
    found = torch.rand(m + n, generator=generator) < share
    scores = torch.randn(m + n, generator=generator) + 4 * (is_member & found)
    return result_of(scores, is_member), found & is_member


@pytest.mark.parametrize("fdr", [0.05, 0.2])
def test_exposed_members_by_hand(fdr):
    result, _ = leaky(0)
    members, others = result.scores["lira"][:200].tolist(), result.scores["lira"][200:].tolist()
    p_values = oracle.conformal(members, others)
    expected = {i for i, rejected in enumerate(oracle.rejected_by_bh(p_values, fdr)) if rejected}
    found = result.exposed(fdr=fdr)
    assert {each.member for each in found} == expected
    assert len(found) > 20  # more than are listed without a rate
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert result.exposed(fdr=fdr, count=3) == found[:3]
    assert result.exposed(count=3) == found[:3]
    # Of one class: compared with its own non-members.
    nulls = [s for s, y in zip(others, result.targets[200:].tolist(), strict=True) if y == 1]
    own = [s for s, y in zip(members, result.targets[:200].tolist(), strict=True) if y == 1]
    expected = sum(oracle.rejected_by_bh(oracle.conformal(own, nulls), fdr))
    assert len(result.exposed(fdr=fdr, target=1)) == expected > 0
    assert all(each.target == 1 for each in result.exposed(fdr=fdr, target=1))


def test_the_rate_of_false_discoveries_in_audits():
    shares = []
    for seed in range(200):
        result, leaks = leaky(seed)
        found = [each.member for each in result.exposed(fdr=0.1)]
        shares.append(sum(not leaks[i] for i in found) / max(1, len(found)))
    shares = torch.tensor(shares, dtype=torch.float64)
    assert float(shares.mean()) <= 0.1 + 3 * float(shares.std()) / math.sqrt(200)
    assert float(shares.mean()) > 0.02  # of those that the rate could show


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"fdr": 0.1}, ValueError, "6 non-members cannot show a false discovery rate of 0.1.*at least 9 can"),
        ({"fdr": 0.3, "target": 1}, ValueError, "2 non-members cannot show.*at least 3 can"),
        ({"fdr": 0}, ValueError, "fdr must be a number"),
        ({"fdr": 1}, ValueError, "fdr must be a number"),
        ({"fdr": "5%"}, TypeError, "fdr must be a number"),
    ],
)
def test_rates_that_cannot_be_had_raise(settings, error, message):
    with pytest.raises(error, match=message):
        made().exposed(**settings)


def test_adjusted_values_are_where_the_list_ends():
    """A rate just above and just below an adjusted p-value."""
    result, _ = leaky(1)
    p = torch.tensor(oracle.conformal(result.scores["lira"][:200].tolist(), result.scores["lira"][200:].tolist()))
    adjusted = benjamini_hochberg(p.double()).unique()
    level = float(adjusted[2])
    above, below = (len(result.exposed(fdr=level * factor)) for factor in (1 + 1e-6, 1 - 1e-6))
    assert above > below


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize(("inside", "outside"), [(1, 8), (10, 2)])
def test_persons_with_more_examples_on_one_side_are_refused(inside, outside, combine):
    """Without any leak their number would tell them apart; with one it can hide it."""
    is_member = torch.arange(20 * (inside + outside)) < 20 * inside
    scores = torch.randn(len(is_member), generator=torch.Generator().manual_seed(0))
    result = result_of(scores, is_member, model={"test_accuracy": estimate(0.8, 0.7, 0.9)})
    groups = [f"m{i // inside}" for i in range(20 * inside)] + [f"n{i // outside}" for i in range(20 * outside)]
    with pytest.raises(ValueError, match=f"a member has {inside} examples on average and a non-member {outside}: the"):
        result.user_level(groups, combine=combine)


@pytest.mark.parametrize(
    "ids",
    [
        pd.Series(["a", pd.NA, pd.NA, "b"], dtype="string"),
        ["a", pd.NaT, pd.NA, "b"],
        pd.Series([1, None, None, 2], dtype="Int64"),
    ],
)
def test_persons_without_a_name_are_not_one_person(ids):
    sides = torch.tensor([True, True, False, False])
    result = result_of(torch.arange(4.0), sides, model={"test_accuracy": estimate(0.8, 0.7, 0.9)})
    with pytest.raises(ValueError, match=r"groups has no value for 2 examples \(first \[1, 2\]\)"):
        result.user_level(ids)
