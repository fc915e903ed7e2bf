"""Labels, logits and losses that are wrong raise with the defense, the epoch and the batch."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassCalibrationError

from lightning_cwrf import DefenseCallback
from lightning_cwrf.defenses import DefenseMixin, RelaxLossMixin
from tests.helpers import Classifier, loader, part, trainer


def test_a_defense_whose_loss_is_not_a_scalar_raises():
    class Forgetful(DefenseMixin):
        def defense_loss(self, logits, targets):
            return F.cross_entropy(logits, targets, reduction="none")

    model = Forgetful.attach(Classifier())
    assert model.defense_settings == {}
    with pytest.raises(TypeError, match=r"loss of ForgetfulClassifier must be a scalar tensor, not a tensor of shape"):
        trainer().fit(model, loader(0, 32))


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_out_of_range_raises_with_the_label_the_defense_and_the_step(label):
    data = [(x, torch.tensor(label if i == 9 else int(y))) for i, (x, y) in enumerate(part(0, 16))]
    message = (
        rf"label {label} is out of range: the model has 10 classes.*\(In RelaxLossClassifier, epoch 0, batch 1; its"
    )
    with pytest.raises(ValueError, match=message):
        trainer().fit(RelaxLossMixin.attach(Classifier()), DataLoader(data, batch_size=8))


def test_bad_logits_raise_with_the_defense_and_the_step():
    class Diverged(Classifier):
        def forward(self, x):
            return super().forward(x) * float("nan")

    with pytest.raises(
        ValueError, match=r"are NaN or infinite .*\(In RelaxLossDiverged, epoch 0, batch 0; its settings"
    ):
        trainer().fit(RelaxLossMixin.attach(Diverged(), alpha=0.5), loader(0, 32))


def test_a_loss_that_turned_nan_names_defense_and_step():
    class Broken(DefenseMixin):
        def defense_loss(self, logits, targets):
            return logits.sum() * float("nan")

    with pytest.raises(ValueError, match="the loss of BrokenClassifier is nan at epoch 0, batch 0"):
        trainer().fit(Broken.attach(Classifier()), loader(0, 32))


class EmptyMetric(Classifier):
    """As in lightning-uq-box: its step updates a metric that a hook computes."""

    def __init__(self):
        super().__init__()
        self.calibration = MulticlassCalibrationError(10)

    def training_step(self, batch, batch_idx):
        self.calibration(self(batch[0]), batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.log("calibration", self.calibration.compute())
        self.calibration.reset()


def test_a_hook_that_computes_a_metric_of_the_replaced_step_raises_with_the_fix():
    trainer(max_epochs=1).fit(EmptyMetric(), loader(0, 32))
    model = EmptyMetric()
    with pytest.raises(MisconfigurationException, match=r"No samples to concatenate\. A defense replaces"):
        trainer(callbacks=[DefenseCallback("relaxloss")]).fit(model, loader(0, 32))
    model.on_train_epoch_end = lambda: None
    trainer(callbacks=[DefenseCallback("relaxloss")]).fit(model, loader(0, 32))
    assert type(model) is EmptyMetric
