import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from opacus.accountants import create_accountant
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_cwrf import (
    CriticalRewindCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    WeightMask,
)
from lightning_cwrf.data.poisson import PoissonBatches
from lightning_cwrf.defenses import DPSGDMixin
from lightning_cwrf.defenses.dpsgd.ledger import Ledger
from tests.helpers import Classifier, digits, loader, part, trainer

WAYS = [
    pytest.param({}, 1, id="hooks"),
    pytest.param({}, 3, id="hooks-accumulated"),
    pytest.param({"max_physical_batch_size": 7}, 1, id="hooks-split"),
    pytest.param({"ghost": True}, 1, id="ghost"),
    pytest.param({"ghost": True, "max_physical_batch_size": 7}, 2, id="ghost-split"),
]


class Conv(Classifier):
    """A classifier that DP-SGD can train as it is."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def fresh(cls=Conv, seed=0, **kwargs):
    torch.manual_seed(seed)
    return cls(**kwargs)


def wide(begin=0, end=96, **kwargs):
    data = digits()[begin:end]
    return DataLoader(TensorDataset(data[0].double(), data[1]), **{"batch_size": 16, **kwargs})


def by_hand(model, batches, steps, clip, frozen=None, loss=F.cross_entropy):
    """DP-SGD without noise, one example at a time (Abadi et al. 2016, Algorithm 1)."""
    optimizer = model.configure_optimizers()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = frozen.masks if frozen else {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    names = [n for n, _ in model.named_parameters()]
    for step in range(steps):
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for i in batches.drawn(step):
            x, y = batches.loader.dataset[i]
            value = loss(model(x[None]), torch.tensor([y]))
            own = dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True))
            own = {n: torch.where(masks[n], 0.0, g) for n, g in own.items()}
            norm = math.sqrt(sum(float(g.square().sum()) for g in own.values()))
            for n, g in own.items():
                total[n] += g * min(1.0, clip / norm)
        for n, p in model.named_parameters():
            p.grad = total[n] / batches.expected_size
        optimizer.step()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(torch.where(masks[n], kept[n], p))
    return model.state_dict()


@pytest.mark.parametrize(("settings", "accumulate"), WAYS)
@pytest.mark.parametrize("clip", [math.inf, 0.3])
@pytest.mark.parametrize("held", [False, True], ids=["free", "frozen"])
def test_without_noise_it_is_the_loop_over_single_examples(settings, accumulate, clip, held):
    """An infinite norm makes it SGD; a finite one clips; frozen weights are masked before the norm is taken."""
    model = fresh(optimizer="sgd", lr=0.5).double()
    twin = copy.deepcopy(model)
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    mask = WeightMask.top(scores, 0.4) if held else None
    DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=clip, **settings)
    run = trainer(
        precision="64-true", accumulate_grad_batches=accumulate, callbacks=[GradientMaskCallback(mask)] if held else []
    )
    run.fit(model, wide())
    steps = 2 * math.ceil(6 / accumulate)
    assert run.global_step == steps
    expected = by_hand(twin, model.defense_state.batches, steps, clip, mask)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)
    assert run.accumulate_grad_batches == accumulate
    assert model.privacy_spent.epsilon == math.inf


class Residual(Classifier):
    """Overwrites activations in place, as torchvision's networks do."""

    def __init__(self):
        super().__init__(optimizer="sgd", lr=0.5)
        self.net = None
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.act, self.head = nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Linear(256, 10)

    def forward(self, x):
        identity = self.act(self.first(x))
        out = self.norm(self.second(identity))
        out += identity
        return self.head(self.act(out).flatten(1))


@pytest.mark.parametrize("ghost", [False, True])
def test_layers_may_overwrite_activations(ghost):
    model = fresh(Residual).double()
    twin = copy.deepcopy(model)
    DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=0.3, ghost=ghost)
    trainer(precision="64-true").fit(model, wide())
    expected = by_hand(twin, model.defense_state.batches, 12, 0.3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)


