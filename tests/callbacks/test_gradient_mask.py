"""Frozen weights despite later callbacks, own hooks and checkpoints; and masks that do not cover the model."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, WeightMask
from lightning_cwrf.weights.vanilla import capture
from tests.callbacks.helpers import MOVED, Manual, cwrf, held, masked
from tests.helpers import Classifier, loader, trainer


def shift(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)


class Shift(Callback):
    """A callback that moves every weight in one of its hooks."""

    def __init__(self, hook):
        setattr(self, hook, lambda trainer, pl_module, *_, **__: shift(pl_module))


LATE = ["on_train_epoch_end", "on_train_end", "on_fit_end", "teardown", "on_validation_end", "on_train_epoch_start"]


@pytest.mark.parametrize("hook", LATE)
@pytest.mark.parametrize("whose", ["callback", "module"])
def test_what_a_later_hook_moves_is_put_back_by_the_end_of_the_fit(hook, whose):
    model = Classifier()
    values, mask = capture(model), masked(model)
    callbacks = [GradientMaskCallback(mask=mask)]
    if whose == "callback":
        callbacks.append(Shift(hook))
    else:
        setattr(model, hook, lambda *_, **__: shift(model))
    with pytest.warns(UserWarning, match=f"{MOVED} {mask.count} frozen weights"):
        trainer(callbacks=callbacks, max_epochs=1).fit(model, loader(0, 32), loader(100, 116))
    assert held(model, mask, values)
    assert not torch.equal(model.net[0].weight, values["net.0.weight"])


def test_an_average_of_the_users_own_written_at_the_end_is_found():
    """An average of a constant is the constant only up to rounding."""

    class Average(Callback):
        def on_train_start(self, trainer, pl_module):
            self.average = [p.detach().clone() for p in pl_module.parameters()]

        def on_train_batch_end(self, trainer, pl_module, *_):
            for average, p in zip(self.average, pl_module.parameters(), strict=True):
                average.mul_(0.9).add_(p.detach(), alpha=0.1)

        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                for average, p in zip(self.average, pl_module.parameters(), strict=True):
                    p.copy_(average)

    model = Classifier()
    values, mask = capture(model), masked(model)
    with pytest.warns(UserWarning, match=MOVED):
        trainer(callbacks=[GradientMaskCallback(mask=mask), Average()]).fit(model, loader(0, 64))
    assert held(model, mask, values)


def test_a_fit_in_which_nothing_else_writes_warns_of_nothing():
    model = Classifier()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=MOVED)
        trainer(callbacks=[GradientMaskCallback(mask=masked(model))]).fit(model, loader(0, 32), loader(100, 116))


class MovesEachBatch(Classifier):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        shift(self)


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_in_the_middle_of_an_epoch_hold_the_held_values(tmp_path, weights_only):
    model = MovesEachBatch()
    values, mask = capture(model), masked(model)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only)
    with pytest.warns(UserWarning, match=f"{MOVED} {mask.count} frozen weights before the weights were read"):
        trainer(callbacks=[GradientMaskCallback(mask=mask), saving], enable_checkpointing=True).fit(
            model, loader(0, 64)
        )
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 8
    for file in files:
        saved = torch.load(file, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[n][m], values[n][m]) for n, m in mask.masks.items())


def test_a_checkpoint_after_the_fit_and_one_with_exchanged_weights_hold_the_held_values(tmp_path):
    class Exchange(Callback):
        """Saves other weights than the module's, as callbacks that average do."""

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["state_dict"] = {n: t + 1 for n, t in checkpoint["state_dict"].items()}

    model = Classifier()
    values, mask = capture(model), masked(model)
    run = trainer(tmp_path, callbacks=[Exchange(), GradientMaskCallback(mask=mask)], max_epochs=1)
    run.fit(model, loader(0, 32))
    with pytest.warns(UserWarning, match=f"{MOVED} {mask.count} frozen weights in a checkpoint"):
        run.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[n][m], values[n][m]) for n, m in mask.masks.items())
    assert all(torch.equal(saved[n][~m], dict(model.named_parameters())[n][~m] + 1) for n, m in mask.masks.items())


def test_an_interrupted_fit_leaves_the_held_values_and_no_hook():
    class Boom(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            shift(pl_module)
            raise RuntimeError("boom")

    model = Classifier()
    values, mask = capture(model), masked(model)
    with pytest.raises(RuntimeError, match="boom"), pytest.warns(UserWarning, match=MOVED):
        trainer(callbacks=[GradientMaskCallback(mask=mask), Boom()]).fit(model, loader(0, 32))
    assert held(model, mask, values)
    assert no_hooks(model)


def no_hooks(model):
    return not model._state_dict_pre_hooks and "teardown" not in vars(model) and not any(
        p._post_accumulate_grad_hooks for p in model.parameters()
    )  # fmt: skip


def test_copies_made_in_a_fit_are_free_and_nothing_is_left_on_the_module():
    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.copy = copy.deepcopy(pl_module)
            self.pickled = pickle.dumps(pl_module)

    for cls in (Classifier, Manual):
        model, copying = cls(), Copy()
        trainer(callbacks=[GradientMaskCallback(mask=masked(model)), copying], max_epochs=1).fit(model, loader(0, 32))
        assert no_hooks(model)
        for twin in (copying.copy, pickle.loads(copying.pickled)):
            shift(twin)
            before = [p.detach().clone() for p in twin.parameters()]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                torch.save(twin.state_dict(), io.BytesIO())
            assert all(torch.equal(a, p) for a, p in zip(before, twin.parameters(), strict=True))
            twin.train()
            twin(torch.rand(4, 1, 8, 8)).sum().backward()
            assert all(p.grad is None or (p.grad != 0).any() for p in twin.net[5].parameters())
            assert not any(p._post_accumulate_grad_hooks for p in twin.parameters())


@pytest.mark.parametrize("given", ["mask", "rewind"])
def test_tuning_the_masked_weights_alone_holds_parameters_without_a_mask_too(given):
    model = Classifier()
    values = capture(model)
    one = WeightMask({"net.5.bias": torch.ones(10, dtype=torch.bool)})
    callbacks = [GradientMaskCallback(mask=one, tune="masked")]
    if given == "rewind":
        vanilla = {n: t + 1 if t.is_floating_point() else t for n, t in values.items()}
        callbacks = [CriticalRewindCallback(mask=one, vanilla=vanilla), GradientMaskCallback(tune="masked")]
    trainer(callbacks=callbacks).fit(model, loader(0, 32))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), values[n])}
    assert moved == {"net.5.bias"}


