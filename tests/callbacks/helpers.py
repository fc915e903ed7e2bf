"""Hardening runs that the tests of callbacks share."""

import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_cwrf import (
    CriticalRewindCallback,
    DefenseCallback,
    FinishedWeightsCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    WeightMask,
)
from tests.helpers import Classifier, loader, part, trained, trainer


def cwrf(vanilla, rate=0.2, steps=3, **scoring):
    return [
        PrivacyScoringCallback(nonmembers=loader(100, 140), vanilla=vanilla, steps=steps, **scoring),
        CriticalRewindCallback(rate=rate),
        GradientMaskCallback(),
    ]


def assert_frozen(model, mask, vanilla):
    """Bit for bit at θ_vn where the mask is, and moved (by training) somewhere else."""
    for name, p in model.named_parameters():
        m = mask.masks[name]
        assert torch.equal(p.detach()[m], vanilla[name][m].to(p.dtype)), name


class Probe(Callback):
    """Checks the frozen weights after every batch, and that training moves the others."""

    def __init__(self, mask_of, vanilla):
        self.mask_of, self.vanilla, self.batches, self.moves = mask_of, vanilla, 0, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert_frozen(pl_module, self.mask_of(), self.vanilla)
        self.moves += any(not torch.equal(a, b) for a, b in zip(self.before, pl_module.parameters(), strict=True))
        self.batches += 1


def finished(cls=Classifier, optimizer="adam", **kwargs):
    """As :func:`trained`, for five epochs."""
    return trained(epochs=5, cls=cls, optimizer=optimizer, **kwargs)


def run_with_resume(tmp_path, make, stop_epoch, epochs):
    """Fit unbroken; and fit, stop after ``stop_epoch`` epochs, resume from the checkpoint. Returns both runs."""
    outcomes = []
    for broken in (False, True):
        model, callbacks = make()
        torch.manual_seed(5)
        data = loader(0, 64)
        if broken:
            first = trainer(tmp_path, callbacks=callbacks, max_epochs=stop_epoch)
            first.fit(model, data)
            first.save_checkpoint(tmp_path / "half.ckpt")
            model, callbacks = make()
        run = trainer(tmp_path, callbacks=callbacks, max_epochs=epochs)
        run.fit(model, data, ckpt_path=(tmp_path / "half.ckpt") if broken else None)
        outcomes.append((model, callbacks))
    return outcomes


MOVED = "something other than the optimizers' steps moved"


def masked(model, share=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return WeightMask({n: torch.rand(p.shape, generator=generator) < share for n, p in model.named_parameters()})


def held(model, mask, values):
    return all(torch.equal(p.detach()[mask.masks[n]], values[n][mask.masks[n]]) for n, p in model.named_parameters())


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


class Splits(LightningDataModule):
    """Digits with a split for everything; the test split exists only after ``setup("test")``."""

    def setup(self, stage):
        self.stages = [*getattr(self, "stages", []), stage]
        if stage == "test":
            self.test = part(200, 264)

    def train_dataloader(self):
        return loader(0, 64, shuffle=True)

    def val_dataloader(self):
        return loader(100, 140)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=16)


def same_weights(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def hardening(first_files, finished=True, **data):
    data = {"nonmembers": "val", **data}
    return [
        *([FinishedWeightsCallback(first_files / "finished.ckpt")] if finished else []),
        PrivacyScoringCallback(**data, vanilla=first_files / "init.safetensors", steps=2),
        CriticalRewindCallback(rate=0.1),
        GradientMaskCallback(),
        DefenseCallback("relaxloss", alpha=0.2),
        MIAAuditCallback(nonmembers="test"),
    ]


def fitted(model, callbacks=(), folder=None, ckpt_path=None, **kwargs):
    run = trainer(folder, callbacks=list(callbacks), **{"max_epochs": 2, **kwargs})
    torch.manual_seed(3)
    run.fit(model, loader(0, 64), ckpt_path=ckpt_path)
    return run


def build(cls=Classifier):
    torch.manual_seed(0)
    return cls()
