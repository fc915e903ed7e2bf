"""Frozen weights through whatever a fit may hold: later callbacks, own hooks, checkpoints, optimizers, manual loops."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import schedulefree
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, PrivacyScoringCallback, WeightMask
from lightning_cwrf.weights.vanilla import capture
from tests.helpers import Classifier, loader, trainer

MOVED = "something other than the optimizers' steps moved"


def masked(model, share=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return WeightMask({n: torch.rand(p.shape, generator=generator) < share for n, p in model.named_parameters()})


def held(model, mask, values):
    return all(torch.equal(p.detach()[mask.masks[n]], values[n][mask.masks[n]]) for n, p in model.named_parameters())


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


# --- Every optimizer, many configurations.

CONFIGURATIONS = {
    "plain": ({}, {}),
    "weight decay": ({"weight_decay": 0.1}, {}),
    "momentum and decay": ({"weight_decay": 0.1, "momentum": 0.9}, {}),
    "nesterov": ({"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}, {}),
    "foreach": ({"weight_decay": 0.1, "foreach": True}, {}),
    "fused": ({"weight_decay": 0.1, "fused": True}, {}),
    "amsgrad": ({"weight_decay": 0.1, "amsgrad": True}, {}),
    "maximize": ({"weight_decay": 0.1, "maximize": True}, {}),
    "accumulated and clipped": ({"weight_decay": 0.1}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
}
SCHEDULE_FREE = (
    "SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFreeReference",
    "AdamWScheduleFreeReference",
)  # fmt: skip
# One takes sparse gradients alone, one 2-D weights alone: their own tests are below.
NOT_HERE = {"Optimizer", "SparseAdam", "Muon"}
TORCH = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in NOT_HERE
)


def cells():
    """Each optimizer in each configuration, with those of its arguments that the optimizer has; none twice."""
    for name in TORCH + list(SCHEDULE_FREE):
        kind = getattr(torch.optim, name, None) or getattr(schedulefree, name)
        known, seen = inspect.signature(kind).parameters, []
        for configuration, (wanted, of_trainer) in CONFIGURATIONS.items():
            arguments = {key: value for key, value in wanted.items() if key in known}
            if (arguments, of_trainer) not in seen:
                seen.append((arguments, of_trainer))
                yield pytest.param(kind, arguments, of_trainer, id=f"{name}-{configuration}")


class Small(Classifier):
    def __init__(self, make, manual=False):
        super().__init__(width=2)
        self.hparams.clear()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.LayerNorm(4), nn.Linear(4, 10))
        self.make = make
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        return self.make(self.parameters())

    def _mode(self, mode):
        optimizer = self.optimizers().optimizer
        if hasattr(optimizer, mode):
            getattr(optimizer, mode)()

    def on_train_epoch_start(self):
        self._mode("train")

    def on_train_end(self):
        self._mode("eval")


CELLS = list(cells())


def test_the_matrix_is_whole():
    ids = [cell.id.split("-")[0] for cell in CELLS]
    assert set(ids) == {*TORCH, *SCHEDULE_FREE}
    assert min(ids.count(name) for name in set(ids)) >= 2
    assert len(CELLS) >= 90


@pytest.mark.parametrize(("kind", "arguments", "of_trainer"), CELLS)
def test_every_optimizer_leaves_frozen_weights_bit_identical(kind, arguments, of_trainer):
    torch.manual_seed(0)
    model = Small(lambda parameters: kind(parameters, lr=0.01, **arguments))
    values, mask = capture(model), masked(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=MOVED)  # the optimizer's own state is right: nothing is to put back
        trainer(callbacks=[GradientMaskCallback(mask=mask)], max_epochs=2, **of_trainer).fit(model, loader(0, 32, 4))
    assert held(model, mask, values)
    assert any(not torch.equal(p.detach(), values[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_all_points_of_a_schedule_free_optimizer_are_one_for_frozen_weights(name):
    """Going to and fro between x and y after the fit moves frozen weights nowhere, and live ones somewhere."""
    kind = getattr(schedulefree, name)
    model = Small(lambda parameters: kind(parameters, lr=0.1, weight_decay=0.1))
    values, mask = capture(model), masked(model)
    run = trainer(callbacks=[GradientMaskCallback(mask=mask)], max_epochs=2)
    run.fit(model, loader(0, 32, 4))
    ended, optimizer = capture(model), run.optimizers[0]
    optimizer.train()
    assert held(model, mask, values)
    assert not all(torch.equal(ended[n], p.detach()) for n, p in model.named_parameters())
    for n, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["z"][mask.masks[n]], values[n][mask.masks[n]])


def test_states_of_other_optimizers_are_left_alone():
    """A state called z is a copy of the weights only where the optimizer can exchange them."""
    model = nn.Linear(2, 2)
    mask = WeightMask({"weight": torch.ones(2, 2, dtype=torch.bool)})
    mask.freeze(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[model.weight]["z"] = torch.full((2, 2), 7.0)
    mask.restore_(model, optimizer)
    assert (optimizer.state[model.weight]["z"] == 7).all()


def test_sparse_gradients_and_their_optimizer():
    class Words(Small):
        def __init__(self):
            super().__init__(lambda parameters: torch.optim.SparseAdam(parameters, 0.1))
            self.net = nn.Sequential(nn.EmbeddingBag(5, 10, sparse=True))

        def forward(self, x):
            return self.net((x.flatten(1)[:, :6] * 4).long())

    model = Words()
    values, mask = capture(model), masked(model)
    trainer(callbacks=[GradientMaskCallback(mask=mask)]).fit(model, loader(0, 32))
    assert held(model, mask, values)
    assert not torch.equal(model.net[0].weight, values["net.0.weight"])


def test_an_optimizer_for_matrices():
    class Matrices(Small):
        def __init__(self):
            super().__init__(lambda parameters: torch.optim.Muon(parameters, 0.1, weight_decay=0.1))
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))

    model = Matrices()
    values, mask = capture(model), masked(model)
    trainer(callbacks=[GradientMaskCallback(mask=mask)]).fit(model, loader(0, 32))
    assert held(model, mask, values)
    assert not torch.equal(model.net[1].weight, values["net.1.weight"])


def test_an_optimizer_without_hooks_is_held_after_each_batch():
    class Bare:
        """What Lightning calls Optimizable: no class of torch's, so no hooks."""

        def __init__(self, inner):
            self.inner, self.defaults = inner, inner.defaults
            self.param_groups, self.state = inner.param_groups, inner.state
            self.state_dict, self.load_state_dict, self.step = inner.state_dict, inner.load_state_dict, inner.step
            self.zero_grad = inner.zero_grad

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            assert held(pl_module, mask, values)

    model = Small(lambda parameters: Bare(torch.optim.SGD(parameters, 0.1, weight_decay=0.1)))
    values, mask = capture(model), masked(model)
    trainer(callbacks=[GradientMaskCallback(mask=mask), Watch()]).fit(model, loader(0, 32))
    assert held(model, mask, values)


