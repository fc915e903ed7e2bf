"""P-values by rank and their corrections, from their definitions, with loops."""

import itertools
import math


def conformal(scores, nulls):
    return [(1 + sum(null >= s for null in nulls)) / (len(nulls) + 1) for s in scores]


def exposure(scores, references):
    """Ranks in the sorted list of the canary and the references, the worst of equal ones."""
    found = []
    for s in scores:
        ranked = sorted([*references, s], reverse=True)
        rank = max(place for place, each in enumerate(ranked, 1) if each == s)
        found.append(math.log2(len(ranked)) - math.log2(rank))
    return found


def rejected_by_bh(p_values, level):
    """Step up: the largest k with p_(k) ≤ k level / m, and all up to it."""
    ordered = sorted(p_values)
    limit = max((p for k, p in enumerate(ordered, 1) if p <= k * level / len(ordered)), default=-1)
    return [p <= limit for p in p_values]


def rejected_by_holm(p_values, level):
    """Step down: from the smallest on, as long as p_(k) ≤ level / (m + 1 − k)."""
    rejected = set()
    ordered = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for k, i in enumerate(ordered):
        if p_values[i] > level / (len(p_values) - k):
            break
        rejected.add(i)
    return [i in rejected for i in range(len(p_values))]


def rank_sum(scores, is_member):
    """Over all ways to choose as many members: the share with as many pairs won or more; ties are lost."""
    indices = range(len(scores))
    won = sum(scores[i] > scores[j] for i in indices if is_member[i] for j in indices if not is_member[j])
    ways = list(itertools.combinations(indices, sum(is_member)))  # of ranks without ties
    return sum(sum(i > j for i in way for j in indices if j not in way) >= won for way in ways) / len(ways)


def signed_rank(differences):
    """Over all signs: the share with as high a sum of the ranks above 0 or higher; these get the lowest of ties."""
    ordered = sorted(differences, key=lambda d: (abs(d), d <= 0))
    found = sum(rank for rank, d in enumerate(ordered, 1) if d > 0)
    sums = [sum(signs) for signs in itertools.product(*((0, rank) for rank in range(1, len(ordered) + 1)))]
    return sum(each >= found for each in sums) / len(sums)
