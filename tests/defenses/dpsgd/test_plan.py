"""Noise and clip norms over several fits, and schedules that do not keep to the plan."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf import DefenseCallback
from lightning_cwrf.defenses import DPSGDMixin
from lightning_cwrf.defenses.dpsgd.ledger import Ledger
from tests.helpers import Classifier, trainer

QUICK = {"noise_multiplier": 1.0, "accountant": "rdp", "target_delta": 1e-3}


class Small(Classifier):
    def __init__(self):
        super().__init__(optimizer="sgd", lr=0.1)
        self.net = nn.Linear(6, 3)


def data():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(60, 6, generator=generator), torch.arange(60) % 3), batch_size=20)


def test_a_deep_copy_has_noise_and_batches_of_its_own():
    model = DPSGDMixin.attach(Small(), **QUICK)
    trainer(max_epochs=1).fit(model, data())
    twin = copy.deepcopy(model)
    assert twin._dpsgd_ledger is twin.defense_state.ledger is not model._dpsgd_ledger
    assert twin.privacy_spent == model.privacy_spent
    for each in (model, twin):
        trainer(max_epochs=1).fit(each, data())
    assert not torch.equal(twin.net.weight, model.net.weight)
    assert twin._dpsgd_ledger.sampling_seed != model._dpsgd_ledger.sampling_seed


def test_adaptive_clipping_goes_on_when_a_callback_attaches_again():
    model = Small()
    for norm, first in ((10.0, 10.0), (10.0, None), (3.0, 3.0)):
        before = getattr(getattr(model, "_dpsgd_ledger", None), "clip_norm", None)
        starts = []
        model.on_train_batch_start = lambda *_, s=starts: s.append(model.defense_state.ledger.clip_norm) and None
        settings = {**QUICK, "clipping": "adaptive", "max_grad_norm": norm}
        trainer(max_epochs=1, callbacks=[DefenseCallback("dpsgd", **settings)]).fit(model, data())
        assert starts[0] == (before if first is None else first) != model._dpsgd_ledger.clip_norm


def test_a_count_that_a_later_noise_would_overdraw_is_refused_before_the_first_step():
    model = DPSGDMixin.attach(Small(), **QUICK, clipping="adaptive", unclipped_num_std=1.0, noise_gamma=1.5)
    with pytest.raises(MisconfigurationException, match=r"unclipped_num_std=1 is too small for a noise multiplier of"):
        trainer(max_epochs=5).fit(model, data())
    assert model.privacy_spent.steps == 0


@pytest.mark.slow
def test_a_schedule_that_changes_its_mind_raises():
    class Own(DPSGDMixin, Small):
        def noise_schedule(self, epoch):
            return 1.0 if self.trainer.global_step == 0 else 0.5

    with pytest.raises(MisconfigurationException, match=r"gave 1 for epoch 0 before, and 0\.5 now"):
        trainer(max_epochs=3).fit(Own(target_epsilon=3.0, accountant="rdp", target_delta=1e-3), data())


def test_a_schedule_may_give_numbers_of_numpy():
    class Own(DPSGDMixin, Small):
        def noise_schedule(self, epoch):
            return np.float32(0.5)

    model = Own(**QUICK)
    trainer(max_epochs=1).fit(model, data())
    assert model.defense_state.ledger.accountant.history == [(0.5, 1 / 3, 3)]


def test_gaussian_dp_of_much_noise_is_zero():
    assert Ledger("gdp").epsilon(1e-3, [(1000.0, 1 / 3, 3)]) == 0