class Tokens(Classifier):
    """A transformer over the rows of an image, with parameters that stand in no layer of their own."""

    def __init__(self):
        super().__init__(optimizer="sgd", lr=0.5)
        self.net = None
        self.scale = nn.Parameter(torch.ones(8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.encoder(x.squeeze(1) * self.scale)[:, 0])


def test_attention_raises_or_is_replaced_and_bare_parameters_are_trained():
    with pytest.raises(MisconfigurationException, match=r"encoder\.self_attn \(MultiheadAttention is not supported"):
        trainer(precision="64-true").fit(DPSGDMixin.attach(Tokens().double(), noise_multiplier=1.0), wide())
    model = fresh(Tokens).double()
    DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=0.3, fix=True)
    twin = copy.deepcopy(model)
    trainer(precision="64-true").fit(model, wide())
    expected = by_hand(twin, model.defense_state.batches, 12, 0.3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)


def test_clipping_and_masking_change_the_result():
    """The comparison above could not tell a clip or a mask that does nothing from one that works."""
    ends = []
    for clip, held in ((math.inf, False), (0.3, False), (0.3, True)):
        model = fresh(optimizer="sgd", lr=0.5)
        mask = WeightMask({n: torch.rand(p.shape) < 0.4 for n, p in model.named_parameters()})
        DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=clip)
        torch.manual_seed(5)
        trainer(callbacks=[GradientMaskCallback(mask)] if held else []).fit(model, loader(0, 96))
        ends.append(model.net[4].weight.detach())
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)
    assert not torch.allclose(ends[1], ends[2], atol=1e-3)


def test_noise_has_the_stated_size():
    """Without any gradient, one step of plain SGD is the noise alone: σ·C / expected batch size."""
    model = fresh(lr=1.0)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 1.0)
    DPSGDMixin.attach(model, noise_multiplier=3.0, max_grad_norm=1e-9 * 2)
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    trainer(max_steps=1).fit(model, loader(0, 96))
    noise = torch.cat([p.detach().flatten() for p in model.parameters()]).double() - before
    assert noise.std() < 1e-6  # float32 rounding of weights near one hides noise this small
    moves = []
    for seed in range(20):
        model = fresh(lr=1.0)
        model.configure_optimizers = lambda m=model: torch.optim.SGD(m.parameters(), 1.0)
        DPSGDMixin.attach(model, noise_multiplier=50.0, max_grad_norm=2.0)
        before = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(seed)
        trainer(max_steps=1).fit(model, loader(0, 96))
        moves.append(torch.cat([(p - b).detach().flatten() for p, b in zip(model.parameters(), before, strict=True)]))
    found = torch.stack(moves)
    # 20 × 698 normal draws: their standard deviation has a standard error of 0.6 %.
    assert float(found.std()) == pytest.approx(50.0 * 2.0 / 16, rel=0.03)
    assert abs(float(found.mean())) < 4 * 6.25 / math.sqrt(found.numel()) + 2 / 16


@pytest.mark.parametrize("mechanism", ["prv", "rdp", "gdp"])
def test_epsilon_is_opacus_own(mechanism):
    model = DPSGDMixin.attach(fresh(), noise_multiplier=0.9, accountant=mechanism, target_delta=1e-4)
    run = trainer(max_epochs=3)
    run.fit(model, loader(0, 90))  # 6 batches of up to 16: a rate of 1/6
    expected = create_accountant(mechanism)
    for _ in range(18):
        expected.step(noise_multiplier=0.9, sample_rate=1 / 6)
    spent = model.privacy_spent
    assert (spent.epsilon, spent.steps) == (expected.get_epsilon(1e-4), 18)
    assert float(run.callback_metrics["epsilon_finetuning"]) == pytest.approx(spent.epsilon)
    assert "epsilon" not in run.callback_metrics


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_target_is_reached_and_not_passed(accumulate):
    model = DPSGDMixin.attach(fresh(), target_epsilon=2.0, accountant="rdp")
    trainer(max_epochs=4, accumulate_grad_batches=accumulate).fit(model, loader(0, 96))
    assert 1.98 <= model.privacy_spent.epsilon <= 2.0


def test_a_budget_is_not_passed_by_training_on(tmp_path):
    model = DPSGDMixin.attach(fresh(), target_epsilon=2.0, accountant="rdp")
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, loader(0, 96))
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = DPSGDMixin.attach(fresh(), target_epsilon=2.0, accountant="rdp")
    with pytest.raises(MisconfigurationException, match=r"12 steps are done and 12 to come, .* above target_epsilon=2"):
        trainer(max_epochs=4).fit(again, loader(0, 96), ckpt_path=tmp_path / "end.ckpt")
    with pytest.raises(MisconfigurationException, match="12 steps are done and 6 to come"):
        trainer(max_epochs=1).fit(model, loader(0, 96))


