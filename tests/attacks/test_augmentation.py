"""The augmentation attack and its default views."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cwrf.attacks import (
    augmentation_attack,
)
from lightning_cwrf.attacks.augmentation import default_views
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.shadows import balanced_membership
from tests.attacks.cases import seeds
from tests.oracles import attacks as oracle


@pytest.mark.slow
@given(seeds, st.sampled_from([1, 4]))
@settings(max_examples=30)
def test_the_augmentation_attack_against_loops(seed, views):
    torch.manual_seed(seed)
    membership, correct = balanced_membership(4, 15, seed), torch.rand(views, 15) < 0.6
    shadows = torch.rand(views, 4, 15) < torch.where(membership, 0.8, 0.5)
    expected = oracle.augmentation(correct.tolist(), shadows.tolist(), membership.tolist())
    assert augmentation_attack(correct, shadows, membership).tolist() == pytest.approx(expected, rel=1e-12)
    shares = [sum(column) / views for column in zip(*correct.tolist(), strict=True)]
    assert augmentation_attack(correct).tolist() == pytest.approx(shares)


def test_the_default_views_are_the_image_small_rotations_and_translations():
    views = default_views()
    assert len(views) == 9
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1.0
    assert torch.equal(views[0](image), image)
    right, left, down, up = (view(image) for view in views[5:])
    for moved, place in ((right, (4, 5)), (left, (4, 3)), (down, (5, 4)), (up, (3, 4))):
        assert float(moved.sum()) == pytest.approx(1)
        assert float(moved[(0, 0, *place)]) == pytest.approx(1)
    assert [view(image)[0, 0, 3, 4] == 1 for view in default_views(pixels=2)[5:]] == [False] * 4
    bar = torch.zeros(1, 1, 21, 21)
    bar[0, 0, 10, :] = 1.0
    heights = [float((view(bar)[0, 0] * torch.arange(21.0)[:, None])[:, 18].sum()) for view in views[1:5]]
    angles = [math.degrees(math.atan((10 - h) / 8)) for h in heights]
    assert angles == pytest.approx([-8, -4, 4, 8], abs=1.2)
    assert len(default_views(degrees=(5,))) == 6
    for wrong in (torch.zeros(4, 4), torch.zeros(1, 1, 4, 4).long()):
        with pytest.raises(ValueError, match="the default views rotate and move images"):
            views[0](wrong)
    assert views[0](torch.zeros(2, 4, 4)).shape == (2, 4, 4)


def test_the_augmentation_attack_with_shadow_models():
    torch.manual_seed(0)
    membership = balanced_membership(8, 500)
    shadow = torch.rand(6, 8, 500) < torch.where(membership, 0.9, 0.6)
    is_member = torch.rand(500) < 0.5
    correct = torch.rand(6, 500) < torch.where(is_member, 0.9, 0.6)
    scores = augmentation_attack(correct, shadow, membership)
    assert float(membership_auroc(scores, is_member)) > 0.7
    order = correct.sum(0)
    assert all(scores[i] > scores[j] for i in range(0, 500, 7) for j in range(0, 500, 11) if order[i] > order[j])
    with pytest.raises(ValueError, match=r"shadow_correct must have shape \(6, k, 500\)"):
        augmentation_attack(correct, shadow[:5], membership)
    with pytest.raises(ValueError, match="correct must be bool"):
        augmentation_attack(correct.float())
