"""How callbacks find each other in a Trainer, and errors for those that cannot work there."""

import pickle
import warnings

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cwrf import (
    CriticalRewindCallback,
    DefenseCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
)
from lightning_cwrf.trainers import callbacks_of
from tests.callbacks.helpers import cwrf, finished, run_with_resume
from tests.helpers import Classifier, DigitsData, loader, trainer


class MyScoring(PrivacyScoringCallback):
    pass


class MyRewind(CriticalRewindCallback):
    pass


class MyMask(GradientMaskCallback):
    pass


def my_cwrf(vanilla):
    return [MyScoring(loader(100, 140), vanilla, steps=2), MyRewind(rate=0.2), MyMask()]


def test_callbacks_are_found_in_order_and_subclasses_too():
    callbacks = my_cwrf("redraw")
    run = trainer(callbacks=[Callback(), *callbacks])
    assert callbacks_of(run, GradientMaskCallback) == callbacks[2:]
    assert callbacks_of(run, CriticalRewindCallback, PrivacyScoringCallback) == callbacks[:2]
    assert callbacks_of(run, MIAAuditCallback) == []


def test_a_subclass_of_the_mask_callback_holds_the_weights(recwarn):
    model, vanilla = finished()
    callbacks = my_cwrf(vanilla)
    trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32))
    assert not [str(w.message) for w in recwarn if "nothing holds the rewound weights" in str(w.message)]
    assert callbacks[2].mask is callbacks[1].mask


def test_a_subclass_of_the_rewind_callback_keeps_the_scores_out_of_checkpoints():
    model, vanilla = finished()
    callbacks = my_cwrf(vanilla)
    trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32))
    assert "scores" not in callbacks[0].state_dict()


@pytest.mark.parametrize(("before", "after"), [(GradientMaskCallback, MyMask), (MyMask, GradientMaskCallback)])
def test_a_run_resumes_with_a_subclass_of_the_mask_callback(before, after, tmp_path):
    vanilla, holders = finished()[1], [before, before, after]

    def make():
        return finished()[0], [*cwrf(vanilla)[:2], holders.pop(0)()]

    _, (model, callbacks) = run_with_resume(tmp_path, make, 1, 2)
    assert type(callbacks[2]) is after
    assert callbacks[2].done_with == {"tune": "rest", "mask": None}
    assert callbacks[2].mask.moved(model) == {}


def test_a_run_with_a_subclass_of_the_mask_callback_does_not_resume_without_it(tmp_path):
    model, vanilla = finished()
    run = trainer(tmp_path, callbacks=my_cwrf(vanilla), max_epochs=1)
    run.fit(model, loader(0, 32))
    run.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(MisconfigurationException, match="GradientMaskCallback, which is not in this Trainer"):
        trainer(callbacks=[MIAAuditCallback(loader(100, 140))], max_epochs=2).fit(
            finished()[0], loader(0, 32), ckpt_path=tmp_path / "half.ckpt"
        )


def test_a_callback_and_its_subclass_are_two_of_a_kind():
    model, vanilla = finished()
    with pytest.raises(MisconfigurationException, match="there are 2 GradientMaskCallbacks in this Trainer; keep one"):
        trainer(callbacks=[*cwrf(vanilla), MyMask()]).fit(model, loader(0, 32))


def test_scoring_and_audit_bring_batches_to_a_model_of_half_precision():
    """A bfloat16 module whose own step converts its inputs, in a Trainer that does not."""

    class Half(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].to(self.net[0].weight.dtype), batch[1]), batch_idx)

    model, vanilla = finished(Half)
    scoring = PrivacyScoringCallback(loader(100, 140), vanilla, steps=2)
    audit = MIAAuditCallback(loader(140, 172))
    trainer(callbacks=[scoring, audit], max_epochs=1).fit(model.bfloat16(), loader(0, 32))
    assert scoring.scores["net.5.weight"].sum() > 0
    assert audit.result.scores["loss"].isfinite().all()
    assert len(audit.result.scores["loss"]) == 64


def test_a_second_fit_of_a_trainer_that_has_trained_all_its_epochs_warns():
    """It trains nothing, and the module would be taken for a hardened one."""
    callbacks = [DefenseCallback("relaxloss"), MIAAuditCallback(loader(100, 160), every_n_epochs=0)]
    for callback in callbacks:
        run = trainer(max_epochs=1, callbacks=[callback])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="this Trainer has trained")
            run.fit(Classifier(), loader(0, 64))
        with pytest.warns(UserWarning, match="max_epochs=1 in an earlier fit, so this one trains nothing"):
            run.fit(Classifier(), loader(0, 64))


class Pickles(Callback):
    """Sends the datamodule to a worker that is not forked, as a loader with its method as collate_fn does."""

    def on_train_epoch_end(self, trainer, pl_module):
        pickle.dumps(trainer.datamodule)


def test_a_datamodule_can_be_sent_to_workers_after_the_scoring():
    model, vanilla = finished()
    trainer(max_epochs=1, callbacks=[*cwrf(vanilla), Pickles()]).fit(model, datamodule=DigitsData())