# --- Manual optimization.


class Manual(Classifier):
    """Clips between the backward pass and the step, as only a manual loop can."""

    def __init__(self, big=0.0, algorithm="norm", accumulate=1, **kwargs):
        super().__init__(width=2, **kwargs)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Dropout(0.0), nn.ReLU(), nn.Linear(4, 10)
        )
        self.automatic_optimization = False
        self.big, self.algorithm, self.accumulate, self.norms = big, algorithm, accumulate, []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for x, y in zip(batch[0].chunk(self.accumulate), batch[1].chunk(self.accumulate), strict=True):
            loss = F.cross_entropy(self(x), y)
            # A part of the loss that reaches the frozen weights alone, with a huge gradient.
            for p, m in zip(self.parameters(), self.frozen, strict=False):
                loss = loss + self.big * (p * m).sum()
            self.manual_backward(loss)
        if self.algorithm == "norm":
            self.norms.append(float(nn.utils.clip_grad_norm_(self.parameters(), 0.1)))
        else:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, weight_decay=0.1)

    frozen = ()


def manual_run(big, precision="32-true", **kwargs):
    torch.manual_seed(0)
    model = Manual(big, **kwargs)
    mask = masked(model)
    model.frozen = [m.float() for m in mask.masks.values()]
    values = capture(model)
    trainer(callbacks=[GradientMaskCallback(mask=mask)], precision=precision, max_epochs=1).fit(model, loader(0, 64))
    assert held(model, mask, values)
    return model


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"algorithm": "lightning"}, {"accumulate": 2}, {"precision": "bf16-mixed"}],
    ids=["torch's clipping", "Lightning's", "accumulated", "bf16"],
)
def test_clipped_manual_steps_do_not_see_the_frozen_gradients(kwargs):
    """The live weights' steps are the same whether the frozen ones have a gradient of thousands or of nothing."""
    without, with_them = manual_run(0.0, **kwargs), manual_run(1e4, **kwargs)
    for a, b in zip(without.parameters(), with_them.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert without.norms == pytest.approx(with_them.norms, rel=1e-3)
    assert len(without.norms) == (0 if kwargs.get("algorithm") else 4)


def test_gradients_are_cleared_in_every_layout_and_pass():
    """Dense, channels last, sparse, a graph that is kept, a second accumulation, and a gradient of the gradient."""
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), "words": nn.Embedding(6, 3, sparse=True)}
    )
    mask = masked(model, 0.5)
    mask.freeze(model)
    hooks = mask.clear_gradients_of(model)

    def loss():
        images = torch.rand(2, 3, 5, 5).to(memory_format=torch.channels_last)
        return model["conv"](images).square().sum() + model["words"](torch.tensor([1, 4, 4])).square().sum()

    def dense():
        return {n: p.grad.to_dense().clone() for n, p in model.named_parameters()}

    first = loss()
    first.backward(retain_graph=True)
    once = dense()
    first.backward()
    for name, gradient in dense().items():
        assert (gradient[mask.masks[name]] == 0).all()
        torch.testing.assert_close(gradient, 2 * once[name])
        assert (gradient[~mask.masks[name]] != 0).any()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    loss().backward()
    assert any((dense()[n][m] != 0).any() for n, m in mask.masks.items())


