"""The audits of MIAAuditCallback."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import (
    DataLoader,
    Subset,
    TensorDataset,
)

from lightning_cwrf import MIAAuditCallback, PrivacyScoringCallback
from lightning_cwrf.attacks import create_attack
from lightning_cwrf.auditing import audit
from lightning_cwrf.weights import weights_digest
from tests.auditing.conftest import MEMBERS, NONMEMBERS
from tests.helpers import Classifier, digits, loader, part, snapshot, trainer

pytestmark = pytest.mark.slow


def test_the_callback_runs_the_given_attacks(shadows):
    callback = MIAAuditCallback(
        NONMEMBERS, members=MEMBERS, shadows=shadows, attacks=["bavaria", create_attack("lira", online=False)]
    )
    trainer(max_epochs=1, callbacks=[callback]).fit(Classifier(), loader(0, 100))
    assert list(callback.result.estimates) == ["bavaria", "lira"]
    with pytest.raises(TypeError, match=r"a list of names, such as \['lira'\]"):
        MIAAuditCallback(NONMEMBERS, attacks="lira")
    with pytest.raises(ValueError, match="the quantile_regression attack needs inputs; run it with"):
        MIAAuditCallback(NONMEMBERS, attacks=["quantile_regression"])


def test_values_are_logged_and_intervals_hold_them(audited):
    _, callback, run = audited
    logged = {name.removeprefix("mia/"): float(v) for name, v in run.callback_metrics.items() if name[:4] == "mia/"}
    assert logged == pytest.approx({**callback.result.values(), **callback.result.bounds()}, abs=1e-6)
    assert {"lira/auroc", "rmia/tpr_at_fpr_0.001", "loss/advantage", "loss/p1", "loss_gap"} <= set(logged)
    assert [round(entry["epoch"]) for entry in callback.history] == [19, 39]
    assert "lira/auroc" not in callback.history[0]
    for found in [*callback.result.estimates.values(), callback.result.model_metrics]:
        for name, estimate in found.items():
            assert estimate.interval.low <= estimate.value <= estimate.interval.high, name


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


@pytest.mark.parametrize(
    "stop",
    [
        {"callbacks": [Stop()]},
        {"max_steps": 6},
        {"callbacks": [EarlyStopping("val_acc", patience=0, stopping_threshold=0.0, mode="max")]},
    ],
)
def test_the_final_audit_runs_however_training_ends(tmp_path, stop):
    callback = MIAAuditCallback(loader(100, 140), every_n_epochs=0)
    callbacks = [callback, *stop.pop("callbacks", [])]
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, max_epochs=3, callbacks=callbacks, logger=logger, **stop)
    run.fit(Classifier(), loader(0, 64), loader(200, 232))
    assert callback.result is not None
    assert len(callback.history) == 1
    logger.save()
    assert "mia/loss/auroc" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MIAAuditCallback(loader(50, 80)), "14 of the 30 examples of nonmembers are members"),
        (lambda: MIAAuditCallback([]), "nonmembers holds no batch"),
        (lambda: MIAAuditCallback(TensorDataset(digits().tensors[0][200:210], torch.full((10,), 10))), "label 10"),
    ],
)
def test_bad_data_raises_before_the_first_step(make, message):
    model = Classifier()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[make()]).fit(model, loader(0, 64))
    assert all(torch.equal(before["state"][n], t) for n, t in model.state_dict().items())


def test_auditing_does_not_change_training():
    states = []
    for callbacks in ([], [MIAAuditCallback(loader(100, 140), every_n_epochs=1)]):
        torch.manual_seed(0)
        model = Classifier()
        trainer(callbacks=callbacks).fit(model, loader(0, 64, shuffle=True))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_history_survives_resume(tmp_path):
    def make():
        return MIAAuditCallback(loader(100, 140), every_n_epochs=1)

    first = trainer(tmp_path, callbacks=[make()], max_epochs=2)
    first.fit(Classifier(), loader(0, 64))
    first.save_checkpoint(tmp_path / "half.ckpt")
    callback = make()
    run = trainer(tmp_path, callbacks=[callback], max_epochs=3)
    run.fit(Classifier(), loader(0, 64), ckpt_path=tmp_path / "half.ckpt")
    assert [entry["epoch"] for entry in callback.history] == [0.0, 1.0, 2.0]


def test_audit_data_that_is_reference_data_raises():
    torch.manual_seed(0)
    scoring = PrivacyScoringCallback(loader(130, 170), Classifier(), steps=1)
    audit = MIAAuditCallback(loader(100, 140))
    with pytest.raises(ValueError, match="10 of the 40 examples of nonmembers are reference data of the scoring"):
        trainer(callbacks=[audit, scoring], max_epochs=1).fit(Classifier(), loader(0, 64))


def test_invalid_settings_raise():
    with pytest.raises(TypeError, match="what train_shadows returns, not str"):
        MIAAuditCallback([], shadows="folder")
    with pytest.raises(ValueError, match="every_n_epochs"):
        MIAAuditCallback([], every_n_epochs=-1)
    with pytest.raises(ValueError, match="confidence"):
        MIAAuditCallback([], confidence=95)


POOL = part(0, 200)
OTHERS = part(300, 400)


class SeenEMA(EMAWeightAveraging):
    """Averages so slowly that the last weights are others."""

    def __init__(self):
        super().__init__(decay=0.9)


class NoNorm(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net[1] = nn.Identity()


@pytest.mark.parametrize("audit_first", [True, False])
@pytest.mark.parametrize(
    ("make", "model"),
    [
        (SeenEMA, Classifier),
        (lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1), Classifier),
        (lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1), NoNorm),
    ],
)
def test_the_audited_weights_are_the_final_ones(make, model, audit_first, tmp_path):
    """With averaged weights the test accuracy was another model's."""
    callback = MIAAuditCallback(OTHERS, every_n_epochs=1)
    callbacks = [callback, make()] if audit_first else [make(), callback]
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, max_epochs=4, callbacks=callbacks, logger=logger)
    torch.manual_seed(1)
    final = model(lr=0.05)
    run.fit(final, DataLoader(POOL, batch_size=32, shuffle=True))
    exact = audit(final, members=POOL, nonmembers=OTHERS)
    assert callback.result.values() == pytest.approx(exact.values(), abs=1e-6)
    assert torch.equal(callback.result.losses, exact.losses)
    others = [entry["test_loss"] for entry in callback.history[:-1]]
    assert all(abs(loss - exact.values()["test_loss"]) > 1e-3 for loss in others)  # the averaging does something
    logger.save()
    last = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    place = last[0].split(",").index("mia/test_loss")
    values = [float(line.split(",")[place]) for line in last[1:] if line.split(",")[place]]
    assert values[-1] == pytest.approx(exact.values()["test_loss"], abs=1e-5)


