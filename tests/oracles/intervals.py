"""The confidence intervals again, the slow and obvious way: loops over thresholds, scipy's distributions and roots."""

import itertools
import math

import torch
from scipy import optimize, stats


def thresholds(members, nonmembers):
    """(members, non-members) strictly above each of: every score, and minus infinity."""
    levels = [*sorted({*members, *nonmembers}, reverse=True), -math.inf]
    return [(sum(x > c for x in members), sum(y > c for y in nonmembers)) for c in levels]


def rate_bound(found, trials, tail, upper):
    """Clopper and Pearson: the rate at which this few (this many) have the probability ``tail``."""
    if found == (trials if upper else 0):
        return float(upper)
    if upper:
        return optimize.brentq(lambda p: stats.binom.cdf(found, trials, p) - tail, 0, 1, xtol=1e-13)
    return optimize.brentq(lambda p: stats.binom.sf(found - 1, trials, p) - tail, 0, 1, xtol=1e-13)


def tpr(members, nonmembers, fpr, confidence):
    """Both tests at every threshold, and for the lower bound at every way to count its tied non-members."""
    m, n, z = len(members), len(nonmembers), stats.norm.ppf((1 + confidence) / 2)

    def left(chance):
        """The tail that a first test with this p-value leaves for the second, or None."""
        used = max(0.0, stats.norm.isf(chance))
        return stats.norm.sf(math.sqrt(z**2 - used**2)) if used < z else None

    steps = thresholds(members, nonmembers)
    highs, lows = [], []
    for found, false in steps:
        tail = left(stats.binom.sf(false - 1, n, fpr))  # as many false positives or more
        if tail is not None:
            highs.append(rate_bound(found, m, tail, True))
    for (found, false), (_, following) in zip(steps, [*steps[1:], (m, n)], strict=True):
        for counted in range(false, following + 1):
            tail = left(stats.binom.cdf(counted, n, fpr))  # as many false positives or fewer
            if tail is not None:
                lows.append(rate_bound(found, m, tail, False))
    return min(lows), max(highs)


def auroc(members, nonmembers, confidence, few=4):
    m, n, z = len(members), len(nonmembers), stats.norm.ppf((1 + confidence) / 2)

    def won(x, y):
        return (x > y) + (x == y) / 2

    for_member = [sum(won(x, y) for y in nonmembers) / n for x in members]
    for_other = [sum(won(x, y) for x in members) / m for y in nonmembers]
    auc = sum(for_member) / m
    tail = (1 - confidence) / 2
    if auc in (0, 1):
        exact = tail ** (1 / min(m, n))
        return (exact, 1.0) if auc == 1 else (0.0, 1 - exact)
    variance = sum((v - auc) ** 2 for v in for_member) / max(m - 1, 1) / m
    variance += sum((v - auc) ** 2 for v in for_other) / max(n - 1, 1) / n
    effective = min(
        sum(side) ** 2 / sum(v * v for v in side)
        for side in (for_member, for_other, [1 - v for v in for_member], [1 - v for v in for_other])
    )
    near = (auc * m * n + 0.5) / (m * n + 1)
    exponential = (1 + ((m + n) / 2 - 1) * ((1 - near) / (2 - near) + near / (1 + near))) / (m * n)
    kappa = variance / (auc * (1 - auc))
    kappa += few / (few + effective) * max(0, exponential - kappa)

    def beyond(a):
        return abs(auc - a) - z * math.sqrt(a * (1 - a) * kappa)

    return optimize.brentq(beyond, 0, auc, xtol=1e-13), optimize.brentq(beyond, auc, 1, xtol=1e-13)


def wilson(found, trials, z):
    """Both roots p of (p̂ − p)² = z² p (1 − p) / n."""
    rate = found / trials
    a, b, c = 1 + z**2 / trials, -(2 * rate + z**2 / trials), rate**2
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def difference(found, m, false, n, z):
    """Newcombe's hybrid score interval of two proportions' difference."""
    p, q = found / m, false / n
    (p_low, p_high), (q_low, q_high) = wilson(found, m, z), wilson(false, n, z)
    low = p - q - math.sqrt((p - p_low) ** 2 + (q_high - q) ** 2)
    return low, p - q + math.sqrt((p_high - p) ** 2 + (q - q_low) ** 2)


