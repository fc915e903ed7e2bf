"""DP-SGD's ε counts on examples that do not depend on one another: a forward pass that mixes them is found."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_cwrf.defenses import DPSGDMixin
from lightning_cwrf.defenses.dpsgd.independence import _alike, _rows
from tests.defenses.dpsgd.cases import Conv, Tokens, fresh
from tests.helpers import Classifier, loader, trainer

pytestmark = pytest.mark.slow


class Body(Conv):
    """Mixes at the features, in the way of ``kind``."""

    def __init__(self, kind, dropout=0.0):
        super().__init__()
        self.kind = kind
        self.drop = nn.Dropout(dropout)
        self.register_buffer("average", torch.zeros(64))

    def forward(self, x):
        z = self.drop(self.net[:-1](x))
        z = getattr(self, self.kind)(z)
        return self.net[-1](z)

    def apart(self, z):
        return z - z.mean(1, keepdim=True)

    def centred(self, z):
        return z - z.mean(0)

    def slightly(self, z):
        return z - 0.1 * z.mean(0)

    def gradient_alone(self, z):
        """Its value is that of no mixing at all."""
        return z - z.mean(0) + z.mean(0).detach()

    def in_training_alone(self, z):
        return z - z.mean(0) if self.training else z

    def causal(self, z):
        """An example depends on those before it alone."""
        return z.cumsum(0)

    def anticausal(self, z):
        return z.flip(0).cumsum(0).flip(0)

    def neighbour(self, z):
        return z + z.roll(1, 0)

    def normed(self, z):
        return z / z.norm()

    def random(self, z):
        return z + 0.1 * torch.randn_like(z) if self.training else z

    def ema(self, z):
        """Its own statistics move with the batch, and are used in later batches: not seen, and left as they were."""
        if self.training:
            self.average += 1.0
        return z

    def random_by_content(self, z):
        """Draws as many numbers as there are large features, in training."""
        if not self.training:
            return z
        large = z > 0.5
        return z.masked_scatter(large, torch.rand(int(large.sum())))

    def random_and_mixed(self, z):
        return self.random_by_content(z) - z.mean(0)


def fit(model, data=None, **settings):
    kind = {"noise_multiplier": 1.0, "accountant": "rdp", **settings}
    run = trainer(max_epochs=1, limit_train_batches=2)
    run.fit(DPSGDMixin.attach(model, **kind), loader(0, 64) if data is None else data)
    return model


MIXED = ["centred", "slightly", "gradient_alone", "in_training_alone", "causal", "anticausal", "neighbour", "normed",
         "random_and_mixed"]  # fmt: skip


@pytest.mark.parametrize("kind", MIXED)
def test_a_forward_pass_that_mixes_the_batch_raises(kind):
    with pytest.raises(MisconfigurationException, match=r"loss or gradient in DPSGDBody depends on the other examples"):
        fit(Body(kind, dropout=0.2))


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("kind", ["apart", "random", "ema"])
def test_one_that_does_not_trains_without_a_warning(kind, ghost):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*depend")
        model = fit(Body(kind, dropout=0.5), ghost=ghost)
    assert model.privacy_spent.steps == 2


def test_random_numbers_that_depend_on_the_batch_are_warned_about():
    with pytest.warns(UserWarning, match="random numbers in training mode that depend on the batch"):
        model = fit(Body("random_by_content"))
    assert model.privacy_spent.steps == 2


def test_the_sequence_in_the_place_of_the_batch_is_found():
    """nn.TransformerEncoderLayer takes the batch second unless it is told otherwise."""

    class Confused(Tokens):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    with pytest.raises(MisconfigurationException, match=r"batch_first=True"):
        fit(fresh(Confused), fix=True)
    assert fit(fresh(Tokens), fix=True).privacy_spent.steps == 2


def test_a_loss_that_compares_examples_is_found():
    class Contrast(DPSGDMixin, Conv):
        def example_losses(self, logits, targets):
            return F.cross_entropy(logits - logits.mean(0), targets, reduction="none")

    with pytest.raises(MisconfigurationException, match="depends on the other examples"):
        trainer(max_epochs=1).fit(Contrast(noise_multiplier=1.0), loader(0, 64))


def test_the_check_changes_nothing(monkeypatch):
    """Weights, buffers and random state after a fit are those of a fit without the check."""
    ends = []
    for checked in (False, True):
        model = fresh(lambda: Body("ema", dropout=0.3))
        if not checked:
            monkeypatch.setattr("lightning_cwrf.defenses.dpsgd.step.PrivateStep.check", lambda *_: None)
        torch.manual_seed(5)
        fit(model)
        ends.append((copy.deepcopy(model.state_dict()), torch.get_rng_state()))
        monkeypatch.undo()
    assert all(torch.equal(ends[0][0][n], t) for n, t in ends[1][0].items())
    assert torch.equal(ends[0][1], ends[1][1])


def test_batches_of_one_example_wait_for_a_larger_one():
    model = DPSGDMixin.attach(Body("centred"), noise_multiplier=1.0)
    data = loader(0, 20, batch_size=1)
    with pytest.raises(MisconfigurationException, match="depends on the other examples"):
        trainer(max_epochs=3).fit(model, data)
    sizes = [len(model.defense_state.batches.drawn(s)) for s in range(model.privacy_spent.steps + 1)]
    assert max(sizes[:-1], default=0) < 2 <= sizes[-1]


def test_what_is_overwritten_and_what_stays():
    batch = {"x": torch.arange(4), "one": torch.tensor(7), "other": torch.zeros(3), "name": ["a", "b", "c", "d"]}
    found = _rows(batch, [0, 1, 0, 1])
    assert found["x"].tolist() == [0, 1, 0, 1]
    assert found["one"] == 7
    assert len(found["other"]) == 3
    assert found["name"] == batch["name"]


@pytest.mark.parametrize(
    ("dtype", "gap", "same"),
    [
        (torch.float32, 5e-4, True),
        (torch.float32, 2e-3, False),
        (torch.bfloat16, 0.03, True),
        (torch.bfloat16, 0.1, False),
    ],
)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_counts_as_alike(dtype, gap, same, where):
    loss, gradient = torch.tensor([1.0, 0.5], dtype=dtype), torch.tensor([-2.0, 0.1], dtype=dtype)
    shifted = (loss + gap, gradient) if where == "loss" else (loss, gradient + 2 * gap)
    assert _alike((loss, [gradient]), (shifted[0], [shifted[1]])) == same
    assert not _alike((loss, [gradient]), (loss, []))  # a weight that the loss does not reach any more


def test_a_mean_over_the_batch_as_small_as_it_can_be_written():
    class Centred(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 10)

        def forward(self, x):
            z = self.net(x.flatten(1))
            return z - z.mean(0)

    with pytest.raises(MisconfigurationException, match="its ε would be wrong"):
        fit(Centred())
