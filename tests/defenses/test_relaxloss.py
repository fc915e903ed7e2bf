"""RelaxLoss against its formula in plain loops, and where its level decides."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_cwrf.defenses import RelaxLossMixin, relaxloss_loss
from tests.helpers import Classifier, loader
from tests.oracles import formulas


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    st.integers(0, 3),
    st.sampled_from([1.0, 0.3, 0.1]),
    st.sampled_from([0.1, 1.0, 8.0]),
)
def test_relaxloss_and_its_gradient_against_loops(seed, alpha, epoch, upper, scale):
    torch.manual_seed(seed)
    logits = (torch.randn(6, 4, dtype=torch.float64) * scale).requires_grad_()
    twin = logits.detach().clone().requires_grad_()
    targets = torch.randint(4, (6,))
    ours = relaxloss_loss(logits, targets, alpha=alpha, epoch=epoch, upper=upper)
    theirs = formulas.relaxloss(twin, targets, alpha, epoch, upper)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-9)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(logits.grad, twin.grad, rtol=1e-6, atol=1e-9)


def test_relaxloss_far_above_its_level_is_cross_entropy():
    logits, targets = torch.randn(8, 5) * 10, torch.randint(5, (8,))
    odd = relaxloss_loss(logits, targets, alpha=0.0, epoch=1)
    assert torch.equal(odd, F.cross_entropy(logits, targets))


def test_relaxloss_exactly_at_its_level_ascends():
    """Only a loss above the level is descended; all logits are equal here, so it is ln 2 for each example."""
    logits, targets = torch.zeros(2, 2), torch.tensor([0, 1])
    level = float(F.cross_entropy(logits, targets))
    # The first example is predicted rightly: -ln 2. The second one wrongly: its soft label's cross-entropy, ln 2, less
    # its loss, ln 2.
    odd = relaxloss_loss(logits, targets, alpha=level, epoch=1)
    assert float(odd) == pytest.approx(-math.log(2) / 2, abs=1e-6)
    assert float(relaxloss_loss(logits, targets, alpha=level - 1e-3, epoch=1)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(relaxloss_loss(logits, targets, alpha=level, epoch=2)) == 0


@pytest.mark.parametrize(("settings", "message"), [({"alpha": -1}, "alpha"), ({"alpha": 1, "upper": 0}, "upper"),
                                                   ({"alpha": 1, "upper": 1.1}, "upper")])  # fmt: skip
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        relaxloss_loss(torch.zeros(2, 3), torch.tensor([0, 1]), epoch=0, **settings)
    with pytest.raises(ValueError, match=message):
        RelaxLossMixin.attach(Classifier(), **settings)


def test_the_training_loss_is_relaxloss_at_the_epoch():
    model = RelaxLossMixin.attach(Classifier(), alpha=0.7)
    batch = next(iter(loader(0, 8)))
    model.eval()
    seen = []
    model.log = lambda name, value, **_: seen.append(value)
    assert torch.equal(model.training_step(batch, 0), relaxloss_loss(model(batch[0]), batch[1], alpha=0.7, epoch=0))
    assert len(seen) == 1
