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


def privacy_bound(members, nonmembers, power, confidence, seed):
    """The largest ε (or μ) that a test at one of the thresholds rejects; ``power(fpr, value)`` is the highest TPR.

    The unknown FPR is one of 20,000 equally likely ones of its Beta distribution.
    """
    examples = [(x, False) for x in sorted(nonmembers.tolist())] + [(x, True) for x in sorted(members.tolist())]
    shuffle = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    ordered = sorted((examples[i] for i in shuffle), key=lambda each: each[0])  # equal scores stay shuffled
    tests = []
    for reference, walked in ((False, ordered[::-1]), (True, ordered)):
        count = sum(flag is reference for _, flag in ordered)
        j = 1
        while j == 1 or j <= count / 2:
            passed, hits = 0, 0
            for _, flag in walked:
                passed += flag is reference
                if passed == j:
                    break
                hits += flag is not reference
            fprs = stats.beta(j, count + 1 - j).ppf((torch.arange(20_000).numpy() + 0.5) / 20_000)
            tests.append((fprs, hits, len(ordered) - count))
            j *= 3
    level = (1 - confidence) / len(tests)

    def rejects(value):
        return any(stats.binom.sf(hits - 1, n, power(fprs, value)).mean() <= level for fprs, hits, n in tests)

    low, high = 0.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if rejects(middle) else (low, middle)
    return low


def largest_tail(lines, canaries, guesses, right):
    """The highest probability of ``right`` or more correct guesses that f-DP allows, by a linear program.

    ``lines`` are (intercept, slope) of straight lines whose minimum is the power at an FPR. With p_n the probability of
    n correct guesses, for every i: Σ_{n ≥ i} p_n n / m is at most the power at Σ_{n ≥ i − 1} p_n (r − n) / m.
    """
    counts = range(guesses + 1)
    rows, limits = [], []
    for i in range(1, guesses + 1):
        for intercept, slope in lines:
            caught = [n / canaries if n >= i else 0.0 for n in counts]
            missed = [(guesses - n) / canaries if n >= i - 1 else 0.0 for n in counts]
            rows.append([c - slope * w for c, w in zip(caught, missed, strict=True)])
            limits.append(intercept)
    goal = [-1.0 if n >= right else 0.0 for n in counts]
    found = optimize.linprog(goal, A_ub=rows, b_ub=limits, A_eq=[[1.0] * (guesses + 1)], b_eq=[1.0], bounds=(0, None))
    return -found.fun