def test_a_gradient_penalty_sees_the_cleared_gradients():
    model = nn.Linear(3, 2, bias=False)
    mask = WeightMask({"weight": torch.tensor([[True, False, False], [False, False, False]])})
    mask.freeze(model)
    mask.clear_gradients_of(model)
    model(torch.ones(1, 3)).square().sum().backward(create_graph=True)
    penalty = model.weight.grad.square().sum()
    assert float(model.weight.grad[0, 0]) == 0
    model.zero_grad()
    penalty.backward()
    assert torch.isfinite(model.weight.grad).all()


def test_hooks_are_for_manual_optimization_alone():
    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.found = [p for p in pl_module.parameters() if p._post_accumulate_grad_hooks]

    for cls in (Classifier, Manual):
        model, look = cls(), Look()
        mask = masked(model)
        trainer(callbacks=[GradientMaskCallback(mask=mask), look], max_epochs=1).fit(model, loader(0, 32))
        assert len(look.found) == (0 if cls is Classifier else sum(bool(m.any()) for m in mask.masks.values()))


# --- Masks that do not cover the model.


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
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.net = nn.Linear(32, 10)

    def forward(self, x):
        return self.net(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def test_weights_that_are_unfrozen_later_are_told_of_before_the_training_and_when_it_happens():
    model = WithBackbone()
    vanilla = {n: t + 0.1 for n, t in capture(model).items()}
    callbacks = [
        BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False),
        PrivacyScoringCallback(loader(100, 140), vanilla, steps=2),
        CriticalRewindCallback(rate=0.2),
        GradientMaskCallback(),
    ]
    with pytest.warns(UserWarning, match="became trainable") as seen:
        trainer(callbacks=callbacks, max_epochs=2).fit(model, loader(0, 32))
    said = [str(w.message) for w in seen]
    early = [text for text in said if "BackboneFinetuning has 2,080 of 2,410 weights frozen now" in text]
    late = [text for text in said if "2,080 weights became trainable after the mask was chosen" in text]
    assert (len(early), len(late)) == (1, 1)
    assert "the other 330 alone" in early[0]
    assert "backbone.1.bias, backbone.1.weight" in late[0]


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