@pytest.mark.parametrize(("size", "accumulate"), [(32, 1), (16, 2), (8, 1)])
def test_a_budget_is_kept_when_the_batches_change(tmp_path, size, accumulate):
    """After one of two epochs, goes on with larger batches (more ε a step, fewer steps) or smaller ones."""
    model = DPSGDMixin.attach(fresh(), target_epsilon=8.0, accountant="rdp")

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    run = trainer(tmp_path, max_epochs=2, callbacks=[Stop()], min_epochs=0)
    run.fit(model, loader(0, 320))
    assert run.current_epoch == 1
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = DPSGDMixin.attach(fresh(), target_epsilon=8.0, accountant="rdp")
    resumed = trainer(max_epochs=2, accumulate_grad_batches=accumulate)
    data = loader(0, 320, batch_size=size)
    if size * accumulate > 16:
        with pytest.raises(MisconfigurationException, match=r"20 steps are done and 10 to come.* above target"):
            resumed.fit(again, data, ckpt_path=tmp_path / "end.ckpt")
    else:
        resumed.fit(again, data, ckpt_path=tmp_path / "end.ckpt")
        assert again.privacy_spent.steps == 60
        assert again.privacy_spent.epsilon < 8


@pytest.mark.parametrize("changed", [{"max_physical_batch_size": 4}, {"max_physical_batch_size": None}])
def test_batches_cannot_change_in_mid_epoch(tmp_path, changed):
    settings = {"noise_multiplier": 1.0, "max_physical_batch_size": 8}
    keep = ModelCheckpoint(tmp_path, "half", every_n_train_steps=3, enable_version_counter=False)
    run = trainer(tmp_path, max_epochs=1, callbacks=[keep], enable_checkpointing=True, max_steps=4)
    run.fit(DPSGDMixin.attach(fresh(), **settings), loader(0, 96))
    again = DPSGDMixin.attach(fresh(), **{**settings, **changed})
    with pytest.raises(MisconfigurationException, match="saved in the middle of an epoch of batches"):
        trainer(max_epochs=1).fit(again, loader(0, 96), ckpt_path=tmp_path / "half.ckpt")


def test_what_a_module_has_spent_stays_spent():
    model = DPSGDMixin.attach(fresh(), target_epsilon=2.0, accountant="rdp", from_scratch=True)
    trainer(max_epochs=1).fit(model, loader(0, 96))
    first = model.privacy_spent.epsilon
    DPSGDMixin.attach(DPSGDMixin.detach(model), target_epsilon=3.0, accountant="prv")
    assert model.privacy_spent.steps == 6
    trainer(max_epochs=1).fit(model, loader(0, 96))
    assert first < 2.97 <= model.privacy_spent.epsilon <= 3.0
    assert model.privacy_spent.steps == 12
    DPSGDMixin.attach(DPSGDMixin.detach(model), target_epsilon=1.0)
    with pytest.raises(MisconfigurationException, match=r"no noise keeps 6 steps within target_epsilon=1 .* is spent"):
        trainer(max_epochs=1).fit(model, loader(0, 96))


def test_a_fast_dev_run_is_one_step():
    model = DPSGDMixin.attach(fresh(), noise_multiplier=1.0, max_physical_batch_size=4)
    trainer(fast_dev_run=True, accumulate_grad_batches=2).fit(model, loader(0, 96))
    assert model.privacy_spent.steps == 1


