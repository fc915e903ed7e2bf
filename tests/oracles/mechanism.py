"""The quadratic exponential mechanism with explicit inverses and loops over examples."""

import torch
from torch.nn import functional as F


def gradients(model, inputs, targets, names):
    """One backward pass for each example."""
    own = dict(model.named_parameters())
    rows = []
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        rows.append(torch.cat([own[name].grad.flatten() for name in names]))
    model.zero_grad()
    return torch.stack(rows)


def gauss_newton(model, inputs, names):
    """``1/m Σ Jᵀ (diag p − p pᵀ) J``, the Jacobian of each logit by a backward pass of its own."""
    own = dict(model.named_parameters())
    total = 0
    for x in inputs:
        logits = model(x[None])[0]
        jacobian = []
        for z in logits:
            parts = torch.autograd.grad(z, [own[name] for name in names], retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(own[n]) if g is None else g for n, g in zip(names, parts, strict=True)]
            jacobian.append(torch.cat([part.flatten() for part in parts]))
        jacobian = torch.stack(jacobian)
        p = logits.detach().softmax(0)
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total / len(inputs)


def clipped(gradients, metric, clip):
    """Each gradient scaled to the norm ``√(gᵀ H⁻¹ g) ≤ C``."""
    inverse = torch.linalg.inv(metric)
    return torch.stack([g * min(1.0, clip / float((g @ inverse @ g).sqrt().clamp_min(1e-300))) for g in gradients])


def draw_moments(theta, gradients, metric, clip, eta, mu, examples, shift):
    """Mean and covariance of one draw."""
    inverse = torch.linalg.inv(metric)
    mean = theta - eta * inverse @ clipped(gradients, metric, clip).sum(0) / examples
    return mean, (eta * shift * clip / (examples * mu)) ** 2 * inverse
