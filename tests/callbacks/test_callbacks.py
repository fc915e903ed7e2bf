"""The hardening run: scoring, rewinding and holding still, in real Trainers."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_cwrf import (
    CriticalRewindCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    RelaxLossMixin,
    VanillaSnapshotCallback,
    WeightMask,
)
from lightning_cwrf.callbacks.audit import _is_last_epoch, weights_digest
from lightning_cwrf.callbacks.common import unseen_share
from lightning_cwrf.weights.vanilla import capture, save_vanilla
from tests.callbacks.helpers import Probe, assert_frozen, cwrf, finished, run_with_resume
from tests.helpers import OPTIMIZERS, Classifier, ManualClassifier, loader, part, trained, trainer

SETTINGS = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 3},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "deterministic": {"deterministic": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_weights_stay_bit_identical(optimizer, setting):
    if optimizer == "lbfgs" and setting == "clipped by value":
        setting = "clipped"  # the two differ in nothing that LBFGS sees; keep the cell real
    model, vanilla = finished(optimizer=optimizer)
    callbacks = cwrf(vanilla)
    probe = Probe(lambda: callbacks[1].mask, vanilla)
    trainer(callbacks=[*callbacks, probe], **SETTINGS[setting]).fit(model, loader(0, 64))
    assert callbacks[1].mask.count == round(0.2 * sum(p.numel() for p in model.parameters()))
    torch.use_deterministic_algorithms(False)
    assert probe.batches == 8
    assert probe.moves >= 1  # LBFGS may find no step that bf16 can show, but not always


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_frozen_under_manual_optimization_with_two_optimizers(precision):
    model, vanilla = finished(ManualClassifier)
    callbacks = cwrf(vanilla)
    probe = Probe(lambda: callbacks[1].mask, vanilla)
    trainer(callbacks=[*callbacks, probe], precision=precision).fit(model, loader(0, 64))
    assert probe.moves == 8


def test_momentum_from_before_the_freeze_cannot_move_frozen_weights():
    """A resumed optimizer carries moments of the frozen weights; only the write-back after the step holds them."""
    model, vanilla = finished(optimizer="sgd")

    class Momentum(Callback):
        def on_train_start(self, trainer, pl_module):
            for p in pl_module.parameters():
                trainer.optimizers[0].state[p]["momentum_buffer"] = torch.ones_like(p)

    callbacks = cwrf(vanilla)
    probe = Probe(lambda: callbacks[1].mask, vanilla)
    trainer(callbacks=[Momentum(), *callbacks, probe]).fit(model, loader(0, 32))
    assert probe.moves == 4


def test_clipping_sees_the_norm_of_the_live_weights_alone():
    model, vanilla = finished(optimizer="sgd")
    callbacks = cwrf(vanilla, rate=0.5)
    seen = []

    class Norms(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            mask = callbacks[1].mask.masks
            grads = {n: p.grad for n, p in pl_module.named_parameters()}
            seen.append(float(torch.cat([g[mask[n]] for n, g in grads.items()]).norm()))

    trainer(callbacks=[*callbacks, Norms()], gradient_clip_val=0.1).fit(model, loader(0, 64))
    assert seen == [0.0] * len(seen)
    assert len(seen) == 8


def test_what_moves_frozen_weights_outside_the_optimizer_is_reported_and_undone():
    model, vanilla = finished()

    class Clamp(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                pl_module.net[5].weight.mul_(0.5)

    callbacks = cwrf(vanilla)
    with pytest.warns(UserWarning, match="something other than the optimizers' steps moved"):
        trainer(callbacks=[*callbacks, Clamp()], max_epochs=1).fit(model, loader(0, 64))
    assert_frozen(model, callbacks[1].mask, vanilla)


@pytest.mark.parametrize("averaging", [lambda: StochasticWeightAveraging(1e-2), lambda: EMAWeightAveraging()])
def test_weight_averaging_is_refused(averaging):
    model, vanilla = finished()
    with pytest.raises(MisconfigurationException, match="average over training"):
        trainer(callbacks=[*cwrf(vanilla), averaging()]).fit(model, loader(0, 64))


@pytest.mark.parametrize("callback", [PrivacyScoringCallback([], "redraw"), GradientMaskCallback("mask"),
                                      CriticalRewindCallback(), VanillaSnapshotCallback()])  # fmt: skip
def test_sharding_strategies_are_refused(callback):
    from types import SimpleNamespace

    from lightning.pytorch.strategies import FSDPStrategy

    fake = SimpleNamespace(strategy=FSDPStrategy(), callbacks=[callback])
    with pytest.raises(MisconfigurationException, match="FSDPStrategy: it shards the weights"):
        callback.setup(fake, finished()[0], "fit")


def test_hooks_are_gone_after_the_fit_and_after_an_exception():
    class Boom(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("boom")

    for extra in ([], [Boom()]):
        model, vanilla = finished()
        run = trainer(callbacks=[*cwrf(vanilla), *extra])
        optimizers = []

        class Keep(Callback):
            def on_train_start(self, trainer, pl_module, kept=optimizers):
                kept += trainer.optimizers

        run.callbacks.append(Keep())
        if extra:
            with pytest.raises(RuntimeError, match="boom"):
                run.fit(model, loader(0, 32))
        else:
            run.fit(model, loader(0, 32))
        assert len(optimizers) == 1
        assert not optimizers[0]._optimizer_step_post_hooks


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


def test_the_same_callbacks_go_on_with_the_same_module_and_begin_anew_with_another():
    model, vanilla = finished()
    callbacks = cwrf(vanilla)
    trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32))
    mask = callbacks[1].mask
    trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32))
    assert callbacks[1].mask is mask
    assert_frozen(model, mask, vanilla)
    torch.manual_seed(9)
    other = Classifier()
    trainer(callbacks=callbacks, max_epochs=1).fit(other, loader(0, 32))
    assert callbacks[1].mask is not mask
    assert_frozen(other, callbacks[1].mask, vanilla)


def test_each_callback_alone_from_files(tmp_path):
    model, vanilla = finished()
    callbacks = cwrf(vanilla)
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: cwrf("nowhere.safetensors"), "no vanilla weights at nowhere.safetensors"),
        (lambda v: cwrf({**v, "net.5.bias": torch.zeros(3)}), r"'net.5.bias' of shape \(3,\) instead of \(10,\)"),
        (lambda v: cwrf({n: t for n, t in v.items() if n != "net.5.weight"}), "lack 'net.5.weight'"),
        (lambda v: [PrivacyScoringCallback(loader(60, 90), v)], "are members"),
        (lambda v: [PrivacyScoringCallback([], v)], "nonmembers holds no batch"),
        (lambda v: [CriticalRewindCallback(scores={"a": torch.ones(2)}, vanilla=v)], "are no such parameters"),
    ],
)
def test_bad_data_is_an_error_before_the_first_step(make, message):
    model, vanilla = finished()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        trainer(callbacks=make(vanilla)).fit(model, loader(0, 64))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_rewind_that_nothing_holds_or_that_chooses_nothing_is_reported():
    model, vanilla = finished()
    with pytest.warns(UserWarning, match="nothing holds the rewound weights"):
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


def test_bad_settings():
    with pytest.raises(ValueError, match=r"rate must be a number in \[0, 1\], not 3"):
        CriticalRewindCallback(rate=3)
    with pytest.raises(ValueError, match="not both"):
        CriticalRewindCallback(scores={}, mask="m")
    with pytest.raises(ValueError, match="lam must be a number in"):
        PrivacyScoringCallback([], "redraw", lam=2)


def test_datamodule_and_redraw():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(0, 64)

    model, _ = finished()
    callbacks = cwrf("redraw")
    with pytest.warns(UserWarning, match="drawn again"):
        trainer(callbacks=callbacks).fit(model, datamodule=Data())
    assert callbacks[2].mask.moved(model) == {}


def test_snapshot_is_taken_before_the_first_step_and_never_on_resume(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    initial = {n: t.clone() for n, t in model.state_dict().items()}
    path = tmp_path / "deep" / "init.safetensors"
    run = trainer(tmp_path, callbacks=[VanillaSnapshotCallback(path)])
    run.fit(model, loader(0, 64))
    run.save_checkpoint(tmp_path / "last.ckpt")
    from safetensors.torch import load_file

    assert all(torch.equal(load_file(path)[n], initial[n]) for n in initial)
    stamp = path.stat().st_mtime_ns
    again = trainer(tmp_path, callbacks=[VanillaSnapshotCallback(path)], max_epochs=3)
    again.fit(Classifier(), loader(0, 64), ckpt_path=tmp_path / "last.ckpt")
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(MisconfigurationException, match="vanilla weights of another run"):
        trainer(callbacks=[VanillaSnapshotCallback(path)]).fit(Classifier(), loader(0, 64))
    late = trainer(tmp_path, callbacks=[VanillaSnapshotCallback(tmp_path / "other.safetensors")], max_epochs=3)
    with pytest.raises(MisconfigurationException, match="initial weights are lost"):
        late.fit(Classifier(), loader(0, 64), ckpt_path=tmp_path / "last.ckpt")


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


def test_frozen_with_a_gradient_scaler_that_skips_a_step():
    """16-bit mixed: the scaler unscales before the mask, and skips the update and both torch hooks on an inf step."""
    from lightning.pytorch.plugins import MixedPrecision

    model, vanilla = finished()
    callbacks = cwrf(vanilla)
    probe = Probe(lambda: callbacks[1].mask, vanilla)

    class Overflow(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.fit_loop.epoch_loop.batch_idx == 1:
                pl_module.net[5].weight.grad[0, 0] = float("inf")

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    trainer(callbacks=[*callbacks, Overflow(), probe], plugins=[plugin], max_epochs=2).fit(model, loader(0, 64))
    assert probe.batches == 8
    assert probe.moves == 6  # one update in each epoch was skipped
    assert plugin.scaler.get_scale() < torch.amp.GradScaler("cpu").get_scale()


def test_frozen_under_the_noise_of_dp_sgd():
    """Opacus writes p.grad itself after the mask was applied, with noise; the write-back still holds the weights."""
    from opacus import PrivacyEngine
    from torch import nn

    class Private(Classifier):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

        def configure_optimizers(self):
            plain = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
            self.hooks, optimizer, _ = PrivacyEngine().make_private(
                module=self, optimizer=plain, data_loader=loader(0, 64), noise_multiplier=1.0, max_grad_norm=1.0,
                poisson_sampling=False, wrap_model=False,
            )  # fmt: skip
            return optimizer

    model, vanilla = finished(Private)
    scores = {name: torch.rand_like(p).detach() for name, p in model.named_parameters()}
    callbacks = [CriticalRewindCallback(rate=0.2, scores=scores, vanilla=vanilla), GradientMaskCallback()]
    probe = Probe(lambda: callbacks[0].mask, vanilla)
    trainer(callbacks=[*callbacks, probe]).fit(model, loader(0, 64))
    assert probe.moves == 8


def test_a_snapshot_under_any_name_is_read_again_and_a_damaged_one_is_not_overwritten(tmp_path):
    for name in ("init.pt", "init", "init.ckpt"):
        torch.manual_seed(0)
        trainer(callbacks=[VanillaSnapshotCallback(tmp_path / name)], max_epochs=1).fit(Classifier(), loader(0, 32))
        callbacks = cwrf(tmp_path / name)
        trainer(callbacks=callbacks, max_epochs=1).fit(finished()[0], loader(0, 32))
        assert callbacks[1].mask.count
    (tmp_path / "init").write_bytes(b"not weights")
    with pytest.raises(MisconfigurationException, match=r"is no file of vanilla weights.*Pass overwrite=True"):
        trainer(callbacks=[VanillaSnapshotCallback(tmp_path / "init")]).fit(Classifier(), loader(0, 32))
    trainer(callbacks=[VanillaSnapshotCallback(tmp_path / "init", overwrite=True)], max_epochs=1).fit(
        Classifier(), loader(0, 32)
    )


def test_files_of_scores_and_masks_are_checked_before_the_first_step(tmp_path):
    _, vanilla = finished()
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"x" * 64)
    weights = save_vanilla(vanilla, tmp_path / "vanilla.safetensors")
    cases = [
        ({"scores": junk}, "junk.safetensors is no file of scores"),
        ({"scores": weights}, "holds lightning_cwrf.Vanilla/1 instead of scores"),
        ({"mask": junk}, "junk.safetensors is no weight mask"),
        ({"mask": weights}, "is not a weight mask, it holds lightning_cwrf.Vanilla/1"),
        ({"scores": {"net.5.bias": torch.ones(3)}}, "or have another shape"),
    ]
    for arguments, message in cases:
        callbacks = [CriticalRewindCallback(vanilla=vanilla, **arguments), GradientMaskCallback()]
        with pytest.raises(ValueError, match=message):
            trainer(callbacks=callbacks).fit(finished()[0], loader(0, 32))


def test_scores_that_lack_parameters_are_taken_with_a_warning():
    model, vanilla = finished()
    rewind = CriticalRewindCallback(rate=0.5, scores={"net.5.bias": torch.rand(10)}, vanilla=vanilla)
    with pytest.warns(UserWarning, match=r"the scores lack 5 of 6 trainable parameters \(net.0.bias, net.0.weight, "):
        trainer(callbacks=[rewind, GradientMaskCallback()], max_epochs=1).fit(model, loader(0, 32))
    assert (rewind.mask.count, rewind.mask.total) == (5, 10)


def test_running_statistics_are_kept_at_the_rewind():
    model, vanilla = finished()
    with torch.no_grad():
        model.net[1].running_mean.fill_(3.0)
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(pl_module.net[1].running_mean.clone())

    trainer(callbacks=[*cwrf(vanilla, rate=1.0), Look()], max_epochs=1).fit(model, loader(0, 32))
    assert seen[0].tolist() == [3.0] * 8


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


def test_scores_that_are_no_tensors_or_all_zero():
    weights = capture(Classifier())
    names = [name for name, _ in Classifier().named_parameters()]
    with pytest.raises(TypeError, match=r"scores of 'net\.0\.weight' must be a tensor, not a ndarray"):
        CriticalRewindCallback(scores={name: weights[name].numpy() for name in names})
    scores = {name: torch.zeros_like(weights[name]) for name in names}
    callbacks = [CriticalRewindCallback(scores=scores, vanilla=weights), GradientMaskCallback()]
    with pytest.warns(UserWarning, match="all scores are 0"):
        trainer(callbacks=callbacks, max_epochs=1).fit(Classifier(), loader(0, 16))


@pytest.mark.parametrize("data", [None, "data", torch.ones(3), 3])
def test_data_that_are_none_are_an_error_where_they_are_given(data):
    with pytest.raises(TypeError, match="nonmembers: expected a DataLoader, a Dataset or an iterable of batches"):
        PrivacyScoringCallback(data, "redraw")
    if data is not None:
        with pytest.raises(TypeError, match="members: expected a DataLoader"):
            PrivacyScoringCallback([], "redraw", members=data)


def test_defaults_are_the_published_settings():
    """λ = 0.7, 30 batches of 256; the rate is in the middle of the searched range; everything else is off."""
    assert PrivacyScoringCallback([], "redraw").settings() == {
        "kind": "privacy", "lam": 0.7, "steps": 30, "lr": 1e-3, "batch_size": 256, "vanilla": "redraw"
    }  # fmt: skip
    assert CriticalRewindCallback().settings() == {
        "rate": 0.03, "per_layer": False, "scores": None, "to": "vanilla", "vanilla": None
    }  # fmt: skip
    assert GradientMaskCallback().settings() == {"tune": "rest", "mask": None}
    assert VanillaSnapshotCallback().overwrite is False


@pytest.mark.parametrize(
    ("share", "error", "warned", "fast"),
    [(0.01, False, False, False), (0.011, False, True, False), (0.1, False, True, False), (0.101, True, False, False),
     (0.9, False, True, True)],
)  # fmt: skip
def test_members_that_training_leaves_out_are_told_by_their_share(share, error, warned, fast, monkeypatch, recwarn):
    monkeypatch.setattr("lightning_cwrf.callbacks.audit.unseen_share", lambda trainer: share)
    check = MIAAuditCallback([])._check_coverage
    if error:
        with pytest.raises(
            MisconfigurationException, match=r"leaves out about 10% of the examples .*Train on a Subset"
        ):
            check(SimpleNamespace(fast_dev_run=fast, reload_dataloaders_every_n_epochs=0))
    else:
        check(SimpleNamespace(fast_dev_run=fast, reload_dataloaders_every_n_epochs=0))
    assert [str(w.message).startswith("the training leaves out about") for w in recwarn] == [True] * warned


@pytest.mark.parametrize(
    ("epochs", "steps", "accumulate", "share"),
    [
        (1, -1, 1, 0.5),  # half of the data in each epoch, drawn anew
        (3, -1, 1, 0.125),
        (3, 2, 1, 0.5),  # two steps are an epoch of two batches
        (3, 2, 2, 0.25),
        (1, 9, 2, 0.5),
        (None, 4, 1, 0.25),
        (-1, 4, 1, 0.25),
        (None, -1, 1, 0.0),
        (-1, -1, 1, 0.0),
    ],
)
def test_the_share_that_training_leaves_out_by_hand(epochs, steps, accumulate, share):
    half = SimpleNamespace(
        train_dataloader=loader(0, 64, shuffle=True), num_training_batches=2, max_epochs=epochs, max_steps=steps,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    assert unseen_share(half) == pytest.approx(share, abs=1e-6)
    for batches in (0, math.inf):
        assert unseen_share(SimpleNamespace(**{**vars(half), "num_training_batches": batches})) == 0
    for other in ([1, 2], DataLoader(Stream(), batch_size=4)):
        assert unseen_share(SimpleNamespace(**{**vars(half), "train_dataloader": other})) == 0


class Stream(IterableDataset):
    def __iter__(self):
        yield from part(0, 8)


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
    assert _is_last_epoch(trainer) == last


def test_a_digest_of_weights_is_of_every_value_and_of_buffers():
    model = finished()[0]
    before = weights_digest(model)
    assert weights_digest(model) == before
    with torch.no_grad():
        model.net[1].running_mean[3] += 1e-6
    after = weights_digest(model)
    assert after != before
    with torch.no_grad():
        model.net[5].bias[9] = -model.net[5].bias[9]
    assert len({before, after, weights_digest(model)}) == 3