@pytest.mark.parametrize("settings", [{"target_epsilon": 3.0}, {"noise_multiplier": 1.0, "ghost": True}])
@pytest.mark.parametrize("stop", ["epoch", "mid-epoch"])
def test_a_resumed_run_ends_as_an_unbroken_one(tmp_path, settings, stop):
    """The same noise, the same batches, the same ε; from the end of an epoch and from the middle of one."""
    ends = []
    for broken in (False, True):
        model = DPSGDMixin.attach(fresh(), accountant="rdp", **settings)
        torch.manual_seed(3)
        if broken:
            every = {"every_n_train_steps": 9} if stop == "mid-epoch" else {"every_n_epochs": 2}
            keep = ModelCheckpoint(tmp_path, "half", **every, save_top_k=-1, enable_version_counter=False)

            class Stop(Callback):
                def on_train_batch_end(self, trainer, pl_module, *_):
                    if trainer.global_step == (14 if stop == "mid-epoch" else 13):
                        raise KeyboardInterrupt

            with pytest.raises(SystemExit):
                trainer(tmp_path, max_epochs=4, callbacks=[keep, Stop()], enable_checkpointing=True,
                        accumulate_grad_batches=2).fit(model, wide_float())  # fmt: skip
            model = DPSGDMixin.attach(fresh(), accountant="rdp", **settings)
            torch.manual_seed(99)
        run = trainer(tmp_path, max_epochs=4, accumulate_grad_batches=2)
        run.fit(model, wide_float(), ckpt_path=tmp_path / "half.ckpt" if broken else None)
        ends.append((model.state_dict(), model.privacy_spent))
    assert ends[0][1] == ends[1][1]
    assert ends[0][1].steps == 24
    assert all(torch.equal(ends[0][0][n], w) for n, w in ends[1][0].items())


def wide_float():
    return loader(0, 192, shuffle=True)


def test_module_optimizer_scheduler_and_datamodule_stay_as_they_are(recwarn):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(0, 96, shuffle=True)

        def val_dataloader(self):
            return loader(100, 120)

    class Scheduled(Conv):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), 0.1)
            self.planned = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model = DPSGDMixin.attach(fresh(Scheduled), noise_multiplier=1.0, max_physical_batch_size=10)
    keys = set(model.__dict__) - {"planned"}
    run = trainer(accumulate_grad_batches=3, max_epochs=2)
    run.fit(model, datamodule=Data())
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message) or "backward hook" in str(w.message)]
    assert model.planned == run.global_step == 4
    assert type(run.optimizers[0]) is torch.optim.Adam
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4)
    assert set(model.__dict__) - {"planned"} <= keys
    assert not any(hasattr(p, "grad_sample") or hasattr(p, "summed_grad") for p in model.parameters())
    assert not model.net[0]._forward_hooks
    assert {"train_loss_epoch", "val_acc", "epsilon_finetuning"} <= set(run.callback_metrics)


def test_an_exception_leaves_nothing_behind():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 1:
                raise RuntimeError("stop")

    model = DPSGDMixin.attach(fresh(), noise_multiplier=1.0, max_physical_batch_size=8)
    run = trainer(callbacks=[Stop()])
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(model, loader(0, 96))
    assert run.accumulate_grad_batches == 1
    assert not hasattr(model.net[0].weight, "grad_sample")
    assert not model.net[0]._forward_hooks
    trainer(max_epochs=1).fit(model, loader(0, 96))
    assert model.privacy_spent.steps == 7  # the one step before the exception counts


def test_cwrf_with_dp_sgd_scores_and_audits_the_users_data():
    """Scoring copies the module, and reads the loader that Poisson batches replace."""
    model = fresh()
    vanilla = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
    DPSGDMixin.attach(model, noise_multiplier=1.0)
    scoring = PrivacyScoringCallback(loader(200, 260), vanilla, steps=3)
    rewind, audit = CriticalRewindCallback(0.2), MIAAuditCallback(loader(100, 160))
    trainer(callbacks=[scoring, rewind, GradientMaskCallback(), audit]).fit(model, loader(0, 96))
    for name, mask in rewind.mask.masks.items():
        assert (model.get_parameter(name)[mask] == 0).all()
    assert int(audit.result.is_member.sum()) == 96
    assert model.privacy_spent.steps == 12


@pytest.mark.parametrize("ghost", [False, True])
def test_merged_dimensions_and_an_empty_mask(ghost):
    with pytest.raises(MisconfigurationException, match=r"net.weight has \d+ gradients for \d+ examples"):
        trainer().fit(DPSGDMixin.attach(Merged(), noise_multiplier=1.0, ghost=ghost), loader(0, 64))
    model = DPSGDMixin.attach(fresh(), noise_multiplier=1.0, ghost=ghost)
    mask = WeightMask({n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()})
    trainer(max_epochs=1, callbacks=[GradientMaskCallback(mask)]).fit(model, loader(0, 64))
    assert model.privacy_spent.steps == 4


