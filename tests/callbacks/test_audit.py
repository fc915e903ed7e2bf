"""When the audit callback audits, what, and which weights."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_cwrf import MIAAuditCallback
from lightning_cwrf.callbacks.audit import is_last_epoch
from tests.helpers import Classifier, loader, trainer


@pytest.mark.parametrize(
    ("epoch", "epochs", "step", "steps", "stop", "last"),
    [
        (0, 2, 4, -1, False, False),
        (1, 2, 8, -1, False, True),
        (0, 2, 4, 5, False, False),
        (0, 2, 5, 5, False, True),
        (0, 2, 4, -1, True, True),
        (7, -1, 9, -1, False, False),
        (7, None, 9, -1, False, False),
        (7, None, 9, 9, False, True),
        (0, 0, 0, -1, False, True),
    ],
)
def test_which_epoch_is_the_last(epoch, epochs, step, steps, stop, last):
    trainer = SimpleNamespace(
        current_epoch=epoch, max_epochs=epochs, global_step=step, max_steps=steps, should_stop=stop
    )
    assert is_last_epoch(trainer) == last


def test_attacks_that_need_more_than_outputs_are_an_error():
    with pytest.raises(ValueError, match="the augmentation attack needs views; run it with"):
        MIAAuditCallback([], attacks=["augmentation"])


def test_ids_come_from_the_key():
    """By their key all examples are different, by content the non-members are members."""
    numbers = itertools.count()
    callback = MIAAuditCallback(loader(0, 32), every_n_epochs=0, key=lambda example: next(numbers))
    trainer(callbacks=[callback], max_epochs=1).fit(Classifier(), loader(0, 32))
    assert len(callback.result.losses) == 64
    assert callback.result.overlap == {}


class Log(CSVLogger):
    def __init__(self, folder):
        super().__init__(folder)
        self.steps = []

    def log_metrics(self, metrics, step=None):
        self.steps += [step] * any(name.startswith("mia/") for name in metrics)


class Changes(Callback):
    """Writes other weights after the last epoch."""

    def on_fit_end(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.net[5].bias += 1


def test_a_late_audit_is_logged_at_the_last_step(tmp_path):
    audit, log = MIAAuditCallback(loader(100, 140), every_n_epochs=0), Log(tmp_path)
    trainer(callbacks=[audit, Changes()], max_epochs=1, logger=log).fit(Classifier(), loader(0, 32))
    assert log.steps[-1] == 2
    assert len(audit.history) == 1


def test_a_fit_without_a_step_is_not_audited():
    audit = MIAAuditCallback(loader(100, 140))
    trainer(callbacks=[audit, Changes()], max_epochs=0).fit(Classifier(), loader(0, 32))
    assert audit.result is None


@pytest.mark.parametrize(("stage", "interrupted", "steps"), [("fit", True, 4), ("fit", False, 0), ("test", False, 4)])
def test_no_audit_when_the_fit_was_interrupted_or_there_was_none(stage, interrupted, steps):
    audit, model = MIAAuditCallback(loader(100, 140)), Classifier()
    audit.teardown(SimpleNamespace(interrupted=interrupted, global_step=steps), model, stage)
    assert audit.result is None
