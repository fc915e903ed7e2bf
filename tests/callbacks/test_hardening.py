"""The whole hardening run: scoring, rewinding and freezing."""

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader

from lightning_cwrf import (
    CriticalRewindCallback,
    GradientMaskCallback,
    RelaxLossMixin,
    WeightMask,
)
from lightning_cwrf.callbacks import scoring
from lightning_cwrf.weights.vanilla import save_vanilla
from tests.callbacks.helpers import assert_frozen, cwrf, finished, run_with_resume
from tests.helpers import Classifier, loader, part, trained, trainer

pytestmark = pytest.mark.slow


def test_the_users_module_is_scored_untouched_and_the_data_order_is_the_same():
    """With rate 0 a hardening run is the plain run, bit for bit: scoring takes no batch and no random number."""
    results = []
    for with_cwrf in (True, False):
        model, vanilla = finished()
        torch.manual_seed(3)
        callbacks = cwrf(vanilla, rate=0.0) if with_cwrf else []
        trainer(callbacks=callbacks).fit(model, loader(0, 64, shuffle=True))
        results.append(model.state_dict())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_persistent_workers_lose_no_batch():
    seen = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(len(batch[1]))

    model, vanilla = finished()
    data = DataLoader(part(0, 64), batch_size=16, num_workers=1, persistent_workers=True, shuffle=True)
    trainer(callbacks=[*cwrf(vanilla), Count()]).fit(model, data)
    assert seen == [16] * 8


def test_resume_neither_scores_nor_rewinds_again_and_ends_at_the_same_weights(tmp_path, monkeypatch):
    calls = []
    original = WeightMask.rewind_
    monkeypatch.setattr(WeightMask, "rewind_", lambda *a: calls.append(1) or original(*a))
    vanilla = finished()[1]

    def make():
        model, _ = finished()
        for module in model.modules():  # dropout draws random numbers that a checkpoint does not carry
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return RelaxLossMixin.attach(model, alpha=0.5), cwrf(vanilla)

    (whole, _), (resumed, callbacks) = run_with_resume(tmp_path, make, 2, 4)
    assert len(calls) == 2  # the unbroken run and the first half; not the resumed one
    assert_frozen(resumed, callbacks[1].mask, vanilla)
    state = resumed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())
    torch.load(tmp_path / "half.ckpt", weights_only=True)  # callback state is tensors and plain values


def test_the_same_callbacks_continue_with_the_same_module_and_start_over_with_another():
    model, vanilla = finished()
    callbacks = cwrf(vanilla)
    trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32))
    mask = callbacks[1].mask
    trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32))
    assert callbacks[1].mask is mask
    assert_frozen(model, mask, vanilla)
    other, _ = trained(seed=9, epochs=5)
    trainer(callbacks=callbacks, max_epochs=1).fit(other, loader(0, 32))
    assert callbacks[1].mask is not mask
    assert_frozen(other, callbacks[1].mask, vanilla)


def test_each_callback_alone_from_files(tmp_path):
    model, vanilla = finished()
    callbacks = cwrf(vanilla, keep_scores=True)
    trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32))
    callbacks[0].save_scores(tmp_path / "scores.safetensors")
    mask_file = callbacks[1].mask.save(tmp_path / "mask.safetensors")
    save_vanilla(vanilla, tmp_path / "vanilla.safetensors")

    again, _ = finished()
    rewind = CriticalRewindCallback(
        rate=0.2, scores=tmp_path / "scores.safetensors", vanilla=tmp_path / "vanilla.safetensors"
    )
    trainer(callbacks=[rewind, GradientMaskCallback()], max_epochs=1).fit(again, loader(0, 32))
    assert all(torch.equal(rewind.mask.masks[n], callbacks[1].mask.masks[n]) for n in rewind.mask.masks)
    assert_frozen(again, rewind.mask, vanilla)

    third, _ = finished()
    held = {n: p.detach().clone() for n, p in third.named_parameters()}
    alone = GradientMaskCallback(mask=mask_file)
    trainer(callbacks=[alone], max_epochs=1).fit(third, loader(0, 32))
    assert_frozen(third, alone.mask, held)
    assert not torch.equal(third.net[0].weight, held["net.0.weight"])


def test_a_mask_alone_survives_resume(tmp_path):
    vanilla = finished()[1]
    mask = WeightMask({n: torch.rand(p.shape) < 0.3 for n, p in finished()[0].named_parameters()})
    path = mask.save(tmp_path / "mask.safetensors")

    def make():
        model, _ = finished()
        return model, [GradientMaskCallback(mask=path)]

    held = dict(finished()[0].named_parameters())
    (_, _), (resumed, callbacks) = run_with_resume(tmp_path, make, 1, 2)
    assert_frozen(resumed, callbacks[0].mask, held)
    assert vanilla


