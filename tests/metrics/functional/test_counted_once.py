"""Scores that several measures count are sorted once, and nothing else changes."""

from contextlib import nullcontext

import pytest
import torch

from lightning_cwrf.auditing import audit_outputs, estimates
from lightning_cwrf.metrics.functional import membership_auroc, roc
from lightning_cwrf.metrics.functional.roc import count_scores, counted_once
from lightning_cwrf.outputs import ModelOutputs

SCORES, IS_MEMBER = torch.tensor([0.5, 1.0, 0.5, 2.0]), torch.tensor([True, True, False, False])


@pytest.fixture
def sorts(monkeypatch):
    """The number of scores of each call that sorts."""
    sizes, unique = [], torch.unique
    monkeypatch.setattr(roc.torch, "unique", lambda x, **how: sizes.append(len(x)) or unique(x, **how))
    return sizes


def test_equal_scores_are_counted_again_only_outside(sorts):
    with counted_once():
        first = count_scores(SCORES, IS_MEMBER)
        assert count_scores(SCORES.clone(), IS_MEMBER.clone()) is first
        assert len(sorts) == 1
    assert count_scores(SCORES, IS_MEMBER) is not first
    with counted_once():
        assert count_scores(SCORES, IS_MEMBER) is not first
    assert len(sorts) == 3


@pytest.mark.parametrize(
    "other",
    [
        (SCORES.double(), IS_MEMBER),
        (SCORES + 1, IS_MEMBER),
        (SCORES, ~IS_MEMBER),
        (SCORES[:3], IS_MEMBER[:3]),
        (SCORES.flip(0), IS_MEMBER),
    ],
)
def test_others_are_told_apart(other):
    expected = count_scores(*other)
    with counted_once():
        count_scores(SCORES, IS_MEMBER)
        found = count_scores(*other)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def test_scores_that_are_written_to_are_counted_again():
    scores = SCORES.clone()
    with counted_once():
        assert membership_auroc(scores, IS_MEMBER) == 0.375
        scores[0] = 3.0
        assert membership_auroc(scores, IS_MEMBER) == 0.75


def test_what_cannot_be_counted_is_an_error_inside_too():
    with counted_once():
        count_scores(SCORES, IS_MEMBER)
        for scores, is_member, error in (
            (SCORES.tolist(), IS_MEMBER, TypeError),
            (SCORES, IS_MEMBER.float(), ValueError),
            (torch.full((4,), torch.nan), IS_MEMBER, ValueError),
        ):
            for _ in range(2):
                with pytest.raises(error):
                    count_scores(scores, is_member)


def test_few_other_scores_are_kept(sorts):
    with counted_once():
        for _ in range(2):
            for shift in range(3):
                count_scores(SCORES + shift, IS_MEMBER)
    assert len(sorts) == 6


def test_an_audit_sorts_the_scores_of_an_attack_once_with_the_same_result(sorts, monkeypatch):
    def outputs(seed, shift):
        logits = torch.randn(60, 3, generator=torch.Generator().manual_seed(seed))
        return ModelOutputs(logits + shift, torch.arange(60) % 3, [bytes([seed, i]) for i in range(60)])

    given = outputs(0, torch.tensor([1.0, 0.0, 0.0])), outputs(1, torch.zeros(3))
    once = audit_outputs(*given, attacks=["loss", "entropy"])
    assert sorts.count(120) == 2  # one for each attack
    assert sum(size < 120 for size in sorts) == 2  # half of the examples, for the bound on ε
    monkeypatch.setattr(estimates, "counted_once", nullcontext)
    sorts.clear()
    again = audit_outputs(*given, attacks=["loss", "entropy"])
    assert sorts.count(120) > 20
    assert again.estimates == once.estimates