def advantage(members, nonmembers, confidence):
    m, n, tail = len(members), len(nonmembers), (1 - confidence) / 2
    steps = thresholds(members, nonmembers)

    def variance(found, false):
        p, q = (found + 0.5) / (m + 1), (false + 0.5) / (n + 1)
        return p * (1 - p) / m + q * (1 - q) / n

    lengths = [
        ((b[0] - a[0]) / m**2 + (b[1] - a[1]) / n**2) / ((variance(*a) + variance(*b)) / 2)
        for a, b in itertools.pairwise(steps)
    ]

    def crossing(length):
        def over(k):
            return stats.norm.sf(k) + k * stats.norm.pdf(k) * length / 2 - tail

        return optimize.brentq(over, max(1.0, stats.norm.isf(tail)), 40, xtol=1e-13)

    high = max(difference(found, m, false, n, stats.norm.isf(tail))[1] for found, false in steps)
    first = [difference(found, m, false, n, crossing(sum(lengths))) for found, false in steps]
    floor = max(low for low, _ in first)
    best = [reach >= floor for _, reach in first]
    near = sum(length for i, length in enumerate(lengths) if best[i] or best[i + 1])
    k = crossing(near)
    low = max(difference(found, m, false, n, k)[0] for (found, false), b in zip(steps, best, strict=True) if b)
    return max(0.0, low), min(1.0, high)


def mean_difference(first, second, confidence):
    """Welch's t with Hall's cubic inverted by root finding; the wider of the bounds with and without it."""

    def moments(values):
        n, mean = len(values), sum(values) / len(values)
        return mean, sum((v - mean) ** 2 for v in values) / (n - 1) / n, sum((v - mean) ** 3 for v in values) / n**3

    (a, va, ta), (b, vb, tb) = moments(first), moments(second)
    error = math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(first) - 1) + vb**2 / (len(second) - 1))
    skew = (ta - tb) / error**3
    q = stats.t.ppf((1 + confidence) / 2, freedom)

    def unskewed(goal):
        return optimize.brentq(
            lambda t: t + skew * (t**2 / 3 + 1 / 6) + skew**2 * t**3 / 27 - goal, -1e3, 1e3, xtol=1e-12
        )

    return a - b - error * max(q, unskewed(q)), a - b - error * min(-q, unskewed(-q))


def epsilon(members, nonmembers, delta, confidence, seed):
    """The first half of each shuffled side chooses a threshold and its direction, the second half measures.

    A list: the bounds of all tests that are equally good up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = []
    for side in (members, nonmembers):
        ordered = sorted(side.tolist())
        order = torch.randperm(len(ordered), generator=generator).tolist()
        shuffled = [ordered[i] for i in order]
        halves.append((shuffled[: len(order) // 2], shuffled[len(order) // 2 :]))
    (chosen_m, measured_m), (chosen_n, measured_n) = halves
    z = stats.norm.ppf((1 + confidence) / 2)
    tests = []
    for level in sorted({*chosen_m, *chosen_n}, reverse=True):
        hits, false = (sum(x >= level for x in part) for part in (chosen_m, chosen_n))
        low, high = wilson(hits, len(chosen_m), z)[0], wilson(false, len(chosen_n), z)[1]
        tests.append((max(0, low - delta) / high, True, level))
        tests.append((max(0, 1 - high - delta) / (1 - low), False, level))
    best = max(ratio for ratio, *_ in tests)
    tail, m, n = (1 - confidence) / 2, len(measured_m), len(measured_n)
    bounds = []
    for ratio, above, level in tests:
        if ratio >= best - 1e-12:
            hits, false = (sum(x >= level for x in part) for part in (measured_m, measured_n))
            low, high = rate_bound(hits, m, tail, False), rate_bound(false, n, tail, True)
            top, bottom = (low, high) if above else (1 - high, 1 - low)
            bounds.append(max(0.0, math.log((top - delta) / bottom)) if top > delta else 0.0)
    return bounds
