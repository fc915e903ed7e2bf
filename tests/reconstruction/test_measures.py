"""Claims, scores and p-values of reconstructions."""

import pytest
import torch
from scipy import stats

from lightning_cwrf.reconstruction import claims, hits_p_value, reconstruction_scores, relative_distances


@pytest.mark.parametrize(("a", "b", "n", "k"), [(16, 0, 20, 20), (3, 2, 20, 30), (1, 5, 4, 9), (20, 20, 20, 20)])
def test_the_p_value_is_that_of_the_hypergeometric_distribution(a, b, n, k):
    assert hits_p_value(a, b, n, k) == pytest.approx(stats.hypergeom.sf(a - 1, n + k, n, a + b), rel=1e-9)


def test_known_p_values_and_wrong_counts():
    assert hits_p_value(16, 0, 20, 20) == pytest.approx(7.71e-8, rel=1e-3)
    assert hits_p_value(0, 0, 20, 20) == 1
    assert hits_p_value(0, 5, 20, 20) == 1
    for counts, message in [
        ((21, 0, 20, 20), "members_claimed must be an integer from 0 to 20"),
        ((1, -1, 20, 20), "nonmembers_claimed must be an integer from 0 to 20"),
        ((0, 0, 0, 20), "members must be an integer of at least 1"),
        ((0, 0, 20, 0), "nonmembers must be an integer of at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            hits_p_value(*counts)


def test_averages_claim_nothing_and_copies_claim_their_example():
    pool = torch.randn(12, 3, 5)
    pairs = (pool[:, None] + pool[None]) / 2
    averages = torch.stack([pairs[i, j] for i in range(12) for j in range(i)])
    assert set(claims(averages, pool, 0.99).tolist()) < set(range(12))  # that of two may be near a third
    line = torch.arange(12.0)[:, None]
    assert len(claims((line[:-1] + line[1:]) / 2, line, 0.99)) == 0
    for ratio in (0.01, 0.5, 0.99):
        assert claims(pool[[7, 3, 7]], pool, ratio).tolist() == [3, 7]
    assert claims(torch.full((4, 3, 5), 1e6), pool).tolist() == []
    assert claims(pool[:0], pool).tolist() == []


def test_the_ratio_is_a_limit():
    pool = torch.tensor([[0.0], [3.0]])
    point = torch.tensor([[1.0]])
    assert claims(point, pool, 0.5).tolist() == [0]
    assert claims(point, pool, 0.49).tolist() == []


def test_the_order_of_the_pool_has_no_influence():
    pool, found = torch.randn(20, 4), torch.randn(30, 4) * 0.7
    order = torch.randperm(20)
    claimed = claims(found, pool, 0.9)
    assert 2 < len(claimed) < 20
    assert sorted(order[claims(found, pool[order], 0.9)].tolist()) == claimed.tolist()
    assert torch.equal(reconstruction_scores(found, pool)[order], reconstruction_scores(found, pool[order]))


def test_scores_are_distances_also_tiny_ones():
    pool = torch.tensor([[1e4, 0.0], [1e4, 1e-7], [0.0, 0.0]], dtype=torch.float64)
    found = torch.tensor([[1e4, 0.0]], dtype=torch.float64)
    assert reconstruction_scores(found, pool).tolist() == pytest.approx([0.0, -1e-7, -1e4])
    assert reconstruction_scores(found[:0], pool).tolist() == [-torch.inf] * 3
    assert relative_distances(torch.tensor([0.0, -1e-7, -5e3]), pool).tolist() == pytest.approx([0.0, 1.0, 0.5])


def test_chance_claims_give_p_values_that_are_no_smaller_than_uniform_ones():
    """Of any reconstructions, here of a pool of which a random half counts as members."""
    pool, found = torch.randn(40, 3), torch.randn(30, 3)
    claimed = claims(found, pool, 0.9)
    assert len(claimed) > 10
    generator = torch.Generator().manual_seed(0)
    members = torch.rand(2000, 40, generator=generator).argsort(1)[:, :20]
    of = [hits_p_value(a, len(claimed) - a, 20, 20) if len(claimed) - a <= 20 else 0.0 for a in range(len(claimed) + 1)]
    p = torch.tensor(of)[torch.isin(members, claimed).sum(1)]
    for level in (0.01, 0.05, 0.1, 0.5):
        assert float((p <= level).double().mean()) <= level + 3 * (level * (1 - level) / 2000) ** 0.5
    assert float((p <= 0.5).double().mean()) > 0.2  # it is not always 1


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"one shape, not \(3,\) and \(2,\)"):
        claims(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"ratio must be a number in \(0, 1\), not 1"):
        claims(torch.zeros(4, 2), torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match="the pool has 1"):
        claims(torch.zeros(4, 2), torch.zeros(1, 2))
