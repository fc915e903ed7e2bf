"""Evidence and signals for the tests of attacks."""

from dataclasses import fields

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cwrf.attacks import (
    Evidence,
    create_attack,
)
from lightning_cwrf.metrics.functional import membership_auroc
from lightning_cwrf.shadows import balanced_membership

seeds = st.integers(0, 9999)


def shadowed(seed=0, n=9, k=6):
    torch.manual_seed(seed)
    return torch.randn(n).double(), torch.randn(k, n).double(), balanced_membership(k, n, seed)


def close(ours, theirs, tolerance=1e-8):
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def evidence(seed=0, n=400, k=8, m=200, classes=4, strength=2.0):
    """Models that put `strength` on the true class of what they were trained on; and who was, of the audited one."""
    torch.manual_seed(seed)
    membership, targets = balanced_membership(k, n, seed), torch.randint(classes, (n,))
    is_member = torch.rand(n) < 0.5
    one_hot = torch.nn.functional.one_hot(targets, classes).float()
    base = torch.randn(n, classes) + one_hot
    labels = torch.randint(classes, (m,))
    easy = torch.randn(m, classes) + torch.nn.functional.one_hot(labels, classes)
    inside, noise = membership[..., None] * one_hot, torch.randn(k, 3, n, classes)
    return Evidence(
        logits=base + strength * is_member[:, None] * one_hot + 0.5 * torch.randn(n, classes),
        targets=targets,
        shadow_logits=base + strength * inside + 0.5 * torch.randn(k, n, classes),
        membership=membership,
        population_logits=easy + 0.5 * torch.randn(m, classes),
        population_targets=labels,
        shadow_population_logits=easy + 0.5 * torch.randn(k, m, classes),
        inputs=base,
        population_inputs=easy,
        view_logits=base + strength * is_member[:, None] * one_hot + 0.5 * torch.randn(3, n, classes),
        shadow_view_logits=base + strength * inside.unsqueeze(1) + 0.5 * noise,
    ), is_member


def given_fields(evidence):
    """Names of the fields that are not None."""
    return [f.name for f in fields(evidence) if f.init and evidence.has(f.name)]


def calibration(name):
    """An attack's AUC where shadow models and audited model show membership, and its mean AUC over noise."""
    attack = create_attack(name)
    seen, is_member = evidence()
    scores = attack(evidence(strength=0.0)[0])
    without = [float(membership_auroc(scores, torch.rand(400) < 0.5)) for _ in range(5)]
    return float(membership_auroc(attack(seen), is_member)), sum(without) / 5


FAST = {"neural": {"epochs": 2}, "quantile_regression": {"epochs": 2}}


def attack(name):
    return create_attack(name, **FAST.get(name, {}))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made, views of given ones aside."""

    def __init__(self, *given):
        super().__init__()
        self.storages = {t.untyped_storage().data_ptr() for t in given}
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self.storages:
                self.elements = max(self.elements, made.numel())
        return result
