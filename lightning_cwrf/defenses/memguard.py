"""MemGuard (Jia et al. 2019): noise on what a finished model shows, so that an attack network cannot decide."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.data import Batches, OverlapCheck, all_ids, isolated_rng
from lightning_cwrf.data.seen import record_seen
from lightning_cwrf.defenses.output import OutputDefense, uniform_of
from lightning_cwrf.outputs import collect_outputs

_WIDTHS = (256, 128, 64)
_BATCH = 256


class MemGuardOutput(OutputDefense):
    """MemGuard (Jia et al. 2019): shows scores with noise that leaves the defender's own attack network at 1/2.

    When it is made, a network learns to tell the model's sorted scores on members from those on non-members. For each
    input, noise is searched that turns the network's decision (:func:`memguard_scores`). It is added with the
    probability :func:`memguard_probability`, which brings the network's expected output closest to 1/2 within the
    budget: the expected L1 distance from the true scores is at most ``epsilon``. The draw is a function of the seed
    and the example's own content, so that repeated queries show the same. The predicted class stays.

    It is made against one network, and attacks of other kinds may not be affected: label-only ones are not, and those
    with shadow models that are shown through MemGuard too adapt to it. Audit the wrapped model.

    The steps and constants of the search are those of the authors' code; how the network is trained (Adam, 100 epochs,
    both sides weighted equally) is this package's choice.

    Args:
        model: a finished classifier.
        members: examples it was trained on.
        nonmembers: examples it was not trained on, to learn from alone: an audit refuses them as its non-members.
        epsilon: budget, the largest expected L1 distance of the scores, from 0 (no noise) to 2. Published: 0.1 to 1.
        steps: of the search, at most, for each weight of the distance. The authors' code has 300; a prediction costs
            some hundred passes of the small network.
        seed: of the network and of the draws; the caller's random state is not touched.

    Raises:
        TypeError: ``model`` is no module, data that are not a loader, a data set or batches.
        ValueError: a setting out of range, an empty side, non-members that are members.

    >>> from torch.utils.data import TensorDataset
    >>> x, y = torch.randn(40, 4), torch.arange(40) % 3
    >>> inside, outside = TensorDataset(x[:20], y[:20]), TensorDataset(x[20:], y[20:])
    >>> model = nn.Linear(4, 3)
    >>> shown = MemGuardOutput(model, inside, outside, steps=20)
    >>> bool((shown(x).argmax(-1) == model(x).argmax(-1)).all()), torch.equal(shown(x), shown(x))
    (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        members: Batches,
        nonmembers: Batches,
        epsilon: float = 1.0,
        steps: int = 300,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        check_number("epsilon", epsilon, low=0, high=2, hint="It is an L1 distance of probabilities.")
        check_integer("steps", steps, low=2)
        check_integer("seed", seed, low=0)
        self.epsilon, self.steps, self.seed = epsilon, steps, seed
        OverlapCheck(members, nonmembers, "nonmembers")
        sides = [
            collect_outputs(model, data, name=name).logits
            for name, data in (("members", members), ("nonmembers", nonmembers))
        ]
        classes = sides[0].shape[1]
        is_member = torch.arange(sum(map(len, sides))) < len(sides[0])
        with isolated_rng():
            self.network = _trained(torch.cat(sides), is_member, classes, seed)
        first = next(model.parameters(), torch.zeros(()))
        self.network.to(first.device).requires_grad_(False)
        record_seen(self, "non-members that MemGuard learned from", all_ids(nonmembers) or ())

    def shown(self, logits: Tensor, digests: Callable[[], list[bytes]]) -> Tensor:
        """Log-probabilities, of some examples with noise."""
        noisy = memguard_scores(logits.float(), self.attack_logits, steps=self.steps)
        plain = logits.float().log_softmax(-1)
        before, after = self.attack_logits(plain).sigmoid(), self.attack_logits(noisy).sigmoid()
        probability = memguard_probability(plain.exp(), noisy.exp(), before, after, self.epsilon)
        drawn = torch.tensor([uniform_of(digest, self.seed) for digest in digests()], dtype=torch.float64)
        with_noise = drawn < probability.double().cpu()
        return torch.where(with_noise.to(logits.device)[:, None], noisy, plain).to(logits.dtype)

    def attack_logits(self, logits: Tensor) -> Tensor:
        """The network's logit for "member" ``(n,)``, from logits of the classes ``(n, K)``."""
        dtype = next(self.network.parameters()).dtype  # .half() casts the network too
        found: Tensor = self.network(logits.softmax(-1).sort(-1).values.to(dtype)).squeeze(-1)
        return found.to(logits.dtype)


def memguard_probability(scores: Tensor, noisy: Tensor, before: Tensor, after: Tensor, epsilon: float) -> Tensor:
    """With which probability the noise is added, ``(n,)``.

    It is 0 where the attack network's output with noise is no closer to 1/2 than without; else the largest that keeps
    the expected distance within the budget, ``min(1, ε / ‖noisy − scores‖₁)`` (Jia et al. 2019, §4.3).

    Args:
        scores: probabilities of the classes, ``(n, K)``.
        noisy: likewise, with noise.
        before: the attack network's output, the probability of a member, without noise ``(n,)``.
        after: with noise ``(n,)``.
        epsilon: ε, the budget.

    >>> s, r = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.7, 0.3]])
    >>> memguard_probability(s, r, torch.tensor([0.9]), torch.tensor([0.5]), 0.1)
    tensor([0.2500])
    """
    distance = (noisy - scores).abs().sum(-1)
    helps = (after - 0.5).abs() < (before - 0.5).abs()
    fitting = torch.where(distance > epsilon, epsilon / distance.clamp_min(1e-30), torch.ones_like(distance))
    return torch.where(helps, fitting, torch.zeros_like(fitting))


def memguard_scores(logits: Tensor, attack: Callable[[Tensor], Tensor], *, steps: int = 300) -> Tensor:
    """Log-probabilities ``(n, K)`` with the predicted class of ``logits``, on the other side of the attack's decision.

    By gradient steps of length 0.1 on the logits, ``|h(z')| + 10 · max(0, max_{j≠l} z'_j − z'_l) + c · ‖p' − p‖₁`` is
    lowered until the attack's logit h has the other sign and l is still the predicted class. This is repeated with a c
    ten times as large, from 0.1 on, for as long as it succeeds; the last success is returned, and the log-probabilities
    without noise where there is none.

    Args:
        logits: of the classes, ``(n, K)``.
        attack: gives h, ``(n,)``, from logits of the classes; positive for a member. Differentiable.
        steps: at most, for each c.

    >>> z = torch.tensor([[3.0, 0.0], [0.2, 0.0]])
    >>> shown = memguard_scores(z, lambda z: z.softmax(-1).amax(-1) - 0.8)  # "member" if the model is sure
    >>> shown.argmax(-1), shown.exp().amax(-1) < 0.8
    (tensor([0, 0]), tensor([ True, False]))
    """
    z, weight = logits.detach(), 0.1
    found, predicted = z.log_softmax(-1), z.argmax(-1)
    scores, start = z.softmax(-1), attack(z).detach()
    alive = ((start.sigmoid() - 0.5).abs() > 1e-5).nonzero().flatten()
    while len(alive) and weight <= 1e5:
        moved = _moved(z[alive], scores[alive], predicted[alive], start[alive], attack, weight, steps)
        alive_now = _turned(moved, predicted[alive], start[alive], attack)
        alive = alive[alive_now]
        found[alive] = moved[alive_now].log_softmax(-1)
        weight *= 10
    return found


def _turned(moved: Tensor, predicted: Tensor, start: Tensor, attack: Callable[[Tensor], Tensor]) -> Tensor:
    return (moved.argmax(-1) == predicted) & (attack(moved).detach() * start <= 0)


def _moved(
    z: Tensor,
    scores: Tensor,
    predicted: Tensor,
    start: Tensor,
    attack: Callable[[Tensor], Tensor],
    weight: float,
    steps: int,
) -> Tensor:
    """The logits after the steps of one c; an example that has succeeded stays where it is."""
    moved, rows = z.clone(), torch.arange(len(z), device=z.device)
    for _ in range(steps - 1):
        with torch.inference_mode(False), torch.enable_grad():
            at, mine = moved[rows].clone().requires_grad_(), predicted[rows].clone()[:, None]
            attacked = attack(at)
            above = at.scatter(-1, mine, -torch.inf).amax(-1) - at.gather(-1, mine).squeeze(-1)
            distance = (at.softmax(-1) - scores[rows].clone()).abs().sum(-1)
            (gradient,) = torch.autograd.grad((attacked.abs() + 10 * above.relu() + weight * distance).sum(), at)
        going = (at.argmax(-1) != predicted[rows]) | (attacked.detach() * start[rows] > 0)
        rows, gradient = rows[going], gradient[going]
        if not len(rows):
            break
        moved[rows] -= 0.1 * gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return moved


def _trained(logits: Tensor, is_member: Tensor, classes: int, seed: int) -> nn.Module:
    """A network that tells the sorted scores of members from those of others."""
    torch.manual_seed(seed)
    sizes = (classes, *_WIDTHS)
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise(sizes):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
    x, y = logits.softmax(-1).sort(-1).values, is_member.float()
    weight = (~is_member).sum() / is_member.sum()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.clone(), y.clone()
        for _ in range(100):
            for rows in torch.split(torch.randperm(len(x)), _BATCH):
                optimizer.zero_grad()
                out: Any = network(x[rows]).squeeze(-1)
                torch.autograd.backward(F.binary_cross_entropy_with_logits(out, y[rows], pos_weight=weight))
                optimizer.step()
    return network