def test_the_rest_of_a_model_knows_tied_and_untrained_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    mask = WeightMask({"1.weight": torch.eye(2).bool()})
    rest = mask.rest_of(model).masks
    assert set(rest) == {"1.weight", "0.bias", "1.bias"}
    assert torch.equal(rest["1.weight"], ~torch.eye(2).bool())
    assert all(rest[n].all() for n in ("0.bias", "1.bias"))
    with pytest.raises(ValueError, match="the mask is of another model"):
        WeightMask({"head": torch.ones(1).bool()}).rest_of(model)


class WithBackbone(Classifier):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.net = nn.Linear(32, 10)

    def forward(self, x):
        return self.net(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


class Unfreezes(WithBackbone):
    def __init__(self):
        super().__init__()
        self.backbone.requires_grad_(False)

    def on_train_epoch_start(self):
        self.backbone.requires_grad_(self.current_epoch == 1)


def test_weights_that_are_unfrozen_later_warn():
    model = Unfreezes()
    vanilla = capture(model)
    trainer(max_epochs=40).fit(model, loader(0, 32))
    with pytest.warns(UserWarning, match="2,080 weights became trainable after the mask was chosen") as seen:
        trainer(callbacks=cwrf(vanilla), max_epochs=2).fit(model, loader(0, 32))
    assert sum("backbone.1.bias, backbone.1.weight" in str(w.message) for w in seen) == 1


def test_a_callback_that_unfreezes_weights_later_is_refused_before_the_scoring():
    model = WithBackbone()
    vanilla = {n: t + 0.1 for n, t in capture(model).items()}
    callbacks = [*cwrf(vanilla), BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)]
    with pytest.raises(MisconfigurationException, match=r"BackboneFinetuning has 2,080 of 2,410 weights frozen now"):
        trainer(callbacks=callbacks).fit(model, loader(0, 32))
    assert callbacks[0].scores is None


def test_gradients_that_are_clipped_in_the_modules_own_hook_are_those_of_the_live_weights():
    class ClipsThere(Classifier):
        def on_after_backward(self):
            self.before = float(nn.utils.clip_grad_norm_(self.parameters(), 0.1))
            self.after = float(torch.stack([p.grad.norm() for p in self.parameters()]).norm())

    model = ClipsThere()
    mask = WeightMask({n: torch.full(p.shape, n.startswith("net.5")) for n, p in model.named_parameters()})
    trainer(max_epochs=1, callbacks=[GradientMaskCallback(mask=mask)]).fit(model, loader(0, 16))
    assert model.before > 0.1
    assert model.after == pytest.approx(0.1, rel=1e-3)


def test_what_moves_weights_after_many_steps_is_found_within_ten():
    class MovesLate(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if 20 <= batch_idx < 30:
                shift(self)

    model = MovesLate()
    values, mask = capture(model), masked(model)
    with pytest.warns(UserWarning, match=f"{MOVED} {mask.count} frozen weights in epoch 0"):
        trainer(callbacks=[GradientMaskCallback(mask=mask)], max_epochs=1).fit(model, loader(0, 40, batch_size=1))
    assert held(model, mask, values)


def test_a_module_can_read_which_weights_are_frozen():
    class Listens(Classifier):
        def on_weights_frozen(self, mask):
            self.frozen = mask

    model = Listens()
    callback = GradientMaskCallback(mask=masked(model))
    trainer(callbacks=[callback], max_epochs=1).fit(model, loader(0, 16))
    assert model.frozen is callback.mask
    assert model.frozen.is_frozen


class ReadsGradients(Callback):
    def on_after_backward(self, trainer, pl_module):
        pass


@pytest.mark.parametrize(("others", "times"), [([], 1), ([ReadsGradients()], 2)])
def test_gradients_are_cleared_early_only_where_a_hook_may_use_them(others, times, monkeypatch):
    calls, clear = [], WeightMask.zero_grad_
    monkeypatch.setattr(WeightMask, "zero_grad_", lambda *given: calls.append(1) or clear(*given))
    model = Classifier()
    trainer(callbacks=[GradientMaskCallback(mask=masked(model)), *others], max_epochs=1).fit(model, loader(0, 32))
    assert len(calls) == 2 * times