def test_a_batch_with_an_empty_side_tensor_is_trained_on():
    class Boxes(Conv):
        def classification_step(self, batch):
            if self.defense_state.step.independent:  # not the passes that check the first batch
                self.seen = self.__dict__.get("seen", 0) + len(batch["digit"])
            return self(batch["image"]), batch["digit"]

    def collate(pairs):
        images, labels = zip(*pairs, strict=True)
        return {"image": torch.stack(images), "digit": torch.stack(labels), "boxes": torch.zeros(0, 4)}

    model = DPSGDMixin.attach(fresh(Boxes), noise_multiplier=1.0)
    trainer(max_epochs=1).fit(model, DataLoader(part(0, 64), batch_size=16, collate_fn=collate))
    assert model.seen == sum(len(model.defense_state.batches.drawn(s)) for s in range(4)) > 0


def test_epsilon_is_shown_with_what_it_covers():
    tuned, scratch = (DPSGDMixin.attach(fresh(), noise_multiplier=1.0, from_scratch=s) for s in (False, True))
    assert "covers the fine-tuning phase alone" in str(tuned.privacy_spent)
    assert "covers the whole training." in str(scratch.privacy_spent)
    run = trainer(max_epochs=1)
    run.fit(scratch, loader(0, 96))
    assert "epsilon" in run.callback_metrics
    mask = WeightMask({n: torch.zeros(p.shape, dtype=torch.bool) for n, p in scratch.named_parameters()})
    with pytest.raises(MisconfigurationException, match="from_scratch=True says"):
        trainer(callbacks=[GradientMaskCallback(mask)]).fit(scratch, loader(0, 96))


class Mixing(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.BatchNorm2d(4, affine=False),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def test_layers_that_mix_examples_raise_by_name_or_are_replaced():
    with pytest.raises(MisconfigurationException, match=r"net\.1 \(BatchNorm2d mixes .*; net\.3 \(BatchNorm2d mixes"):
        trainer().fit(DPSGDMixin.attach(Mixing(), noise_multiplier=1.0), loader(0, 64))
    model = Mixing()
    with pytest.warns(UserWarning, match=r"replaced net\.1: BatchNorm2d by GroupNorm"):
        DPSGDMixin.attach(model, noise_multiplier=1.0, fix=True)
    trainer(max_epochs=1).fit(model, loader(0, 64))

    class Own(DPSGDMixin, Mixing):
        pass

    with pytest.warns(UserWarning, match=r"replaced net\.1"):
        assert isinstance(Own(noise_multiplier=1.0, fix=True).net[1], nn.GroupNorm)


class Unused(Conv):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)


