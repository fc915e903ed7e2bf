"""Label-only attacks again, for one example, in plain Python."""

import math

from tests.oracles.formulas import softmax
from tests.oracles.whitebox import dot, logits_of


def length(v):
    return math.sqrt(dot(v, v))


def minus(a, b):
    return [p - q for p, q in zip(a, b, strict=True)]


def along(a, b, share):
    return [p + share * (q - p) for p, q in zip(a, b, strict=True)]


def clipped(v, low, high):
    return [min(max(value, low), high) for value in v]


def hop_skip_jump(label, x, start, noise, *, low, high, budget, searches):
    """The distance of the nearest point found with another label, after ``budget`` questions.

    ``noise(t)`` has the random points of iteration t; the label of ``start`` is known.
    """
    own, asked, nearest = label(x), 1, length(minus(start, x))

    def other(point):
        """None: not asked."""
        nonlocal asked, nearest
        if asked == budget:
            return None
        asked += 1
        if label(point) == own:
            return False
        nearest = min(nearest, length(minus(point, x)))
        return True

    current, t = start, 1
    while asked < budget:
        near, far = 0.0, 1.0
        for _ in range(searches):
            middle = (near + far) / 2
            found = other(along(x, current, middle))
            if found:
                far = middle
            elif found is False:
                near = middle
        current = along(x, current, far)
        distance = length(minus(current, x))
        delta = 0.1 * (high - low) if t == 1 else distance / len(x)
        signs, moves = [], []
        for each in noise(t):
            point = clipped([c + delta * v / length(each) for c, v in zip(current, each, strict=True)], low, high)
            found = other(point)
            if found is not None:
                signs.append(1 if found else -1)
                moves.append([v / delta for v in minus(point, current)])
        if not signs:
            break
        mean = sum(signs) / len(signs)
        weights = signs if abs(mean) == 1 else [sign - mean for sign in signs]
        normal = [dot(weights, column) for column in zip(*moves, strict=True)]
        normal = [v / length(normal) for v in normal]
        step = distance / math.sqrt(t)
        for _ in range(30):
            tried = clipped([c + step * v for c, v in zip(current, normal, strict=True)], low, high)
            found = other(tried)
            if found is None:
                break
            if found:
                current = tried
                break
            step /= 2
        t += 1
    return nearest, asked


def oslo(label, x, y, sources, validation, *, thresholds, largest, stages, steps, momentum, low, high):
    """For each threshold whether the label survives, and the perturbation's size; models are (weight, bias)."""
    now, push, found = list(x), [0.0] * len(x), {}
    for at in range(stages + 1):
        if at:
            step = largest / stages
            for _ in range(steps):
                gradient = [0.0] * len(x)
                for weight, bias in sources:
                    z = logits_of(weight, bias, now)
                    others = [k for k in range(len(z)) if k != y]
                    shares = dict(zip(others, softmax([z[k] for k in others]), strict=True))
                    for j in range(len(x)):
                        gradient[j] -= weight[y][j] - sum(share * weight[k][j] for k, share in shares.items())
                push = [momentum * p + g / length(gradient) for p, g in zip(push, gradient, strict=True)]
                moved = minus([v + step * p / length(push) for v, p in zip(now, push, strict=True)], x)
                shrink = min(1.0, step * at / length(moved))
                now = clipped([v + shrink * m for v, m in zip(x, moved, strict=True)], low, high)
        sure = sum(softmax(logits_of(weight, bias, now))[y] for weight, bias in validation) / len(validation)
        for threshold in thresholds:
            if threshold not in found and (sure < threshold or at == stages):
                found[threshold] = (label(now) == y, length(minus(now, x)))
        if len(found) == len(thresholds):
            break
    return [found[threshold] for threshold in thresholds]
