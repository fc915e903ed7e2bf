"""Adversarial regularisation (Nasr, Shokri & Houmansadr 2018): train against an attack that trains along."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cwrf.checks import check_integer, check_number
from lightning_cwrf.classification import check_targets, classification_step, values_are_fine
from lightning_cwrf.data import isolated_rng
from lightning_cwrf.defenses.base import DefenseMixin
from lightning_cwrf.defenses.nonmembers import AgainstNonmembers, NonmemberState
from lightning_cwrf.defenses.registry import register_defense
from lightning_cwrf.outputs import evaluating

_STATE_KEY = "adversarial_regularization"


def adversarial_regularization_loss(
    logits: Tensor, targets: Tensor, membership_logits: Tensor, *, lam: float = 1.0
) -> Tensor:
    """Mean ℓ + λ · mean log h over the members of a batch, h = sigmoid(``membership_logits``) (Nasr et al. 2018).

    That is the part of ``L(f) + λ · G(f, h)`` that the classifier f moves; :func:`attack_gain` is G.

    Args:
        logits: shape ``(n, K)``.
        targets: class indices ``(n,)``.
        membership_logits: shape ``(n,)``, the attack's log odds that these examples are members.
        lam: λ ≥ 0, how much privacy counts against accuracy.

    >>> zero = torch.zeros(1, 2)
    >>> adversarial_regularization_loss(zero, torch.tensor([0]), torch.zeros(1), lam=0.5)  # ln 2 - 0.5 ln 2
    tensor(0.3466)
    """
    check_number("lam", lam, low=0)
    targets = check_targets(logits, targets)
    if membership_logits.shape != targets.shape:
        raise ValueError(
            f"membership_logits must have shape {tuple(targets.shape)}, one for each example, not "
            f"{tuple(membership_logits.shape)}."
        )
    return F.cross_entropy(logits, targets) + lam * F.logsigmoid(membership_logits.float()).mean()


def attack_gain(member_logits: Tensor, nonmember_logits: Tensor) -> Tensor:
    """G = ½ mean log h over members + ½ mean log(1 − h) over non-members, h = sigmoid of the given log odds.

    Raises:
        ValueError: one of the sides holds no example.

    >>> attack_gain(torch.zeros(2), torch.zeros(3))
    tensor(-0.6931)
    """
    if not len(member_logits) or not len(nonmember_logits):
        raise ValueError(f"no gain of {len(member_logits)} members and {len(nonmember_logits)} non-members: give both.")
    return (F.logsigmoid(member_logits.float()).mean() + F.logsigmoid(-nonmember_logits.float()).mean()) / 2


class AttackNetwork(nn.Module):
    """h(p, y): the log odds that an example is a member, from its prediction vector and its label.

    Fully connected, ReLU between: the prediction through 1024, 512, 64, the label through 512, 64, both together
    through 256, 64, 1 (Nasr et al. 2018).

    >>> AttackNetwork(10)(torch.zeros(4, 10), torch.tensor([0, 1, 2, 3])).shape
    torch.Size([4])
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        check_integer("classes", classes, low=2)
        self.classes = classes
        self.prediction = _dense(classes, 1024, 512, 64)
        self.label = _dense(classes, 512, 64)
        self.both = nn.Sequential(*_dense(128, 256, 64), nn.Linear(64, 1))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Log odds ``(n,)`` for logits ``(n, K)`` and targets ``(n,)``."""
        if logits.shape[-1] != self.classes:
            raise ValueError(f"this attack network was made for {self.classes} classes, not for {logits.shape[-1]}.")
        prediction = self.prediction(logits.float().softmax(-1))
        # F.one_hot reads the targets on some devices, to check them.
        one_hot = torch.zeros_like(logits, dtype=prediction.dtype).scatter_(-1, targets.unsqueeze(-1), 1.0)
        label = self.label(one_hot)
        odds: Tensor = self.both(torch.cat([prediction, label], dim=-1))
        return odds.squeeze(-1)


def _dense(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers)


@register_defense("adversarial_regularization")
@dataclass(frozen=True, kw_only=True)
class AdversarialRegularization(AgainstNonmembers):
    """Settings of :class:`AdversarialRegularizationMixin`.

    Args:
        nonmembers: a loader or a dataset the model is not trained on.
        lam: λ ≥ 0.
        attack_steps: steps of the attack for each step of the classifier.
        attack_lr: the learning rate of the attack's Adam.
    """

    title = "adversarial regularisation"
    lam: float = 1.0
    attack_steps: int = 1
    attack_lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lam", self.lam, low=0)
        check_integer("attack_steps", self.attack_steps, low=1)
        check_number("attack_lr", self.attack_lr, low=0, low_open=True)


class AdversaryState(NonmemberState):
    """The non-member batches and the attack; before the first step of a resumed run, the attack's saved state."""

    def __init__(self, module: LightningModule, defense: Any) -> None:
        super().__init__(module, defense)
        self.adversary: Adversary | None = None
        self.saved: Mapping[str, Any] | None = None

    def save(self, checkpoint: dict[str, Any]) -> None:
        super().save(checkpoint)
        saved = self.saved if self.adversary is None else self.adversary.state_dict()
        if saved is not None:
            checkpoint[_STATE_KEY] = saved

    def load(self, checkpoint: dict[str, Any]) -> None:
        super().load(checkpoint)
        self.adversary, self.saved = None, checkpoint.get(_STATE_KEY)


