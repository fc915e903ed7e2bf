"""Monitors that a fit with a defense cannot have are an error before the first step."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torchmetrics import Accuracy

from lightning_cwrf import DefenseCallback, DPSGDMixin, RelaxLossMixin
from tests.helpers import Classifier, loader, trainer


class Logs(Classifier):
    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("train/acc", (logits.argmax(1) == batch[1]).float().mean(), on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])


class Shared(Classifier):
    """Names that no string in the code is, and a metric object."""

    def __init__(self):
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=10)

    def shared_step(self, batch, stage):
        logits = self(batch[0])
        self.log_dict({f"{stage}_acc": self.accuracy(logits, batch[1]), "acc": 0.5})
        return F.cross_entropy(logits, batch[1])

    def training_step(self, batch):
        return self.shared_step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.shared_step(batch, "val")


class NeedsATrainer(Logs):
    def training_step(self, batch, batch_idx):
        self.trainer.global_step + 1
        return super().training_step(batch, batch_idx)


class Plateau(Logs):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train/acc"}}


class InHook(Logs):
    def on_train_epoch_end(self):
        self.log("train/acc", 0.5)


class CallbackLogs(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("train/acc", 0.5)


def fit(model, *callbacks, folder=None, validation=False, **kwargs):
    run = trainer(folder, callbacks=list(callbacks), enable_checkpointing=folder is not None, **kwargs)
    run.fit(model, loader(0, 64), loader(64, 96) if validation else None)
    return run


def lost(monitor, who):
    what = rf"RelaxLossMixin replaces this module's training_step, so nothing logs '{monitor}', which {who} would wait"
    return pytest.raises(MisconfigurationException, match=what)


@pytest.mark.parametrize("make", [Logs, NeedsATrainer])
def test_a_monitor_that_only_the_replaced_step_logs_raises_before_the_first_step(tmp_path, make):
    model = make()
    before = copy.deepcopy(model.state_dict())
    waiting = [ModelCheckpoint(tmp_path, monitor="train/acc"), DefenseCallback("relaxloss")]
    with lost("train/acc", "ModelCheckpoint"):
        fit(model, *waiting, folder=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["train/acc", "train/acc_epoch"])
def test_every_form_of_the_name_counts(form):
    with lost(form, "EarlyStopping"):
        fit(RelaxLossMixin.attach(Logs()), EarlyStopping(form))


def test_a_schedulers_monitor_counts():
    with lost("train/acc", "ReduceLROnPlateau"):
        fit(RelaxLossMixin.attach(Plateau()))


def test_names_made_at_run_time_are_found():
    with lost("train_acc", "EarlyStopping"):
        fit(RelaxLossMixin.attach(Shared()), EarlyStopping("train_acc"), validation=True)


@pytest.mark.parametrize("monitor", ["val_acc", "acc"])
def test_what_the_validation_logs_can_be_monitored(monitor):
    run = fit(RelaxLossMixin.attach(Shared()), EarlyStopping(monitor), validation=True)
    assert run.global_step == 8


def test_without_validation_data_its_metrics_do_not_count():
    with lost("acc", "EarlyStopping"):
        fit(RelaxLossMixin.attach(Shared()), EarlyStopping("acc"))


def test_what_a_hook_or_a_callback_logs_can_be_monitored():
    assert fit(RelaxLossMixin.attach(InHook()), EarlyStopping("train/acc")).global_step == 8
    assert fit(RelaxLossMixin.attach(Logs()), CallbackLogs(), EarlyStopping("train/acc")).global_step == 8


def test_monitoring_the_loss_of_the_defense_warns():
    with pytest.warns(
        UserWarning, match="EarlyStopping monitors 'train_loss_epoch', which is now the loss of RelaxLoss"
    ):
        fit(RelaxLossMixin.attach(Logs()), EarlyStopping("train_loss_epoch"))


def test_without_a_defense_nothing_is_checked():
    assert fit(Logs(), EarlyStopping("train/acc", patience=9)).global_step == 8


def test_the_check_changes_no_training():
    def weights(*callbacks):
        torch.manual_seed(1)
        model = RelaxLossMixin.attach(Shared())
        fit(model, *callbacks, validation=True)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(), weights(EarlyStopping("val_acc", patience=9)))


@pytest.mark.slow
def test_dp_sgd_checks_before_it_hooks_the_layers():
    class Linear(Logs):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))

    settings = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "target_delta": 1e-2}
    with pytest.raises(MisconfigurationException, match="DPSGDMixin replaces"):
        fit(DPSGDMixin.attach(Linear(), **settings), EarlyStopping("train/acc"))


class Metrics(Classifier):
    """Metrics of the training step, computed by a hook or given to Lightning as objects, and one of the validation."""

    def __init__(self, objects=False):
        super().__init__()
        self.objects = objects
        self.accuracy, self.val_accuracy = (Accuracy("multiclass", num_classes=10) for _ in range(2))

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.accuracy.update(logits, batch[1])
        return F.cross_entropy(logits, batch[1])

    def validation_step(self, batch, batch_idx):
        self.val_accuracy.update(self(batch[0]), batch[1])

    def on_train_epoch_end(self):
        for name in ("accuracy", "val_accuracy"):
            metric = getattr(self, name)
            self.log(name, metric if self.objects else metric.compute())


@pytest.mark.parametrize("objects", [False, True])
def test_a_metric_of_the_replaced_step_is_a_warning_and_others_are_not(objects, recwarn):
    model = RelaxLossMixin.attach(Metrics(objects))
    run = fit(model, validation=True, max_epochs=2)
    said = [str(each.message) for each in recwarn if "nothing has updated it" in str(each.message)]
    assert len(said) == 1  # in two epochs
    assert said[0].startswith("the metric 'accuracy' is computed")
    assert run.callback_metrics["accuracy"] == 0
    assert run.callback_metrics["val_accuracy"] > 0
    copied = copy.deepcopy(model)
    copied.accuracy.update(torch.eye(10), torch.arange(10))
    assert copied.accuracy.compute() == 1


def test_without_a_defense_metrics_are_left_alone(recwarn):
    fit(Metrics(), validation=True)
    assert not [each for each in recwarn if "nothing has updated it" in str(each.message)]
