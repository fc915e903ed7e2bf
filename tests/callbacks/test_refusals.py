"""Set-ups that cannot work are errors or warnings."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cwrf import (
    CriticalRewindCallback,
    FinishedWeightsCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    VanillaSnapshotCallback,
)
from tests.callbacks.helpers import cwrf, finished
from tests.helpers import loader, trainer


@pytest.mark.parametrize("averaging", [lambda: StochasticWeightAveraging(1e-2), lambda: EMAWeightAveraging()])
def test_weight_averaging_is_refused(averaging):
    model, vanilla = finished()
    with pytest.raises(MisconfigurationException, match="average over training"):
        trainer(callbacks=[*cwrf(vanilla), averaging()]).fit(model, loader(0, 64))


@pytest.mark.parametrize("first", [True, False])
def test_pruning_is_refused(first):
    model, vanilla = finished()
    pruning = ModelPruning("l1_unstructured", amount=0.5)
    callbacks = [pruning, *cwrf(vanilla)] if first else [*cwrf(vanilla), pruning]
    with pytest.raises(MisconfigurationException, match="does not work with ModelPruning, which renames the weights"):
        trainer(callbacks=callbacks).fit(model, loader(0, 64))


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (PrivacyScoringCallback([], "redraw"), "a mask"),
        (GradientMaskCallback("mask"), "a mask"),
        (CriticalRewindCallback(), "a mask"),
        (VanillaSnapshotCallback(), "save_vanilla"),
        (MIAAuditCallback([]), "lightning_cwrf.audit"),
        (FinishedWeightsCallback("finished.ckpt"), "configure_model"),
    ],
)
def test_sharding_strategies_are_refused_with_the_reason(callback, reason):
    from lightning.pytorch.strategies import FSDPStrategy

    fake = SimpleNamespace(strategy=FSDPStrategy(), callbacks=[callback])
    with pytest.raises(MisconfigurationException, match=f"FSDPStrategy, which shards the weights: .*{reason}"):
        callback.setup(fake, finished()[0], "fit")


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda v: [CriticalRewindCallback(), PrivacyScoringCallback([], v)], "put PrivacyScoringCallback before"),
        (lambda v: [GradientMaskCallback(), *cwrf(v)[:2]], "put CriticalRewindCallback before"),
        (lambda v: [CriticalRewindCallback()], "needs vanilla weights"),
        (lambda v: [CriticalRewindCallback(vanilla=v)], "needs scores"),
        (lambda v: [GradientMaskCallback()], "needs a mask"),
        (lambda v: [*cwrf(v), CriticalRewindCallback()], "there are 2 CriticalRewindCallbacks in this Trainer; keep"),
    ],
)
def test_wiring_mistakes(callbacks, message):
    model, vanilla = finished()
    with pytest.raises(MisconfigurationException, match=message):
        trainer(callbacks=callbacks(vanilla)).fit(model, loader(0, 64))


def test_a_rewind_that_nothing_holds_or_that_chooses_nothing_is_reported():
    model, vanilla = finished()
    with pytest.raises(MisconfigurationException, match=r"nothing would hold .* CriticalRewindCallback\(hold=False\)"):
        trainer(callbacks=cwrf(vanilla)[:2], max_epochs=1).fit(model, loader(0, 32))
    model, vanilla = finished()
    with pytest.warns(UserWarning, match="nothing is rewound"):
        trainer(callbacks=cwrf(vanilla, rate=1e-6), max_epochs=1).fit(model, loader(0, 32))


def test_resuming_the_wrong_way_is_reported(tmp_path):
    model, vanilla = finished()
    first = trainer(tmp_path, callbacks=cwrf(vanilla), max_epochs=1)
    first.fit(model, loader(0, 32))
    first.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(MisconfigurationException, match=r"its work with rate=0\.2, and now it has rate=0\.4"):
        trainer(callbacks=cwrf(vanilla, rate=0.4)).fit(finished()[0], loader(0, 32), ckpt_path=tmp_path / "half.ckpt")
    plain = trainer(tmp_path, max_epochs=1)
    plain.fit(finished()[0], loader(0, 32))
    plain.save_checkpoint(tmp_path / "finished.ckpt")
    with pytest.warns(UserWarning, match="ended without a training step"):
        trainer(callbacks=cwrf(vanilla), max_epochs=1).fit(
            finished()[0], loader(0, 32), ckpt_path=tmp_path / "finished.ckpt"
        )