def test_datamodule_and_redraw():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(0, 64)

    model, _ = finished()
    callbacks = cwrf("redraw")
    with pytest.warns(UserWarning, match="drawn again"):
        trainer(callbacks=callbacks).fit(model, datamodule=Data())
    assert callbacks[2].mask.moved(model) == {}


def test_whole_flow_from_a_lightning_checkpoint(tmp_path):
    model, vanilla = trained()
    start = Classifier()
    start.load_state_dict(vanilla)
    save = trainer(tmp_path, max_epochs=1)
    save.strategy.connect(start)
    save.save_checkpoint(tmp_path / "init.ckpt", weights_only=True)
    callbacks = cwrf(tmp_path / "init.ckpt")
    run = trainer(callbacks=callbacks)
    run.fit(RelaxLossMixin.attach(model, alpha=0.3), loader(0, 64), loader(200, 232))
    assert_frozen(model, callbacks[1].mask, vanilla)
    assert "val_acc" in run.callback_metrics


def test_running_statistics_are_kept_at_the_rewind():
    model, vanilla = finished()
    before, seen = model.net[1].running_mean.clone(), []
    assert (before != vanilla["net.1.running_mean"]).all()

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(pl_module.net[1].running_mean.clone())

    trainer(callbacks=[*cwrf(vanilla, rate=1.0), Look()], max_epochs=1).fit(model, loader(0, 32))
    assert torch.equal(seen[0], before)


def test_a_checkpoint_of_a_hardening_is_little_larger_than_that_of_a_plain_run(tmp_path):
    """The mask costs a bit per weight and the rewound values; scores, which are as large as the weights, are not in."""
    sizes = []
    vanilla = finished(width=512)[1]
    for callbacks in ([], cwrf(vanilla, rate=0.03)):
        model, _ = finished(optimizer="rmsprop", width=512)
        run = trainer(callbacks=callbacks, max_epochs=1)
        run.fit(model, loader(0, 16))
        run.save_checkpoint(tmp_path / "run.ckpt")
        sizes.append((tmp_path / "run.ckpt").stat().st_size)
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert sizes[1] - sizes[0] < 0.1 * weights + 15_000


class Holds(Callback):
    """What the scoring holds when the first step begins."""

    def on_train_batch_start(self, trainer, *_):
        scoring = trainer.callbacks[0]
        self.held = [scoring.scores is not None, scoring.vanilla_weights is not None]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("rewinds", [False, True])
def test_scores_are_dropped_when_a_mask_was_made_of_them_unless_they_are_to_be_kept(keep, rewinds, tmp_path):
    model, vanilla = finished()
    holds = Holds()
    callbacks = cwrf(save_vanilla(vanilla, tmp_path / "vanilla.safetensors"), keep_scores=keep)
    trainer(callbacks=[*callbacks[: 3 if rewinds else 1], holds], max_epochs=1).fit(model, loader(0, 32))
    kept = keep or not rewinds
    assert holds.held == [kept, True]
    if kept:
        callbacks[0].save_scores(tmp_path / "scores.safetensors")
        return
    with pytest.raises(RuntimeError, match=r"dropped where a CriticalRewindCallback.*keep_scores=True"):
        callbacks[0].save_scores(tmp_path / "scores.safetensors")


def test_a_file_of_vanilla_weights_is_read_when_the_scores_are_dropped(tmp_path, monkeypatch):
    """Both are as large as the model: they must not be held at the same time."""
    model, vanilla = finished()
    callbacks = cwrf(save_vanilla(vanilla, tmp_path / "vanilla.safetensors"))
    held, load = [], scoring.load_vanilla
    monkeypatch.setattr(scoring, "load_vanilla", lambda *given: held.append(callbacks[0].scores) or load(*given))
    trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32))
    assert held == [None, None]
    assert_frozen(model, callbacks[1].mask, vanilla)


def test_vanilla_weights_are_kept_until_the_fit_ends_and_loaded_once_unless_from_a_file(tmp_path, monkeypatch):
    calls, load = [], scoring.load_vanilla
    monkeypatch.setattr(scoring, "load_vanilla", lambda *given: calls.append(given[0]) or load(*given))
    vanilla = finished()[1]
    for source, times in ((vanilla, 1), (save_vanilla(vanilla, tmp_path / "vanilla.safetensors"), 2)):
        calls.clear()
        callbacks = cwrf(source)
        trainer(callbacks=callbacks, max_epochs=1).fit(finished()[0], loader(0, 32))
        assert len(calls) == times
        assert callbacks[0].vanilla_weights is None
