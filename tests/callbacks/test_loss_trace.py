"""The losses of the training examples over a training: whose, when, and what a resumed run has."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lightning_cwrf import LossTraceCallback, RelaxLossMixin
from lightning_cwrf.attacks import LossTraces, lt_iqr
from tests.helpers import Classifier, ManualClassifier, digits, loader, part, trainer


class Noted(Classifier):
    """Keeps its weights at the start of each epoch."""

    def on_train_epoch_start(self):
        vars(self).setdefault("noted", []).append(copy.deepcopy(self.state_dict()))


def losses_of(model, state, begin, end):
    """The slow way: one example at a time."""
    work = copy.deepcopy(model).eval()
    work.load_state_dict(state)
    with torch.no_grad():
        rows = [F.cross_entropy(work(x[None]), y[None]) for x, y in part(begin, end)]
    return torch.stack(rows)


def fit(callback, data=None, model=None, **settings):
    torch.manual_seed(0)
    model = Noted() if model is None else model
    run = trainer(callbacks=[callback], **settings)
    run.fit(model, loader(0, 40, shuffle=True) if data is None else data)
    return model, run


def test_each_row_has_the_losses_of_the_weights_of_its_time_in_the_data_sets_order():
    callback = LossTraceCallback(nonmembers=loader(100, 120))
    model, _ = fit(callback, max_epochs=3, accumulate_grad_batches=2)
    found = callback.result
    assert found.losses.dtype == torch.float16
    assert found.steps.tolist() == [0, 2, 4, 6]
    for row, state in zip(found.losses, [*model.noted, model.state_dict()], strict=True):
        torch.testing.assert_close(row.float(), losses_of(model, state, 0, 40), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        found.nonmember_losses.float(), losses_of(model, model.state_dict(), 100, 120), rtol=1e-3, atol=1e-6
    )
    assert torch.equal(found.lt_iqr(), lt_iqr(found.losses))
    assert 0 <= found.loss_tnr() <= 1


def test_recording_changes_nothing_about_the_training():
    ended = []
    for callbacks in ([LossTraceCallback(nonmembers=loader(100, 120))], []):
        torch.manual_seed(0)
        model = Classifier()
        trainer(callbacks=callbacks).fit(model, loader(0, 40, shuffle=True), loader(100, 120))
        ended.append((model.state_dict(), torch.get_rng_state()))
    for name, value in ended[0][0].items():
        assert torch.equal(value, ended[1][0][name]), name
    assert torch.equal(ended[0][1], ended[1][1])


def test_every_n_epochs_and_an_early_end():
    callback = LossTraceCallback(every_n_epochs=2)
    fit(callback, max_epochs=3)
    assert callback.result.steps.tolist() == [0, 6, 9]
    callback = LossTraceCallback(every_n_epochs=2)
    fit(callback, max_epochs=4)
    assert callback.result.steps.tolist() == [0, 6, 12]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback = LossTraceCallback(members=part(0, 40))
        fit(callback, max_steps=4, max_epochs=-1)
    assert callback.result.steps.tolist() == [0, 3, 4]


@pytest.mark.parametrize("model", [ManualClassifier, lambda: RelaxLossMixin.attach(Classifier(), alpha=0.5)])
def test_manual_optimization_and_a_defense(model):
    model = model()
    callback = LossTraceCallback()
    fit(callback, model=model)
    assert callback.result.losses.shape == (3, 40)
    last = losses_of(Classifier(), model.state_dict(), 0, 40)
    torch.testing.assert_close(callback.result.losses[-1].float(), last, rtol=1e-3, atol=1e-6)


class Steady(Classifier):
    """Draws no random numbers in training, which a checkpoint would not carry."""

    def __init__(self):
        super().__init__()
        self.net[4].p = 0.0


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint", "ignore:.*before the epoch ended")
@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_run_has_the_trace_of_an_uninterrupted_one(tmp_path, step):
    """From the end of an epoch, and from the middle of one: its other batches are then the first ones again."""
    whole, first, again = (LossTraceCallback() for _ in range(3))
    torch.manual_seed(0)
    start = Steady().state_dict()

    def run(callback, **settings):
        model = Steady()
        model.load_state_dict(start)
        checkpoint = settings.pop("ckpt_path", None)
        trainer(tmp_path, **settings).fit(model, loader(0, 48), ckpt_path=checkpoint, weights_only=True)
        return model

    run(whole, callbacks=[whole], max_epochs=4)
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    run(first, callbacks=[first, saved], max_epochs=2, enable_checkpointing=True)
    model = run(again, callbacks=[again], max_epochs=4, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert again.result.steps.tolist() == whole.result.steps.tolist() == [0, 3, 6, 9, 12]
    same = 5 if step == 3 else 2
    assert torch.equal(again.result.losses[:same], whole.result.losses[:same])
    last = losses_of(model, model.state_dict(), 0, 48)
    torch.testing.assert_close(again.result.losses[-1].float(), last, rtol=1e-3, atol=1e-6)


def test_resuming_with_other_examples_is_an_error_and_without_a_trace_a_warning(tmp_path):
    _, run = fit(LossTraceCallback(), max_epochs=1)
    run.save_checkpoint(tmp_path / "with.ckpt")
    with pytest.raises(MisconfigurationException, match="loss traces of other training examples, or of another order"):
        trainer(callbacks=[LossTraceCallback()]).fit(Noted(), loader(1, 41), ckpt_path=tmp_path / "with.ckpt")
    run = trainer(max_epochs=1)
    run.fit(Noted(), loader(0, 40))
    run.save_checkpoint(tmp_path / "without.ckpt")
    callback = LossTraceCallback()
    with pytest.warns(UserWarning, match="was not in the run that this one resumes: the loss traces begin at step 3"):
        trainer(callbacks=[callback]).fit(Noted(), loader(0, 40), ckpt_path=tmp_path / "without.ckpt")
    assert callback.result.steps.tolist() == [3, 6]


def test_a_second_fit_begins_anew():
    callback = LossTraceCallback()
    model, _ = fit(callback, max_epochs=1)
    trainer(callbacks=[callback], max_epochs=2).fit(model, loader(0, 32))
    assert callback.result.losses.shape == (3, 32)
    assert callback.result.steps.tolist() == [0, 2, 4]


def test_a_further_fit_of_one_trainer_goes_on():
    callback = LossTraceCallback()
    model, run = fit(callback, max_epochs=1)
    first = callback.result
    run.fit_loop.max_epochs = 2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*was not in the run that this one resumes")
        run.fit(model, loader(0, 40, shuffle=True))
    assert callback.result.steps.tolist() == [0, 3, 6]
    assert torch.equal(callback.result.losses[:2], first.losses)


def test_a_further_fit_of_changed_weights_begins_with_them():
    callback = LossTraceCallback()
    model, run = fit(callback, max_epochs=1)
    with torch.no_grad():
        model.net[-1].weight.zero_()
    changed = copy.deepcopy(model.state_dict())
    run.fit_loop.max_epochs = 2
    run.fit(model, loader(0, 40, shuffle=True))
    assert callback.result.steps.tolist() == [0, 3, 3, 6]
    torch.testing.assert_close(
        callback.result.losses[2].float(), losses_of(model, changed, 0, 40), rtol=1e-3, atol=1e-6
    )
    run.fit_loop.max_epochs = 3
    with pytest.raises(MisconfigurationException, match="the earlier fit of this Trainer has the loss traces of other"):
        run.fit(model, loader(1, 41))


class FailsOnce(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 4 and not vars(self).get("failed"):
            self.failed = True
            raise RuntimeError("lost connection")


def test_a_fit_that_failed_and_is_repeated_goes_on():
    callback = LossTraceCallback()
    run = trainer(callbacks=[callback, FailsOnce()], max_epochs=3)
    model = Noted()
    with pytest.raises(RuntimeError, match="lost connection"):
        run.fit(model, loader(0, 40))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*was not in the run that this one resumes")
        run.fit(model, loader(0, 40))
    assert callback.result.steps.tolist()[:3] == [0, 3, 4]


@pytest.mark.parametrize("every_n_epochs", [1, 2])
def test_a_finished_training_that_is_resumed_has_its_result(tmp_path, every_n_epochs):
    """From its end, and from the last epoch's checkpoint, which is written before the last measurement."""
    first = LossTraceCallback(nonmembers=loader(100, 120), every_n_epochs=every_n_epochs)
    saved = ModelCheckpoint(tmp_path, save_last=True)
    torch.manual_seed(0)
    run = trainer(callbacks=[first, saved], max_epochs=2, enable_checkpointing=True)
    run.fit(Noted(), loader(0, 40, shuffle=True))
    run.save_checkpoint(tmp_path / "end.ckpt")
    for name in ("end.ckpt", "last.ckpt"):
        again = LossTraceCallback(nonmembers=loader(100, 120), every_n_epochs=every_n_epochs)
        trainer(callbacks=[again], max_epochs=2).fit(Noted(), loader(0, 40), ckpt_path=tmp_path / name)
        assert again.result.steps.tolist() == first.result.steps.tolist()
        assert torch.equal(again.result.losses, first.result.losses)
        assert torch.equal(again.result.nonmember_losses, first.result.nonmember_losses)


