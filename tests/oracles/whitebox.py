"""Attacks on a linear softmax model again, in plain Python: explicit gradients, Hessians and matrices."""

import math

from tests.oracles.formulas import softmax


def solve(matrix, right):
    """Gaussian elimination with pivots."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(n):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][n] / rows[i][i] for i in range(n)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean_of(vectors):
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def logits_of(weight, bias, x):
    return [dot(row, x) + b for row, b in zip(weight, bias, strict=True)]


def gradient(weight, bias, x, y):
    """Of the weights row by row, then of the bias."""
    p = softmax(logits_of(weight, bias, x))
    error = [value - (k == y) for k, value in enumerate(p)]
    return [e * v for e in error for v in x] + error


def hessian(weight, bias, x):
    p = softmax(logits_of(weight, bias, x))
    classes, d = len(p), len(x)
    place = [(k, x[j]) for k in range(classes) for j in range(d)] + [(k, 1.0) for k in range(classes)]
    return [[((k == m) * p[k] - p[k] * p[m]) * v * w for m, w in place] for k, v in place]


def iha(weight, bias, members, nonmembers, lr, momentum, decay, damping):
    """Scores of members and of non-members; each is a list of (x, y)."""

    size = len(gradient(weight, bias, *members[0]))
    hessians = [hessian(weight, bias, x) for x, _ in members]
    matrix = [
        [sum(h[i][j] for h in hessians) / len(members) + (i == j) * (decay + damping) for j in range(size)]
        for i in range(size)
    ]
    n, found = len(members), ([], [])
    for side, examples in enumerate((members, nonmembers)):
        for place, (x, y) in enumerate(examples):
            others = [m for i, m in enumerate(members) if side == 1 or i != place]
            g = gradient(weight, bias, x, y)
            d = solve(matrix, g)
            a = solve(matrix, mean_of([gradient(weight, bias, *each) for each in others]))
            e = solve(matrix, d)
            loss = -math.log(softmax(logits_of(weight, bias, x))[y])
            scale = (1 - lr * decay / (1 + momentum)) / lr
            score = loss / (1 + momentum) - (dot(d, d) / n + 2 * dot(a, d)) * scale
            score -= (dot(d, e) / n + 2 * dot(a, e)) * decay / lr
            found[side].append(score)
    return found


def laplace_covariance(known, features, probabilities, precision):
    """Of the logits at one example's features, from the Kronecker product written out."""
    m, d, classes = len(known), len(known[0]), len(probabilities[0])
    inside = [[sum(f[i] * f[j] for f in known) / m for j in range(d)] for i in range(d)]
    outside = [
        [sum((k == c) * p[k] - p[k] * p[c] for p in probabilities) / m for c in range(classes)] for k in range(classes)
    ]
    place = [(k, i) for k in range(classes) for i in range(d)]
    matrix = [[m * outside[k][c] * inside[i][j] + ((k, i) == (c, j)) * precision for c, j in place] for k, i in place]
    columns = [solve(matrix, [features[i] * (c == k) for c, i in place]) for k in range(classes)]
    rows = [[column[c * d : (c + 1) * d] for column in columns] for c in range(classes)]
    return [[dot(part, features) for part in row] for row in rows]