def test_weights_that_change_after_the_last_audit_are_audited_again():
    """A user's own averaging, in the module's last hook."""

    class Moves(Classifier):
        def on_train_end(self):
            with torch.no_grad():
                self.net[5].weight.mul_(0.1)

    callback = MIAAuditCallback(OTHERS, every_n_epochs=0)
    model = Moves()
    trainer(max_epochs=2, callbacks=[callback]).fit(model, DataLoader(POOL, batch_size=32))
    assert callback.result.values() == pytest.approx(audit(model, members=POOL, nonmembers=OTHERS).values(), abs=1e-6)
    assert len(callback.history) == 1
    assert weights_digest(model) != weights_digest(Moves())


def test_two_audits_in_one_trainer():
    first = MIAAuditCallback(OTHERS, every_n_epochs=0)
    second = MIAAuditCallback(part(500, 600), every_n_epochs=0, name="mia_other")
    run = trainer(max_epochs=1, callbacks=[first, second])
    run.fit(Classifier(), DataLoader(POOL, batch_size=32))
    logged = {name for name in run.callback_metrics if name.endswith("/test_loss")}
    assert logged == {"mia/test_loss", "mia_other/test_loss"}
    assert first.result.values() != second.result.values()
    twins = trainer(callbacks=[MIAAuditCallback(OTHERS), MIAAuditCallback(OTHERS)])
    with pytest.raises(MisconfigurationException, match=r"there are 2 MIAAuditCallbacks .* or give each another name="):
        twins.fit(Classifier(), DataLoader(POOL, batch_size=32))


class Sparse(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.EmbeddingBag(17, 8, sparse=True), nn.Linear(8, 10))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_sparse_embeddings_are_audited():
    words = TensorDataset((digits().tensors[0].flatten(1) * 16).long(), digits().tensors[1])
    callback = MIAAuditCallback(Subset(words, range(300, 400)), every_n_epochs=1)
    trainer(max_epochs=1, callbacks=[callback]).fit(Sparse(), DataLoader(Subset(words, range(100)), batch_size=20))
    assert callback.result is not None


def test_several_training_loaders_raise():
    class Both(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    loaders = {"a": loader(0, 64), "b": loader(0, 64)}
    with pytest.raises(MisconfigurationException, match=r"not a dict; .*MIAAuditCallback\(members=\.\.\.\)"):
        trainer(callbacks=[MIAAuditCallback(OTHERS)]).fit(Both(), loaders)
    trainer(max_epochs=1, callbacks=[MIAAuditCallback(OTHERS, members=part(0, 64))]).fit(Both(), loaders)
