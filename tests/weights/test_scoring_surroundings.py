"""Scores do not depend on what surrounds the call, and the call leaves nothing behind."""

import contextlib
import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback
from lightning_cwrf.weights.scores import learnability_scores, privacy_vulnerability_scores
from tests.helpers import Classifier, loader, part, same_snapshot, snapshot, trained, trainer
from tests.weights.helpers import batches, linear_case


@pytest.mark.usefixtures("rng_untouched")
def test_scoring_leaves_model_and_rng_untouched():
    rng = torch.get_rng_state()
    model, vanilla = trained()
    model.train()
    model.net[1].eval()  # a frozen BatchNorm, a mode of its own
    model.net[0].weight.requires_grad_(False)
    model(next(iter(loader(0, 8)))[0]).sum().backward()
    before = snapshot(model)
    torch.set_rng_state(rng)
    data = DataLoader(part(0, 40), batch_size=8, shuffle=True)
    scores = privacy_vulnerability_scores(model, vanilla, data, loader(100, 140), steps=6)
    same_snapshot(before, snapshot(model))
    assert "net.0.weight" not in scores
    assert "net.0.bias" in scores


def test_scoring_works_on_a_dataset_and_under_no_grad():
    model = Classifier()
    data = TensorDataset(torch.randn(20, 1, 8, 8), torch.randint(10, (20,)))
    with torch.no_grad():
        scores = learnability_scores(model, data, steps=2)
    assert scores["net.5.weight"].sum() > 0


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad disabled": lambda: torch.set_grad_enabled(False),
}


@contextlib.contextmanager
def default_double():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("surrounding", [*SURROUNDINGS.values(), default_double], ids=[*SURROUNDINGS, "double"])
def test_scores_are_the_same_whatever_surrounds_the_call(surrounding):
    model, vanilla = trained()
    members, reference = batches(0, 40), batches(100, 124)
    plain = (
        privacy_vulnerability_scores(model, vanilla, members, reference, steps=3),
        learnability_scores(model, members, steps=3),
    )
    with surrounding():
        surrounded = (
            privacy_vulnerability_scores(model, vanilla, members, reference, steps=3),
            learnability_scores(model, members, steps=3),
        )
        assert all(p.grad_fn is None for p in model.parameters())
    for a, b in zip(plain, surrounded, strict=True):
        assert all(torch.equal(a[name], b[name]) and b[name].dtype == torch.float32 for name in a)
        assert not any(score.is_inference() for score in b.values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_trainers_mixed_precision_does_not_reach_the_scores(precision):
    model, vanilla = trained()
    callback = PrivacyScoringCallback(batches(100, 124), vanilla, steps=3, members=batches(0, 40))
    expected = privacy_vulnerability_scores(model, vanilla, batches(0, 40), batches(100, 124), steps=3)
    trainer(callbacks=[callback], precision=precision, max_epochs=1).fit(model, loader(0, 32))
    assert all(torch.equal(callback.scores[name], expected[name]) for name in expected)


def test_half_precision_weights_are_scored_on_inputs_of_their_own():
    model, vanilla, members, reference = linear_case()
    scores = privacy_vulnerability_scores(model.bfloat16(), vanilla, members, reference, steps=2)
    assert scores["weight"].sum() > 0

    class Half(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].to(self.net[0].weight.dtype), batch[1]), batch_idx)

    half, vanilla = trained(epochs=5, cls=Half)
    callback = PrivacyScoringCallback(loader(100, 140), vanilla, steps=2)
    trainer(callbacks=[callback], max_epochs=1).fit(half.bfloat16(), loader(0, 32))
    assert callback.scores["net.5.weight"].sum() > 0


def test_random_scores_are_of_what_the_loss_reaches_and_fit_a_mask_in_any_default_precision():
    class WithAverage(Classifier):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.average = copy.deepcopy(self.net)

    for kind in ("random", "learnability", "privacy"):
        model, vanilla = trained(epochs=5, cls=WithAverage)
        scoring = PrivacyScoringCallback(loader(100, 140), vanilla, steps=1, kind=kind)
        rewind = CriticalRewindCallback(rate=0.1)
        with pytest.warns(UserWarning, match="does not reach 6 of 12 trainable parameters"), default_double():
            trainer(callbacks=[scoring, rewind, GradientMaskCallback()], max_epochs=1).fit(model.float(), loader(0, 32))
        own = sum(p.numel() for p in model.net.parameters())
        assert rewind.mask.total == own
        assert rewind.mask.count == round(0.1 * own)
