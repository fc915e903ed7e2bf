"""What both learned attacks share: bounded training, and the caller's random state."""

import torch

from lightning_cwrf.attacks import (
    create_attack,
    quantile_regression,
)
from tests.attacks.cases import evidence


def test_training_is_bounded(monkeypatch):
    """At most 64 steps per epoch and the given number of outputs."""
    sizes = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: sizes.append(1) or step(self, *a))
    seen, _ = evidence(n=3000, k=16, m=30)
    create_attack("neural", epochs=2)(seen)  # 48,000 outputs
    assert len(sizes) == 2 * 64
    sizes.clear()
    create_attack("neural", epochs=2, outputs=600)(seen)
    assert len(sizes) == 2 * 3
    sizes.clear()
    inputs = torch.rand(27_310, 2)  # of which 16,386 are learned from
    quantile_regression(inputs[:5, 0], inputs[:5], inputs[:, 0], inputs, epochs=1)
    assert len(sizes) == 64
    sizes.clear()
    quantile_regression(inputs[:5, 0], inputs[:5], inputs[:854, 0], inputs[:854], epochs=1)
    assert len(sizes) == 2


def test_the_callers_random_state_and_the_seed():
    seen, _ = evidence(n=40, k=4, m=30)
    for name in ("neural", "quantile_regression"):
        state = torch.get_rng_state()
        scores = create_attack(name, epochs=2)(seen)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(create_attack(name, epochs=2)(seen), scores)
        assert not torch.equal(create_attack(name, epochs=2, seed=1)(seen), scores)
