"""Every optimizer leaves frozen weights bit-identical."""

import inspect
import warnings

import pytest
import schedulefree
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_cwrf import GradientMaskCallback, WeightMask
from lightning_cwrf.weights.vanilla import capture
from tests.callbacks.helpers import MOVED, held, masked
from tests.helpers import Classifier, loader, trainer

CONFIGURATIONS = {
    "plain": ({}, {}),
    "weight decay": ({"weight_decay": 0.1}, {}),
    "momentum and decay": ({"weight_decay": 0.1, "momentum": 0.9}, {}),
    "nesterov": ({"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}, {}),
    "foreach": ({"weight_decay": 0.1, "foreach": True}, {}),
    "fused": ({"weight_decay": 0.1, "fused": True}, {}),
    "amsgrad": ({"weight_decay": 0.1, "amsgrad": True}, {}),
    "maximize": ({"weight_decay": 0.1, "maximize": True}, {}),
    "accumulated and clipped": ({"weight_decay": 0.1}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
}


SCHEDULE_FREE = (
    "SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFreeReference",
    "AdamWScheduleFreeReference",
)  # fmt: skip


# One takes sparse gradients alone, one 2-D weights alone: their own tests are below.
NOT_HERE = {"Optimizer", "SparseAdam", "Muon"}


TORCH = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in NOT_HERE
)


def cells():
    """Each optimizer in each configuration, with those of its arguments that the optimizer has; none twice."""
    for name in TORCH + list(SCHEDULE_FREE):
        kind = getattr(torch.optim, name, None) or getattr(schedulefree, name)
        known, seen = inspect.signature(kind).parameters, []
        for configuration, (wanted, of_trainer) in CONFIGURATIONS.items():
            arguments = {key: value for key, value in wanted.items() if key in known}
            if (arguments, of_trainer) not in seen:
                seen.append((arguments, of_trainer))
                slow = [] if configuration == "plain" else [pytest.mark.slow]  # all together
                yield pytest.param(kind, arguments, of_trainer, id=f"{name}-{configuration}", marks=slow)


class Small(Classifier):
    def __init__(self, make, manual=False):
        super().__init__(width=2)
        self.hparams.clear()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LayerNorm(4), nn.Linear(4, 10))
        self.make = make
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        return self.make(self.parameters())

    def _mode(self, mode):
        optimizer = self.optimizers().optimizer
        if hasattr(optimizer, mode):
            getattr(optimizer, mode)()

    def on_train_epoch_start(self):
        self._mode("train")

    def on_train_end(self):
        self._mode("eval")


CELLS = list(cells())


def test_the_matrix_is_whole():
    ids = [cell.id.split("-")[0] for cell in CELLS]
    assert set(ids) == {*TORCH, *SCHEDULE_FREE}
    assert min(ids.count(name) for name in set(ids)) >= 2
    assert len(CELLS) >= 90


@pytest.mark.parametrize(("kind", "arguments", "of_trainer"), CELLS)
def test_every_optimizer_leaves_frozen_weights_bit_identical(kind, arguments, of_trainer):
    torch.manual_seed(0)
    model = Small(lambda parameters: kind(parameters, lr=0.01, **arguments))
    values, mask = capture(model), masked(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=MOVED)  # the optimizer's own state is right: nothing is to put back
        trainer(callbacks=[GradientMaskCallback(mask=mask)], max_epochs=2, **of_trainer).fit(model, loader(0, 32, 4))
    assert held(model, mask, values)
    assert any(not torch.equal(p.detach(), values[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_all_points_of_a_schedule_free_optimizer_are_one_for_frozen_weights(name):
    """Going to and fro between x and y after the fit moves frozen weights nowhere, and live ones somewhere."""
    kind = getattr(schedulefree, name)
    model = Small(lambda parameters: kind(parameters, lr=0.1, weight_decay=0.1))
    values, mask = capture(model), masked(model)
    run = trainer(callbacks=[GradientMaskCallback(mask=mask)], max_epochs=2)
    run.fit(model, loader(0, 32, 4))
    ended, optimizer = capture(model), run.optimizers[0]
    optimizer.train()
    assert held(model, mask, values)
    assert not all(torch.equal(ended[n], p.detach()) for n, p in model.named_parameters())
    for n, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["z"][mask.masks[n]], values[n][mask.masks[n]])


def test_states_of_other_optimizers_are_left_alone():
    """A state called z is a copy of the weights only where the optimizer can exchange them."""
    model = nn.Linear(2, 2)
    mask = WeightMask({"weight": torch.ones(2, 2, dtype=torch.bool)})
    mask.freeze(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[model.weight]["z"] = torch.full((2, 2), 7.0)
    mask.restore_(model, optimizer)
    assert (optimizer.state[model.weight]["z"] == 7).all()


def test_sparse_gradients_and_their_optimizer():
    class Words(Small):
        def __init__(self):
            super().__init__(lambda parameters: torch.optim.SparseAdam(parameters, 0.1))
            self.net = nn.Sequential(nn.EmbeddingBag(5, 10, sparse=True))

        def forward(self, x):
            return self.net((x.flatten(1)[:, :6] * 4).long())

    model = Words()
    values, mask = capture(model), masked(model)
    trainer(callbacks=[GradientMaskCallback(mask=mask)]).fit(model, loader(0, 32))
    assert held(model, mask, values)
    assert not torch.equal(model.net[0].weight, values["net.0.weight"])


def test_an_optimizer_for_matrices():
    class Matrices(Small):
        def __init__(self):
            super().__init__(lambda parameters: torch.optim.Muon(parameters, 0.1, weight_decay=0.1))
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))

    model = Matrices()
    values, mask = capture(model), masked(model)
    trainer(callbacks=[GradientMaskCallback(mask=mask)]).fit(model, loader(0, 32))
    assert held(model, mask, values)
    assert not torch.equal(model.net[1].weight, values["net.1.weight"])


def test_an_optimizer_without_hooks_is_held_after_each_batch():
    class Bare:
        """What Lightning calls Optimizable: no class of torch's, so no hooks."""

        def __init__(self, inner):
            self.inner, self.defaults = inner, inner.defaults
            self.param_groups, self.state = inner.param_groups, inner.state
            self.state_dict, self.load_state_dict, self.step = inner.state_dict, inner.load_state_dict, inner.step
            self.zero_grad = inner.zero_grad

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            assert held(pl_module, mask, values)

    model = Small(lambda parameters: Bare(torch.optim.SGD(parameters, 0.1, weight_decay=0.1)))
    values, mask = capture(model), masked(model)
    trainer(callbacks=[GradientMaskCallback(mask=mask), Watch()]).fit(model, loader(0, 32))
    assert held(model, mask, values)
