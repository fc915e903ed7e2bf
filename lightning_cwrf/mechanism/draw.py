"""Private fine-tuning by draws of a quadratic exponential mechanism, whose distribution is exactly Gaussian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cwrf.checks import check_integer
from lightning_cwrf.data import Batches, bring_to
from lightning_cwrf.mechanism.checks import (
    check_fit,
    check_public,
    check_settings,
    check_single,
    warn_of_other_training,
    written,
)
from lightning_cwrf.mechanism.curvature import PublicCurvature
from lightning_cwrf.mechanism.gradients import part_size
from lightning_cwrf.mechanism.noise import KNOWN_NOISE, noise_source
from lightning_cwrf.mechanism.parameters import flat, write
from lightning_cwrf.mechanism.private import PrivateExamples
from lightning_cwrf.mechanism.spent import SHIFTS, Adjacency, PrivacySpent, large_delta, ledger_of
from lightning_cwrf.outputs import evaluating
from lightning_cwrf.weights.copies import changed_since, copied, visiting
from lightning_cwrf.weights.descent import scoring_context

_COMPARED = 4
"""Of how many examples the gradients are compared before and after each pass."""


def clipped_sum(gradients: Tensor, curvature: PublicCurvature) -> Tensor:
    """``Σ_i ū_i``, ``ū_i = u_i min(1, C / ‖u_i‖₂)``, ``u_i = L⁻¹g_i``: float64 ``(k,)``.

    One example changes it by C at most in the Euclidean norm, and exchanging one by 2C.

    Args:
        gradients: ``(n, k)``, one row for each example.
        curvature: of public data.

    Raises:
        ValueError: a gradient is not finite: its norm could not be bounded.

    >>> unit = PublicCurvature(torch.eye(2, dtype=torch.float64), 1.0, ["weight"])
    >>> clipped_sum(torch.tensor([[3.0, 4.0], [0.5, 0.0]]), unit)
    tensor([1.1000, 0.8000], dtype=torch.float64)
    """
    whitened = curvature.whiten(gradients)
    norms = whitened.norm(dim=1, keepdim=True)
    if not bool(torch.isfinite(norms).all()):
        raise ValueError(
            "an example's gradient is NaN or infinite, so it cannot be clipped; look for inputs that are not finite, "
            "or lower eta."
        )
    total: Tensor = (whitened * (curvature.clip / norms.clamp_min(curvature.clip))).sum(0)
    return total


def quadratic_draw(
    theta: Tensor,
    total: Tensor,
    curvature: PublicCurvature,
    *,
    eta: float,
    mu: float,
    examples: int,
    adjacency: Adjacency = "add_remove",
    noise: Tensor,
) -> Tensor:
    """One draw, which is μ-GDP: ``θ⁺ = θ − η L⁻ᵀ(Σ ū_i / n + s C / (n μ) z)``, where z is standard normal.

    So ``θ⁺ ~ N(θ − η H_λ⁻¹ḡ, τ H_λ⁻¹)`` with ``τ = (η s C / (n μ))²``: the exponential mechanism, at the density
    ``exp(u/τ)``, of the utility ``u(θ') = −η ḡᵀ(θ' − θ) − ½ ‖θ' − θ‖²_{H_λ}``, whose quadratic form is a local model of
    a pretrained classifier and whose linear one is the new data. A neighbouring data set moves the mean by at most
    ``η s C / n`` in the norm of ``H_λ``, in which the noise has the standard deviation ``√τ`` in each direction. So the
    draw is exactly μ-GDP, for any k and η (which scales both). Its expected cost in the metric is ``½ k τ``.
    **It is not (ε, 0)-DP**: the utility is linear in θ', so its sensitivity over all θ' is infinite.

    After the idea of Tran et al. (2026, arXiv 2605.20521), of which only the abstract was at hand: the derivation is
    this package's.

    Args:
        theta: float64 ``(k,)``, the present parameters.
        total: ``(k,)``, :func:`clipped_sum` over all n private examples at theta.
        curvature: of public data.
        eta: η; 1 is a Newton step of a quadratic loss.
        mu: μ of this draw.
        examples: n, which counts as public, and is the same for both neighbours.
        adjacency: ``"add_remove"`` (s = 1), as for DP-SGD, or ``"replace_one"`` (s = 2).
        noise: standard normal, float64 ``(k,)``; or ``(m, k)`` for m draws.

    Returns:
        ``(k,)``, or ``(m, k)``.

    >>> unit = PublicCurvature(torch.eye(2, dtype=torch.float64), 1.0, ["weight"])
    >>> zero, up = torch.zeros(2).double(), torch.tensor([0.0, 1.0]).double()
    >>> quadratic_draw(zero, 4 * up, unit, eta=0.5, mu=1.0, examples=8, noise=zero)
    tensor([ 0.0000, -0.2500], dtype=torch.float64)
    >>> quadratic_draw(zero, zero, unit, eta=0.5, mu=1.0, examples=8, adjacency="replace_one", noise=up)
    tensor([ 0.0000, -0.1250], dtype=torch.float64)
    """
    scale = SHIFTS[adjacency] * curvature.clip / (examples * mu)
    return theta - eta * curvature.unwhiten(total / examples + scale * noise)


def exponential_mechanism(
    model: nn.Module,
    private: Batches,
    curvature: PublicCurvature,
    *,
    target_epsilon: float | None = None,
    mu: float | None = None,
    target_delta: float = 1e-5,
    draws: int = 10,
    eta: float = 0.5,
    adjacency: Adjacency = "add_remove",
    transfer: Callable[[Any], Any] | None = None,
    noise_seed: int | None = None,
) -> PrivacySpent:
    """Fine-tune a model in place by adaptive draws (:func:`quadratic_draw`), each after a pass over all private data.

    T draws of μ/√T each compose exactly to μ. The model is written once, after the last draw; what the draws before it
    gave is not kept, but counts. The loss is the cross-entropy, in eval mode. Draws add up over calls for one model
    object and its copies. The noise is that of NumPy's Philox generator, whose key and counter are made from 256 random
    bits of the operating system, new in each call.

    Args:
        model: a classifier.
        private: a data set of single examples, or a loader of all of it (in order or shuffled, without ``drop_last``),
            whose ``collate_fn`` is applied to one example at a time.
        curvature: of public data, at this model's weights.
        target_epsilon: ε of all draws of this model together, at ``target_delta``. Either this
        mu: or μ of these draws together.
        target_delta: δ; below 1/n.
        draws: T.
        eta: η.
        adjacency: what neighbours differ in.
        transfer: applied to each example, a batch of one, before its tensors go to the model's device and precision.
        noise_seed: for tests alone: the noise is a function of it and of all that the draws depend on. The guarantee
            then holds only while it is secret, and has no more possible values than an attacker can try.

    Returns:
        What all draws of this model have spent.

    Raises:
        TypeError: a stream, batches without the examples they are made of, or something other than tensors.
        ValueError: settings out of range; a budget that is spent; a loader that leaves examples out; data that read
            differently each time; a model that keeps something of earlier examples; gradients or weights that are not
            finite.

    >>> from torch.utils.data import TensorDataset
    >>> from lightning_cwrf.mechanism import public_curvature
    >>> public, data = (TensorDataset(torch.randn(64, 4), torch.randint(3, (64,))) for _ in range(2))
    >>> model = nn.Linear(4, 3)
    >>> print(exponential_mechanism(model, data, public_curvature(model, public), target_epsilon=1, target_delta=1e-3))
    exponential mechanism: ε = 1 at δ = 0.001 after 10 draws (exact Gaussian accountant). It covers the fine-tuning ...
    """
    check_settings(target_epsilon, mu, target_delta, draws, eta, adjacency)
    if noise_seed is not None:
        check_integer("noise_seed", noise_seed, low=0)
        warnings.warn(KNOWN_NOISE, stacklevel=2)
    check_fit(model, curvature)
    examples = PrivateExamples(private, transfer)
    ids = examples.ids()
    check_public(ids, curvature)
    check_single(private, ids)
    warning = large_delta(target_delta, len(ids))
    if warning:
        warnings.warn(warning, stacklevel=2)
    ledger = ledger_of(model, curvature.names)
    warn_of_other_training(model, ledger)
    if target_epsilon is not None:
        mu = ledger.left(target_epsilon, target_delta, adjacency)
    assert mu is not None
    each = mu / draws**0.5
    sigma = ledger.noise_for(mu, adjacency, draws)
    run = ledger.new_run()
    settings = repr((each, draws, eta, adjacency, curvature.clip, curvature.names, ids))
    start = flat(model, curvature.names)
    position = start if curvature.subspace is None else torch.zeros(curvature.dimensions, dtype=torch.float64)
    with _untouched(model), _working_copy(model) as work:  # what a pass keeps of examples must not be released
        random = noise_source(noise_seed, model, curvature, examples, settings)
        for _ in range(draws):
            total = _over_all(work, examples, curvature, _weights(start, position, curvature))
            ledger.add(run, sigma)
            noise = torch.from_numpy(random.standard_normal(curvature.dimensions))
            position = quadratic_draw(
                position, total, curvature, eta=eta, mu=each, examples=len(ids), adjacency=adjacency, noise=noise
            )
    result = _weights(start, position, curvature)
    write(model, curvature.names, result)
    ledger.weights = written(model)
    return ledger.spent(target_delta, adjacency)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Raise a ValueError where the passes have written into the model itself, as transfer hooks can; it is restored.

    What they write would be released with the weights, without noise.
    """
    with visiting(model) as kept:
        yield
        changed = changed_since(kept, model)
    if changed:
        raise ValueError(
            f"reading the private data has changed {', '.join(changed)} of the model, without noise: a transfer hook "
            "(on_before_batch_transfer, transfer_batch_to_device, on_after_batch_transfer) keeps something of the "
            "examples. Make the hooks functions of the batch alone."
        )


