"""Frozen weights under manual optimization, where gradients are cleared by hooks."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_cwrf import GradientMaskCallback, WeightMask
from lightning_cwrf.weights.vanilla import capture
from tests.callbacks.helpers import Manual, held, masked
from tests.helpers import Classifier, loader, trainer


def manual_run(big, precision="32-true", **kwargs):
    torch.manual_seed(0)
    model = Manual(big, **kwargs)
    mask = masked(model)
    model.frozen = [m.float() for m in mask.masks.values()]
    values = capture(model)
    trainer(callbacks=[GradientMaskCallback(mask=mask)], precision=precision, max_epochs=1).fit(model, loader(0, 64))
    assert held(model, mask, values)
    return model


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"algorithm": "lightning"}, {"accumulate": 2}, {"precision": "bf16-mixed"}],
    ids=["torch's clipping", "Lightning's", "accumulated", "bf16"],
)
def test_clipped_manual_steps_do_not_see_the_frozen_gradients(kwargs):
    """The live weights' steps are the same whether the frozen ones have a gradient of thousands or of nothing."""
    without, with_them = manual_run(0.0, **kwargs), manual_run(1e4, **kwargs)
    for a, b in zip(without.parameters(), with_them.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert without.norms == pytest.approx(with_them.norms, rel=1e-3)
    assert len(without.norms) == (0 if kwargs.get("algorithm") else 4)


def test_gradients_are_cleared_in_every_layout_and_pass():
    """Dense, channels last, sparse, a graph that is kept, a second accumulation, and a gradient of the gradient."""
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), "words": nn.Embedding(6, 3, sparse=True)}
    )
    mask = masked(model, 0.5)
    mask.freeze(model)
    hooks = mask.clear_gradients_of(model)

    def loss():
        images = torch.rand(2, 3, 5, 5).to(memory_format=torch.channels_last)
        return model["conv"](images).square().sum() + model["words"](torch.tensor([1, 4, 4])).square().sum()

    def dense():
        return {n: p.grad.to_dense().clone() for n, p in model.named_parameters()}

    first = loss()
    first.backward(retain_graph=True)
    once = dense()
    first.backward()
    for name, gradient in dense().items():
        assert (gradient[mask.masks[name]] == 0).all()
        torch.testing.assert_close(gradient, 2 * once[name])
        assert (gradient[~mask.masks[name]] != 0).any()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    loss().backward()
    assert any((dense()[n][m] != 0).any() for n, m in mask.masks.items())


def test_a_gradient_penalty_sees_the_cleared_gradients():
    model = nn.Linear(3, 2, bias=False)
    mask = WeightMask({"weight": torch.tensor([[True, False, False], [False, False, False]])})
    mask.freeze(model)
    mask.clear_gradients_of(model)
    model(torch.ones(1, 3)).square().sum().backward(create_graph=True)
    penalty = model.weight.grad.square().sum()
    assert float(model.weight.grad[0, 0]) == 0
    model.zero_grad()
    penalty.backward()
    assert torch.isfinite(model.weight.grad).all()


def test_hooks_are_for_manual_optimization_alone():
    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.found = [p for p in pl_module.parameters() if p._post_accumulate_grad_hooks]

    for cls in (Classifier, Manual):
        model, look = cls(), Look()
        mask = masked(model)
        trainer(callbacks=[GradientMaskCallback(mask=mask), look], max_epochs=1).fit(model, loader(0, 32))
        assert len(look.found) == (0 if cls is Classifier else sum(bool(m.any()) for m in mask.masks.values()))