class AdversarialRegularizationMixin(DefenseMixin, settings=AdversarialRegularization):
    """Trains a LightningModule against a membership attack that is trained in alternation with it.

    Before each step of the classifier the attack network takes ``attack_steps`` steps of Adam up :func:`attack_gain`,
    on this step's members and a batch of non-members, both as the model predicts them in eval mode: BatchNorm's
    running statistics are those of the members alone, and are updated once a step. Then the classifier takes its step
    on :func:`adversarial_regularization_loss`. The attack is no part of the module's parameters: neither its state dict
    nor its optimizer contains it. Checkpoints hold it and its own optimizer.
    """

    state_class = AdversaryState
    more_than_loss = "an attack is trained along with each model"

    def defense_step(self, batch: Any) -> tuple[Tensor, int]:
        """Train the attack on this batch and a non-member batch, then the classifier's loss against it."""
        with evaluating(self):
            members = classification_step(self, batch)
            others = self.defense_state.nonmembers.step(self, batch)
        adversary = self.defense_state.adversary or self._new_adversary(members[0])
        adversary.train(self, members, others, self.defense.attack_steps)
        logits, targets = classification_step(self, batch)
        odds = adversary.network(logits, targets)
        return adversarial_regularization_loss(logits, targets, odds, lam=self.defense.lam), len(targets)

    def _new_adversary(self, logits: Tensor) -> Adversary:
        """Made at the first step, when the number of classes is known."""
        state: AdversaryState = self.defense_state
        state.adversary = Adversary(logits.shape[1], self.defense.attack_lr, self)
        if state.saved is not None:
            state.adversary.load_state_dict(state.saved)
            state.saved = None
        return state.adversary


class Adversary:
    """The attack network and its optimizer; no nn.Module, so that the module that holds it does not register it."""

    def __init__(self, classes: int, lr: float, module: LightningModule) -> None:
        with isolated_rng():
            # In float32 whatever the Trainer's precision: double and half precision set torch's default dtype.
            self.network = AttackNetwork(classes).to(module.device, torch.float32)
        for p in self.network.parameters():
            p.data = module.trainer.strategy.broadcast(p.data)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr)
        self.network.requires_grad_(False)

    def train(
        self,
        module: LightningModule,
        members: tuple[Tensor, Tensor],
        others: tuple[Tensor, Tensor],
        steps: int,
    ) -> None:
        self.network.requires_grad_(True)
        fine = torch.as_tensor(values_are_fine(), device=members[0].device)
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = -attack_gain(self.network(*members), self.network(*others))
            loss.backward()  # type: ignore[no-untyped-call]
            for p in self.network.parameters():
                gradient = module.trainer.strategy.reduce(p.grad, reduce_op="mean")
                p.grad = torch.where(fine, gradient, 0)  # a batch that will raise must not reach the attack
            self.optimizer.step()
        self.network.requires_grad_(False)

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        classes = state["network"]["prediction.0.weight"].shape[1]
        if classes != self.network.classes:
            raise ValueError(
                f"the checkpoint's attack network is of {classes} classes, and the model has {self.network.classes}: "
                "resume with the model that it was trained against."
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(dict(state["optimizer"]))
