"""DP-SGD in a Trainer: the user's module, optimizer, scheduler and data; two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule

from lightning_cwrf import (
    CriticalRewindCallback,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
)
from lightning_cwrf.defenses import DPSGDMixin
from tests.defenses.dpsgd.cases import Conv, fresh
from tests.defenses.dpsgd.ddp_script import WAYS
from tests.helpers import loader, trainer

pytestmark = pytest.mark.slow


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
    trainer(max_epochs=10).fit(model, loader(0, 96))
    DPSGDMixin.attach(model, noise_multiplier=1.0)
    scoring = PrivacyScoringCallback(loader(200, 260), vanilla, steps=3)
    rewind, audit = CriticalRewindCallback(0.2), MIAAuditCallback(loader(100, 160))
    trainer(callbacks=[scoring, rewind, GradientMaskCallback(), audit]).fit(model, loader(0, 96))
    for name, mask in rewind.mask.masks.items():
        assert (model.get_parameter(name)[mask] == 0).all()
    assert int(audit.result.is_member.sum()) == 96
    assert model.privacy_spent.steps == 12


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(tmp_path, way):
    """Without noise two processes end with the weights of one; with noise they agree with one another."""
    script = [sys.executable, "-m", "tests.defenses.dpsgd.ddp_script", str(tmp_path), way]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PL_GLOBAL_SEED", None)  # left by another test's seed_everything: it would seed the processes anew
    done = subprocess.run(
        script, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    for kind in ("plain", "noisy"):
        for name, weight in ranks[0][kind].items():
            assert torch.equal(weight, ranks[1][kind][name]), (kind, name)
    model = fresh(optimizer="sgd", lr=0.5)
    DPSGDMixin.attach(model, noise_multiplier=0, max_grad_norm=0.3, **WAYS[way])
    torch.manual_seed(1)
    trainer(accumulate_grad_batches=2).fit(model, loader(0, 96))
    assert ranks[0]["steps"] == model.privacy_spent.steps == 6
    if way == "adaptive":
        assert ranks[0]["plain clip norm"] == ranks[1]["plain clip norm"] == model.defense_state.ledger.clip_norm
        assert ranks[0]["noisy clip norm"] == ranks[1]["noisy clip norm"] != ranks[0]["plain clip norm"]
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(ranks[0]["plain"][name], weight, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ranks[0]["noisy"]["net.4.weight"], ranks[0]["plain"]["net.4.weight"], atol=1e-3)