@contextmanager
def _working_copy(model: nn.Module) -> Iterator[nn.Module]:
    work = copied(model)
    with scoring_context(work), evaluating(work):
        yield work


def _over_all(model: nn.Module, private: PrivateExamples, curvature: PublicCurvature, at: Tensor) -> Tensor:
    """:func:`clipped_sum` over all private examples, at these weights.

    Raises:
        ValueError: the gradients of the first examples are others after the pass: those of later ones depend on what
            the model, or the transfer hooks, kept of examples before.
    """
    total, seen = torch.zeros(curvature.dimensions, dtype=torch.float64), 0
    bring, size = bring_to(model), part_size(model, curvature.names)
    first = _first(model, private, curvature, at)
    for group in private.groups(size):
        gradients = curvature.gradients(model, bring(group), at)
        total += clipped_sum(gradients, curvature)
        seen += len(gradients)
    private.check_number(seen)
    again = _first(model, private, curvature, at)
    precision = torch.finfo(next(value.dtype for value in model.parameters() if value.is_floating_point())).eps
    if not bool(((again - first).norm(dim=1) <= min(1e3 * precision, 1e-3) * first.norm(dim=1)).all()):
        raise ValueError(
            "the gradients of the first private examples are others after a pass over all: the model (in eval mode) or "
            "the transfer hooks keep something of the examples that they have seen, or are random, and the gradient "
            "of an example must be its own. Make the forward pass a function of its input and the weights."
        )
    return total


def _first(model: nn.Module, private: PrivateExamples, curvature: PublicCurvature, at: Tensor) -> Tensor:
    groups = map(bring_to(model), private.groups(1, first=_COMPARED))
    return torch.cat([curvature.gradients(model, group, at) for group in groups])


def _weights(start: Tensor, position: Tensor, curvature: PublicCurvature) -> Tensor:
    return position if curvature.subspace is None else start + curvature.subspace.lift(position)
