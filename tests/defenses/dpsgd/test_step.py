"""One step of DP-SGD: the examples' gradients, clipping and noise."""

import copy
import math

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_cwrf import (
    GradientMaskCallback,
    WeightMask,
)
from lightning_cwrf.defenses import DPSGDMixin
from tests.defenses.dpsgd.cases import Conv, Merged, Tokens, by_hand, fresh, wide
from tests.helpers import Classifier, loader, part, trainer

pytestmark = pytest.mark.slow

WAYS = [
    pytest.param({}, 1, id="hooks"),
    pytest.param({}, 3, id="hooks-accumulated"),
    pytest.param({"max_physical_batch_size": 7}, 1, id="hooks-split"),
    pytest.param({"ghost": True}, 1, id="ghost"),
    pytest.param({"ghost": True, "max_physical_batch_size": 7}, 2, id="ghost-split"),
]


@pytest.mark.parametrize(("settings", "accumulate"), WAYS)
@pytest.mark.parametrize("clip", [math.inf, 0.3])
@pytest.mark.parametrize("held", [False, True], ids=["free", "frozen"])
def test_without_noise_it_is_the_loop_over_single_examples(settings, accumulate, clip, held):
    """An infinite norm makes it SGD; a finite one clips; frozen weights are masked before the norm is taken."""
    model = fresh(optimizer="sgd", lr=0.5).double()
    twin = copy.deepcopy(model)
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    mask = WeightMask.top(scores, 0.4) if held else None
    DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=clip, **settings)
    run = trainer(
        precision="64-true", accumulate_grad_batches=accumulate, callbacks=[GradientMaskCallback(mask)] if held else []
    )
    run.fit(model, wide())
    steps = 2 * math.ceil(6 / accumulate)
    assert run.global_step == steps
    expected = by_hand(twin, model.defense_state.batches, steps, clip, mask)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)
    assert run.accumulate_grad_batches == accumulate
    assert model.privacy_spent.epsilon == math.inf


class Residual(Classifier):
    """Overwrites activations in place, as torchvision's networks do."""

    def __init__(self):
        super().__init__(optimizer="sgd", lr=0.5)
        self.net = None
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.act, self.head = nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Linear(256, 10)

    def forward(self, x):
        identity = self.act(self.first(x))
        out = self.norm(self.second(identity))
        out += identity
        return self.head(self.act(out).flatten(1))


@pytest.mark.parametrize("ghost", [False, True])
def test_layers_may_overwrite_activations(ghost):
    model = fresh(Residual).double()
    twin = copy.deepcopy(model)
    DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=0.3, ghost=ghost)
    trainer(precision="64-true").fit(model, wide())
    expected = by_hand(twin, model.defense_state.batches, 12, 0.3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)


def test_attention_raises_or_is_replaced_and_bare_parameters_are_trained():
    with pytest.raises(MisconfigurationException, match=r"encoder\.self_attn \(MultiheadAttention is not supported"):
        trainer(precision="64-true").fit(DPSGDMixin.attach(Tokens().double(), noise_multiplier=1.0), wide())
    model = fresh(Tokens).double()
    DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=0.3, fix=True)
    twin = copy.deepcopy(model)
    trainer(precision="64-true").fit(model, wide())
    expected = by_hand(twin, model.defense_state.batches, 12, 0.3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)


def test_clipping_and_masking_change_the_result():
    """The comparison above could not tell a clip or a mask that does nothing from one that works."""
    ends = []
    for clip, held in ((math.inf, False), (0.3, False), (0.3, True)):
        model = fresh(optimizer="sgd", lr=0.5)
        mask = WeightMask({n: torch.rand(p.shape) < 0.4 for n, p in model.named_parameters()})
        DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=clip)
        torch.manual_seed(5)
        trainer(callbacks=[GradientMaskCallback(mask)] if held else []).fit(model, loader(0, 96))
        ends.append(model.net[4].weight.detach())
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)
    assert not torch.allclose(ends[1], ends[2], atol=1e-3)


def test_noise_has_the_stated_size():
    """Without any gradient, one step of plain SGD is the noise alone: σ·C / expected batch size."""
    model = fresh(lr=1.0)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 1.0)
    DPSGDMixin.attach(model, noise_multiplier=3.0, max_grad_norm=1e-9 * 2)
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    trainer(max_steps=1).fit(model, loader(0, 96))
    noise = torch.cat([p.detach().flatten() for p in model.parameters()]).double() - before
    assert noise.std() < 1e-6  # float32 rounding of weights near one hides noise this small
    moves = []
    for seed in range(20):
        model = fresh(lr=1.0)
        model.configure_optimizers = lambda m=model: torch.optim.SGD(m.parameters(), 1.0)
        DPSGDMixin.attach(model, noise_multiplier=50.0, max_grad_norm=2.0)
        before = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(seed)
        trainer(max_steps=1).fit(model, loader(0, 96))
        moves.append(torch.cat([(p - b).detach().flatten() for p, b in zip(model.parameters(), before, strict=True)]))
    found = torch.stack(moves)
    # 20 × 698 normal draws: their standard deviation has a standard error of 0.6 %.
    assert float(found.std()) == pytest.approx(50.0 * 2.0 / 16, rel=0.03)
    assert abs(float(found.mean())) < 4 * 6.25 / math.sqrt(found.numel()) + 2 / 16


@pytest.mark.parametrize("ghost", [False, True])
def test_merged_dimensions_and_an_empty_mask(ghost):
    with pytest.raises(MisconfigurationException, match=r"net.weight has \d+ gradients for \d+ examples"):
        trainer().fit(DPSGDMixin.attach(Merged(), noise_multiplier=1.0, ghost=ghost), loader(0, 64))
    model = DPSGDMixin.attach(fresh(), noise_multiplier=1.0, ghost=ghost)
    mask = WeightMask({n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()})
    trainer(max_epochs=1, callbacks=[GradientMaskCallback(mask)]).fit(model, loader(0, 64))
    assert model.privacy_spent.steps == 4


def test_a_batch_with_an_empty_side_tensor_is_trained_on():
    class Boxes(Conv):
        def classification_step(self, batch):
            if self.defense_state.step.independent:  # not the passes that check the first batch
                self.seen = self.__dict__.get("seen", 0) + len(batch["digit"])
            return self(batch["image"]), batch["digit"]

    def collate(pairs):
        images, labels = zip(*pairs, strict=True)
        return {"image": torch.stack(images), "digit": torch.stack(labels), "boxes": torch.zeros(0, 4)}

    model = DPSGDMixin.attach(fresh(Boxes), noise_multiplier=1.0)
    trainer(max_epochs=1).fit(model, DataLoader(part(0, 64), batch_size=16, collate_fn=collate))
    assert model.seen == sum(len(model.defense_state.batches.drawn(s)) for s in range(4)) > 0