class Merged(Classifier):
    """Hides that its rows belong together: each would be clipped as if it were an example of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 10)

    def forward(self, x):
        return self.net(x.reshape(-1, 8)).view(len(x), 8, 10).sum(1)


def scaled():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


class Mean(DPSGDMixin, Conv):
    def example_losses(self, logits, targets):
        return F.cross_entropy(logits, targets)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(part(0, 32))


def weighted():
    return DataLoader(part(0, 64), batch_size=8, sampler=WeightedRandomSampler(torch.ones(64), 64))


@pytest.mark.parametrize(
    ("model", "data", "settings", "error", "message"),
    [
        (Unused, None, {}, MisconfigurationException, "does not depend on spare.weight, spare.bias"),
        (Conv, None, {"plugins": [scaled()]}, MisconfigurationException, "use bf16-mixed"),
        (lambda: Conv(optimizer="lbfgs"), None, {}, MisconfigurationException, "gave LBFGS"),
        (Conv, weighted, {}, ValueError, "WeightedRandomSampler chooses examples"),
        (Conv, lambda: [next(iter(loader(0, 8)))], {}, TypeError, "from one DataLoader; got a list"),
        (Conv, lambda: DataLoader(Stream(), batch_size=4), {}, TypeError, "a stream"),
        (Conv, None, {"overfit_batches": 1}, MisconfigurationException, "overfit_batches=1"),
        (Conv, None, {"reload_dataloaders_every_n_epochs": 1}, MisconfigurationException, "train on new loaders"),
        (Conv, None, {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}, MisconfigurationException,
         "logical batches of one size"),
        (Conv, None, {"accumulate_grad_batches": 2, "limit_train_batches": 3}, MisconfigurationException,
         "3 physical batches, and a logical batch 2"),
        (Conv, None, {"precision": "bf16-true"}, MisconfigurationException, "net.0.weight is torch.bfloat16"),
    ],
)  # fmt: skip
def test_unsupported_trainings_raise_before_the_first_step(model, data, settings, error, message):
    model = DPSGDMixin.attach(model(), noise_multiplier=1.0)
    with pytest.raises(error, match=message):
        trainer(**settings).fit(model, loader(0, 64) if data is None else data())
    assert model.privacy_spent.steps == 0


def test_other_misuse():
    with pytest.raises(ValueError, match=r"one loss per example, shape \(\d+,\), not \(\)"):
        trainer().fit(Mean(noise_multiplier=1.0), loader(0, 64))
    with pytest.raises(MisconfigurationException, match="set max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(DPSGDMixin.attach(Conv(), target_epsilon=1.0), loader(0, 64))
    with pytest.warns(UserWarning, match=r"target_delta=0.1 is not below 1/n = 0.016"):
        trainer(max_epochs=1).fit(DPSGDMixin.attach(Conv(), noise_multiplier=1.0, target_delta=0.1), loader(0, 64))


@given(
    n=st.integers(1, 60),
    steps=st.integers(1, 9),
    parts=st.integers(1, 4),
    world=st.integers(1, 3),
    seed=st.integers(0, 2**62),
)
def test_parts_and_processes_share_out_one_poisson_draw(n, steps, parts, world, seed):
    data = DataLoader(torch.arange(n), batch_size=4)
    ranks = [
        PoissonBatches(data, steps=steps, parts=parts, seed=seed, first_step=lambda: 5, rank=r, world_size=world)
        for r in range(world)
    ]
    batches = [[b.tolist() for b in rank] for rank in ranks]
    assert {len(b) for b in batches} == {steps * parts} == {len(ranks[0])}
    for step in range(steps):
        chunks = [batches[r][step * parts + p] for r in range(world) for p in range(parts)]
        assert sorted(i for c in chunks for i in c) == ranks[0].drawn(5 + step).tolist()
        sizes = [len(c) for c in chunks]
        assert max(sizes) - min(sizes) <= 2


def test_every_example_is_drawn_independently_at_the_stated_rate():
    batches = PoissonBatches(DataLoader(torch.arange(40), batch_size=10), steps=4)
    drawn = np.stack([np.bincount(batches.drawn(step), minlength=40) for step in range(4000)])
    assert set(np.unique(drawn)) == {0, 1}
    error = math.sqrt(0.25 * 0.75 / 4000)
    assert np.abs(drawn.mean(0) - 0.25).max() < 5 * error
    correlations = np.corrcoef(drawn.T)[np.triu_indices(40, 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(4000)


def test_an_empty_batch_has_the_form_of_the_others_and_is_a_step_of_noise():
    data = DataLoader([{"pixels": torch.zeros(3), "name": "a", "label": 1}] * 4, batch_size=1)
    empty = PoissonBatches(data, steps=10_000)._collate([])
    assert empty["pixels"].shape == (0, 3)
    assert empty["label"].shape == (0,)

    class Sparse(Conv):
        def forward(self, x):
            return super().forward(x.view(len(x), -1).view(len(x), 1, 8, 8))  # fails on an empty batch

    model = DPSGDMixin.attach(fresh(Sparse), noise_multiplier=1.0)
    run = trainer(max_epochs=1)
    run.fit(model, loader(0, 20, batch_size=1))
    assert min(len(model.defense_state.batches.drawn(s)) for s in range(20)) == 0
    assert run.global_step == model.privacy_spent.steps == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_ahead_without_changing_the_draw(workers):
    data = DataLoader(part(0, 40), batch_size=8, num_workers=workers)
    batches = PoissonBatches(data, steps=5, parts=2, seed=3)
    labels = torch.cat([y for _, y in batches])
    assert labels.tolist() == [int(digits()[i][1]) for s in range(5) for i in batches.drawn(s)]


@pytest.mark.parametrize("way", ["hooks", "ghost"])
def test_two_processes_are_one(tmp_path, way):
    """Without noise two processes end with the weights of one; with noise they agree with one another."""
    script = [sys.executable, "-m", "tests.defenses.dpsgd_ddp_script", str(tmp_path), way]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        script, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    for kind in ("plain", "noisy"):
        for name, weight in ranks[0][kind].items():
            assert torch.equal(weight, ranks[1][kind][name]), (kind, name)
    model = fresh(optimizer="sgd", lr=0.5)
    DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=0.3, ghost=way == "ghost")
    torch.manual_seed(1)
    trainer(accumulate_grad_batches=2).fit(model, loader(0, 96))
    assert ranks[0]["steps"] == model.privacy_spent.steps == 6
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(ranks[0]["plain"][name], weight, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ranks[0]["noisy"]["net.4.weight"], ranks[0]["plain"]["net.4.weight"], atol=1e-3)


def test_from_scratch_is_checked_against_earlier_steps(tmp_path):
    quick = {"noise_multiplier": 1.0, "accountant": "rdp"}
    plain = fresh()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(plain, loader(0, 96))
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="this module was trained for 6 steps without DP-SGD, and from_scratch=True"):
        DPSGDMixin.attach(plain, **quick, from_scratch=True)

    class Own(DPSGDMixin, Conv):
        pass

    with pytest.warns(UserWarning, match="this checkpoint was trained for 6 steps without DP-SGD"):
        Own.load_from_checkpoint(tmp_path / "plain.ckpt", **quick, from_scratch=True)

    tuned = DPSGDMixin.attach(fresh(), **quick)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(tuned, loader(0, 96))
    run.save_checkpoint(tmp_path / "tuned.ckpt")
    message = "the first 6 steps of DP-SGD were taken without it"
    with pytest.raises(MisconfigurationException, match=message):
        DPSGDMixin.attach(DPSGDMixin.detach(tuned), **quick, from_scratch=True)
    with pytest.raises(MisconfigurationException, match=message):
        Own.load_from_checkpoint(tmp_path / "tuned.ckpt", **quick, from_scratch=True)


def test_from_scratch_does_not_warn_without_a_reason(recwarn):
    quick = {"noise_multiplier": 1.0, "accountant": "rdp", "from_scratch": True}
    model = DPSGDMixin.attach(fresh(), **quick)
    trainer(max_epochs=1).fit(model, loader(0, 96))
    DPSGDMixin.attach(DPSGDMixin.detach(model), **quick)
    assert model.privacy_spent.steps == 6
    assert not [w for w in recwarn if "from_scratch" in str(w.message)]


@pytest.mark.parametrize("other", ["prv", "gdp"])
def test_a_run_continues_under_another_accountant(tmp_path, other):
    """The steps are those of the checkpoint; ε is the other accountant's."""
    run = trainer(tmp_path, max_epochs=1)
    run.fit(DPSGDMixin.attach(fresh(), noise_multiplier=1.0, accountant="rdp"), loader(0, 96))
    run.save_checkpoint(tmp_path / "rdp.ckpt")
    again = DPSGDMixin.attach(fresh(), noise_multiplier=1.0, accountant=other)
    trainer(max_epochs=2).fit(again, loader(0, 96), ckpt_path=tmp_path / "rdp.ckpt")
    expected = create_accountant(other)
    for _ in range(12):
        expected.step(noise_multiplier=1.0, sample_rate=1 / 6)
    assert again.privacy_spent.steps == 12
    assert again.privacy_spent.epsilon == pytest.approx(expected.get_epsilon(1e-5))


def test_the_ledger_by_hand():
    ledger = Ledger("rdp")
    assert (ledger.epsilon(1e-5), ledger.steps) == (0.0, 0)
    ledger.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    ledger.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    expected = create_accountant("rdp")
    for _ in range(5):
        expected.step(noise_multiplier=1.0, sample_rate=0.1)
    assert ledger.steps == 2
    assert ledger.epsilon(1e-5, (1.0, 0.1, 3)) == expected.get_epsilon(1e-5)
    assert ledger.steps == 2  # looking ahead spends nothing
    assert ledger.epsilon(1e-5, (0, 0.1, 1)) == math.inf
    noise = ledger.noise_for(3.0, 1e-5, 0.1, 20)
    assert 2.97 <= ledger.epsilon(1e-5, (noise, 0.1, 20)) <= 3.0
    again = Ledger("rdp")
    again.load_state_dict(ledger.state_dict())
    assert again.state_dict() == ledger.state_dict()
    assert Ledger("prv", earlier=ledger).steps == 2
    with pytest.raises(
        MisconfigurationException, match=r"no noise keeps 20 steps within target_epsilon=0\.1 .*is spent"
    ):
        ledger.noise_for(0.1, 1e-5, 0.1, 20)
