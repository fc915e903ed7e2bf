"""Details of DP-SGD's training: its batches, its noise, its precision."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_cwrf.data.poisson import PoissonBatches
from lightning_cwrf.defenses import DPSGDMixin
from lightning_cwrf.defenses.dpsgd.clipping import Clipping
from lightning_cwrf.defenses.dpsgd.independence import check_independent
from tests.helpers import Classifier, digits, loader, trainer

pytestmark = pytest.mark.slow


class Flat(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def private(**settings):
    torch.manual_seed(0)
    return DPSGDMixin.attach(Flat(), **{"noise_multiplier": 1.0, "target_delta": 1e-5, **settings})


def test_the_training_loader_gives_this_process_its_share_of_poisson_batches(monkeypatch):
    monkeypatch.setattr(Trainer, "global_rank", 2)
    run = trainer(max_epochs=1)
    run.fit(private(), loader(0, 64))
    assert isinstance(run.train_dataloader, PoissonBatches)
    assert run.train_dataloader.rank == 2


def test_a_checkpoint_says_which_batches_there_were(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(private(), loader(0, 64))
    run.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert {"examples": 64, "steps": 4, "parts": 1} in [s.get("layout") for s in saved.values() if isinstance(s, dict)]


@pytest.mark.parametrize(("delta", "warned"), [(1 / 64, True), (1 / 65, False)])
def test_a_delta_of_one_over_n_allows_giving_away_an_example(delta, warned, recwarn):
    trainer(max_epochs=1).fit(private(target_delta=delta), loader(0, 64))
    assert any("is not below 1/n" in str(w.message) for w in recwarn) == warned


def test_a_checkpoint_after_the_fit_continues_the_noise(tmp_path):
    ends = []
    for stop in (None, 1):
        model, run = private(), trainer(tmp_path, max_epochs=stop or 2)
        torch.manual_seed(3)
        run.fit(model, loader(0, 64))
        if stop:
            run.save_checkpoint(tmp_path / "run.ckpt")
            model = private()
            torch.manual_seed(99)
            trainer(tmp_path, max_epochs=2).fit(model, loader(0, 64), ckpt_path=tmp_path / "run.ckpt")
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


@pytest.mark.parametrize("ghost", [False, True])
def test_gradients_of_examples_have_the_precision_of_the_weights(monkeypatch, ghost):
    """Under autocast, activations and their gradients are of half precision."""
    found, factors = set(), Clipping.factors

    def spy(clipping, norms):
        found.add(norms.dtype)
        return factors(clipping, norms)

    monkeypatch.setattr(Clipping, "factors", spy)
    trainer(max_epochs=1, precision="bf16-mixed").fit(private(ghost=ghost), loader(0, 64))
    assert found == {torch.float32}


def test_examples_are_apart_in_a_step_that_trains_nothing():
    model = private().requires_grad_(False)
    images, labels = digits()[:8]

    def losses_of(batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    assert check_independent(model, losses_of, (images, labels))


def test_nan_in_the_first_batch_is_no_dependence_between_examples():
    x, y = digits()[:32]
    data = TensorDataset(torch.full_like(x, torch.nan), y)
    with pytest.raises(ValueError, match=r"the logits of .* examples are NaN"):
        trainer(max_epochs=1).fit(private(), DataLoader(data, batch_size=16))
