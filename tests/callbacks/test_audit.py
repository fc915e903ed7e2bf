"""When the audit callback audits, what, and which weights."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cwrf import AuditResult, MIAAuditCallback
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


def test_the_last_audit_is_saved_and_an_earlier_file_is_not_replaced(tmp_path):
    path = tmp_path / "audit.json"
    callback = MIAAuditCallback(loader(100, 140), every_n_epochs=1, save=path)
    model = Classifier()
    trainer(callbacks=[callback], max_epochs=2).fit(model, loader(0, 64))
    assert AuditResult.load(path).values() == callback.result.values()
    with pytest.raises(MisconfigurationException, match="overwrite=True"):
        again = MIAAuditCallback(loader(100, 140), save=path)
        trainer(callbacks=[again], max_epochs=2).fit(model, loader(0, 64))
    replaced = MIAAuditCallback(loader(100, 160), save=path, overwrite=True)
    trainer(callbacks=[replaced], max_epochs=2).fit(model, loader(0, 64))
    assert len(AuditResult.load(path).is_member) == 124


def test_files_that_no_audit_can_be_saved_to_are_refused_before_the_training(tmp_path):
    (tmp_path / "file").touch()
    for path, message in (("a.ckpt", "suffix of another kind"), ("", "is a folder"), ("file/a.json", "not a folder")):
        with pytest.raises(ValueError, match=message):
            MIAAuditCallback(loader(100, 140), save=tmp_path / path)
    twins = [MIAAuditCallback(loader(100, 140), save=tmp_path / "a.json", name=name) for name in ("one", "two")]
    with pytest.raises(MisconfigurationException, match="two callbacks in this Trainer save to"):
        trainer(callbacks=twins, max_epochs=1).fit(Classifier(), loader(0, 64))
