"""The guarantee, audited from outside: draws on neighbouring data, told apart in the worst direction.

``mu_lower_bound`` is what any auditor would use: it knows nothing of the mechanism. At the right noise it must come
near μ from below; half the noise, no clipping, or noise for the wrong adjacency must push it above the claimed μ.
"""

import pytest
import torch

from lightning_cwrf.mechanism import clipped_sum, quadratic_draw
from lightning_cwrf.metrics.functional import gaussian_mu, mu_lower_bound
from tests.mechanism.cases import curvature_of, metric

DRAWS, K, N, CLIP = 10_000, 20, 100, 1.0
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)


def bound(mu, adjacency="add_remove", noise=1.0, clip=True, shift=None):
    """The lower bound on μ from draws on two neighbours; faults by ``noise``, ``clip``, and ``shift`` of the noise."""
    generator = torch.Generator().manual_seed(0)
    curvature = curvature_of(metric(K, 1), CLIP)
    others = torch.randn(N - 1, K, generator=generator, dtype=torch.float64)
    u = torch.randn(K, generator=generator, dtype=torch.float64)
    worst = 10 * CLIP * curvature.cholesky @ (u / u.norm())  # ten times the clipping norm
    first = torch.cat([others, worst[None]])
    second = others if adjacency == "add_remove" else torch.cat([others, -worst[None]])
    zero = torch.zeros(K, dtype=torch.float64)
    sides = []
    for gradients in (first, second):
        total = clipped_sum(gradients, curvature)
        if not clip:
            total = curvature.whiten(gradients).sum(0)
        z = torch.randn(DRAWS, K, generator=generator, dtype=torch.float64)
        moved = quadratic_draw(
            zero, total, curvature, eta=0.5, mu=mu, examples=N, adjacency=shift or adjacency, noise=noise * z
        )
        # The auditor's statistic: how far a draw lies in the direction of the example's own step.
        sides.append(-(moved @ curvature.cholesky) @ (u / u.norm()))
    scores, members = torch.cat(sides), torch.arange(2 * DRAWS) < DRAWS
    return float(mu_lower_bound(scores, members))


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_the_bound_is_near_mu_and_not_above(epsilon, adjacency):
    mu = gaussian_mu(epsilon, 1e-5)
    assert mu - 0.05 <= bound(mu, adjacency) <= mu


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize(
    "fault",
    [
        {"noise": 0.5},
        {"clip": False},
        {"adjacency": "replace_one", "shift": "add_remove"},
    ],
    ids=["half the noise", "no clipping", "noise for the other adjacency"],
)
def test_faults_are_caught(epsilon, fault):
    mu = gaussian_mu(epsilon, 1e-5)
    assert bound(mu, **fault) > mu


def test_noise_of_a_tenth_too_little_is_caught_at_a_larger_epsilon():
    assert bound(gaussian_mu(8.0, 1e-5), noise=0.9) > gaussian_mu(8.0, 1e-5)
