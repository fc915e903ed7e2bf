"""Slow, obvious versions of the equation of a network's weights, and of its least squares."""

import itertools

import numpy as np
import torch


def residual(model, inputs, targets, multipliers):
    """One backward pass for each example and class."""
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    total = torch.zeros_like(theta)
    for x, y, weights in zip(inputs, targets.tolist(), multipliers, strict=True):
        logits = model(x[None])[0]
        others = [c for c in range(len(logits)) if c != y]
        for c, weight in zip(others, weights, strict=True):
            model.zero_grad()
            (logits[y] - logits[c]).backward(retain_graph=True)
            total += weight * torch.cat([p.grad.flatten() for p in model.parameters()])
    return float((theta - total).square().sum() / theta.square().sum())


def least_nonnegative(matrix, target):
    """The smallest residual ‖A λ − b‖² with λ ≥ 0: the best of all sets of columns."""
    best = float(target @ target)
    for size in range(1, matrix.shape[1] + 1):
        for columns in itertools.combinations(range(matrix.shape[1]), size):
            part = matrix[:, list(columns)]
            found = np.linalg.lstsq(part, target, rcond=None)[0]
            if (found >= -1e-12).all():
                best = min(best, float(np.square(part @ found - target).sum()))
    return best
