"""What DP-SGD has spent: accounting, budgets, and runs that resume."""

import math
from statistics import NormalDist

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from opacus.accountants import create_accountant

from lightning_cwrf import (
    GradientMaskCallback,
    WeightMask,
)
from lightning_cwrf.defenses import DPSGDMixin
from lightning_cwrf.defenses.dpsgd.ledger import Ledger
from tests.defenses.dpsgd.cases import Conv, fresh, wide_float
from tests.helpers import loader, trainer

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize(
    "settings",
    [
        {"target_epsilon": 3.0},
        {"noise_multiplier": 1.0, "ghost": True},
        {"noise_multiplier": 1.0, "clipping": "adaptive", "noise_gamma": 0.8},
    ],
)
@pytest.mark.parametrize("stop", ["epoch", "mid-epoch"])
def test_a_resumed_run_ends_as_one_without_a_break(tmp_path, settings, stop):
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
        ledger = model.defense_state.ledger
        ends.append((model.state_dict(), model.privacy_spent, ledger.clip_norm, ledger.accountant.history))
    assert ends[0][1:] == ends[1][1:]
    assert ends[0][1].steps == 24
    assert all(torch.equal(ends[0][0][n], w) for n, w in ends[1][0].items())


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


@pytest.mark.parametrize("mechanism", ["prv", "rdp"])
def test_steps_of_several_noises_are_composed(mechanism):
    ledger, expected = Ledger(mechanism), create_accountant(mechanism)
    for noise, steps in ((1.5, 4), (1.0, 3), (1.5, 2)):
        for _ in range(steps):
            ledger.record(noise, 0.1)
            expected.step(noise_multiplier=noise, sample_rate=0.1)
    assert ledger.accountant.history == [(1.5, 0.1, 4), (1.0, 0.1, 3), (1.5, 0.1, 2)]
    assert ledger.epsilon(1e-5) == expected.get_epsilon(1e-5)
    whole = Ledger(mechanism)
    assert whole.epsilon(1e-5, [(1.5, 0.1, 4), (1.0, 0.1, 3), (1.5, 0.1, 2)]) == ledger.epsilon(1e-5)
    noise = whole.noise_for(3.0, 1e-5, 0.1, [(1.0, 10), (0.5, 10)])
    assert 2.97 <= whole.epsilon(1e-5, [(noise, 0.1, 10), (noise / 2, 0.1, 10)]) <= 3.0


def test_gaussian_dp_composes_steps_of_several_noises():
    """μ² = Σ q² (exp(1/σ²) - 1) over the steps (Bu et al. 2020), and ε from μ (Dong et al. 2022, Corollary 1)."""
    ledger = Ledger("gdp")
    steps = [(1.5, 0.1)] * 4 + [(1.0, 0.2)] * 3
    for noise, rate in steps:
        ledger.record(noise, rate)
    mu = math.sqrt(sum(rate**2 * (math.exp(noise**-2) - 1) for noise, rate in steps))
    epsilon, normal = ledger.epsilon(1e-5), NormalDist()
    delta = normal.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * normal.cdf(-epsilon / mu - mu / 2)
    assert delta == pytest.approx(1e-5, rel=1e-6)
    assert ledger.epsilon(1e-5, [(1.0, 0.2, 5)]) > epsilon
    assert ledger.epsilon(1e-5, [(0.01, 0.2, 5)]) == math.inf


def test_prv_of_hardly_any_noise_is_the_bound_of_rdp():
    """PRV's grid would take terabytes."""
    assert Ledger("prv").epsilon(1e-5, [(1e-3, 0.1, 10)]) == Ledger("rdp").epsilon(1e-5, [(1e-3, 0.1, 10)]) > 1e5


def test_the_ledger_by_hand():
    ledger = Ledger("rdp")
    assert (ledger.epsilon(1e-5), ledger.steps) == (0.0, 0)
    ledger.record(1.0, 0.1)
    ledger.record(1.0, 0.1)
    expected = create_accountant("rdp")
    for _ in range(5):
        expected.step(noise_multiplier=1.0, sample_rate=0.1)
    assert ledger.steps == 2
    assert ledger.epsilon(1e-5, [(1.0, 0.1, 3)]) == expected.get_epsilon(1e-5)
    assert ledger.steps == 2  # looking ahead spends nothing
    assert ledger.epsilon(1e-5, [(0, 0.1, 1)]) == math.inf
    noise = ledger.noise_for(3.0, 1e-5, 0.1, [(1.0, 20)])
    assert 2.97 <= ledger.epsilon(1e-5, [(noise, 0.1, 20)]) <= 3.0
    again = Ledger("rdp")
    again.load_state_dict(ledger.state_dict())
    assert again.state_dict() == ledger.state_dict()
    assert Ledger("prv", earlier=ledger).steps == 2
    with pytest.raises(
        MisconfigurationException, match=r"no noise keeps 20 steps within target_epsilon=0\.1 .*is spent"
    ):
        ledger.noise_for(0.1, 1e-5, 0.1, [(1.0, 20)])