class Augmented(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        x, y = digits()[i]
        return x + torch.randn(()), y


def test_examples_that_read_differently_each_time_are_an_error_whose_fix_works():
    with pytest.raises(ValueError, match=r"members read differently each time .* Pass members= a data set"):
        fit(LossTraceCallback(), DataLoader(Augmented(), batch_size=16))
    callback = LossTraceCallback(members=part(0, 40))
    model, _ = fit(callback, DataLoader(Augmented(), batch_size=16))
    last = losses_of(model, model.state_dict(), 0, 40)
    torch.testing.assert_close(callback.result.losses[-1].float(), last, rtol=1e-3, atol=1e-6)


def test_wrong_data():
    with pytest.raises(ValueError, match="of nonmembers are members"):
        fit(LossTraceCallback(nonmembers=loader(30, 60)))
    with pytest.raises(MisconfigurationException, match=r"leaves out .* or pass LossTraceCallback\(members=\.\.\.\)"):
        sampler = RandomSampler(part(0, 40), num_samples=16)
        fit(LossTraceCallback(), DataLoader(part(0, 40), batch_size=16, sampler=sampler))
    with pytest.raises(MisconfigurationException, match="training loader is recreated"):
        fit(LossTraceCallback(), reload_dataloaders_every_n_epochs=1)
    with pytest.raises(ValueError, match="every_n_epochs must be an integer of at least 1, not 0"):
        LossTraceCallback(every_n_epochs=0)
    with pytest.raises(TypeError, match="nonmembers: expected a DataLoader"):
        LossTraceCallback(nonmembers=3)


def test_a_loss_beyond_float16_is_kept():
    class Huge(Noted):
        def forward(self, x):
            return self.net(x) * 1e6

    callback = LossTraceCallback()
    fit(callback, model=Huge(), max_epochs=1, gradient_clip_val=1.0)
    assert callback.result.losses.dtype == torch.float32
    assert callback.result.losses.max() > 65504
    assert callback.result.lt_iqr().isfinite().all()


def test_the_file_is_written_and_not_replaced_unless_asked(tmp_path):
    path = tmp_path / "traces.safetensors"
    callback = LossTraceCallback(save=path)
    fit(callback, max_epochs=1)
    assert torch.equal(LossTraces.load(path).losses, callback.result.losses)
    with pytest.raises(MisconfigurationException, match="exists; pass another file as save=, or overwrite=True"):
        fit(LossTraceCallback(save=path), max_epochs=1)
    fit(LossTraceCallback(save=path, overwrite=True), max_epochs=2)
    assert len(LossTraces.load(path).losses) == 3
    with pytest.raises(ValueError, match="is a folder; name a file"):
        LossTraceCallback(save=tmp_path)


def test_a_training_that_raises_has_no_result_and_the_callback_can_be_copied():
    callback = LossTraceCallback()
    fit(callback, max_epochs=1)
    copied = copy.deepcopy(callback)
    assert torch.equal(copied.result.losses, callback.result.losses)


class Uncounted(ManualClassifier):
    """Steps the optimizer itself, which Lightning does not count."""

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        F.cross_entropy(self(batch[0]), batch[1]).backward()
        for optimizer in self.optimizers(use_pl_optimizer=False):
            optimizer.step()


def test_steps_that_lightning_does_not_count_are_measured_all_the_same():
    callback, model = LossTraceCallback(), Uncounted()
    fit(callback, model=model, max_epochs=3)
    result = callback.result
    assert (len(result.losses), result.steps.tolist()) == (4, [0, 0, 0, 0])
    expected = losses_of(model, model.state_dict(), 0, result.losses.shape[1])
    torch.testing.assert_close(result.losses[-1].float(), expected, atol=2e-3, rtol=2e-3)
