"""How often confidence intervals hold the truth, in simulation."""

import math

import pytest
import torch
from scipy import special, stats

from lightning_cwrf.metrics import (
    MembershipAUROC,
)
from lightning_cwrf.metrics import functional as MF
from lightning_cwrf.metrics.functional.roc import ScoreCounts
from tests.helpers import load_benchmark
from tests.metrics.cases import NULLS, null

coverage = load_benchmark("coverage")


# Cells in which an interval is wider than 1.5 times the oracle's, as docs/numbers.md says.
WIDE = {(50, 3.5): {"AUC", "advantage", "balanced accuracy", "P1"}}


@pytest.mark.slow
@pytest.mark.parametrize("n", coverage.SIZES)
def test_95_percent_intervals_cover_in_94_percent_of_samples(n):
    """Of r samples at least the 0.1 % quantile of Binomial(r, .94); at r = 600, that is 545, or 90.8 %."""
    replicates = coverage.SIZES[n]
    least = stats.binom.ppf(0.001, replicates, 0.94)
    for separation in coverage.SEPARATIONS:
        for name, measured in coverage.measure(separation, n, replicates, seed=n + round(100 * separation)).items():
            assert int(measured.held.sum()) >= least, (name, separation)
            if measured.oracle is not None and name not in WIDE.get((n, separation), ()):
                assert measured.width <= 1.5 * measured.oracle, (name, separation)
            if name.startswith("TPR"):
                shown = n >= MF.fewest_nonmembers(float(name.split()[-1]))
                assert bool((measured.low > 0).any()) == shown, (name, separation)


@pytest.mark.slow
@pytest.mark.parametrize(("separation", "n", "fpr"), [(0.36, 1000, 1e-2), (2.33, 1000, 1e-2), (1.2, 10_000, 1e-3)])
def test_tpr_intervals_are_about_as_wide_as_with_a_known_family(separation, n, fpr):
    measured = coverage.measure(separation, n, 40, seed=1)[f"TPR at {fpr:g}"]
    assert measured.width <= 1.5 * coverage.tpr_oracle(separation, n, fpr)


def test_the_coverage_test_can_fail():
    """A threshold taken as given: the exact interval of its share of members does not hold the TPR at the FPR."""
    members, nonmembers = coverage.draw(1.2, 1000, 400, seed=0)
    found = (members > nonmembers.topk(2, 1).values[:, 1:]).sum(1)
    low, high = MF.proportion_interval(found, 1000)
    truth = special.ndtr(1.2 + special.ndtri(1e-3))
    held = int(((low <= truth) & (truth <= high)).sum())
    assert held < stats.binom.ppf(0.001, 400, 0.94) - 100


@pytest.mark.parametrize("step", [0.25, 1.0])
def test_tied_scores_are_covered(step):
    """Gaussian scores rounded to a grid: every true value is a sum over it."""
    n, replicates, separation, grid = 400, 600, 1.2, torch.arange(9, -6, -step, dtype=torch.float64)
    edges = special.ndtr((grid - step / 2).numpy()), special.ndtr((grid - step / 2 - separation).numpy())
    fpr, tpr = (torch.from_numpy(1 - edge) for edge in edges)
    members, nonmembers = coverage.draw(separation, n, replicates, seed=5)
    counts = ScoreCounts(
        grid,
        *(
            torch.stack([(((side / step).round() * step) == level).sum(1) for level in grid], -1).double()
            for side in (members, nonmembers)
        ),
    )
    assert counts.members.sum(-1).eq(n).all()
    mass = tpr.diff(prepend=torch.zeros(1)), fpr.diff(prepend=torch.zeros(1))
    auc = float((mass[0] * (1 - fpr + mass[1] / 2)).sum())
    least = stats.binom.ppf(0.001, replicates, 0.94)
    for (low, high), truth in (
        (MF.auroc_interval(counts), auc),
        (MF.advantage_interval(counts), float((tpr - fpr).max())),
        (MF.tpr_interval(counts, 0.05), float(tpr[fpr <= 0.05].max())),
        (MF.tpr_interval(counts, 0.01), float(tpr[fpr <= 0.01].max())),
    ):
        assert int(((low <= truth) & (truth <= high)).sum()) >= least


def test_skewed_losses_are_covered():
    """Members' losses near 0, non-members' long-tailed; the normal interval holds far less often."""
    generator, replicates, n = torch.Generator().manual_seed(0), 1000, 50
    members, others = torch.randn(2, replicates, n, generator=generator, dtype=torch.float64)
    members, others = 0.01 * members.exp(), others.exp()
    truth = 0.99 * math.exp(0.5)
    low, high = MF.mean_difference_interval(others, members)
    held = int(((low <= truth) & (truth <= high)).sum())
    assert held >= stats.binom.ppf(0.001, replicates, 0.94)
    reach = 1.96 * ((others.var(1) + members.var(1)) / n).sqrt()
    plain = int(((others.mean(1) - members.mean(1) - truth).abs() <= reach).sum())
    assert plain < held - 30


def test_intervals_of_the_auc_cover_one_half():
    covered = 0
    for run in range(NULLS):
        metric = MembershipAUROC(seed=run)
        metric.update(*null(run))
        low, high = metric.interval(0.95)
        covered += low <= 0.5 <= high
    assert covered >= stats.binom.ppf(0.0001, NULLS, 0.95)
